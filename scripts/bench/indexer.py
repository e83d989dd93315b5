#!/usr/bin/env python3
"""Times the indexer at the sizes of Flash: scores of keys in FP4 and in bfloat16, and the choice of the best.

Every case is checked against the reference in the same run: scores of some queries, all of the choices. Of
scores it also says how many queries' choices would differ from those by exact scores, and by how much the
scores of what was traded lie apart.

  python scripts/bench/indexer.py --results scripts/bench/results/h200.json
  python scripts/bench/indexer.py --cases "top-k 512 B=128 keys=8192"
  python scripts/bench/indexer.py --tune --seconds 90    times candidates too
"""

import argparse
import dataclasses
import functools
import math
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from floors import bytes_per_s
from harness import Repeated, facts, save, timed
from profile_kernels import kernel_times
from small_ops import COLD_BYTES, size_bytes

from dsv4_jax.config import FLASH
from pallas_kernels.formats import fake_quantize, quantize
from pallas_kernels.indexer import mosaic, reference, triton
from pallas_kernels.indexer.queries import tile_queries
from pallas_kernels.indexer.top_k import index_top_k

BF16_FLOP_PER_S, FP8_FLOP_PER_S = 8.04e14, 1.48e15
HEADS, CHANNELS, CHOSEN = FLASH.index_n_heads, FLASH.index_head_dim, FLASH.index_topk
ROUND_US, PROGRAM_US = 400, 1500  # about how long a round and one program are to run
CHECKED = 4  # queries whose scores are checked

