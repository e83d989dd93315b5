"""`dsv4-jax plan`: what fits, before there is any device."""

import argparse
from pathlib import Path
from typing import Any

from dsv4_jax.cli.options import add_command, add_json, mesh_sizes
from dsv4_jax.cli.talk import show
from dsv4_jax.config import PRESETS, Config
from dsv4_jax.errors import EXIT_NO_MEMORY, OutputError
from dsv4_jax.numerics import PRESETS as NUMERICS
from dsv4_jax.plan import plan_memory
from dsv4_jax.sharding import DEFAULT_RULES, RULES


def add(commands: Any) -> None:
    """Adds the command."""
    command = add_command(
        commands,
        "plan",
        "what a model takes of each device's memory, and what fits beside it; needs no device",
        """
        dsv4-jax plan pro --mesh tp=16 --rules ep --slots 32 --max-len 32768
        dsv4-jax plan DeepSeek-V4-Flash --mesh tp=8 --device-gib 141 --json
        """,
    )
    command.add_argument("model", metavar="DIR|PRESET", help=f"a checkpoint folder, or {', '.join(PRESETS)}")
    command.add_argument("--mesh", type=mesh_sizes, default={}, metavar="tp=N,ep=N,dp=N")
    command.add_argument(
        "--rules", choices=list(RULES), default=DEFAULT_RULES, help="how it is split (default: %(default)s)"
    )
    command.add_argument("--device-gib", type=float, default=141, metavar="GIB", help="default: %(default)s")
    command.add_argument("--slots", type=int, default=32, metavar="N", help="requests under way together")
    command.add_argument("--max-len", type=int, default=32768, metavar="N", help="tokens of each at most")
    command.add_argument(
        "--numerics", choices=list(NUMERICS), default="official", help="default: %(default)s"
    )
    command.add_argument("--mtp", action="store_true", help="with the MTP head")
    command.add_argument("--svg", type=Path, metavar="FILE", help="draw it too")
    add_json(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """77 if it does not fit."""
    config = PRESETS.get(arguments.model) or Config.from_pretrained(arguments.model)
    sizes = arguments.mesh
    plan = plan_memory(
        config,
        (sizes.get("dp", 1), sizes.get("ep", 1), sizes.get("tp", 1)),
        RULES[arguments.rules],
        NUMERICS[arguments.numerics],
        slots=arguments.slots,
        max_len=arguments.max_len,
        device_nbytes=int(arguments.device_gib * 2**30),
        mtp=arguments.mtp,
    )
    if arguments.svg:
        try:
            arguments.svg.write_text(plan.svg())
        except OSError as error:
            raise OutputError(f"{arguments.svg} cannot be written: {error.strerror}") from None
    if arguments.json:
        show(plan.to_dict())
    else:
        print("\n".join(plan.lines()))
    return 0 if plan.fits else EXIT_NO_MEMORY
