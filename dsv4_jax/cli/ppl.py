"""`dsv4-jax ppl`: how well texts are predicted."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import jax

from dsv4_jax.cli.options import add_command, add_json, add_model, load_llm
from dsv4_jax.cli.talk import show
from dsv4_jax.errors import EXIT_BAD_DATA, EXIT_NO_INPUT, RequestError
from dsv4_jax.evaluation.runner import evaluate
from dsv4_jax.evaluation.tasks import Item, Task, read_task
from dsv4_jax.prompts import PromptRow
from dsv4_jax.sampling import SamplingParams


def add(commands: Any) -> None:
    """Adds the command."""
    command = add_command(
        commands,
        "ppl",
        "perplexity of texts, and bits per byte, which compare across tokenizers",
        """
        dsv4-jax ppl CHECKPOINT book.txt notes.txt --context 4096
        dsv4-jax ppl CHECKPOINT prose.jsonl --json

        a file that ends in .jsonl has a text a line, {"text": ...}; any other is one text.
        """,
    )
    add_model(command)
    command.add_argument("files", type=Path, nargs="+", metavar="FILE", help="UTF-8 text, or JSONL")
    command.add_argument(
        "--context", type=int, metavar="N", help="tokens that are read at once (default: --max-len)"
    )
    add_json(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """One score over all files."""
    items: list[Item] = []
    for file in arguments.files:
        items += _items(file, len(items))
    llm = load_llm(arguments)
    task = Task("ppl", arguments.files[0], "text", items)
    with tempfile.TemporaryDirectory() as folder:
        found = evaluate(
            llm, [task], folder, identity={}, sampling=SamplingParams(), context=arguments.context
        )["ppl"]
    if jax.process_index():
        return 0
    if arguments.json:
        show(found)
    else:
        low, high = found["interval"]
        print(
            f"{found['score']:.4f} bits per byte (95% {low:.4f} to {high:.4f}), perplexity"
            f" {found['perplexity_per_token']:.3f} a token, {found['perplexity_per_byte']:.4f} a byte;"
            f" {found['n']} texts, {found['tokens']:,} tokens, {found['nbytes']:,} bytes"
        )
    return 0


def _items(file: Path, first: int) -> list[Item]:
    if file.suffix == ".jsonl":
        task = read_task(file)
        if task.kind != "text":
            raise RequestError(f"{file}: a task of kind {task.kind!r}, not of texts", exit_code=EXIT_BAD_DATA)
        return [_renamed(item.prompt, first + number) for number, item in enumerate(task.items)]
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{file} cannot be read: {error.strerror}", exit_code=EXIT_NO_INPUT) from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{file} is not UTF-8 text: {error}", exit_code=EXIT_BAD_DATA) from None
    if not text:
        raise RequestError(f"{file} is empty", exit_code=EXIT_BAD_DATA)
    return [_renamed(PromptRow(id=0, prompt=text, overrides={}, where=str(file)), first)]


def _renamed(prompt: PromptRow, id: int) -> Item:
    return Item(prompt=PromptRow(id=id, prompt=prompt.prompt, overrides={}, where=prompt.where))