# Tried by --tune. Scores by Mosaic: fields of Config; top-k: entries of a part, warps, bits of a digit.
PREFILL = (
    "128 4 2 2 2 4, 128 4 2 2 2 5, 64 4 2 2 2 4, 256 4 2 2 2 4, 128 2 2 2 2 8, 128 4 2 4 1 4, 128 2 2 4 1 8"
)
DECODE = "1 1 4 1 8 8, 1 1 4 1 4 4, 1 1 2 2 8 8, 1 1 2 2 4 4, 1 1 2 4 4 4, 1 1 2 1 8 8"
TOP_K = {
    8192: "8192 8 8, 8192 8 9, 8192 8 10, 8192 16 9, 8192 16 10, 8192 16 11, 8192 32 10, 2048 8 9",
    32768: "32768 16 10, 32768 32 9, 32768 32 10, 32768 32 11, 16384 32 10, 8192 16 10",
    4096: "4096 4, 4096 8, 4096 16",
    16384: "16384 8, 16384 16, 16384 32",
    262144: "32768 32, 16384 32, 32768 16",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Scores of `tokens` queries of each sequence, or the choice of the best of as many.

    Attributes:
      id: as in targets.json.
      kind: "fp4", "bf16", or "top-k".
      implementation: of the scores.
    """

    id: str
    batch: int
    tokens: int
    entries: int
    kind: str
    implementation: str = "triton"

    @property
    def size(self) -> tuple[int, int, int, bool]:
        """Cases that are alike in this are prepared together."""
        return self.batch, self.tokens, self.entries, self.kind == "top-k"

    @property
    def label(self) -> str:
        return f"{self.implementation} {self.kind}" if self.kind != "top-k" else self.implementation

    @property
    def floor_us(self) -> float:
        """Of scores: of the arithmetic, or of reading keys and writing scores."""
        pairs = self.batch * self.tokens * self.entries
        if self.kind == "top-k":
            return 4 * pairs / bytes_per_s() * 1e6
        fp4 = self.kind == "fp4"
        rate, of_key = (FP8_FLOP_PER_S, 68) if fp4 else (BF16_FLOP_PER_S, 256)
        of_queries = self.batch * self.tokens * HEADS * CHANNELS * (1 if fp4 else 2)
        bytes = self.batch * self.entries * of_key + of_queries + 4 * pairs
        return 1e6 * max(2 * pairs * HEADS * CHANNELS / rate, bytes / bytes_per_s())

    @functools.cached_property
    def inputs(self) -> list[Any]:
        make = jax.jit(self._made_up)
        first = make(jax.random.key(0, impl="rbg"))
        result = 4 * self.batch * self.tokens * (CHOSEN if self.kind == "top-k" else self.entries)
        copies = min(24, max(2, math.ceil(COLD_BYTES / (size_bytes(first) + result))))
        return [first] + [make(jax.random.key(n, impl="rbg")) for n in range(1, copies)]

    def _made_up(self, key: jax.Array) -> tuple[Any, ...]:
        keys = jax.random.split(key, 3)
        if self.kind == "top-k":
            scores = jax.random.normal(keys[0], (self.batch, self.tokens, self.entries))
            return scores, jnp.full((self.batch, self.tokens), self.entries, jnp.int32)
        q = jax.random.normal(keys[0], (self.batch, self.tokens, HEADS, CHANNELS), jnp.bfloat16)
        q = fake_quantize(q, "fp4_group32")
        numbers = jax.random.normal(keys[1], (self.batch, self.entries, CHANNELS), jnp.bfloat16)
        weights = jax.random.normal(keys[2], (self.batch, self.tokens, HEADS))
        if self.kind == "bf16":
            return q, fake_quantize(numbers, "fp4_group32"), weights
        q, weights = tile_queries(q, weights)
        return q, quantize(numbers, "fp4_group32"), weights

    @property
    def passes(self) -> int:
        """Over the inputs, in a round."""
        return max(1, round(ROUND_US / (self.floor_us + 4) / len(self.inputs)))

    @property
    def rounds(self) -> int:
        return max(2, round(PROGRAM_US / (self.floor_us + 4) / len(self.inputs) / self.passes))

    def run(self, candidate: tuple[int, ...] = ()) -> Callable[..., jax.Array]:
        """The op, cut as the candidate says; as the kernels choose without one."""
        if self.kind == "top-k":
            choices = dict(zip(("part", "num_warps", "digit"), candidate, strict=False))
            return functools.partial(index_top_k, top_k=CHOSEN, **choices)
        if self.implementation == "triton":
            return triton.index_scores
        return functools.partial(mosaic.index_scores, config=mosaic.Config(*candidate) if candidate else None)

    @property
    def candidates(self) -> list[tuple[int, ...]]:
        if self.kind != "top-k" and self.implementation != "mosaic":
            return []
        listed = TOP_K[self.entries] if self.kind == "top-k" else PREFILL if self.tokens > 1 else DECODE
        return [tuple(map(int, each.split())) for each in listed.split(",")]

    def error(self, found: jax.Array) -> tuple[float, str]:
        """Of scores relative to the largest, of choices the share that differs; not a number is infinite."""
        if self.kind == "top-k":
            scores, visible = (each[:, :64] for each in self.inputs[0])
            return float((found[:, :64] != reference.index_top_k(scores, visible, CHOSEN)).mean()), ""
        q, keys, weights = self.inputs[0]
        some = min(CHECKED, self.tokens)
        q, weights = jax.tree.map(lambda leaf: leaf[:1, -some:], (q, weights))
        expected = reference.index_scores(q, jax.tree.map(lambda leaf: leaf[:1], keys), weights)
        mine, theirs = (np.asarray(each, np.float64)[0] for each in (found[:1, -some:], expected))
        apart = np.abs(mine - theirs).max() / np.abs(theirs).max()
        return (float(apart) if np.isfinite(apart) else math.inf), traded(mine, theirs)


def traded(found: np.ndarray, expected: np.ndarray) -> str:
    """What a choice by the scores found does otherwise than one by those expected."""
    count, gap = 0, 0.0
    for mine, theirs in zip(found, expected, strict=True):
        chosen, right = (set(np.argsort(-row, kind="stable")[:CHOSEN].tolist()) for row in (mine, theirs))
        count += len(right - chosen)
        if right - chosen:
            lost, won = max(theirs[list(right - chosen)]), min(theirs[list(chosen - right)])
            gap = max(gap, (lost - won) / np.abs(theirs).max())
    return f", traded {count} of {len(found) * CHOSEN} within {gap:.1e}"


def _cases() -> list[Case]:
    sizes = [("decode B=1 keys=32768", 1, 1, 32768)]
    sizes += [(f"decode B={batch} keys=8192", batch, 1, 8192) for batch in (32, 128)]
    sizes += [("decode B=1 keys=262144", 1, 1, 262144)]
    sizes += [(f"prefill T=4096 keys={keys}", 1, 4096, keys) for keys in (4096, 16384, 32768)]
    scored = [
        Case(f"indexer logits {name}", batch, tokens, entries, kind, implementation)
        for name, batch, tokens, entries in sizes
        for implementation, kind in (("mosaic", "fp4"), ("triton", "fp4"), ("triton", "bf16"))
    ]
    choices = [(128, 1, 8192), (128, 1, 32768), (1, 1, 8192), (1, 1, 32768), (1, 1, 262144)]
    choices += [(1, 4096, 4096), (1, 4096, 16384)]
    return [
        Case(f"top-k {CHOSEN} B={batch * tokens} keys={entries}", batch, tokens, entries, "top-k")
        for batch, tokens, entries in choices
    ] + scored


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A compiled program of a case, and how far its first result is off."""

    case: Case
    program: Repeated
    error: float
    traded: str

    @property
    def right(self) -> bool:
        return self.error <= (0.0 if self.case.kind == "top-k" else 1e-3)

    def times(self) -> dict[str, float]:
        rounds = self.case.rounds
        return timed(lambda: self.program(rounds), rounds * self.program.calls)

    def kernel_us(self) -> float:
        """What the kernels of a call take, by the profiler, without what lies between them."""
        times = kernel_times(lambda: self.program(2), 2 * self.program.calls)
        return sum(us for count, us in times.values() if count > 0.99)


def prepare(case: Case, candidate: tuple[int, ...]) -> Prepared:
    """Compiles and runs once, since a kernel's PTX is assembled on its first run."""
    error, traded = case.error(jax.jit(case.run(candidate))(*case.inputs[0]))
    return Prepared(case, Repeated(case.run(candidate), case.inputs, case.passes), error, traded)


def main() -> int:
    cases = {f"{case.id} {case.label}": case for case in _cases()}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="*", default=[""], help="those whose name contains one of these")
    parser.add_argument("--tune", action="store_true", help="time candidates too; saves no row of them")
    parser.add_argument("--profile", action="store_true", help="print what the kernels take alone, too")
    parser.add_argument("--seconds", type=float, default=60, help="time nothing new after so long")
    parser.add_argument("--results", type=Path, help="JSON file to add rows to")
    arguments = parser.parse_args()
    # Calls that do not depend on each other must not run side by side, as they never do in a model.
    flags = "--xla_gpu_command_buffer_scheduling_mode=SERIALIZE"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"
    started = time.perf_counter()
    chosen = [case for name, case in cases.items() if any(part in name for part in arguments.cases)]
    wrong = 0
    for size in dict.fromkeys(case.size for case in chosen):
        some = [each for each in chosen if each.size == size]
        tried = [
            (case, candidate)
            for case in some
            for candidate in [(), *(case.candidates if arguments.tune else [])]
        ]
        for case in some:
            jax.block_until_ready(case.inputs)  # made once, not by every thread
        with ThreadPoolExecutor(8) as pool:  # all are ready before the first is timed
            futures = [pool.submit(prepare, *each) for each in tried]
        for (case, candidate), future in zip(tried, futures, strict=True):
            label = " ".join(map(str, (case.id, case.label, *candidate)))
            if time.perf_counter() - started > arguments.seconds:
                print(f"{label}: not timed: out of time", flush=True)
                continue
            try:
                prepared = future.result()
                times = prepared.times()
            except Exception as failure:  # what does not fit the chip is a result too
                wrong += not candidate
                print(f"{label}: {type(failure).__name__} {str(failure)[:200]}", flush=True)
                continue
            # Faster than the floor by more than its own uncertainty means that something was not run.
            believed = prepared.right and times["us"] > 0.85 * case.floor_us
            wrong += not believed
            said = f"{times['us']:.2f} us, sustained {times['us_sustained']:.2f}, floor {case.floor_us:.2f}"
            if arguments.profile:
                said += f", kernels {prepared.kernel_us():.2f}"
            doubt = "" if believed else "  NOT BELIEVED"
            print(f"{label}: {said}, error {prepared.error:.1e}{prepared.traded}{doubt}", flush=True)
            if arguments.results and believed and not candidate:
                row = {"id": case.id, "implementation": case.label} | times
                more = {"floor_us": round(case.floor_us, 2), "rel_err": prepared.error}
                save([row | more | facts()], arguments.results)
        for case in some:
            vars(case).pop("inputs", None)
    print(f"# done in {time.perf_counter() - started:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
