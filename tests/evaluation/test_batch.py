"""Files of answers: gone on with after any end, never mixed, never written by two at once."""

import dataclasses
import errno
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from dsv4_jax import batch
from dsv4_jax.answers import GenerationOutput, Timings
from dsv4_jax.batch import AnswerFile, answer, answer_to_file, check_output, requests_of
from dsv4_jax.errors import DSV4Error, OutputError, RequestError
from dsv4_jax.prompts import PromptRow
from dsv4_jax.sampling import SamplingParams

IDENTITY = {"model": "a model", "numerics": "plain"}
ROWS = [PromptRow(id=f"row {n}", prompt=[n, n + 1], overrides={}, where=f"p:{n}") for n in range(6)]
REQUESTS = [([n, n + 1], SamplingParams(max_tokens=2)) for n in range(6)]
NO_TIME = Timings(0.0, 0.0, 0, 0)


class Parrot:
    """Answers in the place of a model: says the prompt again, the last request first."""

    def __init__(self, fail_after: int | None = None):
        self.asked: list[list[int]] = []
        self._fail_after = fail_after

    def room_for(self, requests: Sequence[batch.Request]) -> tuple[int, int]:
        return len(requests), 128

    def encode(self, prompt: list[int], sampling: SamplingParams, name: str) -> list[int]:
        if max(prompt) > 100:
            raise RequestError(f"{name}: too large")
        return prompt

    def each(
        self, requests: Sequence[batch.Request], room: tuple[int, int]
    ) -> Iterator[tuple[int, GenerationOutput]]:
        for place, (ids, _) in sorted(enumerate(requests), reverse=True):
            self.asked.append(ids)
            yield (
                place,
                GenerationOutput(ids, ids, f"{ids} 日", None, -1.5, "length", None, (), 0, 0.0, 0.0, NO_TIME),
            )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "answers.jsonl"


def run(path: Path, rows=ROWS, requests=REQUESTS, identity=IDENTITY, parrot=None):
    return answer_to_file(parrot or Parrot(), rows, requests, path, identity)  # type: ignore[arg-type]


def test_answers_come_in_the_order_of_the_prompts(path):
    rows, new = run(path)

    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == written
    assert [row["id"] for row in written] == [row.id for row in ROWS]
    assert new == 6
    assert json.loads((path.parent / "answers.jsonl.run.json").read_text()) == IDENTITY


def test_only_what_is_missing_is_asked_and_the_bytes_are_the_same(path):
    run(path)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    parrot = Parrot()

    path.write_bytes(b"".join(lines[:2]))
    rows, new = run(path, parrot=parrot)

    assert path.read_bytes() == whole
    assert (len(rows), new) == (6, 4)
    assert [2, 3] in parrot.asked
    assert [0, 1] not in parrot.asked


@pytest.mark.parametrize("kept", [1, 30], ids="{} bytes of the torn line".format)
def test_a_line_that_was_torn_off_is_dropped_and_answered_again(path, kept):
    run(path)
    whole = path.read_bytes()
    third = whole.splitlines(keepends=True)[:3]

    path.write_bytes(b"".join(third[:2]) + third[2][:kept])
    with pytest.warns(UserWarning, match="its last line was torn off and is dropped"):
        run(path)

    assert path.read_bytes() == whole


def test_answers_of_another_run_are_not_added_to(path):
    run(path)
    before = path.read_bytes()

    with pytest.raises(
        OutputError, match="answers of another run: numerics 'plain', now 'official'"
    ) as refused:
        run(path, identity=IDENTITY | {"numerics": "official"})

    assert refused.value.exit_code == 65
    assert path.read_bytes() == before


def test_a_file_that_nobody_knows_is_not_added_to(path):
    path.write_text('{"id": "mine"}\n')

    with pytest.raises(OutputError, match=r"answers.jsonl.run.json does not say what made them") as refused:
        run(path)

    assert refused.value.exit_code == 65
    assert path.read_text() == '{"id": "mine"}\n'


def test_an_id_with_another_prompt_is_refused_by_line(path):
    run(path)
    changed = [*REQUESTS[:4], ([7, 7], SamplingParams()), REQUESTS[5]]

    with pytest.raises(OutputError, match=r"answers.jsonl:5: id 'row 4' was answered for another prompt"):
        run(path, requests=changed)


@pytest.mark.parametrize("line", ["not JSON", "[]", '{"no": "id"}'])
def test_a_line_that_is_no_row_is_named(path, line):
    run(path)
    path.write_text(path.read_text() + line + "\n")

    with pytest.raises(OutputError, match=r"answers.jsonl:7: is not a row of answers") as refused:
        run(path)
    assert refused.value.exit_code == 65


def test_a_second_run_of_the_same_file_is_refused(path):
    with AnswerFile.open(path, IDENTITY):
        for attempt in (lambda: check_output(path), lambda: run(path)):
            with pytest.raises(OutputError, match="is being written by another run") as refused:
                attempt()
            assert refused.value.exit_code == 75
    check_output(path)


def test_a_full_disk_keeps_whole_rows_and_says_how_to_go_on(path, monkeypatch):
    run(path)
    whole = path.read_bytes()
    path.unlink()
    size, real = 0, os.write

    def write(descriptor: int, data: bytes) -> int:
        nonlocal size
        if size > 300:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        size += len(data) // 2
        return real(descriptor, data[: max(len(data) // 2, 1)])  # some of it, as a nearly full disk does

    monkeypatch.setattr(batch.os, "write", write)
    with pytest.raises(
        OutputError, match=r"No space left on device; its rows are whole, \d are missing"
    ) as full:
        run(path)
    monkeypatch.undo()

    assert full.value.exit_code == 75
    assert "run the same command again" in full.value.hint
    assert path.read_bytes() in [b"".join(whole.splitlines(keepends=True)[:n]) for n in range(6)]
    run(path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (lambda tmp: tmp / "nowhere" / "out.jsonl", "No such file"),
        (lambda tmp: tmp, "is not an ordinary file"),
    ],
    ids=["a folder that is not there", "a folder"],
)
def test_what_cannot_be_written_is_refused_before_anything_runs(tmp_path, place, reason):
    for attempt in (lambda: check_output(place(tmp_path)), lambda: run(place(tmp_path))):
        with pytest.raises(OutputError, match=reason) as refused:
            attempt()
        assert refused.value.exit_code == 73


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o555)

    with pytest.raises(OutputError, match="Permission denied") as refused:
        check_output(tmp_path / "out.jsonl")
    assert refused.value.exit_code == 73


def test_looking_whether_a_file_can_be_written_leaves_nothing(path):
    check_output(path)

    assert list(path.parent.iterdir()) == []


def test_requests_that_cannot_be_served_are_told_one_by_one():
    rows = [ROWS[0], dataclasses.replace(ROWS[1], prompt=[999]), ROWS[2]]

    found = requests_of(Parrot(), rows, SamplingParams())  # type: ignore[arg-type]

    assert [isinstance(each, DSV4Error) for each in found] == [False, True, False]


def test_rows_to_skip_are_not_asked():
    parrot = Parrot()

    found = [place for place, _ in answer(parrot, REQUESTS, [True, False] * 3)]  # type: ignore[arg-type]

    assert found == [1, 3, 5]
    assert len(parrot.asked) == 3
