"""The whole model against the official implementation: every array of expected.npz."""

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv4_jax.cache import LayerCache
from dsv4_jax.model import declare
from dsv4_jax.numerics import KVQUANT
from pallas_kernels.dispatch import choose

CHECKPOINTS = ["tiny-fp4", "tiny-fp8"]
DATA = Path(__file__).parents[1] / "data"
DECODE_STEPS = 40


def reference_keys(checkpoint: str) -> list[str]:
    with np.load(DATA / checkpoint / "expected.npz", allow_pickle=False) as archive:
        return [key for key in archive.files if not key.startswith(("in/", "info/"))]


def mode(key: str) -> str:
    """What computes a key: "plain", "kvquant", or "greedy" for greedy37 and the like."""
    return re.sub(r"\d+$", "", key.split("/")[0])


def kvquant(checkpoint: str, folder: Path) -> dict[str, np.ndarray]:
    """The outputs of `scripts/dump_outputs.py`, compiled as users compile and not as tests do.

    Rounding to the formats of the cache makes a step of a last bit now and then, and what the compiler is
    told to leave out moves last bits: with the tests' flags more rows flip on some CPUs than the tolerances
    allow.
    """
    out = folder / f"{checkpoint}.npz"
    script, data = DATA.parents[1] / "scripts" / "dump_outputs.py", DATA / checkpoint
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, script, data, data / "expected.npz", out, "--numerics", "kvquant"]
    subprocess.run(command, env=environment, check=True)
    with np.load(out, allow_pickle=False) as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def outputs(load_golden, dump_outputs, tmp_path_factory) -> Callable[[str, str], dict[str, np.ndarray]]:
    """What our model gives for the keys of a mode, computed once."""

    @functools.cache
    def of_mode(checkpoint: str, mode: str) -> dict[str, np.ndarray]:
        loaded, inputs = load_golden(checkpoint).loaded, load_golden(checkpoint).expected
        if mode == "plain":
            return dump_outputs.plain(loaded, inputs, DECODE_STEPS)
        if mode == "kvquant":
            return kvquant(checkpoint, tmp_path_factory.mktemp("kvquant"))
        names = [match[1] for key in inputs if (match := re.fullmatch(r"in/(greedy\d+)/prompt", key))]
        prompts = {name: inputs[f"in/{name}/prompt"] for name in names}
        total = inputs["in/plain/input_ids"].shape[1]
        return dump_outputs.greedy(loaded, prompts, like=(total - DECODE_STEPS, total))

    return of_mode


@pytest.mark.parametrize(
    ("checkpoint", "key"),
    [(checkpoint, key) for checkpoint in CHECKPOINTS for key in reference_keys(checkpoint)],
)
def test_the_model_gives_what_the_official_one_gives(checkpoint, key, load_golden, outputs):
    found = outputs(checkpoint, mode(key))

    load_golden(checkpoint).assert_agrees(key, found[key])


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_every_reference_array_is_tested(checkpoint, outputs):
    keys = reference_keys(checkpoint)

    found = [key for each in {mode(key) for key in keys} for key in outputs(checkpoint, each)]

    assert sorted(found) == sorted(keys)


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_the_kernels_of_a_gpu_give_what_the_official_model_gives(checkpoint, load_golden, dump_outputs):
    golden = load_golden(checkpoint)
    loaded, inputs = golden.loaded, golden.expected
    names = [match[1] for key in inputs if (match := re.fullmatch(r"in/(greedy\d+)/prompt", key))]

    with choose("triton"):
        found = dump_outputs.plain(loaded, inputs, DECODE_STEPS)
        found |= dump_outputs.kvquant(loaded, inputs)
        found |= dump_outputs.greedy(loaded, {name: inputs[f"in/{name}/prompt"] for name in names})

    assert sorted(found) == sorted(reference_keys(checkpoint))
    off = []
    for key, array in found.items():
        try:
            golden.assert_agrees(key, array)
        except AssertionError as error:
            off.append(f"{key}: {error}")
    assert not off, "\n".join(off)


@pytest.mark.gpu
@pytest.mark.parametrize("layer", [0, 1, 2], ids=["SWA", "CSA", "HCA"])
def test_attention_of_the_golden_checkpoints_runs_on_kernels(layer, tiny_fp4):
    from pallas_kernels.triton_call import launches

    config, params = tiny_fp4.loaded.config, tiny_fp4.loaded.params["layers"][layer]["attn"]
    graphdef, _ = nnx.split(declare(config, KVQUANT).layers[layer].attn)
    ratio = config.main_ratios[layer]
    cache = LayerCache.zeros(config, KVQUANT, ratio, batch=1, max_len=64, max_draft=0)
    x, position = jnp.zeros((1, 1, config.hidden_size)), jnp.zeros(1, jnp.int32)

    def attend(params, x, position, cache):
        return nnx.merge(graphdef, params)(x, position, position + 1, cache)

    with choose("sparse_attention=triton"):
        kernels = {launch.kernel.__name__ for launch in launches(attend, params, x, position, cache)}
    assert kernels & {"_whole", "_split"}
