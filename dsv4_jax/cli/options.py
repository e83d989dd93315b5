"""Options that several commands have, and what is made of them."""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any, get_args

import jax
from jax.sharding import Mesh

from dsv4_jax.chat import Effort
from dsv4_jax.checkpoint.fingerprint import fingerprint
from dsv4_jax.checkpoint.load import Verify
from dsv4_jax.cli.processes import add_processes
from dsv4_jax.distributed import agree, code_fingerprint
from dsv4_jax.errors import EXIT_USAGE, MemoryPlanError, OutputError, RequestError
from dsv4_jax.llm import LLM
from dsv4_jax.numerics import PRESETS
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.sharding import DEFAULT_RULES, RULES, make_mesh

CHECKPOINT_HELP = "folder in the official format"


def add_command(commands: Any, name: str, help: str, examples: str = "") -> argparse.ArgumentParser:
    """A command with its help and examples, one a line."""
    lines = "".join(f"  {line.strip()}\n" for line in examples.strip().splitlines())
    return commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=f"examples:\n{lines}" if lines else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_json(command: argparse.ArgumentParser, what: str = "one JSON object") -> None:
    """`--json`."""
    command.add_argument("--json", action="store_true", help=what)


def add_sampling(command: argparse.ArgumentParser) -> None:
    """What `sampling_of` reads."""
    defaults = SamplingParams()
    add = command.add_argument
    add("--max-tokens", type=int, default=defaults.max_tokens, metavar="N", help="default: %(default)s")
    add("--temperature", type=float, default=defaults.temperature, metavar="T", help="0: greedy")
    add("--top-k", type=int, default=defaults.top_k, metavar="K", help="0: off")
    add("--top-p", type=float, default=defaults.top_p, metavar="P")
    add("--min-p", type=float, default=defaults.min_p, metavar="P")
    for name in ("repetition", "presence", "frequency"):
        off = getattr(defaults, f"{name}_penalty")
        add(f"--{name}-penalty", type=float, default=off, metavar="X", help=f"{off:g}: off")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; may be given again")
    add("--seed", type=int, default=defaults.seed, metavar="S")
    add("--ignore-eos", action="store_true", help="go on past an end-of-sentence token")
    add("--logprobs", action="store_true", help="with --json, of every token")


def sampling_of(arguments: argparse.Namespace) -> SamplingParams:
    """Raises RequestError where a value is out of its range."""
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    return SamplingParams(**{name: getattr(arguments, name) for name in names if hasattr(arguments, name)})


def add_thinking(command: argparse.ArgumentParser) -> None:
    """How conversations are to be answered."""
    command.add_argument("--thinking", action="store_true", help="let the model think before it answers")
    command.add_argument(
        "--effort", choices=get_args(Effort), default="auto", help="how hard to think (default: %(default)s)"
    )


def add_model(command: argparse.ArgumentParser) -> None:
    """What `load_llm` reads."""
    command.add_argument("checkpoint", type=Path, help=CHECKPOINT_HELP)
    command.add_argument("--numerics", choices=list(PRESETS), default="official", help="default: %(default)s")
    command.add_argument(
        "--implementation",
        metavar="NAME|OP=NAME,...",
        help="reference, triton...: of all ops, or op by op (default: the fastest proven one that fits)",
    )
    command.add_argument(
        "--mesh", type=mesh_sizes, default={}, metavar="tp=N,ep=N,dp=N", help="spread it over so many devices"
    )
    command.add_argument(
        "--rules", choices=list(RULES), default=DEFAULT_RULES, help="how, on a mesh (default: %(default)s)"
    )
    command.add_argument("--max-len", type=int, metavar="N", help="tokens of prompt and answer together")
    command.add_argument("--max-batch", type=int, default=32, metavar="N", help="prompts that run together")
    command.add_argument(
        "--draft-tokens", type=int, default=0, metavar="K", help="let the MTP head draft K tokens a step"
    )
    command.add_argument(
        "--prefix-bytes",
        type=int,
        default=0,
        metavar="N",
        help="memory for the beginnings of prompts, which are then read once (default: none)",
    )
    command.add_argument(
        "--invariant",
        action="store_true",
        help="answers to the bit the same in any batch and, greedy, with any --draft-tokens; the price:"
        " docs/numerics.md. Goes with --max-len",
    )
    command.add_argument(
        "--verify",
        choices=get_args(Verify),
        default="header",
        help="values: look for NaN; full: hold a converted checkpoint against its sums",
    )
    command.add_argument(
        "--strict", action="store_true", help="refuse tensors that have no place in the model"
    )
    command.add_argument(
        "--compile-cache",
        type=Path,
        metavar="DIR",
        help="where compiled programs are kept (default: nowhere); a command finds those of warmup by the"
        " same --max-len, --max-batch, --draft-tokens, --prefix-bytes and --invariant",
    )
    add_processes(command)


