"""Prompts in: the checks on a prompt of token ids, and files of JSON lines.

A prompt file has one object a line, with text, token ids or messages, and sampling parameters of its own if
need be:

    {"id": "a", "prompt": "Once upon a time"}
    {"id": "b", "tokens": [0, 671, 6102], "max_tokens": 32, "temperature": 0}
    {"id": "c", "messages": [{"role": "user", "content": "Hello"}], "thinking": true}
"""

import dataclasses
import json
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, NoReturn, get_args

from dsv4_jax.chat import Effort, read_messages
from dsv4_jax.errors import EXIT_BAD_DATA, EXIT_NO_INPUT, RequestError
from dsv4_jax.sampling import SamplingParams

# What a row may set for itself; anything else in it is taken for a slip of the pen.
SAMPLING_KEYS = (
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "ignore_eos",
    "stop",
)
CHAT_KEYS = ("tools", "thinking", "effort")  # of a row with messages, as `encode_chat` takes them
PROMPT_KEYS = ("prompt", "tokens", "messages")
_KEYS = ("id", *PROMPT_KEYS, *SAMPLING_KEYS, *CHAT_KEYS)


def check_prompt(
    ids: Sequence[int], *, vocab_size: int, max_len: int, max_tokens: int, name: str
) -> list[int]:
    """The prompt as a list of ints, if the model can read it and has room to answer. It is never cut short.

    Args:
      ids: token ids; a list, a tuple or a one-dimensional array of integers.
      vocab_size: ids lie in [0, vocab_size).
      max_len: tokens that the caches hold, prompt and answer together.
      max_tokens: tokens to be generated.
      name: how an error speaks of the prompt, such as "prompt 3" or "prompts.jsonl:3".

    Raises:
      RequestError: the prompt is empty, too long, or not made of the model's token ids.
    """
    tokens = _token_ids(ids, name)
    for place, token in enumerate(tokens):
        if not 0 <= token < vocab_size:
            raise RequestError(f"{name}: token {place} is {token}, outside [0, {vocab_size})")
    if len(tokens) >= max_len:
        raise RequestError(
            f"{name} has {len(tokens)} tokens and leaves no room to answer within max_len {max_len}",
            hint="shorten the prompt or raise max_len",
        )
    if len(tokens) + max_tokens > max_len:
        raise RequestError(
            f"{name} has {len(tokens)} tokens, and max_tokens {max_tokens} more exceed max_len {max_len}",
            hint=f"lower max_tokens to {max_len - len(tokens)} or raise max_len",
        )
    return tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptRow:
    """One line of a prompt file."""

    id: str | int  # the line number where the line names none
    prompt: str | list[int] | list[Mapping[str, Any]]  # text, token ids of any vocabulary, or messages
    overrides: dict[str, Any]  # sampling parameters that the line sets, each in its range
    where: str  # "file:line", for errors
    chat: dict[str, Any] = dataclasses.field(default_factory=dict)  # of messages: what `encode_chat` takes

    def sampling(self, defaults: SamplingParams) -> SamplingParams:
        """`defaults`, but for what the line sets."""
        return dataclasses.replace(defaults, **self.overrides)


def read_prompts(path: str | Path, bad: Callable[[RequestError], None] | None = None) -> list[PromptRow]:
    """Reads a prompt file: UTF-8, with or without byte-order mark; blank lines are skipped.

    Args:
      bad: is told of each line that is not a prompt, which is then left aside; by default it is raised.

    Raises:
      RequestError: the file cannot be read (exit code 66), or a line is not a prompt (65), by line number.
    """
    path = Path(path)
    rows: list[PromptRow] = []
    line_of_id: dict[str | int, int] = {}
    for number, raw in json_rows(path, "prompt file", bad):
        try:
            row = parse_prompt(raw, number, f"{path}:{number}")
            if row.id in line_of_id:
                _malformed(row.where, f"id {row.id!r} is already that of line {line_of_id[row.id]}")
        except RequestError as error:
            if bad is None:
                raise
            bad(error)
            continue
        line_of_id[row.id] = number
        rows.append(row)
    if not rows:
        _malformed(str(path), "holds no prompts", 'write one a line, such as {"prompt": "Hello"}')
    return rows


