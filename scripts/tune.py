#!/usr/bin/env python3
"""Finds the fastest tiles of the matrix products on this machine's GPU and writes them into the package.

Every candidate is checked against the definition before it may win. The tables are JSON by kind of chip
(`pallas_kernels/*/tuned*.json`); a chip that is not in them runs on rules that hold for all.

  python scripts/tune.py                  both ops, some five minutes
  python scripts/tune.py --ops expert_mlp
"""

import argparse
import subprocess
import sys
from pathlib import Path

from pallas_kernels import current_target

ROOT = Path(__file__).parent.parent
# By op: the benchmark that tries candidates, its options, and the table that it writes.
COMMANDS = {
    "block_matmul": [("block_matmul", ["--tune"], "tuned.json")],
    "expert_mlp": [
        ("expert_mlp", ["--tune", *options], "tuned.json")
        for options in ([], ["--activation", "none"], ["--weights", "fp8", "--tokens", "1", "32", "512"])
    ],
}
# As well, on Hopper.
MOSAIC = {"block_matmul": [("block_matmul_mosaic", ["--sweep"], "tuned_mosaic.json")]}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", nargs="*", choices=list(COMMANDS), default=list(COMMANDS))
    arguments = parser.parse_args()
    for op in arguments.ops:
        mosaic = MOSAIC.get(op, []) if current_target().arch == "sm_90" else []
        for bench, options, table in [*COMMANDS[op], *mosaic]:
            command = [sys.executable, str(ROOT / "scripts" / "bench" / f"{bench}.py"), *options]
            path = ROOT / "pallas_kernels" / op / table
            subprocess.run([*command, "--tiles-out", str(path)], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
