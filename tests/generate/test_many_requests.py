"""A thousand requests, sixteen at a time: each gets what it gets alone, and nothing compiles or leaks.

Takes some seven minutes on two cores, so it is not among the tests that `scripts/test` runs:

  .venv/bin/python -m pytest -n 0 -s -m slow tests/generate/test_many_requests.py
"""

import ctypes
import dataclasses
import gc
import sys
import time

import jax
import numpy as np
import psutil
import pytest

from dsv4_jax.compiles import count_compiles
from dsv4_jax.engine import STEPS_ON_GPU, Engine, Event
from dsv4_jax.numerics import OFFICIAL
from dsv4_jax.sampling import SamplingParams

MOST_PROMPT, MOST_NEW, SLOTS = 2000, 300, 16
OUTSTANDING = 3 * SLOTS  # requests that wait or run at most
GOES_ON, REASONS = -1, ("stop", "length", "error", "cancelled")


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked, and after how many of its tokens it is cancelled, if ever; 0: before the next step."""

    ids: list[int]
    sampling: SamplingParams
    cancelled_after: int | None


def made_up(number: int) -> Request:
    """Any length of prompt and answer, half of all below 45 and 5 tokens; every kind of sampling."""
    random = np.random.default_rng(number)

    def up_to(most: int, power: int) -> int:
        return int(np.exp(random.uniform() ** power * np.log(most + 1)))

    sampling = SamplingParams(
        max_tokens=up_to(MOST_NEW, 2),
        temperature=float(random.choice([0.0, 0.0, 0.7, 1.3])),
        top_k=int(random.choice([0, 0, 20])),
        top_p=float(random.choice([1.0, 1.0, 0.9])),
        min_p=float(random.choice([0.0, 0.0, 0.05])),
        seed=int(random.integers(2**32)),
        ignore_eos=bool(random.integers(2)),
    )
    ids = random.integers(2, 512, up_to(MOST_PROMPT, 1)).tolist()
    cancelled = number % 20 == 7
    return Request(ids, sampling, int(random.integers(sampling.max_tokens)) if cancelled else None)


class Answers:
    """What came of each request, in arrays that are there from the start: holding it takes no more memory."""

    def __init__(self, count: int):
        self.tokens = np.full((count, MOST_NEW), -1, np.int32)
        self.logprobs = np.full((count, MOST_NEW), np.nan, np.float32)
        self.count = np.full(count, 0, np.int32)
        self.reason = np.full(count, GOES_ON, np.int32)

    def take(self, row: int, event: Event) -> None:
        assert self.reason[row] == GOES_ON  # nothing comes after the end
        start, end = self.count[row], self.count[row] + len(event.token_ids)
        self.tokens[row, start:end], self.logprobs[row, start:end] = event.token_ids, event.logprobs
        self.count[row] = end
        if event.finish_reason is not None:
            self.reason[row] = REASONS.index(event.finish_reason)

    def of(self, row: int) -> tuple[list[int], list[float], str]:
        count = self.count[row]
        reason = REASONS[self.reason[row]]
        return self.tokens[row, :count].tolist(), self.logprobs[row, :count].tolist(), reason


def serve(engine: Engine, requests: list[Request], answers: Answers, first: int) -> None:
    """Runs `requests`, which come in at random times; their answers go to rows from `first` on."""
    random = np.random.default_rng(first)
    rows: dict[int, int] = {}
    coming = list(enumerate(requests, first))[::-1]
    by_row = dict(coming)
    while coming or engine.busy:
        for _ in range(random.integers(4)):
            if coming and len(rows) < OUTSTANDING:
                row, request = coming.pop()
                number = engine.add(request.ids, request.sampling)
                rows[number] = row
                if request.cancelled_after == 0:
                    engine.cancel(number)
        for event in engine.step():
            row = rows[event.request]
            answers.take(row, event)
            if event.finish_reason is not None:
                del rows[event.request]
            elif answers.count[row] >= (by_row[row].cancelled_after or MOST_NEW):
                engine.cancel(event.request)


def alone(engine: Engine, request: Request) -> tuple[list[int], list[float], str]:
    answers = Answers(1)
    number = engine.add(request.ids, request.sampling)
    for event in engine.run():
        assert event.request == number
        answers.take(0, event)
    return answers.of(0)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Of this process: bytes, JAX arrays, and Python objects that can hold others.

    Attributes:
      held: what was asked for and not given back, of C's allocator and of Python's.
      resident: what that and all else has in memory, free parts among it. XLA takes each program's workspace
        from the allocator, on many threads, and the arena of each thread keeps what it once had: this grows
        for a while, then no more.
    """

    held: int
    resident: int
    arrays: int
    objects: int

    @classmethod
    def now(cls) -> "Memory":
        gc.collect()
        held = _allocated() + 64 * sys.getallocatedblocks()  # blocks of Python's are of 16 to 512 bytes
        resident = psutil.Process().memory_info().rss
        return cls(held, resident, len(jax.live_arrays()), len(gc.get_objects()))


