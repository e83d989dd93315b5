"""`dsv4-jax bench`: how fast this machine reads prompts and writes answers."""

import argparse
import time
from typing import Any

import jax
import numpy as np

from dsv4_jax.cli.options import add_command, add_json, add_model, load_llm
from dsv4_jax.cli.talk import peak_gib, say, show
from dsv4_jax.compiles import count_compiles
from dsv4_jax.errors import RequestError
from dsv4_jax.evaluation.environment import describe
from dsv4_jax.llm import LLM
from dsv4_jax.sampling import SamplingParams

_SHOWN = ("first_token_seconds", "prompt_tokens_per_second", "new_tokens_per_second")


def add(commands: Any) -> None:
    """Adds the command."""
    command = add_command(
        commands,
        "bench",
        "how fast prompts are read and answers written, by random tokens",
        """
        dsv4-jax bench CHECKPOINT --prompt-tokens 512 --new-tokens 128 --batch 1,8,32
        dsv4-jax bench CHECKPOINT --batch 1 --draft-tokens 1 --json
        """,
    )
    command.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="default: %(default)s")
    command.add_argument("--new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    command.add_argument(
        "--batch", default="1", metavar="N,N", help="requests together (default: %(default)s)"
    )
    command.add_argument("--repeats", type=int, default=3, metavar="N", help="the fastest counts")
    add_json(command, "one JSON object per batch")
    add_model(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """A line for each size of a batch."""
    if arguments.prompt_tokens < 1 or arguments.new_tokens < 2 or arguments.repeats < 1:
        raise RequestError("bench needs --prompt-tokens 1, --new-tokens 2 and --repeats 1 at least")
    try:
        batches = [int(part) for part in arguments.batch.split(",")]
    except ValueError:
        batches = [0]
    if min(batches) < 1:
        raise RequestError(f"--batch {arguments.batch!r} is not a list of integers >= 1", hint="as in 1,8,32")
    arguments.max_batch = max(arguments.max_batch, *batches)
    llm = load_llm(arguments)
    told = describe(arguments.checkpoint, llm.model.config)
    columns = ("batch", "first token s", "prompt tok/s", "new tok/s", "each tok/s")
    if not arguments.json:
        print("  ".join(columns))
    for batch in batches:
        measured = _measure(llm, batch, arguments.prompt_tokens, arguments.new_tokens, arguments.repeats)
        if jax.process_index():
            continue
        if arguments.json:
            show({"device": told["device"], "model": told["config"], **measured, "peak_gib": peak_gib()})
        else:
            first, read, new = (measured[key] for key in _SHOWN)
            cells = (str(batch), f"{first:.4f}", f"{read:.1f}", f"{new:.1f}", f"{new / batch:.1f}")
            pairs = zip(cells, columns, strict=True)
            print("  ".join(cell.rjust(len(column)) for cell, column in pairs), flush=True)
    return 0


def _measure(llm: LLM, batch: int, prompt_tokens: int, new_tokens: int, repeats: int) -> dict[str, Any]:
    """The fastest of some runs, after one in which everything is compiled."""
    random = np.random.default_rng(0)
    prompts = random.integers(0, llm.model.config.vocab_size, (repeats + 1, batch, prompt_tokens))
    sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    best: dict[str, Any] = {}
    for number, rows in enumerate(prompts):
        with count_compiles() as compiles:
            started = time.perf_counter()
            outputs = llm.generate([row.tolist() for row in rows], sampling)
            seconds = time.perf_counter() - started
        if number == 0:
            say(f"batch {batch}: {compiles.count} programs compiled in {compiles.seconds:.1f} s")
            continue
        first = max(output.first_token_seconds for output in outputs)
        drafted, accepted = (sum(getattr(each, name) for each in outputs) for name in ("drafted", "accepted"))
        found = {
            "batch": batch,
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "seconds": seconds,
            "first_token_seconds": min(output.first_token_seconds for output in outputs),
            "prompt_tokens_per_second": batch * prompt_tokens / first,
            "new_tokens_per_second": batch * (new_tokens - 1) / max(seconds - first, 1e-9),
            "drafted": drafted,
            "accepted": accepted,
        }
        if not best or seconds < best["seconds"]:
            best = found
    return best
