"""`dsv4-jax generate`: continues prompts, one or a file of them."""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import dsv4_jax.batch as batch
from dsv4_jax.answers import GenerationOutput
from dsv4_jax.checkpoint.fingerprint import fingerprint
from dsv4_jax.cli.options import (
    add_command,
    add_json,
    add_model,
    add_sampling,
    add_thinking,
    answer_options,
    load_llm,
    sampling_of,
    token_list,
)
from dsv4_jax.cli.talk import peak_gib, say, show
from dsv4_jax.compiles import count_compiles
from dsv4_jax.distributed import first_reads
from dsv4_jax.errors import DSV4Error, NumericError, RequestError
from dsv4_jax.llm import LLM
from dsv4_jax.prompts import PromptRow, read_prompts
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.stops import AnswerText


def add(commands: Any) -> None:
    """Adds the command."""
    command = add_command(
        commands,
        "generate",
        "continue prompts",
        """
        dsv4-jax generate CHECKPOINT --prompt "The capital of Italy is" --max-tokens 32 --temperature 0
        dsv4-jax generate CHECKPOINT --tokens 0,128803,19923 --json
        dsv4-jax generate CHECKPOINT -i prompts.jsonl -o answers.jsonl --mesh tp=4,ep=2

        a line of prompts.jsonl is {"id": ..., "prompt": "text"}, {"id": ..., "tokens": [1, 2]} or
        {"id": ..., "messages": [{"role": "user", "content": "text"}]}; it may also set max_tokens,
        temperature, top_k, top_p, min_p, seed, ignore_eos and stop for itself, and with messages tools,
        thinking and effort. The same command goes on with answers.jsonl where it was interrupted.
        """,
    )
    prompts = command.add_mutually_exclusive_group(required=True)
    prompts.add_argument("-p", "--prompt", help="a text, taken raw: no chat template")
    prompts.add_argument("--tokens", help="token ids, separated by commas")
    prompts.add_argument("-i", "--input", type=Path, metavar="JSONL", help="one prompt a line")
    command.add_argument("-o", "--output", type=Path, metavar="JSONL", help="answers to -i (default: stdout)")
    command.add_argument(
        "--skip-bad", action="store_true", help="leave lines of -i that cannot be served out"
    )
    add_sampling(command)
    add_thinking(command)
    add_json(command, "one JSON object per prompt")
    add_model(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Answers, to stdout or to a file."""
    if arguments.output and not arguments.input:
        raise RequestError("-o goes with -i", hint="without -i the answer is printed")
    if arguments.skip_bad and not arguments.input:
        raise RequestError("--skip-bad goes with -i")
    defaults = sampling_of(arguments)
    rows = [PromptRow(**each) for each in first_reads(lambda: _told_rows(arguments))]
    llm = load_llm(arguments)
    rows, requests = _served(arguments, llm, rows, defaults)
    if arguments.compile_cache and arguments.max_len:
        llm.warm_up()  # the shapes that `warmup` compiled
    say("generating; the first batch of a new shape is compiled first")
    broken: list[str] = []
    with _Statistics() as statistics:
        if arguments.output:
            _to_file(arguments, llm, rows, requests, statistics, broken)
        elif arguments.json or arguments.input:
            _to_stdout(llm, rows, requests, statistics, broken)
        else:
            _as_text(llm, *requests[0], statistics, broken)
    say(statistics.line())
    if broken:
        raise NumericError(f"logits of request {', '.join(broken)} were not finite numbers")
    return 0


def _told_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What is asked for, once it is sure that it can be answered."""
    rows = [dataclasses.asdict(row) for row in _rows(arguments)]
    if arguments.output:
        batch.check_output(arguments.output)
    return rows


def _rows(arguments: argparse.Namespace) -> list[PromptRow]:
    if arguments.input:
        rows = read_prompts(arguments.input, _skipped if arguments.skip_bad else None)
        how = {"thinking": arguments.thinking, "effort": arguments.effort}
        return [dataclasses.replace(row, chat=how | row.chat) if _is_chat(row) else row for row in rows]
    if arguments.prompt is not None:
        return [PromptRow(id=0, prompt=arguments.prompt, overrides={}, where="--prompt")]
    return [PromptRow(id=0, prompt=token_list(arguments.tokens), overrides={}, where="--tokens")]


def _is_chat(row: PromptRow) -> bool:
    return isinstance(row.prompt, list) and isinstance(row.prompt[0], dict)


def _served(
    arguments: argparse.Namespace, llm: LLM, rows: list[PromptRow], defaults: SamplingParams
) -> tuple[list[PromptRow], list[batch.Request]]:
    """The rows that can be served, with what they ask; the others are refused, or left out if so asked."""
    kept, requests = [], []
    for row, request in zip(rows, batch.requests_of(llm, rows, defaults), strict=True):
        if not isinstance(request, DSV4Error):
            kept.append(row)
            requests.append(request)
        elif arguments.skip_bad:
            _skipped(request)
        else:
            raise request
    if not kept:
        raise RequestError(f"{arguments.input}: no line can be served")
    return kept, requests


def _skipped(error: DSV4Error) -> None:
    say(f"warning: skipped: {error}")


def _to_file(
    arguments: argparse.Namespace,
    llm: LLM,
    rows: Sequence[PromptRow],
    requests: Sequence[batch.Request],
    statistics: "_Statistics",
    broken: list[str],
) -> None:
    def watch(place: int, row: batch.Row, output: GenerationOutput) -> None:
        statistics.add(output)

    identity = {"model": fingerprint(arguments.checkpoint), **answer_options(arguments)}
    identity["sampling"] = dataclasses.asdict(sampling_of(arguments))
    answers, new = batch.answer_to_file(llm, rows, requests, arguments.output, identity, watch)
    broken += [_told(row["id"], len(row["token_ids"])) for row in answers if row["finish_reason"] == "error"]
    kept = f", {len(answers) - new} were there" if new < len(answers) else ""
    say(f"{new} answers written to {arguments.output}{kept}")


def _to_stdout(
    llm: LLM,
    rows: Sequence[PromptRow],
    requests: Sequence[batch.Request],
    statistics: "_Statistics",
    broken: list[str],
) -> None:
    for place, output in batch.answer(llm, requests, [False] * len(requests)):
        statistics.add(output)
        if jax.process_index() == 0:
            sha = batch.prompt_sha(output.prompt_token_ids)
            timings = dataclasses.asdict(output.timings) | {
                "tokens_per_second": output.timings.tokens_per_second,
                "first_token_seconds": output.first_token_seconds,
                "request_seconds": output.seconds,
            }
            show(batch.row_of(rows[place], requests[place][1], sha, output) | {"timings": timings})
        if output.finish_reason == "error":
            broken.append(_told(rows[place].id, len(output.token_ids)))


def _as_text(
    llm: LLM, ids: list[int], sampling: SamplingParams, statistics: "_Statistics", broken: list[str]
) -> None:
    """Prints one answer as it comes; token ids where there is no tokenizer."""
    text = AnswerText(llm.tokenizer, sampling.stop) if llm.tokenizer else None
    count = 0
    for event in llm.stream(ids, sampling):
        shown = text.put(event.token_ids) if text else _ids(event.token_ids, first=count == 0)
        count += len(event.token_ids)
        statistics.drafted += len(event.stood) * llm.draft_tokens
        statistics.accepted += event.accepted
        if jax.process_index() == 0:
            print(shown, end="", flush=True)
        if event.finish_reason == "error":
            broken.append(_told(0, count))
    statistics.tokens += count
    if jax.process_index() == 0:
        print(text.end() if text else "")


def _ids(token_ids: Sequence[int], *, first: bool) -> str:
    listed = ",".join(map(str, token_ids))
    return f",{listed}" if listed and not first else listed


def _told(id: str | int, count: int) -> str:
    return f"{id} (after {count} tokens)"


class _Statistics:
    """Of the answers in a `with` block."""

    def __init__(self):
        self.tokens = self.drafted = self.accepted = 0
        self._seconds = 0.0
        self._compiling = count_compiles()

    def __enter__(self) -> "_Statistics":
        self._started = time.perf_counter()
        self._compiles = self._compiling.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._compiling.__exit__(*error)
        self._seconds = time.perf_counter() - self._started

    def add(self, output: GenerationOutput) -> None:
        self.tokens += len(output.token_ids)
        self.drafted += output.drafted
        self.accepted += output.accepted

    def line(self) -> str:
        """All of it in one line; the rate leaves compiling out."""
        compile_seconds = min(self._compiles.seconds, self._seconds)
        running = self._seconds - compile_seconds
        return (
            f"{self.tokens} tokens in {running:.2f} s, {self.tokens / max(running, 1e-9):.1f} tok/s"
            + (f" | {self.accepted} of {self.drafted} drafts stood" if self.drafted else "")
            + f" | {self._compiles.count} programs compiled in {compile_seconds:.1f} s"
            f" | peak {peak_gib():.2f} GiB"
        )