def json_rows(
    path: Path, what: str, bad: Callable[[RequestError], None] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file of JSON lines, with the numbers of their lines.

    Raises:
      RequestError: as `read_prompts`; `what` is how it speaks of the file.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        message = f"{what} {path} cannot be read: {error.strerror}"
        raise RequestError(message, exit_code=EXIT_NO_INPUT) from error
    # Split as bytes: str.splitlines would also break at U+2028, which JSON allows inside a string.
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = _json_object(line, f"{path}:{number}")
        except RequestError as error:
            if bad is None:
                raise
            bad(error)
            continue
        yield number, row


def _json_object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
        json.dumps(row, ensure_ascii=False).encode()  # an escape can still spell half a surrogate pair
    except UnicodeError as error:
        _malformed(where, f"is not UTF-8 text: {error}")
    except json.JSONDecodeError as error:
        _malformed(where, f"is not JSON: {error.msg}, column {error.colno}")
    except (ValueError, RecursionError) as error:
        _malformed(where, f"is not JSON: {error}")
    if not isinstance(row, dict):
        _malformed(where, f"is not an object but {_kind(row)}", 'such as {"prompt": "Hello"}')
    return row


def parse_prompt(row: dict[str, Any], number: int, where: str) -> PromptRow:
    """What an object of line `number` asks.

    Raises:
      RequestError: it is not a prompt (65).
    """
    if unknown := [key for key in row if key not in _KEYS]:
        _malformed(where, f"unknown key {unknown[0]!r}", f"known are {', '.join(_KEYS)}")
    if sum(key in row for key in PROMPT_KEYS) != 1:
        _malformed(where, 'must have either "prompt" or "tokens" or "messages"')
    if "messages" not in row and (strange := [key for key in CHAT_KEYS if key in row]):
        _malformed(where, f'{strange[0]!r} goes with "messages"')

    row_id = row.get("id", number)
    if not isinstance(row_id, str | int) or isinstance(row_id, bool):
        _malformed(where, f"id must be text or an integer, got {_kind(row_id)}")
    overrides = {key: row[key] for key in SAMPLING_KEYS if key in row}
    try:
        SamplingParams(**overrides)
        prompt, chat = _prompt(row)
    except RequestError as error:
        _malformed(where, error.message, error.hint)
    return PromptRow(id=row_id, prompt=prompt, overrides=overrides, where=where, chat=chat)


def _prompt(row: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if "tokens" in row:
        return _token_ids(row["tokens"], "tokens"), {}
    if "prompt" in row:
        return _text(row["prompt"]), {}
    chat = {key: row[key] for key in CHAT_KEYS if key in row}
    if not isinstance(chat.get("thinking", False), bool):
        raise RequestError(f"thinking must be true or false, got {_kind(chat['thinking'])}")
    if chat.get("effort", "auto") not in get_args(Effort):
        raise RequestError(f"effort must be one of {', '.join(get_args(Effort))}, got {chat['effort']!r}")
    read_messages(row["messages"], chat.get("tools", ()))
    return row["messages"], chat


def _text(prompt: Any) -> str:
    if not isinstance(prompt, str):
        raise RequestError(f"prompt must be text, got {_kind(prompt)}", hint='ids go under "tokens"')
    if not prompt:
        raise RequestError("prompt is empty")
    return prompt


def _token_ids(ids: Any, name: str) -> list[int]:
    tokens = ids.tolist() if hasattr(ids, "tolist") else ids  # arrays of numpy and JAX
    if not isinstance(tokens, Sequence) or isinstance(tokens, str | bytes):
        raise RequestError(f"{name} must be a list of token ids, got {_kind(tokens)}")
    if not tokens:
        raise RequestError(f"{name} is empty", hint="give at least one token")
    for place, token in enumerate(tokens):
        if not isinstance(token, Integral) or isinstance(token, bool):
            raise RequestError(f"{name}: token {place} must be an integer, got {reprlib.repr(token)}")
    return [int(token) for token in tokens]


def _kind(value: Any) -> str:
    return type(value).__name__


def _malformed(where: str, message: str, hint: str = "") -> NoReturn:
    raise RequestError(f"{where}: {message}", hint=hint, exit_code=EXIT_BAD_DATA)
