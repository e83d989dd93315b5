"""Options of commands that run in several processes, one on each host."""

import argparse
import os
import sys

from dsv4_jax.cli.talk import say
from dsv4_jax.distributed import HEARTBEAT_SECONDS, PATIENCE, init_distributed

_HELP = "the same command in every process; docs/multihost.md"


def add_processes(command: argparse.ArgumentParser) -> None:
    """What `join` reads."""
    group = command.add_argument_group("several processes", _HELP)
    add = group.add_argument
    add("--distributed", action="store_true", help="as SLURM, Open MPI, Kubernetes or JAX_* variables say")
    add("--coordinator", metavar="HOST:PORT", help="by hand: where process 0 listens")
    add("--num-processes", type=int, metavar="N")
    add("--process-id", type=int, metavar="I", help="0 to N - 1")
    add(
        "--coordinator-timeout",
        type=float,
        default=PATIENCE,
        metavar="S",
        help="seconds to wait for process 0 to listen (default: %(default)s)",
    )
    add(
        "--heartbeat-timeout",
        type=int,
        default=HEARTBEAT_SECONDS,
        metavar="S",
        help="seconds after which a silent process counts as gone, and the others end (default: %(default)s)",
    )


def join(arguments: argparse.Namespace) -> None:
    """Joins the other processes, if this command is to run in several.

    Raises:
      DistributedError: see `init_distributed`.
    """
    by_hand = (getattr(arguments, name, None) for name in ("coordinator", "num_processes", "process_id"))
    if not getattr(arguments, "distributed", False) and all(each is None for each in by_hand):
        return
    _keep_stdout_for_results()
    init_distributed(
        arguments.coordinator,
        arguments.num_processes,
        arguments.process_id,
        patience=arguments.coordinator_timeout,
        heartbeat_seconds=arguments.heartbeat_timeout,
        say=say,
    )


def _keep_stdout_for_results() -> None:
    """Sends what libraries in C write to stdout to stderr: Python alone writes results."""
    sys.stdout.flush()
    results = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(results, "w", buffering=1)
