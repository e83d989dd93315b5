"""`dsv4-jax convert`: an official checkpoint folder to an orbax checkpoint."""

import argparse
import sys
from pathlib import Path
from typing import Any

from dsv4_jax.checkpoint.convert import convert
from dsv4_jax.checkpoint.converted import verify_files
from dsv4_jax.cli.options import CHECKPOINT_HELP, add_command, add_json
from dsv4_jax.cli.talk import say, show


def add(commands: Any) -> None:
    """Adds the command."""
    command = add_command(
        commands,
        "convert",
        "write a checkpoint anew, so that any mesh restores it and any flipped bit is found",
        """
        dsv4-jax convert DeepSeek-V4-Flash flash-converted
        dsv4-jax convert DeepSeek-V4-Flash flash-converted --verify full

        interrupted, the same command goes on where it was; all commands take the result as a checkpoint.
        """,
    )
    command.add_argument("checkpoint", type=Path, help=CHECKPOINT_HELP)
    command.add_argument("output", type=Path, help="folder to write")
    command.add_argument("--overwrite", action="store_true", help="remove what the folder holds")
    command.add_argument(
        "--verify", choices=["header", "full"], default="header", help="full: hold it against its sums again"
    )
    add_json(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Converts, or goes on."""
    out = convert(
        arguments.checkpoint, arguments.output, overwrite=arguments.overwrite, progress=sys.stderr.isatty()
    )
    verified = verify_files(out) if arguments.verify == "full" else None
    if arguments.json:
        show({"output": str(out), "verified_nbytes": verified})
    say(f"{out} written" + (f", {verified:,} bytes verified" if verified is not None else ""))
    return 0
