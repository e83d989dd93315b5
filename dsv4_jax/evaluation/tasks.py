"""Tasks in JSON lines: what is asked, and what a right answer is.

A file is one task, and its rows are of one kind:

    {"id": 1, "prompt": "2 + 3 =", "target": "5"}                       the answer must be the target
    {"id": 1, "prompt": "The sky is", "choices": [" blue", " green"], "answer": 0}
    {"id": 1, "text": "Once upon a time there was a cache."}             how well it is predicted

In place of "prompt" a row may have "messages" (a conversation) or "tokens"; rows with a target may set
sampling parameters and "match", which is "exact" (but for space around it), "prefix" or "contains".
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from dsv4_jax.errors import EXIT_BAD_DATA, EXIT_NO_INPUT, RequestError
from dsv4_jax.prompts import PROMPT_KEYS, PromptRow, json_rows, parse_prompt

Kind = Literal["match", "choice", "text"]
Match = Literal["exact", "prefix", "contains"]
_EXTRA_KEYS = {"match": ("target", "match"), "choice": ("choices", "answer"), "text": ("text",)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """One row of a task.

    Attributes:
      prompt: what is asked; of a text to predict, the text itself.
      targets: right answers.
      match: when an answer is one of them.
      choices: continuations of the prompt.
      answer: which of them is right.
    """

    prompt: PromptRow
    targets: tuple[str, ...] = ()
    match: Match = "exact"
    choices: tuple[str, ...] = ()
    answer: int = 0

    def is_right(self, text: str) -> bool:
        """Whether a generated text is a right answer."""
        said = text.strip()
        return any(
            said == target
            or (self.match == "prefix" and said.startswith(target))
            or (self.match == "contains" and target in said)
            for target in self.targets
        )


@dataclasses.dataclass(frozen=True)
class Task:
    """A file of items, all of one kind; its name is that of the file."""

    name: str
    path: Path
    kind: Kind
    items: list[Item]


def read_task(path: str | Path, limit: int | None = None) -> Task:
    """Reads a task, or its first `limit` rows.

    Raises:
      RequestError: the file cannot be read (exit code 66), or a row is not of a task (65), by line number.
    """
    path = Path(path)
    items: list[Item] = []
    kind: Kind | None = None
    line_of_id: dict[str | int, int] = {}
    for number, row in json_rows(path, "task file"):
        where = f"{path}:{number}"
        found = _kind_of(row, where)
        if kind is not None and found != kind:
            _malformed(where, f"a row of kind {found!r} in a task of kind {kind!r}")
        kind = found
        items.append(_item(row, number, where, kind))
        id = items[-1].prompt.id
        if id in line_of_id:
            _malformed(where, f"id {id!r} is already that of line {line_of_id[id]}")
        line_of_id[id] = number
        if limit is not None and len(items) == limit:
            break
    if kind is None:
        _malformed(str(path), "holds no rows")
    return Task(path.stem, path, kind, items)


def find_tasks(names: Sequence[str], folder: str | Path | None) -> list[Path]:
    """The files of tasks, named as files or by their names in a folder; all of a folder if none is named.

    Raises:
      RequestError: there is no such task (66); the message lists those that there are.
    """
    there = {path.stem: path for path in sorted(Path(folder).glob("*.jsonl"))} if folder is not None else {}
    if folder is not None and not there:
        raise RequestError(f"{folder}: holds no *.jsonl", exit_code=EXIT_NO_INPUT)
    found = []
    for name in names or there:
        path = Path(name) if Path(name).suffix == ".jsonl" else there.get(name)
        if path is None:
            hint = f"there are {', '.join(there)}" if there else "name a .jsonl file, or give --task-dir"
            raise RequestError(f"no task is called {name!r}", hint=hint, exit_code=EXIT_NO_INPUT)
        found.append(path)
    return found


def _kind_of(row: Mapping[str, Any], where: str) -> Kind:
    for kind, keys in _EXTRA_KEYS.items():
        if keys[0] in row:
            return kind  # type: ignore[return-value]
    _malformed(where, 'must have "target", "choices" or "text"')


def _item(row: Mapping[str, Any], number: int, where: str, kind: Kind) -> Item:
    asked = {key: value for key, value in row.items() if key not in _EXTRA_KEYS[kind]}
    if kind == "text":
        if strange := [key for key in PROMPT_KEYS if key in asked]:
            _malformed(where, f'{strange[0]!r} does not go with "text"')
        asked["prompt"] = row["text"]
    prompt = parse_prompt(asked, number, where)
    if kind == "text":
        return Item(prompt=prompt)
    if kind == "choice":
        choices, answer = row["choices"], row.get("answer")
        if not isinstance(choices, list) or len(choices) < 2 or not all(_is_text(each) for each in choices):
            _malformed(where, "choices must be two texts or more")
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
            _malformed(where, f"answer must be an integer in [0, {len(choices)}), got {answer!r}")
        return Item(prompt=prompt, choices=tuple(choices), answer=answer)
    targets = row["target"] if isinstance(row["target"], list) else [row["target"]]
    if not targets or not all(_is_text(each) and each.strip() for each in targets):
        _malformed(where, "target must be a text, or texts")
    match = row.get("match", "exact")
    if match not in get_args(Match):
        _malformed(where, f"match must be one of {', '.join(get_args(Match))}, got {match!r}")
    return Item(prompt=prompt, targets=tuple(each.strip() for each in targets), match=match)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _malformed(where: str, message: str, hint: str = "") -> NoReturn:
    raise RequestError(f"{where}: {message}", hint=hint, exit_code=EXIT_BAD_DATA)
