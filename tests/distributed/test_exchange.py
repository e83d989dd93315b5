"""What devices tell each other, op by op: the same numbers as on one device, whatever the worst case."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import parallel
from dsv4_jax.nn import context, expert_parallel
from dsv4_jax.nn.expert_parallel import on_owners
from dsv4_jax.parallel import Along, spread
from dsv4_jax.sampling import SamplingArrays, SamplingParams, sample
from dsv4_jax.sharding import make_mesh, on_mesh
from pallas_kernels import compressed_entries, empty_index_keys, index_select

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

BATCH, EXPERTS, CHOICES = 48, 16, 3


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Experts.


def routings() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    random = np.stack([rng.permutation(EXPERTS)[:CHOICES] for _ in range(BATCH)])
    return {
        "at random": random,
        "all to the first experts": np.tile(np.arange(CHOICES), (BATCH, 1)),
        "all to the last device": np.tile(EXPERTS - 1 - np.arange(CHOICES), (BATCH, 1)),
        "each to three devices": np.tile([0, 5, 10], (BATCH, 1)),
        "one device sends all, the others at random": np.where(
            np.arange(BATCH)[:, None] < 12, 7 + 0 * random, random
        ),
    }


def answer(x, experts, weights, scale):
    """What stands for the experts: each multiplies by its scale; the number of `scale` stands for none."""
    own = jnp.append(scale, 0.0)[jnp.minimum(experts, scale.shape[0])]
    return x.astype(jnp.float32) * (weights * own).sum(1, keepdims=True)


def routed(x, experts, weights, scale):
    run = functools.partial(answer, scale=scale)
    term = on_owners(run, x, experts, weights, scale.shape[0])
    return parallel.total_of_terms((term, ("experts",)), apart_from="batch")


@pytest.mark.parametrize("capacity", [1000, 1], ids=["in one round", "in many rounds"])
@pytest.mark.parametrize("rules", ["ep", "tp+ep", "dp-attention"])
@pytest.mark.parametrize("routing", routings())
def test_every_token_reaches_all_its_experts(routing, rules, capacity, monkeypatch):
    monkeypatch.setattr(expert_parallel, "CAPACITY", capacity)
    experts = routings()[routing].astype(np.int32)
    x, weights, scale = random(BATCH, 4), random(BATCH, CHOICES, seed=2), random(EXPERTS, seed=3)

    with on_mesh(make_mesh(ep=4, tp=2), rules):
        rows = Along("batch")
        along = rows, rows, rows, Along("experts")
        found = jax.jit(lambda *each: spread(routed, (), list(zip(each, along, strict=True)), rows))(
            x, experts, weights, scale
        )

    np.testing.assert_allclose(found, answer(x, experts, weights, scale), rtol=1e-5, atol=1e-6)


# Text in parts.


@pytest.mark.parametrize("top_k", [4, 12])
def test_the_best_entries_of_a_text_in_parts_are_those_of_the_whole(top_k):
    rng = np.random.default_rng(0)
    # Small integers: scores are exact, and many are equal.
    q, keys, weights = (
        rng.integers(-1, 2, size).astype(np.float32) for size in ((2, 5, 4, 8), (2, 64, 8), (2, 5, 4))
    )
    visible = np.array([[0, 1, 7, 40, 64], [64, 3, 8, 9, 33]], np.int32)
    entries = random(2, 64, 4)

    def choose(q, keys, weights, visible, entries):
        chosen = context.select(q, keys, weights, visible, top_k)
        rows, place = context.borrow(entries, chosen)
        found = jnp.take_along_axis(rows, jnp.maximum(place, 0).reshape(2, -1, 1), axis=1)
        return chosen, jnp.where(place[..., None] >= 0, found.reshape(*place.shape, -1), 0)

    with on_mesh(make_mesh(ep=2, tp=4), "context"):
        part, whole = Along(None, "cache_slots"), Along()
        along = whole, part, whole, whole, part
        chosen, found = jax.jit(lambda *each: spread(choose, (), list(zip(each, along, strict=True)), whole))(
            q, keys, weights, visible, entries
        )

    expected = np.asarray(index_select(q, keys, weights, visible, top_k))
    np.testing.assert_array_equal(chosen, expected)
    rows = np.take_along_axis(entries, np.maximum(expected, 0).reshape(2, -1, 1), 1).reshape(
        *expected.shape, -1
    )
    np.testing.assert_array_equal(found, np.where(expected[..., None] >= 0, rows, 0))


# Sampling.

PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(seed=1),
    SamplingParams(top_k=1, seed=2),
    SamplingParams(top_k=50, seed=3),
    SamplingParams(top_p=0.5, seed=4),
    SamplingParams(min_p=0.2, seed=5),
    SamplingParams(temperature=3.0, top_k=200, top_p=0.9, min_p=0.001, seed=6),
    SamplingParams(top_p=1e-9, seed=7),
]


@pytest.mark.parametrize("ties", [False, True], ids=["all different", "many equal"])
def test_a_vocabulary_in_parts_gives_the_tokens_of_the_whole(ties):
    logits = 3 * random(len(PARAMS), 512)
    logits = np.round(logits) if ties else logits
    arguments = logits, SamplingArrays.stack(PARAMS), jnp.zeros(len(PARAMS), jnp.int32)
    expected = sample(*arguments)

    with on_mesh(make_mesh(ep=2, tp=4)):
        tokens, logprobs = jax.jit(sample)(*arguments)

    np.testing.assert_array_equal(tokens, expected[0])
    np.testing.assert_allclose(logprobs, expected[1], rtol=0, atol=1e-5)


def test_sampling_sends_no_logits():
    logits = jax.ShapeDtypeStruct((4, 4096), jnp.float32)
    asked = SamplingArrays.stack([SamplingParams(top_k=5, top_p=0.9, seed=1)] * 4)

    with on_mesh(make_mesh(ep=2, tp=4)) as _:
        text = jax.jit(sample).lower(logits, asked, jnp.zeros(4, jnp.int32)).compile().as_text()

    assert "all-reduce" in text
    assert not [line for line in text.splitlines() if "all-gather" in line and "4096" in line]


@pytest.mark.parametrize("draft", [0, 3])
def test_entries_are_written_where_their_slots_are(draft):
    rng = np.random.default_rng(0)
    position, length = np.array([0, 5, 41, 118], np.int32), np.array([9, 8, 3, 6], np.int32)
    tokens, width, ratio, slots = 9, 64, 4, 32
    projected = rng.normal(size=(4, tokens, 4 * width)).astype(np.float32)
    ape, norm = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((ratio, 2 * width), width))
    rings = jnp.asarray(rng.normal(size=(2, 4, 2 * ratio + draft, 2 * width)), jnp.float32)
    entries = empty_index_keys(4, slots, width, "fp4_group32", jnp.float32)
    count = -(-tokens // ratio)
    cos, sin = rng.normal(size=(2, 4, count, 16)).astype(np.float32)
    settings = {"column": 0, "eps": 1e-6, "for_index": True, "format": "fp4_group32", "dtype": jnp.float32}

    def compress(entries, position):
        kept = projected, ape, entries, *rings, position, length, norm, cos, sin
        return compressed_entries(*kept, **settings)

    def in_parts(entries):
        sizes = {"ratio": ratio, "count": count, "period": math.lcm(ratio, 2 * ratio + draft)}
        return context.write(compress, entries, position, length, **sizes)

    with on_mesh(make_mesh(ep=2, tp=4), "context"):
        part, whole = Along(None, "cache_slots"), Along()
        found = jax.jit(lambda entries: spread(in_parts, (), ((entries, part),), (part, whole, whole)))(
            entries
        )

    jax.tree.map(np.testing.assert_array_equal, found, jax.jit(compress)(entries, position))
