"""Runs tasks and scores them; a run that was killed is gone on with by the same call.

A run is a folder: `TASK.jsonl` with a row for each item (the same bytes in every run, see `batch`),
`timings.jsonl` with what differs from run to run, and `results.json` at the end.
"""

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv4_jax.answers import GenerationOutput
from dsv4_jax.batch import Row, answer_to_file, prompt_sha, requests_of, shared
from dsv4_jax.errors import DSV4Error, OutputError, RequestError
from dsv4_jax.evaluation.likelihood import Likelihood, likelihoods
from dsv4_jax.evaluation.statistics import bootstrap, mean_and_error, quantiles, wilson
from dsv4_jax.evaluation.tasks import Task
from dsv4_jax.llm import LLM
from dsv4_jax.prompts import PromptRow
from dsv4_jax.sampling import SamplingParams

_AT_ONCE = 256  # items whose texts are read before their rows are written

Scores = dict[str, Any]


def evaluate(
    llm: LLM,
    tasks: Sequence[Task],
    folder: str | Path,
    *,
    identity: Mapping[str, Any],
    sampling: SamplingParams,
    context: int | None = None,
) -> dict[str, Scores]:
    """Answers and scores what the folder does not hold yet, and gives the scores of each task.

    Args:
      identity: what the rows depend on besides the tasks: model and settings.
      sampling: for items that do not set their own.
      context: tokens that a text to predict is read in at once; by default `max_len` of the model.

    Raises:
      RequestError: an item cannot be served; its line is named, and nothing of its task has run.
      OutputError: the folder cannot be written, or holds a run of something else.
    """
    folder = Path(folder)
    make_folder(folder)
    results = {}
    for task in tasks:
        told = {**identity, "task": task.name, "kind": task.kind}
        watch = _Timings(folder / "timings.jsonl", task.name)
        started = time.perf_counter()
        path = folder / f"{task.name}.jsonl"
        if task.kind == "match":
            told["sampling"] = dataclasses.asdict(sampling)
            rows, new = _answer(llm, task, path, told, sampling, watch)
            scores = _match_scores(task, rows)
        else:
            told["context"] = context
            texts = _choice_texts(llm, task) if task.kind == "choice" else _text_windows(llm, task, context)
            rows, new = _read(llm, task, path, told, texts)
            scores = _choice_scores(task, rows) if task.kind == "choice" else _text_scores(rows)
        watch.close()
        results[task.name] = {"kind": task.kind, "n": len(rows), **scores}
        results[task.name] |= {"seconds": time.perf_counter() - started, "new": new}
    return results


# --- answers


def _answer(
    llm: LLM, task: Task, path: Path, identity: Row, sampling: SamplingParams, watch: "_Timings"
) -> tuple[list[Row], int]:
    prompts = [item.prompt for item in task.items]
    requests = requests_of(llm, prompts, sampling)
    for request in requests:
        if isinstance(request, DSV4Error):
            raise request
    return answer_to_file(llm, prompts, requests, path, identity, watch)  # type: ignore[arg-type]


def _match_scores(task: Task, rows: Sequence[Row]) -> Scores:
    right_of = {item.prompt.id: item for item in task.items}
    right = [float(right_of[row["id"]].is_right(row["text"] or "")) for row in rows]
    mean, error = mean_and_error(right)
    reasons = [row["finish_reason"] for row in rows]
    scores: Scores = {
        "score": mean,
        "stderr": error,
        "interval": wilson(int(sum(right)), len(right)),
        "metric": "exact_match",
        "tokens": sum(len(row["token_ids"]) for row in rows),
        "finish_reasons": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        "wrong": [row["id"] for row, is_right in zip(rows, right, strict=True) if not is_right],
    }
    drafted = [row for row in rows if row.get("draft_steps")]
    if drafted:
        steps = sum(row["draft_steps"] for row in drafted)
        at = np.sum([row["accepted_at"] for row in drafted], axis=0)
        scores["acceptance"] = {
            "by_position": (at / steps).tolist(),
            "mean_length": 1 + float(at.sum()) / steps,
        }
    return scores


