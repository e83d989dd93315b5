"""Problems like those that training makes, none of its sums among them, each with its one right answer."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from dsv4_jax.train import data
from dsv4_jax.train.words import TOKENS

SHORT = {"arithmetic": data.arithmetic, "copy": data.copying, "sort": data.sorting, "close": data.closing}
STOP = "\n"


class Problem(NamedTuple):
    """What is asked and what is right, as texts; the answer ends with STOP, within `max_tokens`."""

    prompt: str
    target: str
    max_tokens: int


def short(task: str, rows: int, level: data.Level, seed: int) -> Iterator[Problem]:
    """Single lines of a task of SHORT, cut where the answer begins."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), len(task)), rows)
    lines = jax.jit(jax.vmap(lambda key: SHORT[task](key, level, held_out=True)))(keys)
    for ids, answer, length in zip(*map(np.asarray, lines), strict=True):
        start = answer.argmax()
        yield Problem(TOKENS[0] + text_of(ids[:start]), text_of(ids[start : length - 1]).strip(), 16)


def recall(distance: int, rows: int, seed: int) -> Iterator[Problem]:
    """Facts, and at the end a pair of words that stands so many tokens before, and only there."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), distance), rows)
    between = distance // data.FACT - 1
    tokens = 1 + data.FACT * (2 * between + 32)
    for ids in np.asarray(jax.jit(jax.vmap(lambda key: data.recall(key, tokens)[0]))(keys)):
        facts = ids[1:].reshape(-1, data.FACT)
        at = np.sort(np.unique(facts[:, :2], axis=0, return_index=True)[1])[2]
        others = facts[(facts[:, :2] != facts[at, :2]).any(1) & (np.arange(len(facts)) > at)][:between]
        told = np.concatenate([*facts[: at + 1], *others, facts[at, :2]])
        yield Problem(TOKENS[0] + text_of(told), text_of(facts[at, 2:3]).strip(), 4)


def text_of(ids: Iterable[int]) -> str:
    """What the tokens say."""
    return "".join(TOKENS[id] for id in ids).replace("Ġ", " ").replace("Ċ", "\n")
