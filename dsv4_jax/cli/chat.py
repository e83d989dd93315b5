"""`dsv4-jax chat`: a conversation in the terminal, or with lines from a pipe."""

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from dsv4_jax.chat import Completion, CompletionStream, Delta
from dsv4_jax.cli.options import (
    add_command,
    add_json,
    add_model,
    add_sampling,
    add_thinking,
    load_llm,
    sampling_of,
)
from dsv4_jax.cli.talk import say, show
from dsv4_jax.compiles import count_compiles
from dsv4_jax.errors import NumericError, RequestError
from dsv4_jax.llm import LLM
from dsv4_jax.stops import AnswerText

_HELP = """/reset       forget the conversation, keep the system message
/think       let the model think first, or no longer
/undo        take the last question and its answer back
/exit        leave; Ctrl-D does too
Ctrl-C stops an answer; what was said of it stays in the conversation"""


def add(commands: Any) -> None:
    """Adds the command."""
    command = add_command(
        commands,
        "chat",
        "talk with the model; Ctrl-C stops an answer, Ctrl-D ends the talk",
        """
        dsv4-jax chat CHECKPOINT --system "Be brief."
        dsv4-jax chat CHECKPOINT --thinking --effort high --draft-tokens 1
        echo "What is the capital of Italy?" | dsv4-jax chat CHECKPOINT --temperature 0 --json
        """,
    )
    command.add_argument("--system", metavar="TEXT", help="a system message")
    add_sampling(command)
    add_thinking(command)
    add_json(command, "one JSON object per answer")
    add_model(command)
    command.set_defaults(run=run, max_batch=1)


def run(arguments: argparse.Namespace) -> int:
    """Reads questions until there are no more."""
    talk = _Talk(arguments, load_llm(arguments))
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing for input())
        say("type /help for help; Ctrl-D ends")
    for line in _typed() if interactive else map(str.strip, sys.stdin):
        if not line:
            continue
        try:
            if not talk.command(line):
                talk.ask(line)
        except EOFError:
            break
        except (RequestError, NumericError) as error:
            if not interactive:
                raise
            say(f"error: {error}")
    return 0


def _typed() -> Iterator[str]:
    """Lines from a person; Ctrl-C throws one away."""
    while True:
        try:
            yield input("› ").strip()
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


class _Talk:
    """A conversation so far."""

    def __init__(self, arguments: argparse.Namespace, llm: LLM):
        self._llm, self._json = llm, arguments.json
        self._sampling, self._effort = sampling_of(arguments), arguments.effort
        self._thinking = arguments.thinking
        self._messages: list[dict[str, Any]] = []
        if arguments.system is not None:
            self._messages.append({"role": "system", "content": arguments.system})
        self._out = Console(soft_wrap=True, markup=False, highlight=False, emoji=False)
        # A conversation that cannot be had is refused before the first question.
        llm.encode_chat([*self._messages, {"role": "user", "content": "?"}])

    def command(self, line: str) -> bool:
        """Does what a line says that begins with a slash; False for a question.

        Raises:
          EOFError: it says to leave.
        """
        system = [message for message in self._messages if message["role"] == "system"]
        if line in ("/exit", "/quit"):
            raise EOFError
        if line == "/reset":
            self._messages = system
        elif line == "/undo":
            self._messages = self._messages[:-2] if len(self._messages) > len(system) else system
        elif line == "/think":
            self._thinking = not self._thinking
            say(f"thinking is {'on' if self._thinking else 'off'}")
        elif line == "/help":
            say(_HELP)
        else:
            return False
        return True

    def ask(self, question: str) -> None:
        """Answers, as it comes on a terminal; both are part of the conversation from then on."""
        messages = [*self._messages, {"role": "user", "content": question}]
        ids = self._llm.encode_chat(messages, thinking=self._thinking, effort=self._effort)
        tokenizer = self._llm.tokenizer
        assert tokenizer is not None
        parser = CompletionStream(tokenizer, thinking=self._thinking)
        until = AnswerText(tokenizer, self._sampling.stop)
        completion, count, started, first = Completion(), 0, time.perf_counter(), 0.0
        reason = "interrupted"
        with _interruptible() as interrupted, count_compiles() as compiles:
            events = self._llm.stream(ids, self._sampling, name="the conversation")
            for event in events:
                first = first or time.perf_counter() - started - compiles.seconds
                count += len(event.token_ids)
                until.put(event.token_ids)
                for delta in parser.put(event.token_ids):
                    completion = completion.add(delta)
                    self._show(delta)
                if event.finish_reason is not None:
                    reason = event.finish_reason
                if interrupted():
                    break
            events.close()
        for delta in parser.end():
            completion = completion.add(delta)
            self._show(delta)
        if until.found is not None:
            content = completion.content.partition(until.found)[0]
            completion = Completion(completion.reasoning, content, completion.tool_calls)
        self._messages = [*messages, completion.to_message()]
        seconds = time.perf_counter() - started - compiles.seconds
        if self._json:
            show(
                completion.to_message()
                | {"finish_reason": reason, "prompt_tokens": len(ids), "tokens": count}
                | {"first_token_seconds": first, "seconds": seconds}
            )
        else:
            self._out.print()
            for call in completion.tool_calls:
                self._out.print(f"[calls {call.name}({call.arguments})]", style="cyan")
        say(
            f"{reason}: {count} tokens, the first after {first:.2f} s,"
            f" {max(count - 1, 0) / max(seconds - first, 1e-9):.1f} tok/s after it"
            + (f"; {compiles.seconds:.1f} s of compiling" if compiles.count else "")
        )
        if reason == "error":
            raise NumericError(f"logits were not finite numbers after {count} tokens")

    def _show(self, delta: Delta) -> None:
        if not self._json and delta.kind != "tool_call":
            self._out.print(delta.text, end="", style="dim italic" if delta.kind == "reasoning" else "")


@contextlib.contextmanager
def _interruptible() -> Iterator[Any]:
    """Ctrl-C is noted, and told by what this gives: an answer ends between two steps, not inside one."""
    noted = False

    def note(*_: Any) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)
