"""Answers to many prompts, in a file that grows: killed at any moment, it is gone on with where it stands.

Rows come in the order of the prompts, one JSON object a line. They hold nothing that differs from run to run,
and every run gives the model the same room, so a file that was finished in pieces is, byte for byte, the one
that an undisturbed run writes. Beside `answers.jsonl` lies `answers.jsonl.run.json`, which says by what it
was made: answers of another model or of other settings are never mixed in.

With several processes all of them run the model, and the first one alone reads and writes files.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from dsv4_jax.answers import GenerationOutput
from dsv4_jax.distributed import from_first
from dsv4_jax.errors import EXIT_BAD_DATA, EXIT_TRY_AGAIN, DSV4Error, OutputError
from dsv4_jax.llm import LLM
from dsv4_jax.prompts import PromptRow
from dsv4_jax.sampling import SamplingParams

_FSYNC_SECONDS = 5.0  # a killed process loses no row; a machine that loses power those of so long

Row = dict[str, Any]
Request = tuple[list[int], SamplingParams]


class Watcher(Protocol):
    """Is told of each answer as it is written, with its place and what does not go into the file."""

    def __call__(self, place: int, row: Row, output: GenerationOutput) -> None: ...


def requests_of(llm: LLM, rows: Sequence[PromptRow], defaults: SamplingParams) -> list[Request | DSV4Error]:
    """What each row asks of the model, or why it cannot be served."""
    found: list[Request | DSV4Error] = []
    for row in rows:
        try:
            sampling = row.sampling(defaults)
            found.append((llm.encode(row.prompt, sampling, row.where, **row.chat), sampling))
        except DSV4Error as error:
            found.append(error)
    return found


def answer(
    llm: LLM, requests: Sequence[Request], skip: Sequence[bool]
) -> Iterator[tuple[int, GenerationOutput]]:
    """Answers in the order of the requests, with their places; those to `skip` are left out.

    The room in the caches is that for all requests, left out or not.
    """
    places = [place for place, done in enumerate(skip) if not done]
    if not places:
        return
    early: dict[int, GenerationOutput] = {}  # answers that wait for one before them
    waited_for = iter(places)
    place = next(waited_for)
    for number, output in llm.each([requests[place] for place in places], llm.room_for(requests)):
        early[places[number]] = output
        while place in early:
            yield place, early.pop(place)
            place = next(waited_for, -1)


def answer_to_file(
    llm: LLM,
    rows: Sequence[PromptRow],
    requests: Sequence[Request],
    path: str | Path,
    identity: Mapping[str, Any],
    watch: Watcher | None = None,
) -> tuple[list[Row], int]:
    """Adds the answers that the file does not have yet.

    Args:
      identity: what all answers of the file depend on, as JSON takes it: model, settings.

    Returns:
      All rows in the order of the prompts, and how many of them are new.

    Raises:
      OutputError: the file cannot be written (73); the disk is full or another run is writing it (75); or it
        holds something else (65). What it holds stays.
    """
    keys = [_key(row, request) for row, request in zip(rows, requests, strict=True)]
    with shared(path, identity, keys) as (file, known):
        skip = [row is not None for row in known]
        missing = skip.count(False)
        left = missing
        for place, output in answer(llm, requests, skip):
            row = row_of(rows[place], requests[place][1], keys[place]["prompt_sha"], output)
            if file is not None:
                file.append(row, left)
            known[place] = row
            left -= 1
            if watch is not None:
                watch(place, row, output)
    return [row for row in known if row is not None], missing


@contextlib.contextmanager
def shared(
    path: str | Path, identity: Mapping[str, Any], keys: Sequence[Row]
) -> Iterator[tuple["AnswerFile | None", list[Row | None]]]:
    """The file, open on the first process alone, and the row that it holds for each key; as `answer_to_file`.

    On every process the same rows are there, so that all of them do the same.
    """
    with contextlib.ExitStack() as stack:
        file, known = None, [None] * len(keys)
        if jax.process_index() == 0:
            try:
                file = stack.enter_context(AnswerFile.open(path, identity))
                known = [file.answer_to(key) for key in keys]
            except DSV4Error:
                from_first(b"failed")
                raise
        told = from_first(json.dumps(known).encode())
        if told == b"failed":
            raise OutputError(f"{path}: process 0 cannot go on with it, and says why")
        yield file, json.loads(told)


def check_output(path: str | Path) -> None:
    """Raises OutputError where `answer_to_file` would at once: no model needs to be loaded to know."""
    path = Path(path)
    existed = path.exists()
    with _writable(path):
        pass
    if not existed:
        path.unlink(missing_ok=True)


def row_of(row: PromptRow, sampling: SamplingParams, prompt_sha: str, output: GenerationOutput) -> Row:
    """An answer as its file holds it: the same in every run."""
    answered: Row = {
        "id": row.id,
        "prompt_sha": prompt_sha,
        "prompt_tokens": len(output.prompt_token_ids),
        "token_ids": output.token_ids,
        "text": output.text,
        "finish_reason": output.finish_reason,
        "logprob_sum": output.logprob_sum,
        "seed": sampling.seed,
    }
    if output.stop_string is not None:
        answered["stop_string"] = output.stop_string
    if output.logprobs is not None:
        answered["logprobs"] = output.logprobs
    if output.drafted:
        answered |= {"drafted": output.drafted, "accepted": output.accepted}
        answered |= {"accepted_at": output.accepted_at, "draft_steps": output.draft_steps}
    return answered


def prompt_sha(ids: Sequence[int]) -> str:
    """Sixteen hex digits that tell prompts apart."""
    return hashlib.sha256(np.asarray(ids, np.int64).tobytes()).hexdigest()[:16]


def _key(row: PromptRow, request: Request) -> Row:
    return {"id": row.id, "prompt_sha": prompt_sha(request[0])}


class AnswerFile:
    """A file of rows that one process at a time adds to."""

    def __init__(self, path: Path, file: io.FileIO, rows: list[tuple[int, Row]]):
        self._path, self._file = path, file
        self._line_of = {row["id"]: (line, row) for line, row in rows}
        self._synced_at = time.monotonic()

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: str | Path, identity: Mapping[str, Any]) -> Iterator["AnswerFile"]:
        """Opens or begins a file, drops a last line that was torn off, and keeps other runs away meanwhile.

        Raises:
          OutputError: as `answer_to_file`.
        """
        path = Path(path)
        with _writable(path) as file:
            rows = _read_rows(path, file)
            _check_identity(path, identity, begun=bool(rows))
            answers = cls(path, file, rows)
            yield answers
            with _as_output_error(path):
                os.fsync(file.fileno())

    def answer_to(self, key: Mapping[str, Any]) -> Row | None:
        """The row with this id, if there is one.

        Raises:
          OutputError: it answers another prompt (65).
        """
        line, row = self._line_of.get(key["id"], (0, None))
        if row is not None and row.get("prompt_sha") != key["prompt_sha"]:
            raise OutputError(
                f"{self._path}:{line}: id {key['id']!r} was answered for another prompt",
                hint="name another output file",
                exit_code=EXIT_BAD_DATA,
            )
        return row

    def append(self, row: Row, left: int) -> None:
        """Adds a row, whole or not at all; `left`: how many are missing without it."""
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        size = os.fstat(self._file.fileno()).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._file.fileno(), line[written:])
            if time.monotonic() - self._synced_at > _FSYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced_at = time.monotonic()
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), size)
            raise OutputError(
                f"{self._path} cannot be written: {error.strerror}; its rows are whole, {left} are missing",
                hint="make room and run the same command again: it goes on from there",
                exit_code=EXIT_TRY_AGAIN,
            ) from error


@contextlib.contextmanager
def _writable(path: Path) -> Iterator[io.FileIO]:
    """The file, open to read and to add to, and locked against other runs."""
    with _as_output_error(path):
        if path.exists() and not path.is_file():
            raise OutputError(f"{path} is not an ordinary file", hint="name a file to write")
        file = io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644), "r+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(
                f"{path} is being written by another run",
                hint="wait for it, or name another file",
                exit_code=EXIT_TRY_AGAIN,
            ) from None
        yield file


def _read_rows(path: Path, file: io.FileIO) -> list[tuple[int, Row]]:
    """The rows of a file, with their lines; a line without an end is cut off."""
    data = file.readall()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        warnings.warn(f"{path}: its last line was torn off and is dropped", stacklevel=2)
        with _as_output_error(path):
            os.ftruncate(file.fileno(), whole)
    rows = []
    for number, line in enumerate(data[:whole].split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("id"), str | int):
            raise OutputError(
                f"{path}:{number}: is not a row of answers",
                hint="name another output file",
                exit_code=EXIT_BAD_DATA,
            )
        rows.append((number, row))
    return rows


def _check_identity(path: Path, identity: Mapping[str, Any], *, begun: bool) -> None:
    """Holds what made the file against what is about to add to it; writes it down for a new file."""
    beside = path.with_name(path.name + ".run.json")
    wanted = json.loads(json.dumps(identity))
    if begun:
        try:
            found = json.loads(beside.read_text())
        except (OSError, ValueError):
            raise OutputError(
                f"{path} holds rows, but {beside.name} does not say what made them",
                hint="name another output file",
                exit_code=EXIT_BAD_DATA,
            ) from None
        differing = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
        if differing:
            told = ", ".join(f"{key} {found.get(key)!r}, now {wanted.get(key)!r}" for key in differing)
            raise OutputError(
                f"{path} holds answers of another run: {told}",
                hint="name another output file",
                exit_code=EXIT_BAD_DATA,
            )
        return
    unfinished = beside.with_name(f".{beside.name}.{os.getpid()}.tmp")
    with _as_output_error(path):
        unfinished.write_text(json.dumps(wanted, indent=2) + "\n")
        unfinished.replace(beside)


@contextlib.contextmanager
def _as_output_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise OutputError(
            f"{path} cannot be written: {error.strerror}",
            hint="make room and run the same command again"
            if full
            else "name a file in a folder that exists and is writable",
            exit_code=EXIT_TRY_AGAIN if full else None,
        ) from error
