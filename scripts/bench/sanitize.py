#!/usr/bin/env python3
"""Runs the kernels' GPU tests under compute-sanitizer: accesses out of bounds, or races.

Every array is an allocation of its own here, so that a kernel that leaves one leaves what is allocated.
Kernels that XLA makes are left out: one of its scatters reads the bytes behind an array. Each file of tests
has a process of its own. It runs a case of each test, one at an edge if there is one, then another of each,
until its time is up. Exit code 9 if the sanitizer found something, else that of the first file that failed.

  python scripts/bench/sanitize.py
  python scripts/bench/sanitize.py --processes 4 --seconds 60
  python scripts/bench/sanitize.py --plant    a kernel that writes past its output: must exit with 9
  python scripts/bench/sanitize.py --tool racecheck --match "tokens=17" tests/kernels/test_expert_mlp.py
  python scripts/bench/sanitize.py --dry      no sanitizer and no GPU: only lists the tests
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import triton
import triton.language as tl

from pallas_kernels.triton_call import triton_call

ROOT = Path(__file__).resolve().parents[2]

# No tokens, one, few, one more than a tile; experts without tokens; sizes that are no multiple of anything.
EDGES = r"tokens=(0|1|3|17|129)\b|edge|empty|no_token|nothing|odd|ragged"
FOUND = 9
MOST_SECONDS = 280  # of a file

BY_XLA = "fusion", "wrapped"  # in the names of its kernels
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    # Of the allocators that ask the driver for each buffer, the one by which it sees where a buffer ends.
    "XLA_PYTHON_CLIENT_ALLOCATOR": "cuda_async",
    # Autotuning runs products many times; graphs hide which kernel was at fault.
    "XLA_FLAGS": "--xla_gpu_autotune_level=0 --xla_gpu_enable_command_buffer=",
}


@triton.jit
def _past_its_end(out, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(out + place, place)
    tl.store(out + SIZE + place, place)


class Edges:
    """A pytest plugin: keeps the tests that match, takes the functions in turn, stops when time is up."""

    def __init__(self, match: str, seconds: float):
        self.match, self.deadline = re.compile(match), time.monotonic() + seconds

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept = [item for item in items if item.get_closest_marker("gpu") and self.match.search(item.nodeid)]
        seen: dict[str, int] = {}
        turns = []
        for item in sorted(kept, key=lambda item: re.search(EDGES, item.nodeid) is None):
            function = item.nodeid.partition("[")[0]
            seen[function] = turn = seen.get(function, -1) + 1
            turns.append((turn, item))
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for _, item in sorted(turns, key=lambda each: each[0])]

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if time.monotonic() > self.deadline:
            pytest.skip("out of time")


def sanitized(file: Path, options: list[str], tool: str) -> tuple[int, str]:
    """The exit code of a file's tests, 0 if none of them is for a GPU, and what there was to read."""
    # Errors of API calls are left out: JAX asks the driver for functions that it need not have.
    sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND)]
    sanitizer += ["--target-processes", "all"]
    for name in BY_XLA:
        sanitizer += ["--kernel-name-exclude", f"kernel_substring={name}"]
    sanitizer += ["--report-api-errors", "no"] if tool == "memcheck" else []
    flags = f"{ENVIRONMENT['XLA_FLAGS']} {os.environ.get('XLA_FLAGS', '')}"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | ENVIRONMENT | {"XLA_FLAGS": flags, "PYTHONPATH": path}
    command = [*sanitizer, sys.executable, __file__, "--inside", *options, str(file)]
    run = subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said = run.communicate(timeout=MOST_SECONDS)[0]
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)  # the sanitizer leaves what it runs behind
        return 124, run.communicate()[0]
    if re.search(r"^=+ (no tests|\d+ deselected)", said, re.MULTILINE):
        return 0, ""
    return run.returncode, said


def files_in(places: list[str]) -> list[Path]:
    found = [Path(place) for place in places]
    return [
        file for place in found for file in (sorted(place.glob("test_*.py")) if place.is_dir() else [place])
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tests", nargs="*", default=["tests/kernels"], help="files or folders")
    parser.add_argument("--tool", choices=["memcheck", "racecheck", "initcheck"], default="memcheck")
    parser.add_argument("--match", default="", help="a regular expression: names of the tests to run")
    parser.add_argument("--seconds", type=float, default=100, help="start no further test after so long")
    parser.add_argument("--processes", type=int, default=1, help="files at a time")
    parser.add_argument("--dry", action="store_true", help="only list the tests")
    parser.add_argument("--plant", action="store_true", help="run a faulty kernel in place of the tests")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside and arguments.plant:
        whole = jax.ShapeDtypeStruct((256,), jnp.int32)
        jax.block_until_ready(triton_call(_past_its_end, out=whole, grid=(1,), SIZE=256))
        return 0
    if arguments.inside or arguments.dry:
        options = f"-m gpu -v -rs --rootdir {ROOT} -p no:cacheprovider -p no:xdist".split()
        options += ["--collect-only"] if arguments.dry else []
        return pytest.main([*options, *arguments.tests], [Edges(arguments.match, arguments.seconds)])
    if not shutil.which("compute-sanitizer"):
        print("error: no compute-sanitizer on the PATH; it comes with the CUDA toolkit", file=sys.stderr)
        return 69
    options = ["--match", arguments.match, "--seconds", str(arguments.seconds)]
    options += ["--plant"] if arguments.plant else []
    files = [Path(__file__)] if arguments.plant else files_in(arguments.tests)
    worst = 0
    with ThreadPoolExecutor(arguments.processes) as pool:
        for file, (code, said) in zip(
            files, pool.map(lambda file: sanitized(file, options, arguments.tool), files), strict=True
        ):
            counts = re.findall(r"\d+ (?:passed|failed|error)", said) + re.findall(r"ERROR SUMMARY: .*", said)
            print(f"{file}: exit code {code}, {', '.join(counts) or 'nothing ran'}", flush=True)
            if code:
                print(said[-4000:], flush=True)
            worst = code if code == FOUND or not worst else worst
    return worst


if __name__ == "__main__":
    sys.exit(main())
