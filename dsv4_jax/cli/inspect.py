"""`dsv4-jax inspect`: what a checkpoint folder holds."""

import argparse
from pathlib import Path
from typing import Any

from dsv4_jax.checkpoint.inspect import inspect_checkpoint
from dsv4_jax.cli.options import CHECKPOINT_HELP, add_command, add_json
from dsv4_jax.cli.talk import show
from dsv4_jax.errors import EXIT_BAD_DATA


def add(commands: Any) -> None:
    """Adds the command."""
    command = add_command(
        commands,
        "inspect",
        "what a checkpoint folder holds, read from its headers",
        """
        dsv4-jax inspect DeepSeek-V4-Flash
        dsv4-jax inspect DeepSeek-V4-Flash --json
        """,
    )
    command.add_argument("checkpoint", type=Path, help=CHECKPOINT_HELP)
    add_json(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """65 if the folder does not hold what its config needs."""
    report = inspect_checkpoint(arguments.checkpoint)
    if arguments.json:
        show(report.to_dict())
    else:
        print("\n".join(report.lines()))
    return 0 if report.ok else EXIT_BAD_DATA
