"""`dsv4-jax warmup`: compiles ahead of time."""

import argparse
import time
from typing import Any

from dsv4_jax.cli.options import add_command, add_json, add_model, load_llm
from dsv4_jax.cli.talk import say, show
from dsv4_jax.compiles import count_compiles
from dsv4_jax.errors import RequestError


def add(commands: Any) -> None:
    """Adds the command."""
    command = add_command(
        commands,
        "warmup",
        "compile what `generate` will need for so many prompts of such lengths, and keep it",
        """
        dsv4-jax warmup CHECKPOINT --max-len 4096 --max-batch 16 --compile-cache programs
        dsv4-jax generate CHECKPOINT -p Hello --max-len 4096 --max-batch 16 --compile-cache programs
        """,
    )
    add_model(command)
    add_json(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Fills --compile-cache."""
    for option in ("max_len", "compile_cache"):
        if getattr(arguments, option) is None:
            raise RequestError(
                f"warmup needs --{option.replace('_', '-')}", hint="the one that generate gets"
            )
    llm = load_llm(arguments)
    started = time.perf_counter()
    with count_compiles() as compiles:
        llm.warm_up()
    seconds = time.perf_counter() - started
    if arguments.json:
        show({"programs": compiles.count, "seconds": seconds})
    say(f"{compiles.count} programs ready in {seconds:.1f} s")
    return 0
