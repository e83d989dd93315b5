"""The whole model against the official implementation: every array of expected.npz."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

CHECKPOINTS = ["tiny-fp4", "tiny-fp8"]
DATA = Path(__file__).parents[1] / "data"
DECODE_STEPS = 40


def reference_keys(checkpoint: str) -> list[str]:
    with np.load(DATA / checkpoint / "expected.npz", allow_pickle=False) as archive:
        return [key for key in archive.files if not key.startswith(("in/", "info/"))]


@pytest.fixture(scope="module")
def outputs(load_golden, dump_outputs) -> Callable[[str, str], dict[str, np.ndarray]]:
    """What our model gives for the keys that begin with a word, computed once."""

    @functools.cache
    def of_mode(checkpoint: str, mode: str) -> dict[str, np.ndarray]:
        loaded, inputs = load_golden(checkpoint).loaded, load_golden(checkpoint).expected
        if mode == "plain":
            return dump_outputs.plain(loaded, inputs, DECODE_STEPS)
        if mode == "kvquant":
            return dump_outputs.kvquant(loaded, inputs)
        return dump_outputs.greedy(loaded, {mode: inputs[f"in/{mode}/prompt"]})

    return of_mode


@pytest.mark.parametrize(
    ("checkpoint", "key"),
    [(checkpoint, key) for checkpoint in CHECKPOINTS for key in reference_keys(checkpoint)],
)
def test_the_model_gives_what_the_official_one_gives(checkpoint, key, load_golden, outputs):
    found = outputs(checkpoint, key.split("/")[0])

    load_golden(checkpoint).assert_agrees(key, found[key])


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_every_reference_array_is_tested(checkpoint, outputs):
    keys = reference_keys(checkpoint)

    found = [key for mode in {key.split("/")[0] for key in keys} for key in outputs(checkpoint, mode)]

    assert sorted(found) == sorted(keys)
