"""Two processes with four devices each, as on two hosts: what one process with eight does, bit for bit."""

import contextlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import worker

from dsv4_jax.checkpoint.load import as_stored
from dsv4_jax.checkpoint.names import parameters
from dsv4_jax.config import Config
from dsv4_jax.sharding import RULES, Placement, make_mesh, placements
from dsv4_jax.weight_files import WeightFiles

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(*arguments: str | Path, devices: int = 4) -> subprocess.Popen[str]:
    """A process with its own devices on a CPU."""
    flags = re.sub(r"\S*device_count=\d+", "", os.environ["XLA_FLAGS"])
    environment = {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}"}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def together(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes did, and what this one did alone."""
    pair, alone = (tmp_path_factory.mktemp(name) for name in ("pair", "alone"))
    coordinator = f"127.0.0.1:{free_port()}"
    processes = [start(worker.__file__, wide, pair, coordinator, "2", str(number)) for number in range(2)]
    expected = worker.run(wide, alone)
    for process in processes:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    found = [json.loads((pair / f"process-{number}.json").read_text()) for number in range(2)]
    return {"found": found, "expected": expected, "pair": pair, "alone": alone}


@pytest.mark.parametrize("layout", range(len(worker.LAYOUTS)), ids=["experts", "columns", "copies"])
def test_both_processes_together_load_what_one_does(together, layout):
    first, second = (each["loads"][layout]["parts"] for each in together["found"])

    assert {**first, **second} == together["expected"]["loads"][layout]["parts"]


@pytest.mark.parametrize("layout", range(len(worker.LAYOUTS)), ids=["experts", "columns", "copies"])
def test_a_process_reads_the_bytes_of_its_own_devices_once_and_no_other(together, layout, wide):
    sizes, rules = worker.LAYOUTS[layout]
    mesh, config = make_mesh(*sizes), Config.from_pretrained(wide)
    needed, whole_rows = np.zeros(2, int), 0
    with WeightFiles.open(wide) as files:
        stored = [as_stored(each, files) for each in parameters(config, mtp=True)]
    for each in stored:
        places = placements(config, mesh, RULES[rules], each.axes, each.value)
        places = jax.tree.leaves(places, is_leaf=lambda place: isinstance(place, Placement))
        for place, leaf in zip(places, jax.tree.leaves(each.value), strict=True):
            width = 8 if each.entry.stored == "I64" else leaf.dtype.itemsize
            indices = place.sharding.devices_indices_map(place.shape)
            own = [{place.source(indices[device]) for device in half} for half in halves(jax.devices())]
            columns = {range(place.shape[-1])[indices[device][-1]] for device in jax.devices()[:4]}
            if leaf.ndim > 1 and sum(map(len, columns)) < place.shape[-1] and place.pieces == 1:
                # Each reads half of the rows, and devices exchange columns; or all, if they are too few.
                few = leaf.shape[-2] % 8 > 0
                needed += math.prod(leaf.shape) * width // (1 if few else 2)
                whole_rows += few * math.prod(leaf.shape) * width
            else:
                needed += [sum(math.prod(map(len, part)) for part in half) * width for half in own]

    assert [each["loads"][layout]["nbytes"] for each in together["found"]] == needed.tolist()
    assert whole_rows < 1e-4 * sum(needed)


def halves(devices: list[jax.Device]) -> tuple[list[jax.Device], list[jax.Device]]:
    return devices[:4], devices[4:8]


def test_both_processes_generate_what_one_does_to_the_bit(together):
    for each in together["found"]:
        assert each["answers"] == together["expected"]["answers"]


def test_a_file_of_answers_is_the_same_to_the_byte(together):
    found, expected = ((together[name] / "answers.jsonl").read_bytes() for name in ("pair", "alone"))

    assert found == expected
    assert found.count(b"\n") == len(worker.PROMPTS)


def test_what_two_processes_convert_is_what_one_does_and_is_restored_on_another_mesh(together):
    manifests = [(together[name] / "converted" / "manifest.json").read_text() for name in ("pair", "alone")]
    first, second = (each["restored"] for each in together["found"])

    assert manifests[0] == manifests[1]
    assert {**first, **second} == together["expected"]["loads"][2]["parts"]


# What goes wrong.


def generate(wide: Path, *arguments: str, devices: int = 4) -> subprocess.Popen[str]:
    common = ("--tokens", "1,2,3", "--max-tokens", "2", "--numerics", "plain", "--mesh", "dp=4,tp=2")
    return start("-m", "dsv4_jax", "generate", wide, *common, *arguments, devices=devices)


def pair_of(
    wide: Path, *arguments: str, each: tuple[tuple[str, ...], ...] = ((), ())
) -> list[subprocess.Popen]:
    by_hand = ("--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2")
    return [generate(wide, *by_hand, "--process-id", str(i), *arguments, *own) for i, own in enumerate(each)]


def ended(process: subprocess.Popen[str], timeout: float = 120) -> tuple[int, str, list[str]]:
    """Exit code, stdout, and those lines of stderr that are ours."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, [line for line in err.splitlines() if line.startswith("error:")]


def test_a_coordinator_that_is_down_is_told_within_ten_seconds(wide):
    begin = time.monotonic()
    process = generate(
        wide, "--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-id", "1"
    )
    code, out, errors = ended(process)

    assert time.monotonic() - begin < 10 + 10 * (
        os.getloadavg()[0] > 3
    )  # importing takes a while on a busy machine
    assert (code, out) == (69, "")
    assert len(errors) == 1
    assert "does not answer: Connection refused (is process 0 running there" in errors[0]


def test_processes_that_differ_stop_before_they_compile_and_say_in_what(wide):
    processes = pair_of(wide, each=(("--seed", "1"), ("--seed", "2")))

    for process in processes:
        code, out, errors = ended(process)
        assert (code, out) == (69, "")
        assert errors == [
            "error: process 1 differs from process 0 in its options"
            " (all processes must run the same command on the same files)"
        ]


@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_process_ends_the_other_and_what_is_finished_stays(killed, wide, tmp_path):
    finished, prompts = tmp_path / "answers.jsonl", tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": 1, "tokens": [1, 2, 3]}\n')
    finished.write_text("")
    processes = pair_of(wide, "--heartbeat-timeout", "4")
    with killing(processes):
        assert processes[0].stderr is not None
        while "generating" not in (line := processes[0].stderr.readline()):
            assert line, "process 0 ended"
        begin = time.monotonic()
        processes[killed].send_signal(signal.SIGKILL)
        code, out, errors = ended(processes[1 - killed])

    assert (code, out) == (69, "")
    assert len(errors) == 1
    assert "is gone (what is finished is written: run the same command again)" in errors[0]
    assert time.monotonic() - begin < 60


@contextlib.contextmanager
def killing(processes: list[subprocess.Popen[str]]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
