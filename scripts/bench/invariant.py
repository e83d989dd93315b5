#!/usr/bin/env python3
"""What `invariant` promises, held on this device: three layers of Flash, made-up weights.

For each number of slots two engines answer the same prompts, with and without drafts. They must agree in each
bit of tokens and logprobs, with each other and with prompts that are asked alone. `generate` is held to the
same with the first number of slots. All compiles at once, in threads. `decode.py --modes invariant` times
what it costs. On one GPU:

  python scripts/bench/invariant.py --slots 1 8

Without a GPU `--model tiny --slots 2` tries it out. Exit code 1: a bit differed that must not.
"""

import argparse
import dataclasses
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from made_up import made_up_params

from dsv4_jax.checkpoint.load import LoadedModel
from dsv4_jax.config import FLASH, TINY, Config
from dsv4_jax.decode import Requests
from dsv4_jax.engine import Engine
from dsv4_jax.generate import generate
from dsv4_jax.numerics import OFFICIAL
from dsv4_jax.sampling import SamplingParams

CONFIGS = {
    "flash": dataclasses.replace(FLASH, num_hidden_layers=3, compress_ratios=(0, 4, 128, 0)),
    "tiny": TINY,
}
MAX_LEN, NEW, MOST_ASKED = 1024, 16, 32

Bits = tuple[list[int], list[float]]


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


def prompts(config: Config, count: int) -> list[list[int]]:
    """Of 1 to 700 tokens: shorter and longer than a piece."""
    random = np.random.default_rng(0)
    return [random.integers(2, config.vocab_size, random.integers(1, 700)).tolist() for _ in range(count)]


def engines(model: LoadedModel, slots: int, drafts: int) -> list[Engine]:
    """Without drafts and with, warm. One after the other: they share programs."""
    made = []
    for k in (0, drafts):
        sizes: dict[str, Any] = {"slots": slots, "max_len": MAX_LEN, "draft_tokens": k}
        engine = Engine(model, numerics=OFFICIAL, invariant=True, **sizes)
        engine.warm_up()
        made.append(engine)
    return made


def answers(engine: Engine, asked: list[list[int]]) -> list[Bits]:
    numbers = [engine.add(ids, greedy(NEW)) for ids in asked]
    found: dict[int, Bits] = {number: ([], []) for number in numbers}
    for event in engine.run():
        found[event.request][0].extend(event.token_ids)
        found[event.request][1].extend(event.logprobs)
    return [found[number] for number in numbers]


def generated(model: LoadedModel, asked: list[list[int]], width: int, k: int) -> list[Bits]:
    """What `generate` gives, with prompts padded to `width`."""
    ids = np.zeros((len(asked), width), np.int32)
    for row, prompt in enumerate(asked):
        ids[row, : len(prompt)] = prompt
    rows = generate(
        model.config,
        OFFICIAL,
        model.params,
        ids,
        np.array([len(prompt) for prompt in asked], np.int32),
        Requests.stack([greedy(NEW)] * len(asked)),
        max_new=NEW,
        max_len=MAX_LEN,
        mtp_params=model.mtp_params if k else None,
        draft_tokens=k,
        invariant=True,
    )
    return list(zip(np.asarray(rows.tokens).tolist(), np.asarray(rows.logprobs).tolist(), strict=True))


def same(found: list[Bits], expected: list[Bits]) -> int:
    return sum(each == other for each, other in zip(found, expected, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(CONFIGS), default="flash")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--drafts", type=int, default=2)
    arguments = parser.parse_args()

    config, drafts = CONFIGS[arguments.model], arguments.drafts
    params, mtp_params = made_up_params(config, mtp=True)
    model = LoadedModel(config, params, mtp_params, None)
    jax.block_until_ready(params)
    wrong = 0
    started = time.perf_counter()
    first = prompts(config, arguments.slots[0])
    with ThreadPoolExecutor() as pool:
        made = {slots: pool.submit(engines, model, slots, drafts) for slots in arguments.slots}
        loops = [pool.submit(generated, model, first, width, k) for width, k in ((700, 0), (900, drafts))]
    agree = same(*(loop.result() for loop in loops))
    wrong += agree < len(first)
    print(f"compiled in {time.perf_counter() - started:.0f} s", flush=True)
    print(f"generate, B={len(first)}: {agree} of {len(first)} rows agree with and without drafts", flush=True)

    for slots in arguments.slots:
        asked = prompts(config, min(2 * slots + 1, MOST_ASKED))
        plain, drafting = made.pop(slots).result()  # their caches go with them
        expected = answers(plain, asked)
        agree = {
            "alone": same([answers(plain, [ids])[0] for ids in asked[:4]], expected[:4]) + len(asked[4:]),
            f"k={drafts}": same(answers(drafting, asked), expected),
        }
        wrong += sum(count < len(asked) for count in agree.values())
        said = ", ".join(f"{name} {count}" for name, count in agree.items())
        print(f"B={slots}: of {len(asked)} answers agree: {said}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
