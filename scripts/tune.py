#!/usr/bin/env python3
"""Finds the fastest tiles of the matrix products on this machine's GPU and writes them into the package.

Every candidate is checked against the definition before it may win. The tables are JSON by kind of chip
(`pallas_kernels/*/tuned.json`); a chip that is not in them runs on rules that hold for all.

  python scripts/tune.py                  both ops, some five minutes
  python scripts/tune.py --ops expert_mlp
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "block_matmul": [[]],
    "expert_mlp": [[], ["--activation", "none"], ["--weights", "fp8", "--tokens", "1", "32", "512"]],
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", nargs="*", choices=list(COMMANDS), default=list(COMMANDS))
    arguments = parser.parse_args()
    for op in arguments.ops:
        table = ROOT / "pallas_kernels" / op / "tuned.json"
        for options in COMMANDS[op]:
            bench = [sys.executable, str(ROOT / "scripts" / "bench" / f"{op}.py"), "--tune", *options]
            subprocess.run([*bench, "--tiles-out", str(table)], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
