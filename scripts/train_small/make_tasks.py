#!/usr/bin/env python3
"""Writes the small model's tasks: problems like those it was trained on, none of the sums among them.

python scripts/train_small/make_tasks.py models/small/tasks              as they are committed
python scripts/train_small/make_tasks.py build/recall --distances 1000 4000 8000 --rows 20
dsv4-jax eval models/small --task-dir models/small/tasks -o build/scores
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np

from dsv4_jax.train import data
from dsv4_jax.train.words import TOKENS

KINDS = {"arithmetic": data.arithmetic, "copy": data.copying, "sort": data.sorting, "close": data.closing}


def text_of(ids: Iterable[int]) -> str:
    return "".join(TOKENS[id] for id in ids).replace("Ġ", " ").replace("Ċ", "\n")


def lines(kind: str, rows: int, level: data.Level, seed: int) -> Iterator[dict]:
    """Single lines, cut where the answer begins."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), len(kind)), rows)
    for row in zip(*map(np.asarray, jax.vmap(lambda key: KINDS[kind](key, level, True))(keys)), strict=True):
        ids, answer, length = row
        start = answer.argmax()
        yield item(text_of(ids[:start]), text_of(ids[start:length]), 16)


def recall(distance: int, rows: int, seed: int) -> Iterator[dict]:
    """Facts and questions, and at the end one for the third fact, which stands so many tokens before."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), distance), rows)
    between = distance // data.FACT - 1
    tokens = 1 + data.FACT * (2 * between + 16)
    for ids in np.asarray(jax.vmap(lambda key: data.recall(key, tokens)[0])(keys)):
        text = ids[1:].reshape(-1, data.FACT)
        at = np.flatnonzero(text[:, 0] == data.SET)[2]
        same_key = (text[:, 1:3] == text[at, 1:3]).all(1)
        after = text[at + 1 :][~same_key[at + 1 :]][:between]
        told = np.concatenate([text[: at + 1], after]).reshape(-1)
        yield item(text_of(told) + text_of([data.GET, *text[at, 1:4]]), text_of(text[at, 4:5]), 4)


def item(prompt: str, target: str, max_tokens: int) -> dict:
    return {"prompt": TOKENS[0] + prompt, "target": target.strip(), "max_tokens": max_tokens, "stop": "\n"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=100, help="of each task")
    parser.add_argument("--items", type=int, default=6, help="in a line, at most")
    parser.add_argument("--digits", type=int, default=2, help="of a number, at most")
    parser.add_argument("--distances", type=int, nargs="*", default=[30, 60, 100], help="of facts, in tokens")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    level = data.Level(arguments.items, arguments.digits)
    tasks = {kind: lines(kind, arguments.rows, level, arguments.seed) for kind in KINDS}
    tasks |= {f"recall_{each}": recall(each, arguments.rows, arguments.seed) for each in arguments.distances}
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tasks.items():
        text = "".join(
            json.dumps({"id": id, **row}, ensure_ascii=False) + "\n" for id, row in enumerate(rows)
        )
        (arguments.folder / f"{name}.jsonl").write_text(text)


if __name__ == "__main__":
    main()
