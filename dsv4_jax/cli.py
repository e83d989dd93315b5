"""The command line: results on stdout, talk and progress on stderr, one line for what went wrong."""

import argparse
import dataclasses
import json
import os
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax

from dsv4_jax.checkpoint.inspect import inspect_checkpoint
from dsv4_jax.compiles import count_compiles
from dsv4_jax.errors import (
    EXIT_BAD_DATA,
    EXIT_INTERRUPTED,
    EXIT_UNEXPECTED,
    EXIT_USAGE,
    DSV4Error,
    MemoryPlanError,
    NumericError,
    OutputError,
    RequestError,
)
from dsv4_jax.llm import LLM, GenerationOutput
from dsv4_jax.numerics import PRESETS
from dsv4_jax.prompts import PromptRow, read_prompts, write_rows
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.sharding import make_mesh

_EXAMPLES = """examples:
  dsv4-jax inspect CHECKPOINT
  dsv4-jax generate CHECKPOINT --prompt "The capital of Italy is" --max-tokens 32 --temperature 0
  dsv4-jax generate CHECKPOINT --tokens 0,128803,19923 --json
  dsv4-jax generate CHECKPOINT -i prompts.jsonl -o answers.jsonl --mesh tp=4,ep=2
  dsv4-jax warmup CHECKPOINT --max-len 4096 --max-batch 16 --compile-cache programs

a line of prompts.jsonl is {"id": ..., "prompt": "text"} or {"id": ..., "tokens": [1, 2]}; it may also set
max_tokens, temperature, top_k, top_p, min_p, seed and ignore_eos for itself.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command and gives its exit code; the codes are those of `errors.py`."""
    arguments = _parser().parse_args(argv)
    warnings.showwarning = _warn
    try:
        return arguments.run(arguments)
    except DSV4Error as error:
        return _complain(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _complain("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of stdout has seen enough; keep Python from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        message = str(error).splitlines()[0]
        return _complain(f"the device is out of memory: {message}", MemoryPlanError.exit_code)
    except Exception:
        traceback.print_exc()
        return _complain("this should not happen; please report it", EXIT_UNEXPECTED)


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

    inspect = commands.add_parser("inspect", help="what a checkpoint folder holds, read from its headers")
    inspect.add_argument("checkpoint", type=Path, help="folder in the official format")
    inspect.add_argument("--json", action="store_true", help="one JSON object")
    inspect.set_defaults(run=_inspect)

    generate = commands.add_parser("generate", help="continue prompts")
    generate.add_argument("checkpoint", type=Path, help="folder in the official format")
    prompts = generate.add_mutually_exclusive_group(required=True)
    prompts.add_argument("-p", "--prompt", help="a text, taken raw: no chat template")
    prompts.add_argument("--tokens", help="token ids, separated by commas")
    prompts.add_argument("-i", "--input", type=Path, metavar="JSONL", help="one prompt a line")
    generate.add_argument(
        "-o", "--output", type=Path, metavar="JSONL", help="answers to -i (default: stdout)"
    )
    defaults = SamplingParams()
    generate.add_argument("--max-tokens", type=int, default=defaults.max_tokens, metavar="N")
    generate.add_argument(
        "--temperature", type=float, default=defaults.temperature, metavar="T", help="0: greedy"
    )
    generate.add_argument("--top-k", type=int, default=defaults.top_k, metavar="K", help="0: off")
    generate.add_argument("--top-p", type=float, default=defaults.top_p, metavar="P")
    generate.add_argument("--min-p", type=float, default=defaults.min_p, metavar="P")
    generate.add_argument("--seed", type=int, default=defaults.seed, metavar="S")
    generate.add_argument("--ignore-eos", action="store_true", help="go on past an end-of-sentence token")
    generate.add_argument("--logprobs", action="store_true", help="with --json, of every token")
    generate.add_argument("--json", action="store_true", help="one JSON object per prompt")
    _add_model(generate)
    generate.set_defaults(run=_generate)

    warmup = commands.add_parser(
        "warmup", help="compile what `generate` will need for so many prompts of such lengths, and keep it"
    )
    warmup.add_argument("checkpoint", type=Path, help="folder in the official format")
    _add_model(warmup)
    warmup.set_defaults(run=_warmup)
    return parser


def _add_model(command: argparse.ArgumentParser) -> None:
    """What `_load` reads."""
    command.add_argument("--numerics", choices=list(PRESETS), default="official", help="default: %(default)s")
    command.add_argument(
        "--implementation",
        metavar="NAME|OP=NAME,...",
        help="reference, triton...: of all ops, or op by op (default: the fastest proven one that fits)",
    )
    command.add_argument("--mesh", type=_mesh_sizes, default={}, metavar="tp=N,ep=N,dp=N")
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
        "--verify", choices=["header", "values"], default="header", help="values: look for NaN"
    )
    command.add_argument(
        "--strict", action="store_true", help="refuse tensors that have no place in the model"
    )
    command.add_argument(
        "--compile-cache",
        type=Path,
        metavar="DIR",
        help="where compiled programs are kept (default: nowhere); generate finds those of warmup by the same"
        " --max-len, --max-batch, --draft-tokens, --prefix-bytes and --invariant",
    )


def _keep_programs(folder: Path | None) -> None:
    """Lets JAX read compiled programs from this folder, and write them there."""
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"--compile-cache {folder}: {error.strerror}", hint="name a folder") from None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _mesh_sizes(text: str) -> dict[str, int]:
    """tp=2,ep=4 as a dict."""
    sizes = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        if name not in ("tp", "ep", "dp") or not number.isdecimal() or int(number) < 1:
            raise argparse.ArgumentTypeError(f"{part!r} is not tp=N, ep=N or dp=N with N at least 1")
        sizes[name] = int(number)
    return sizes


