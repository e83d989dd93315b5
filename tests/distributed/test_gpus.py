"""Two GPUs of one machine: the logits and tokens of one, in one process and in two with a GPU each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from test_invariance import (
    assert_same_drafted,
    assert_same_logits,
    drafted,
    drafted_on_one_device,
    greedy_logits,
    on_one_device,
)
from test_processes import free_port

from dsv4_jax.checkpoint.load import load
from dsv4_jax.sharding import make_mesh

__all__ = ["drafted_on_one_device", "on_one_device"]  # fixtures

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu" or jax.device_count() < 2, reason="needs two GPUs"),
]
MESHES = [
    ("tp", 1, 1, 2),
    ("ep", 1, 2, 1),
    ("tp+ep", 2, 1, 1),
    ("dp-attention", 1, 2, 1),
    ("context", 1, 1, 2),
]


@pytest.fixture(autouse=True)
def float32_products(request):
    """Not TF32: so small a difference is asked for."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize(("rules", "dp", "ep", "tp"), MESHES)
def test_two_gpus_give_the_logits_of_one(rules, dp, ep, tp, wide, on_one_device):
    logits = greedy_logits(load(wide, mesh=make_mesh(dp, ep, tp), rules=rules))
    print(f"{rules} dp={dp} ep={ep} tp={tp}: max |d logit| {np.abs(logits - on_one_device).max():.1e}")

    assert_same_logits(logits, on_one_device)


@pytest.mark.parametrize(("rules", "dp", "ep", "tp"), MESHES)
def test_two_gpus_draw_and_draft_what_one_does(rules, dp, ep, tp, wide, drafted_on_one_device):
    model = load(wide, mtp=True, mesh=make_mesh(dp, ep, tp), rules=rules)

    assert_same_drafted(drafted(model), drafted_on_one_device)


def generating(wide: Path, gpus: str, *arguments: str) -> subprocess.Popen[str]:
    command = ["-m", "dsv4_jax", "generate", wide, "--tokens", "5,6,7,8", "--max-tokens", "8", "--json"]
    command += ["--temperature", "0", "--numerics", "plain", *arguments]
    environment = {"CUDA_VISIBLE_DEVICES": gpus, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_with_a_gpu_each_give_the_tokens_of_one(wide):
    by_hand = ("--mesh", "tp=2", "--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2")
    processes = [generating(wide, str(i), *by_hand, "--process-id", str(i)) for i in range(2)]
    processes += [generating(wide, "0,1", "--mesh", "tp=2"), generating(wide, "0")]
    answers = []
    for process in processes:
        out, said = process.communicate(timeout=200)
        assert process.returncode == 0, said
        answers.append(out)

    assert answers[1] == ""  # only the first prints
    first, _, one_process, one_gpu = (
        [json.loads(line)["token_ids"] for line in each.splitlines()] for each in answers
    )
    assert first == one_process == one_gpu
