#!/usr/bin/env python3
"""Runs the kernels' GPU tests at their edges under compute-sanitizer: accesses out of bounds, or races.

Every array is an allocation of its own here, so that a kernel that leaves one leaves what is allocated.
Kernels that XLA makes are left out: one of its scatters reads the bytes behind an array. Exit code 9 if the
sanitizer found something, pytest's own if a test failed, 5 if none ran.

  python scripts/bench/sanitize.py
  python scripts/bench/sanitize.py --plant    a kernel that writes past its output: must exit with 9
  python scripts/bench/sanitize.py --tool racecheck --match "tokens=17" tests/kernels/test_expert_mlp.py
  python scripts/bench/sanitize.py --dry      no sanitizer and no GPU: only lists the tests
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
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
        for item in kept:
            function = item.nodeid.partition("[")[0]
            seen[function] = turn = seen.get(function, -1) + 1
            turns.append((turn, item))
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for _, item in sorted(turns, key=lambda each: each[0])]

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if time.monotonic() > self.deadline:
            pytest.skip("out of time")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tests", nargs="*", default=["tests/kernels"], help="files or folders")
    parser.add_argument("--tool", choices=["memcheck", "racecheck", "initcheck"], default="memcheck")
    parser.add_argument("--match", default=EDGES, help="a regular expression: names of the tests to run")
    parser.add_argument("--seconds", type=float, default=100, help="start no further test after so long")
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
    # Errors of API calls are left out: JAX asks the driver for functions that it need not have.
    sanitizer = ["compute-sanitizer", "--tool", arguments.tool, "--error-exitcode", str(FOUND)]
    sanitizer += ["--target-processes", "all"]
    for name in BY_XLA:
        sanitizer += ["--kernel-name-exclude", f"kernel_substring={name}"]
    sanitizer += ["--report-api-errors", "no"] if arguments.tool == "memcheck" else []
    command = [*sanitizer, sys.executable, __file__, "--inside", *sys.argv[1:]]
    flags = f"{ENVIRONMENT['XLA_FLAGS']} {os.environ.get('XLA_FLAGS', '')}"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | ENVIRONMENT | {"XLA_FLAGS": flags, "PYTHONPATH": path}
    return subprocess.run(command, env=environment, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
