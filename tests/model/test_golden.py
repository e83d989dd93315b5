"""The whole model against the official implementation: every array of expected.npz."""

import functools
import re
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


def mode(key: str) -> str:
    """What computes a key: "plain", "kvquant", or "greedy" for greedy37 and the like."""
    return re.sub(r"\d+$", "", key.split("/")[0])


@pytest.fixture(scope="module")
def outputs(load_golden, dump_outputs) -> Callable[[str, str], dict[str, np.ndarray]]:
    """What our model gives for the keys of a mode, computed once."""

    @functools.cache
    def of_mode(checkpoint: str, mode: str) -> dict[str, np.ndarray]:
        loaded, inputs = load_golden(checkpoint).loaded, load_golden(checkpoint).expected
        if mode == "plain":
            return dump_outputs.plain(loaded, inputs, DECODE_STEPS)
        if mode == "kvquant":
            return dump_outputs.kvquant(loaded, inputs)
        names = [match[1] for key in inputs if (match := re.fullmatch(r"in/(greedy\d+)/prompt", key))]
        return dump_outputs.greedy(loaded, {name: inputs[f"in/{name}/prompt"] for name in names})

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
