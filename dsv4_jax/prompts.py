"""Prompts in, rows out: the checks on a prompt of token ids, and files of JSON lines.

A prompt file has one object a line, either text or token ids, with sampling parameters of its own if need be:

    {"id": "a", "prompt": "Once upon a time"}
    {"id": "b", "tokens": [0, 671, 6102], "max_tokens": 32, "temperature": 0}
"""

import contextlib
import dataclasses
import json
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, NoReturn

from dsv4_jax.errors import EXIT_BAD_DATA, EXIT_NO_INPUT, OutputError, RequestError
from dsv4_jax.sampling import SamplingParams

# What a row may set for itself; anything else in it is taken for a slip of the pen.
SAMPLING_KEYS = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "ignore_eos", "stop")
_KEYS = ("id", "prompt", "tokens", *SAMPLING_KEYS)


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
    prompt: str | list[int]  # text, or token ids not yet checked against a vocabulary
    overrides: dict[str, Any]  # sampling parameters that the line sets, each in its range
    where: str  # "file:line", for errors

    def sampling(self, defaults: SamplingParams) -> SamplingParams:
        """`defaults`, but for what the line sets."""
        return dataclasses.replace(defaults, **self.overrides)


def read_prompts(path: str | Path) -> list[PromptRow]:
    """Reads a prompt file: UTF-8, with or without byte-order mark; blank lines are skipped.

    Raises:
      RequestError: the file cannot be read (exit code 66), or a line is not a prompt (65), by line number.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        message = f"prompt file {path} cannot be read: {error.strerror}"
        raise RequestError(message, exit_code=EXIT_NO_INPUT) from error

    rows: list[PromptRow] = []
    line_of_id: dict[str | int, int] = {}
    # Split as bytes: str.splitlines would also break at U+2028, which JSON allows inside a string.
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        row = _parse(line, number, f"{path}:{number}")
        if row.id in line_of_id:
            _malformed(row.where, f"id {row.id!r} is already that of line {line_of_id[row.id]}")
        line_of_id[row.id] = number
        rows.append(row)
    if not rows:
        _malformed(str(path), "holds no prompts", 'write one a line, such as {"prompt": "Hello"}')
    return rows


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line. A file already there is replaced at the end, whole, or not at all.

    The folder is tried before the first row is taken, so `rows` may be a generator that works for hours.

    Raises:
      OutputError: the folder is missing, read-only or full, or `path` is not an ordinary file.
    """
    target = Path(path).resolve()  # so that a symbolic link stays one
    # In the same folder, since a rename is atomic only within one file system.
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with _writing(path):
        if target.exists() and not target.is_file():
            raise OutputError(f"{path} is not an ordinary file", hint="name a file to write")
        unfinished.touch()
    try:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with _writing(path):
            with unfinished.open("w", encoding="utf-8", newline="\n") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror}",
            hint="name a folder that exists, is writable and has room",
        ) from error


def _parse(line: bytes, number: int, where: str) -> PromptRow:
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
    if unknown := [key for key in row if key not in _KEYS]:
        _malformed(where, f"unknown key {unknown[0]!r}", f"known are {', '.join(_KEYS)}")
    if ("prompt" in row) == ("tokens" in row):
        _malformed(where, 'must have either "prompt" or "tokens"')

    row_id = row.get("id", number)
    if not isinstance(row_id, str | int) or isinstance(row_id, bool):
        _malformed(where, f"id must be text or an integer, got {_kind(row_id)}")
    overrides = {key: row[key] for key in SAMPLING_KEYS if key in row}
    try:
        SamplingParams(**overrides)
        prompt = _token_ids(row["tokens"], "tokens") if "tokens" in row else _text(row["prompt"])
    except RequestError as error:
        _malformed(where, error.message, error.hint)
    return PromptRow(id=row_id, prompt=prompt, overrides=overrides, where=where)


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
