"""The scores of the small model, by name: what its card shows and its regression test holds it to."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.answers import GenerationOutput
from dsv4_jax.checkpoint.load import LoadedModel, load
from dsv4_jax.compiles import count_compiles
from dsv4_jax.evaluation import faults
from dsv4_jax.evaluation.likelihood import likelihoods
from dsv4_jax.llm import LLM
from dsv4_jax.numerics import OFFICIAL, PLAIN
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.tokenizer import Tokenizer
from dsv4_jax.train import data
from dsv4_jax.train.forward import Setting, Weights, forward
from dsv4_jax.train.problems import SHORT, STOP, Problem, recall, short

NEAR = 100  # tokens between a fact and its question, in the scores that need no long text
DRAFTS = 1, 3
_SEED = 1  # of problems; training has others
_TEXTS, _TOKENS = 16, 512  # whose loss is taken
_ROOM = 256  # tokens of a short problem and its answer


class Timed(NamedTuple):
    """Problems, what was answered, and in how long; compiling is left out."""

    problems: Sequence[Problem]
    outputs: Sequence[GenerationOutput]
    seconds: float

    @property
    def tokens(self) -> list[list[int]]:
        return [each.token_ids for each in self.outputs]

    @property
    def tokens_a_second(self) -> float:
        return sum(map(len, self.tokens)) / self.seconds

    def scores(self) -> dict[str, Any]:
        """Speed; and if there were drafts: tokens a step, and the share that stood by position."""
        speed = {"tokens_a_second": round(self.tokens_a_second, 1)}
        if not (steps := sum(each.draft_steps for each in self.outputs)):
            return speed
        stood = np.sum([each.accepted_at for each in self.outputs if each.accepted_at], axis=0) / steps
        by_position = np.round(stood, 3).tolist()
        return speed | {"tokens_a_step": round(1 + float(stood.sum()), 3), "by_position": by_position}


class Small:
    """The model, and the problems that it is asked.

    Attributes:
      rows: of each task.
      level: how hard its short tasks are.
    """

    def __init__(self, folder: str | Path, *, rows: int, level: data.Level | None = None):
        self.model: LoadedModel = load(folder, mtp=True)
        self.tokenizer = Tokenizer.from_pretrained(folder, self.model.config.vocab_size)
        self.rows, self.level = rows, level or data.Level()

    def serve(self, *, model: LoadedModel | None = None, **options: Any) -> LLM:
        """As it is released: official arithmetic."""
        return LLM(model or self.model, numerics=OFFICIAL, tokenizer=self.tokenizer, **options)

    def problems(self, distance: int = NEAR) -> dict[str, list[Problem]]:
        """Those of the tasks that fit a short text, by task."""
        tasks = {task: list(short(task, self.rows, self.level, _SEED)) for task in SHORT}
        return tasks | {f"recall_{distance}": list(recall(distance, self.rows, _SEED))}

    def exact(self) -> dict[str, float]:
        """The share of right answers, by task."""
        llm = self.serve(max_len=_ROOM)
        return {task: share(ask(llm, each), each) for task, each in self.problems().items()}

    def recall(self, distances: Sequence[int], rows: int) -> dict[str, float]:
        """The share of facts found at so many tokens, by distance."""
        llm = self.serve(max_len=max(distances) + _ROOM, max_batch=4)
        problems = {str(distance): list(recall(distance, rows, _SEED)) for distance in distances}
        return {distance: share(ask(llm, each), each) for distance, each in problems.items()}

    def recall_by_random_choice(self, distances: Sequence[int], rows: int) -> dict[str, float]:
        """As `recall`, of entries drawn at random in place of those that the indexer chooses."""
        with faults.random_choice():
            return self.recall(distances, rows)

    def alone(self, counts: Sequence[int], **options: Any) -> dict[int, dict[str, Timed]]:
        """The problems of short texts, one at a time, by the number of drafts a step and task."""
        options |= {"max_len": _ROOM, "max_batch": 1}
        llms = {drafts: self.serve(draft_tokens=drafts, **options) for drafts in counts}
        tasks = self.problems()
        firsts = [problems[0] for problems in tasks.values()]
        with ThreadPoolExecutor() as pool:  # compiles them side by side
            list(pool.map(lambda llm: ask(llm, firsts), llms.values()))
        return {
            drafts: {task: timed(llm, problems) for task, problems in tasks.items()}
            for drafts, llm in llms.items()
        }

    def drafts(self) -> dict[str, Any]:
        """Of each number of drafts and task: tokens a step, drafts that stood by position, and speed.

        Whether the tokens are those without drafts is asked with `invariant`, as no rounding may decide it.
        """
        counts = 0, *DRAFTS
        exact, timed = self.alone(counts, invariant=True), self.alone(counts)
        return {
            str(drafts): {
                task: each.scores()
                | {
                    "speed_up": round(each.tokens_a_second / timed[0][task].tokens_a_second, 2),
                    "same_tokens": exact[drafts][task].tokens == exact[0][task].tokens,
                }
                for task, each in tasks.items()
            }
            for drafts, tasks in timed.items()
        }

    def loss(self, model: LoadedModel | None = None) -> dict[str, float]:
        """Nats a token of new texts, half of them facts, as the released model reads them; and of answers."""
        ids, task = self._texts()
        llm = self.serve(model=model, max_len=_TOKENS)
        found = likelihoods(llm, [(row, 1) for row in ids.tolist()])
        nats = -np.array([each.logprobs for _, each in found])
        return {"loss": float(nats.mean()), "answer_loss": float(nats[task[:, 1:] > 0].mean())}

    def loss_unquantised(self, masters: Weights) -> float:
        """`loss` of the float32 weights that were quantised, in float32 arithmetic."""
        ids = jnp.asarray(self._texts()[0])
        setting = Setting(self.model.config, PLAIN, choose=True)
        logits = jax.jit(lambda ids: forward(ids, masters, setting)[0])(ids)
        nats = jax.nn.log_softmax(logits[:, :-1])
        return -float(jnp.take_along_axis(nats, ids[:, 1:, None], -1).mean())

    def with_faults(self) -> dict[str, dict[str, float]]:
        """`exact` and `loss`, by the fault that is planted."""
        found = {}
        for name, planted in faults.PLANTED.items():
            with planted():
                found[name] = self.exact() | self.loss()
        whole, self.model = self.model, faults.scale_bytes_shifted(self.model)
        found["scale bytes shifted"] = self.exact() | self.loss()
        self.model = whole
        return found

    def _texts(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids, and to which task each is an answer, as `data.batch`."""
        make = jax.jit(lambda key: data.batch(key, _TEXTS, _TOKENS, 0.5, self.level))
        ids, task = make(jax.random.key(2**31 + _SEED))
        return np.asarray(ids), np.asarray(task)


def ask(llm: LLM, problems: Sequence[Problem]) -> list[GenerationOutput]:
    """Greedy answers."""
    sampling = [
        SamplingParams(temperature=0.0, max_tokens=each.max_tokens, stop=(STOP,)) for each in problems
    ]
    return llm.generate([each.prompt for each in problems], sampling)


def timed(llm: LLM, problems: Sequence[Problem]) -> Timed:
    started = time.perf_counter()
    with count_compiles() as compiles:
        outputs = ask(llm, problems)
    return Timed(problems, outputs, time.perf_counter() - started - compiles.seconds)


def share(outputs: Sequence[GenerationOutput], problems: Sequence[Problem]) -> float:
    """Of answers that are the right ones, letter for letter but for space around them."""
    right = [
        (each.text or "").strip() == problem.target for each, problem in zip(outputs, problems, strict=True)
    ]
    return float(np.mean(right))
