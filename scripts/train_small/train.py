#!/usr/bin/env python3
"""Trains the small model and writes it as a checkpoint in the official format.

python scripts/train_small/train.py build/small models/small                  on a GPU, for 14 minutes
python scripts/train_small/train.py build/small models/small --cpu --seconds 86400

A run that was killed goes on with the same command. Needs the extra `train`.
"""

import argparse
import sys
import time
from pathlib import Path

import jax

from dsv4_jax.errors import EXIT_UNAVAILABLE, DSV4Error
from dsv4_jax.numerics import KVQUANT, OFFICIAL
from dsv4_jax.train.data import Level
from dsv4_jax.train.forward import Setting
from dsv4_jax.train.release import release
from dsv4_jax.train.run import train
from dsv4_jax.train.small import SMALL
from dsv4_jax.train.step import Phase

PHASES = (
    Phase(share=0.42, rows=64, tokens=512, recall=0.5, level=Level(), choose=False),
    Phase(share=0.26, rows=16, tokens=2048, recall=0.625, level=Level(), choose=True),
    Phase(share=0.32, rows=4, tokens=8192, recall=0.75, level=Level(), choose=True),
)
CPU_PHASES = (Phase(share=1, rows=12, tokens=128, recall=0.5, level=Level(items=6), choose=False),)
TOKENS = 3e8  # that a run is meant to see
CPU_TOKENS_A_SECOND = 1300  # measured on two cores


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="states and the loss curve go here")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--seconds", type=float, default=840, help="of training, compiling included")
    parser.add_argument("--peak", type=float, default=2e-3, help="the largest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="train on the CPU, on short texts")
    arguments = parser.parse_args()
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu and not arguments.cpu:
        print(
            f"error: no GPU found; two CPU cores would take {TOKENS / CPU_TOKENS_A_SECOND / 86400:.1f} days"
            " (--cpu --seconds N trains for as long as you like)",
            file=sys.stderr,
        )
        return EXIT_UNAVAILABLE
    setting = Setting(SMALL, KVQUANT if on_cpu else OFFICIAL, choose=False)
    try:
        state = train(
            arguments.run,
            setting,
            CPU_PHASES if on_cpu else PHASES,
            seconds=arguments.seconds,
            peak=arguments.peak,
            seed=arguments.seed,
        )
        release(arguments.checkpoint, SMALL, state.masters)
    except DSV4Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{arguments.checkpoint} after {int(state.step)} steps, {time.process_time():.0f} s of CPU time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