class _Mallinfo2(ctypes.Structure):
    _fields_ = (("numbers", ctypes.c_size_t * 10),)


def _allocated() -> int:
    """Bytes in use by glibc's count: `hblkhd`, what it mapped for one alone, and `uordblks`, the rest."""
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = _Mallinfo2
    numbers = ask().numbers
    return numbers[4] + numbers[7]


@pytest.mark.slow
@pytest.mark.parametrize(("draft_tokens", "count"), [(0, 1000), (2, 200)], ids=["k=0", "k=2"])
def test_many_requests(tiny_fp4, shallow, draft_tokens, count):
    model = shallow(tiny_fp4.loaded, 0, 1, 2)
    config = dataclasses.replace(model.config, max_position_embeddings=4096)
    engine = Engine(
        dataclasses.replace(model, config=config),
        numerics=OFFICIAL,
        slots=SLOTS,
        max_len=MOST_PROMPT + MOST_NEW,
        draft_tokens=draft_tokens,
        steps_at_once=STEPS_ON_GPU,
    )
    engine.warm_up()
    requests, answers, first = [made_up(number) for number in range(count)], Answers(count), count // 2

    begin = time.perf_counter()
    with count_compiles() as compiles:
        serve(engine, requests[:first], answers, 0)
        before = Memory.now()
        serve(engine, requests[first:], answers, first)
        after = Memory.now()
        served = time.perf_counter()
        expected = [alone(engine, request) for request in requests]

    reasons = [answers.of(row)[2] for row in range(count)]
    print(
        f"\nk={draft_tokens}: {count} requests in {served - begin:.0f} s, {len(expected)} alone in"
        f" {time.perf_counter() - served:.0f} s; {sum(len(each.ids) for each in requests)} tokens read,"
        f" {answers.count.sum()} generated; {', '.join(f'{reasons.count(each)} {each}' for each in REASONS)};"
        f" held {before.held / 2**20:.1f} -> {after.held / 2**20:.1f} MiB,"
        f" resident {before.resident / 2**20:.0f} -> {after.resident / 2**20:.0f},"
        f" {before.arrays} -> {after.arrays} arrays, {before.objects} -> {after.objects} objects;"
        f" {compiles.count} compiles"
    )
    for row, (tokens, logprobs, reason) in enumerate(expected):
        found = answers.of(row)
        if found[2] == "cancelled":
            so_far = len(found[0])
            tokens, logprobs, reason = tokens[:so_far], logprobs[:so_far], "cancelled"
        assert found == (tokens, logprobs, reason), f"request {row}"
    assert set(reasons) == {"stop", "length", "cancelled"}
    # A request that left something behind would leave an array or an object, or a part of its slot's caches.
    assert after.arrays == before.arrays
    assert after.objects - before.objects < (count - first) / 10
    assert after.held - before.held < (count - first) * engine.cache_bytes / SLOTS / 10
    assert compiles.count == 0
