"""One command, one exit code: results on stdout, talk on stderr, one line for what went wrong."""

import argparse
import os
import sys
import traceback
import warnings
from typing import NoReturn

import jax

from dsv4_jax.cli import bench, chat, convert, doctor, evaluate, generate, inspect, plan, ppl, warmup
from dsv4_jax.cli.processes import join
from dsv4_jax.cli.talk import complain, warn
from dsv4_jax.distributed import leave, lost_a_peer
from dsv4_jax.errors import (
    EXIT_INTERRUPTED,
    EXIT_UNEXPECTED,
    EXIT_USAGE,
    DistributedError,
    DSV4Error,
    MemoryPlanError,
)

# Each has `add`, which sets `run`.
COMMANDS = (inspect, plan, convert, warmup, generate, chat, evaluate, ppl, bench, doctor)

_EXAMPLES = """examples:
  dsv4-jax inspect CHECKPOINT
  dsv4-jax generate CHECKPOINT --prompt "The capital of Italy is" --max-tokens 32 --temperature 0
  dsv4-jax chat CHECKPOINT --thinking
  dsv4-jax COMMAND --help       options and examples of one command

exit codes: 0 ok, 1 a fault of ours, 2 usage, 65 bad data, 66 input missing, 69 device or peer unavailable,
70 not a finite number, 73 cannot write, 75 try again: what is done is kept, 77 out of memory, 130 Ctrl-C
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command and gives its exit code; the codes are those of `errors.py`."""
    arguments = _parser().parse_args(argv)
    warnings.showwarning = warn
    exit_code = _run(arguments)
    if exit_code and jax.distributed.is_initialized():
        leave(exit_code)  # the other processes end too, by themselves or because this one is gone
    return exit_code


def _run(arguments: argparse.Namespace) -> int:
    try:
        join(arguments)
        return arguments.run(arguments)
    except DSV4Error as error:
        return complain(str(error), error.exit_code)
    except KeyboardInterrupt:
        return complain("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of stdout has seen enough; keep Python from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if lost_a_peer(error):
            hint = "what is finished is written: run the same command again"
            return complain(f"another process is gone ({hint})", DistributedError.exit_code)
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            message = f"the device is out of memory: {str(error).splitlines()[0]}"
            hint = "dsv4-jax plan says what fits; a smaller --max-batch or --max-len takes less"
            return complain(f"{message} ({hint})", MemoryPlanError.exit_code)
        traceback.print_exc()
        return complain("this should not happen; please report it", EXIT_UNEXPECTED)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like everything else here."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dsv4-jax",
        description="DeepSeek-V4 in JAX.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
