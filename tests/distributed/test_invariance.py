"""The model spread over eight made-up devices: same logits and tokens, whatever the mesh and the rules.

A few meshes every time; every mesh under every table of rules, with drafts, in the slow test.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from dsv4_jax.cache import make_cache
from dsv4_jax.checkpoint.load import LoadedModel, load
from dsv4_jax.decode import Requests
from dsv4_jax.generate import decode_step, generate, prefill
from dsv4_jax.numerics import PLAIN
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.sharding import RULES, make_mesh, on_mesh

CLOSE = 1e-4  # in logits of size 8, sums of which a mesh adds up in another order
STEPS, MAX_LEN = 3, 64
LENGTH = np.array([19, 7, 30, 12], np.int32)
MESHES = ["1x1x1", "1x2x1", "1x1x2", "1x1x4", "1x2x2", "1x4x2", "2x2x2", "4x1x2"]  # dp x ep x tp

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")


def mesh_of(sizes: str) -> jax.sharding.Mesh:
    return make_mesh(*map(int, sizes.split("x")))


def prompts(model: LoadedModel) -> np.ndarray:
    size = len(LENGTH), int(LENGTH.max())
    return np.random.default_rng(0).integers(2, model.config.vocab_size, size, dtype=np.int32)


def greedy_logits(model: LoadedModel) -> np.ndarray:
    """Logits after the prompts, then after each greedy token: [step, row, vocab]."""
    static = model.config, PLAIN, model.params
    with on_mesh(model.mesh, model.rules):
        cache = make_cache(model.config, PLAIN, batch=len(LENGTH), max_len=MAX_LEN)
        logits, cache = prefill(*static, prompts(model), np.zeros_like(LENGTH), LENGTH, cache)
        rows = [np.asarray(logits)]
        for step in range(STEPS):
            token = rows[-1].argmax(-1).astype(np.int32)
            logits, cache = decode_step(*static, token, LENGTH + step, cache)
            rows.append(np.asarray(logits))
    return np.stack(rows)


def drafted(model: LoadedModel) -> dict[str, np.ndarray]:
    """What two rows that are greedy and two that draw get with two drafts a step."""
    greedy = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    drawn = dataclasses.replace(greedy, temperature=6.0, top_k=400, top_p=0.95, seed=3)
    with on_mesh(model.mesh, model.rules):
        found = generate(
            *(model.config, PLAIN, model.params, prompts(model), LENGTH),
            Requests.stack([greedy, greedy, drawn, drawn]),
            max_new=6,
            max_len=MAX_LEN,
            mtp_params=model.mtp_params,
            draft_tokens=2,
        )
        return {name: np.asarray(getattr(found, name)) for name in ("tokens", "logprobs", "accepted")}


def assert_same_logits(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE)
    np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))


def assert_same_drafted(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    np.testing.assert_array_equal(found["tokens"], expected["tokens"])
    np.testing.assert_array_equal(found["accepted"], expected["accepted"])
    np.testing.assert_allclose(found["logprobs"], expected["logprobs"], rtol=0, atol=CLOSE)


@pytest.fixture(scope="module")
def on_one_device(wide: Path) -> np.ndarray:
    return greedy_logits(load(wide))


@pytest.fixture(scope="module")
def drafted_on_one_device(wide: Path) -> dict[str, np.ndarray]:
    found = drafted(load(wide, mtp=True))
    assert found["accepted"].sum() > 0  # or nothing would be shown of drafts that stand
    return found


@pytest.mark.parametrize(
    ("rules", "sizes"),
    [
        pytest.param("tp", "1x1x4", id="everything in four, three blocks of experts among them"),
        pytest.param("context", "1x2x2", id="the text in four"),
        pytest.param("dp-attention", "1x4x2", id="tokens that travel to their experts"),
        pytest.param("tp+ep", "2x2x2", id="all axes", marks=pytest.mark.slow),  # quick with drafts, below
    ],
)
def test_a_mesh_gives_the_logits_and_greedy_tokens_of_one_device(rules, sizes, wide, on_one_device):
    assert_same_logits(greedy_logits(load(wide, mesh=mesh_of(sizes), rules=rules)), on_one_device)


def test_a_mesh_draws_and_drafts_what_one_device_does(wide, drafted_on_one_device):
    model = load(wide, mtp=True, mesh=mesh_of("2x2x2"), rules="tp+ep")

    assert_same_drafted(drafted(model), drafted_on_one_device)


@pytest.mark.slow
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("sizes", MESHES)
def test_every_table_of_rules_on_every_mesh(rules, sizes, wide, on_one_device, drafted_on_one_device):
    model = load(wide, mtp=True, mesh=mesh_of(sizes), rules=rules)
    logits, found = greedy_logits(model), drafted(model)
    worst = np.abs(logits - on_one_device).max()
    print(f"{rules} {sizes}: max |d logit| {worst:.1e}, {found['accepted'].sum()} drafts stood")

    assert_same_logits(logits, on_one_device)
    assert_same_drafted(found, drafted_on_one_device)
