"""A conversation as the model reads it: pieces of text, and control tokens between them.

This is the released encoder's format, tasks and developer messages included. `encoding` leaves what
DeepSeek's own package can write to that package, where it is installed.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence

from dsv4_jax.chat.messages import Message
from dsv4_jax.chat.wire import (
    ASSISTANT,
    BOS,
    DSML,
    END_THINK,
    EOS,
    LATEST_REMINDER,
    TASKS,
    THINK,
    USER,
    tools_block,
)


@dataclasses.dataclass(frozen=True)
class _Turn:
    """A message, or those of a user and of tools that follow one another as one."""

    message: Message
    blocks: tuple[str, ...] = ()  # of a user


def render(messages: Sequence[Message], *, thinking: bool, preamble: str = "") -> list[str]:
    """The pieces of a prompt; each is a `wire.Control` or text that must stay text.

    It ends where the assistant is to go on, or with EOS if the last message is a whole one of its.

    Args:
      thinking: whether the model is to think first, and its thoughts are shown.
      preamble: what stands before everything else, such as how hard to think.
    """
    # Thoughts before the last question are dropped, unless there are tools to use them with.
    keep = not thinking or any(message.tools for message in messages)
    turns = _turns(messages)
    last = _last_question(turns)
    if not keep:
        silent = ("system", "user", "latest_reminder", "assistant")
        turns = [turn for n, turn in enumerate(turns) if n >= last or turn.message.role in silent]
        last = _last_question(turns)

    pieces: list[str] = [BOS, preamble]
    for place, turn in enumerate(turns):
        message = turn.message
        before = turns[place - 1].message if place else None
        shown = thinking and (keep or place > last)
        pieces += _opening(turn)
        if message.role == "assistant":
            if shown and not (before and before.task):
                # A prefix without content is one of the reasoning.
                pieces += [message.reasoning, "" if message.prefix and not message.content else END_THINK]
            pieces += [message.content, *_calls(message)]
            if not message.prefix:
                pieces.append(EOS)
        following = turns[place + 1].message.role if place + 1 < len(turns) else "assistant"
        if following in ("assistant", "latest_reminder") and message.role in ("user", "developer"):
            pieces += _transition(message, thinking=thinking, thinks=thinking and (keep or place >= last))
    return [piece for piece in pieces if piece]


def _turns(messages: Sequence[Message]) -> list[_Turn]:
    turns: list[_Turn] = []
    calls: list[str] = []  # ids of the last assistant's
    results: list[tuple[int, str]] = []  # of the turn under way: which block answers which call
    for message in messages:
        if message.role not in ("user", "tool"):
            turns.append(_Turn(message))
            if message.role == "assistant":
                calls = [call.id for call in message.tool_calls]
            results = []
            continue
        block = f"<tool_result>{message.content}</tool_result>" if message.role == "tool" else message.content
        open_turn = turns[-1] if turns and turns[-1].message.role == "user" else None
        if open_turn and (message.role == "tool" or not open_turn.message.task):
            blocks = (*open_turn.blocks, block)
            if message.role == "user" and len(blocks) - 2 not in [place for place, _ in results]:
                blocks = (*blocks[:-2], "\n\n".join(filter(None, blocks[-2:])))  # texts become one
            turn = dataclasses.replace(open_turn, blocks=blocks)
            task = message.task or open_turn.message.task
            turns[-1] = dataclasses.replace(turn, message=dataclasses.replace(turn.message, task=task))
        else:
            turns.append(_Turn(dataclasses.replace(message, role="user"), (block,)))
            results = []
        if message.role == "tool":
            results.append((len(turns[-1].blocks) - 1, message.tool_call_id))
            turns[-1] = _sorted(turns[-1], results, calls)
    return turns


def _sorted(turn: _Turn, results: list[tuple[int, str]], calls: list[str]) -> _Turn:
    """The results of tools in the order of the calls; other blocks stay where they are."""

    def rank(result: tuple[int, str]) -> int:
        return calls.index(result[1]) if result[1] in calls else 0

    order = sorted(results, key=rank)  # stable
    blocks = list(turn.blocks)
    for (place, _), (source, _) in zip(results, order, strict=True):
        blocks[place] = turn.blocks[source]
    results[:] = [(place, id) for (place, _), (_, id) in zip(results, order, strict=True)]
    return dataclasses.replace(turn, blocks=tuple(blocks))


def _last_question(turns: Sequence[_Turn]) -> int:
    places = [n for n, turn in enumerate(turns) if turn.message.role in ("user", "developer")]
    return places[-1] if places else -1


def _opening(turn: _Turn) -> Iterator[str]:
    message = turn.message
    if message.role == "user":
        yield USER
        yield "\n\n".join(turn.blocks)
    elif message.role == "latest_reminder":
        yield LATEST_REMINDER
        yield message.content
    elif message.role in ("system", "developer"):
        if message.role == "developer":
            yield USER
        yield message.content
        if message.tools:
            yield "\n\n"
            yield from tools_block([json.dumps(tool, ensure_ascii=False) for tool in message.tools])


def _transition(message: Message, *, thinking: bool, thinks: bool) -> list[str]:
    """From a question to what the assistant says."""
    if message.task == "action":
        return [ASSISTANT, THINK if thinking else END_THINK, TASKS["action"]]
    if message.task:
        return [TASKS[message.task]]
    return [ASSISTANT, THINK if thinks else END_THINK]


def _calls(message: Message) -> Iterator[str]:
    """The block of tool calls at the end of an assistant's message."""
    if not message.tool_calls:
        return
    yield from ("\n\n<", DSML, "tool_calls>\n")
    for place, call in enumerate(message.tool_calls):
        yield from ("\n" if place else "", "<", DSML, f'invoke name="{call.name}">\n')
        for name, value in _parameters(call.arguments):
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            kind = "true" if isinstance(value, str) else "false"
            yield from ("<", DSML, f'parameter name="{name}" string="{kind}">{text}</', DSML, "parameter>\n")
        yield from ("</", DSML, "invoke>")
    yield from ("\n</", DSML, "tool_calls>")


def _parameters(arguments: str) -> Iterator[tuple[str, object]]:
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict):
        yield from found.items()
    else:
        yield "arguments", arguments