# --- likelihoods


@dataclasses.dataclass(frozen=True)
class _Texts:
    """What is read for an item: token ids with where the scored ones start, and the bytes they stand for."""

    pieces: list[tuple[list[int], int]]
    nbytes: list[int]


def _choice_texts(llm: LLM, task: Task) -> list[_Texts]:
    tokenizer = _tokenizer(llm, task)
    one = SamplingParams(max_tokens=1)
    texts = []
    for item in task.items:
        prompt = llm.encode(item.prompt.prompt, one, item.prompt.where, **item.prompt.chat)
        pieces = []
        for choice in item.choices:
            ids = tokenizer.encode_plain(choice)
            if isinstance(item.prompt.prompt, str):
                # As the text as a whole is tokenised; where the two ends melt together the prompt's are kept.
                whole = tokenizer.encode(item.prompt.prompt + choice)
                ids = whole[len(prompt) :] if whole[: len(prompt)] == prompt else ids
            pieces.append(([*prompt, *ids], len(prompt)))
        texts.append(_Texts(pieces, [len(choice.encode()) for choice in item.choices]))
    return texts


def _text_windows(llm: LLM, task: Task, context: int | None) -> list[_Texts]:
    """Each text after a BOS, in windows; from the second on half of a window is what stands before."""
    tokenizer = _tokenizer(llm, task)
    size = min(context or llm.max_len, llm.max_len)
    if size < 4:
        raise RequestError(f"context must be at least 4 tokens, got {size}")
    texts = []
    for item in task.items:
        assert isinstance(item.prompt.prompt, str)
        ids = [llm.model.config.bos_token_id, *tokenizer.encode_plain(item.prompt.prompt)]
        pieces, scored = [], 1
        while scored < len(ids):
            first = 0 if scored == 1 else max(scored - size // 2, 0)
            end = min(first + size, len(ids))
            pieces.append((ids[first:end], scored - first))
            scored = end
        texts.append(_Texts(pieces, [len(item.prompt.prompt.encode())]))
    return texts


def _tokenizer(llm: LLM, task: Task):
    if llm.tokenizer is None:
        raise RequestError(
            f"{task.path}: a task of texts needs a tokenizer, and the checkpoint has no tokenizer.json"
        )
    return llm.tokenizer


def _read(llm: LLM, task: Task, path: Path, identity: Row, texts: Sequence[_Texts]) -> tuple[list[Row], int]:
    """A row of log-probabilities for each item, in order."""
    keys = [
        {"id": item.prompt.id, "prompt_sha": prompt_sha([id for ids, _ in text.pieces for id in ids])}
        for item, text in zip(task.items, texts, strict=True)
    ]
    with shared(path, identity, keys) as (file, known):
        missing = [place for place, row in enumerate(known) if row is None]
        for first in range(0, len(missing), _AT_ONCE):
            places = missing[first : first + _AT_ONCE]
            found = _likelihoods_of(
                llm, [texts[place] for place in places], [task.items[place].prompt for place in places]
            )
            for number, place in enumerate(places):
                row = keys[place] | _likelihood_row(task, texts[place], found[number])
                if file is not None:
                    file.append(row, left=len(missing) - first - number)
                known[place] = row
    return [row for row in known if row is not None], len(missing)


def _likelihoods_of(
    llm: LLM, texts: Sequence[_Texts], prompts: Sequence[PromptRow]
) -> list[list[Likelihood]]:
    pieces = [piece for text in texts for piece in text.pieces]
    names = [prompt.where for prompt, text in zip(prompts, texts, strict=True) for _ in text.pieces]
    found = dict(likelihoods(llm, pieces, names))
    places = iter(range(len(pieces)))
    return [[found[next(places)] for _ in text.pieces] for text in texts]


def _likelihood_row(task: Task, text: _Texts, found: Sequence[Likelihood]) -> Row:
    if task.kind == "choice":
        sums = [math.fsum(each.logprobs) for each in found]
        return {"logprobs": sums, "nbytes": text.nbytes, "greedy": [all(each.greedy) for each in found]}
    logprobs = [logprob for each in found for logprob in each.logprobs]
    return {"logprob_sum": math.fsum(logprobs), "tokens": len(logprobs), "nbytes": text.nbytes[0]}


def _choice_scores(task: Task, rows: Sequence[Row]) -> Scores:
    item_of = {item.prompt.id: item for item in task.items}
    picks = [int(np.argmax(row["logprobs"])) for row in rows]
    by_byte = [int(np.argmax(np.divide(row["logprobs"], row["nbytes"]))) for row in rows]
    answers = [item_of[row["id"]].answer for row in rows]
    right = [float(pick == answer) for pick, answer in zip(picks, answers, strict=True)]
    normal = [float(pick == answer) for pick, answer in zip(by_byte, answers, strict=True)]
    mean, error = mean_and_error(right)
    choices = max(len(item.choices) for item in task.items)
    return {
        "score": mean,
        "stderr": error,
        "interval": wilson(int(sum(right)), len(right)),
        "metric": "accuracy",
        "accuracy_by_byte": float(np.mean(normal)),
        "chance": float(np.mean([1 / len(item.choices) for item in task.items])),
        "picks": np.bincount(picks, minlength=choices).tolist(),
        "wrong": [row["id"] for row, is_right in zip(rows, right, strict=True) if not is_right],
    }


def _text_scores(rows: Sequence[Row]) -> Scores:
    nats, tokens, nbytes = (
        np.array([row[key] for row in rows], float) for key in ("logprob_sum", "tokens", "nbytes")
    )

    def bits_per_byte(places: np.ndarray) -> float:
        return float(-nats[places].sum() / nbytes[places].sum() / math.log(2))

    everything = np.arange(len(rows))
    return {
        "score": bits_per_byte(everything),
        "interval": bootstrap(bits_per_byte, len(rows)),
        "metric": "bits_per_byte",
        "perplexity_per_token": math.exp(min(-nats.sum() / tokens.sum(), 700.0)),
        "perplexity_per_byte": math.exp(min(-nats.sum() / nbytes.sum(), 700.0)),
        "tokens": int(tokens.sum()),
        "nbytes": int(nbytes.sum()),
    }


# --- files


def write_results(folder: str | Path, results: Mapping[str, Any]) -> None:
    """Writes `results.json`, whole or not at all; of several processes the first one does."""
    if jax.process_index():
        return
    path = Path(folder) / "results.json"
    unfinished = path.with_name(".results.json.tmp")
    try:
        unfinished.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
        unfinished.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error


def read_timings(folder: str | Path) -> list[Row]:
    """What `timings.jsonl` of a run holds."""
    rows = []
    path = Path(folder) / "timings.jsonl"
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue  # torn off where a run was killed
    return rows


def timing_scores(rows: Sequence[Row]) -> Scores:
    """First-token times and rates of answers."""
    if not rows:
        return {}
    tokens = sum(row["tokens"] for row in rows)
    rates = [(row["tokens"] - 1) / max(row["seconds"] - row["first_token_seconds"], 1e-9) for row in rows]
    return {
        "first_token_seconds": quantiles([row["first_token_seconds"] for row in rows]),
        "tokens_per_second_of_a_request": quantiles(
            [rate for rate, row in zip(rates, rows, strict=True) if row["tokens"] > 1]
        ),
        "tokens": tokens,
    }


def make_folder(folder: Path) -> None:
    if jax.process_index():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written: {error.strerror}", hint="name a folder, or where one can be made"
        ) from error


class _Timings:
    """Adds a line of timings for each answer; what cannot be written is no loss."""

    def __init__(self, path: Path, task: str):
        self._task, self._file = task, None
        if jax.process_index() == 0:
            self._file = path.open("a")

    def __call__(self, place: int, row: Row, output: GenerationOutput) -> None:
        if self._file is None:
            return
        timed = {"task": self._task, "id": row["id"], "tokens": len(output.token_ids)}
        timed |= {"first_token_seconds": output.first_token_seconds, "seconds": output.seconds}
        self._file.write(json.dumps(timed) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