def _inspect(arguments: argparse.Namespace) -> int:
    report = inspect_checkpoint(arguments.checkpoint)
    print(json.dumps(report.to_dict()) if arguments.json else "\n".join(report.lines()))
    return 0 if report.ok else EXIT_BAD_DATA


def _generate(arguments: argparse.Namespace) -> int:
    if arguments.output and not arguments.input:
        raise RequestError("-o goes with -i", hint="without -i the answer is printed")
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    defaults = SamplingParams(**{name: getattr(arguments, name) for name in names})
    rows = _rows(arguments)
    sampling = [row.sampling(defaults) for row in rows]
    outputs: list[GenerationOutput] = []

    def answers() -> Iterator[dict[str, Any]]:
        outputs.extend(_outputs(arguments, rows, sampling))
        for row, params, output in zip(rows, sampling, outputs, strict=True):
            yield _answer(row, params, output)

    if arguments.output:
        write_rows(arguments.output, answers())
        _say(f"{len(outputs)} answers written to {arguments.output}")
    elif arguments.json or arguments.input:
        for answer in answers():
            print(json.dumps(answer, ensure_ascii=False))
    else:
        (answer,) = answers()
        print(answer["text"] if answer["text"] is not None else ",".join(map(str, answer["token_ids"])))
    _say(_statistics(outputs))
    broken = [
        f"{row.id} (after {len(output.token_ids)} tokens)"
        for row, output in zip(rows, outputs, strict=True)
        if output.finish_reason == "error"
    ]
    if broken:
        raise NumericError(f"logits of request {', '.join(broken)} were not finite numbers")
    return 0


def _warmup(arguments: argparse.Namespace) -> int:
    for option in ("max_len", "compile_cache"):
        if getattr(arguments, option) is None:
            raise RequestError(
                f"warmup needs --{option.replace('_', '-')}", hint="the one that generate gets"
            )
    llm = _load(arguments)
    started = time.perf_counter()
    with count_compiles() as compiles:
        llm.warm_up()
    _say(f"{compiles.count} programs ready in {time.perf_counter() - started:.1f} s")
    return 0


def _outputs(
    arguments: argparse.Namespace, rows: list[PromptRow], sampling: list[SamplingParams]
) -> list[GenerationOutput]:
    """Loads the model and answers."""
    llm = _load(arguments)
    if arguments.compile_cache and arguments.max_len:
        llm.warm_up()  # the shapes that `warmup` compiled
    _say("generating; the first batch of a new shape is compiled first")
    return llm.generate([row.prompt for row in rows], sampling, names=[row.where for row in rows])


def _load(arguments: argparse.Namespace) -> LLM:
    _keep_programs(arguments.compile_cache)
    return LLM.from_pretrained(
        arguments.checkpoint,
        numerics=PRESETS[arguments.numerics],
        implementation=arguments.implementation,
        mesh=make_mesh(**arguments.mesh) if arguments.mesh else None,
        verify=arguments.verify,
        strict=arguments.strict,
        progress=sys.stderr.isatty(),
        max_len=arguments.max_len,
        max_batch=arguments.max_batch,
        draft_tokens=arguments.draft_tokens,
        prefix_bytes=arguments.prefix_bytes,
        invariant=arguments.invariant,
    )


def _rows(arguments: argparse.Namespace) -> list[PromptRow]:
    if arguments.input:
        return read_prompts(arguments.input)
    if arguments.prompt is not None:
        return [PromptRow(id=0, prompt=arguments.prompt, overrides={}, where="--prompt")]
    try:
        ids = [int(part) for part in arguments.tokens.split(",")] if arguments.tokens.strip() else []
    except ValueError:
        raise RequestError(
            f"--tokens {arguments.tokens!r} is not a list of integers", hint="as in --tokens 1,2,3"
        ) from None
    return [PromptRow(id=0, prompt=ids, overrides={}, where="--tokens")]


def _answer(row: PromptRow, sampling: SamplingParams, output: GenerationOutput) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "id": row.id,
        "token_ids": output.token_ids,
        "text": output.text,
        "finish_reason": output.finish_reason,
        "prompt_tokens": len(output.prompt_token_ids),
        "logprob_sum": output.logprob_sum,
        "seed": sampling.seed,
    }
    if output.logprobs is not None:
        answer["logprobs"] = output.logprobs
    if output.drafted:
        answer |= {"drafted": output.drafted, "accepted": output.accepted}
    timings = dataclasses.asdict(output.timings)
    return answer | {"timings": timings | {"tokens_per_second": output.timings.tokens_per_second}}


def _statistics(outputs: list[GenerationOutput]) -> str:
    batches = {id(output.timings): output.timings for output in outputs}.values()
    tokens, seconds = sum(each.tokens for each in batches), sum(each.seconds for each in batches)
    compile_seconds = sum(each.compile_seconds for each in batches)
    rate = tokens / max(seconds - compile_seconds, 1e-9)
    drafted, accepted = sum(each.drafted for each in outputs), sum(each.accepted for each in outputs)
    return (
        f"{tokens} tokens in {seconds - compile_seconds:.2f} s, {rate:.1f} tok/s"
        + (f" | {accepted} of {drafted} drafts stood" if drafted else "")
        + f" | {sum(each.compiles for each in batches)} programs compiled in {compile_seconds:.1f} s"
        f" | peak {_peak_gib():.2f} GiB"
    )


def _peak_gib() -> float:
    """Of the busiest device where it says so, else of this process."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    return (max(peaks) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**30


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _complain(message: str, exit_code: int) -> int:
    _say(f"error: {message}")
    return exit_code


def _warn(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    _say(f"warning: {message}")
