"""The whole model against the official implementation: every array of expected.npz."""

import functools
import os
import re
import subprocess
import sys
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


@pytest.mark.gpu
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_gpu_gives_what_the_official_model_gives(checkpoint, load_golden, outputs):
    golden = load_golden(checkpoint)

    for key in reference_keys(checkpoint):
        if mode(key) != "kvquant":
            golden.assert_agrees(key, outputs(checkpoint, mode(key))[key])
