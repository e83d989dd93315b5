"""Error bars, tasks, and scores from rows."""

import math

import numpy as np
import pytest

from dsv4_jax.errors import RequestError
from dsv4_jax.evaluation.runner import _match_scores, _text_scores, timing_scores
from dsv4_jax.evaluation.statistics import bootstrap, mean_and_error, quantiles, wilson
from dsv4_jax.evaluation.tasks import find_tasks, read_task


def test_a_mean_has_its_standard_error():
    mean, error = mean_and_error([0.0, 1.0, 1.0, 0.0])

    assert mean == 0.5
    assert error == pytest.approx(math.sqrt(1 / 3) / 2)
    assert mean_and_error([3.0]) == (3.0, 0.0)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilsons_interval(right, n, low, high):
    assert wilson(right, n) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_a_bootstrap_covers_the_mean_and_repeats_itself():
    values = np.random.default_rng(1).normal(size=200)

    low, high = bootstrap(lambda places: float(values[places].mean()), 200)

    error = values.std() / math.sqrt(200)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)
    assert (low, high) == bootstrap(lambda places: float(values[places].mean()), 200)


def test_quantiles_of_nothing_are_nothing():
    assert quantiles([]) == {}
    assert quantiles([1.0, 3.0]) == {"p50": 2.0, "p99": pytest.approx(2.98), "max": 3.0}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "task.jsonl"


def test_answers_match_exactly_by_prefix_or_by_holding_the_target(path):
    path.write_text(
        '{"id": 1, "prompt": "a", "target": "42"}\n'
        '{"id": 2, "prompt": "a", "target": ["42", "43"], "match": "prefix"}\n'
        '{"id": 3, "prompt": "a", "target": "42", "match": "contains"}\n'
    )
    task = read_task(path)

    def right(text: str) -> list[bool]:
        return [item.is_right(text) for item in task.items]

    assert (task.kind, task.name) == ("match", "task")
    assert right(" 42\n") == [True, True, True]
    assert right("43 of them") == [False, True, False]
    assert right("it is 42") == [False, False, True]
    assert [item.prompt.id for item in read_task(path, limit=2).items] == [1, 2]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"prompt": "a"}', 'must have "target", "choices" or "text"'),
        ('{"prompt": "a", "target": ""}', "target must be a text, or texts"),
        ('{"prompt": "a", "target": []}', "target must be a text, or texts"),
        ('{"prompt": "a", "target": "b", "match": "fuzzy"}', "match must be one of exact, prefix, contains"),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}', "choices must be two texts or more"),
        (
            '{"prompt": "a", "choices": ["b", "c"], "answer": 2}',
            r"answer must be an integer in \[0, 2\), got 2",
        ),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": true}', "answer must be an integer"),
        ('{"text": "a", "prompt": "b"}', "'prompt' does not go with \"text\""),
        ('{"text": ""}', "prompt is empty"),
        ('{"text": "a", "tempo": 1}', "unknown key 'tempo'"),
        ('{"target": "a"}', 'must have either "prompt"'),
    ],
)
def test_a_row_that_is_not_of_a_task_is_named_by_its_line(path, row, said):
    path.write_text("\n" + row + "\n")

    with pytest.raises(RequestError, match=rf"task.jsonl:2: .*{said}") as refused:
        read_task(path)
    assert refused.value.exit_code == 65


def test_rows_of_two_kinds_and_ids_given_twice_are_refused(path):
    path.write_text('{"text": "a"}\n{"prompt": "a", "target": "b"}\n')
    with pytest.raises(RequestError, match=r":2: a row of kind 'match' in a task of kind 'text'"):
        read_task(path)
    path.write_text('{"id": 2, "text": "a"}\n{"text": "b"}\n')
    with pytest.raises(RequestError, match=r":2: id 2 is already that of line 1"):
        read_task(path)
    path.write_text("\n")
    with pytest.raises(RequestError, match="holds no rows"):
        read_task(path)


def test_tasks_are_found_by_file_or_by_name(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}\n')

    assert [path.stem for path in find_tasks([], tmp_path)] == ["a", "b"]
    assert find_tasks(["b"], tmp_path) == [tmp_path / "b.jsonl"]
    with pytest.raises(RequestError, match=r"no task is called 'c' \(there are a, b\)") as refused:
        find_tasks(["c"], tmp_path)
    assert refused.value.exit_code == 66


def test_acceptance_is_counted_by_position(path):
    path.write_text('{"id": 0, "prompt": "a", "target": "b"}\n{"id": 1, "prompt": "a", "target": "c"}\n')
    row = {"text": "b", "finish_reason": "stop", "token_ids": [1, 2], "draft_steps": 4, "accepted_at": [3, 1]}

    scores = _match_scores(read_task(path), [{**row, "id": 0}, {**row, "id": 1, "accepted_at": [1, 1]}])

    assert scores["acceptance"] == {"by_position": [0.5, 0.25], "mean_length": 1.75}
    assert scores["wrong"] == [1]
    assert scores["score"] == 0.5


def test_bits_per_byte_are_over_all_texts_together():
    nats = math.log(2)
    rows = [
        {"logprob_sum": -8 * nats, "tokens": 4, "nbytes": 4},
        {"logprob_sum": -4 * nats, "tokens": 2, "nbytes": 8},
    ]

    scores = _text_scores(rows)

    assert scores["score"] == pytest.approx(1.0)
    assert scores["perplexity_per_token"] == pytest.approx(4.0)
    assert scores["perplexity_per_byte"] == pytest.approx(2.0)
    low, high = scores["interval"]
    assert 0.5 <= low <= 1 <= high <= 2


def test_speed_of_a_request_is_that_after_its_first_token():
    rows = [{"tokens": 11, "seconds": 3.0, "first_token_seconds": 1.0}]

    assert timing_scores(rows)["tokens_per_second_of_a_request"]["p50"] == pytest.approx(5.0)
    assert timing_scores([]) == {}