# Of those options the ones that an answer depends on.
_ANSWER_OPTIONS = (
    *("numerics", "implementation", "mesh", "rules"),
    *("max_len", "max_batch", "draft_tokens", "invariant"),
)
# Those that may differ from one process to the other.
_OWN_OPTIONS = ("run", "coordinator", "num_processes", "process_id", "compile_cache")


def answer_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_model` that answers depend on, as JSON takes them."""
    return {name: getattr(arguments, name) for name in _ANSWER_OPTIONS}


def mesh_sizes(text: str) -> dict[str, int]:
    """tp=2,ep=4 as a dict."""
    sizes = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        if name not in ("tp", "ep", "dp") or not number.isdecimal() or int(number) < 1:
            raise argparse.ArgumentTypeError(f"{part!r} is not tp=N, ep=N or dp=N with N at least 1")
        sizes[name] = int(number)
    return sizes


def load_llm(arguments: argparse.Namespace) -> LLM:
    """The model that the options of `add_model` describe.

    Raises:
      DistributedError: of several processes one has other options, files or code.
    """
    keep_programs(arguments.compile_cache)
    if jax.process_count() > 1:
        options = {name: each for name, each in vars(arguments).items() if name not in _OWN_OPTIONS}
        agree(
            {
                "code": code_fingerprint(),
                "options": json.dumps(options, sort_keys=True, default=str),
                "checkpoint": fingerprint(arguments.checkpoint),
            }
        )
    return LLM.from_pretrained(
        arguments.checkpoint,
        numerics=PRESETS[arguments.numerics],
        implementation=arguments.implementation,
        mesh=_mesh(arguments.mesh),
        rules=arguments.rules,
        verify=arguments.verify,
        strict=arguments.strict,
        progress=sys.stderr.isatty(),
        max_len=arguments.max_len,
        max_batch=arguments.max_batch,
        draft_tokens=arguments.draft_tokens,
        prefix_bytes=arguments.prefix_bytes,
        invariant=arguments.invariant,
    )


def _mesh(sizes: dict[str, int]) -> Mesh | None:
    """The mesh of these sizes; of several processes all devices are in it, or some would stand idle."""
    if not sizes and jax.process_count() == 1:
        return None
    mesh = make_mesh(sizes.get("dp", 1), sizes.get("ep", 1), sizes.get("tp", 1))
    if mesh.size < jax.device_count() and jax.process_count() > 1:
        raise MemoryPlanError(
            f"--mesh of {mesh.size} devices leaves {jax.device_count() - mesh.size} of"
            f" {jax.device_count()} in {jax.process_count()} processes idle",
            hint="name all of them, as in --mesh tp=8,ep=2 for 16",
            exit_code=EXIT_USAGE,
        )
    return mesh


def keep_programs(folder: Path | None) -> None:
    """Lets compiled programs and kernels be read from this folder, and written there."""
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"--compile-cache {folder}: {error.strerror}", hint="name a folder") from None
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def token_list(text: str) -> list[int]:
    """--tokens 1,2,3 as a list.

    Raises:
      RequestError: it is something else.
    """
    try:
        return [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        raise RequestError(
            f"--tokens {text!r} is not a list of integers", hint="as in --tokens 1,2,3"
        ) from None
