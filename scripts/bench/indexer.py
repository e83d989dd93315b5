#!/usr/bin/env python3
"""Times the indexer at the sizes of Flash: scores of bfloat16 and FP8 operands, and the choice of the best.

Every case is checked against the reference in the same run: scores of three queries, all of the choices.

  python scripts/bench/indexer.py --results scripts/bench/results/h200.json
  python scripts/bench/indexer.py --cases "top-k 512 B=128 keys=8192"
  python scripts/bench/indexer.py --tune --seconds 90    times candidates too
"""

import argparse
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parent))

from harness import facts, median_us, save
from small_ops import COLD_BYTES, COPY_BYTES_PER_S, program, size_bytes

from dsv4_jax.config import FLASH
from pallas_kernels.formats import fake_quantize, quantize
from pallas_kernels.indexer import reference
from pallas_kernels.indexer.scores import Tiling, index_scores
from pallas_kernels.indexer.top_k import index_top_k

BF16_FLOP_PER_S, FP8_FLOP_PER_S = 8.04e14, 1.48e15
HEADS, CHANNELS, CHOSEN = FLASH.index_n_heads, FLASH.index_head_dim, FLASH.index_topk
PROGRAM_US = 4000  # about how long one program is to run
CHECKED = 3  # queries whose scores are checked

# Tried by --tune. Scores: keys, queries, steps, in registers, warps, stages; top-k: entries of a part, warps.
PREFILL = (
    "128 1 32 1 4 4, 128 1 128 1 4 4, 128 1 64 0 4 3, 128 1 32 0 4 4, 128 2 32 0 4 3, 128 2 32 1 4 3, "
    "256 1 64 0 8 3, 256 1 64 1 8 4, 256 2 32 0 8 3, 64 1 64 1 4 4, 64 2 32 1 4 3"
)
DECODE = (
    "128 1 1 0 4 1, 128 1 2 0 4 2, 128 1 4 0 4 3, 128 1 8 0 4 4, 128 1 16 0 4 3, 64 1 1 0 4 1, 64 1 2 0 4 2, "
    "64 1 8 0 4 4, 64 1 16 0 4 5, 256 1 2 0 8 2, 256 1 4 0 8 3"
)
TOP_K = {
    8192: "8192 8, 8192 32, 4096 8, 4096 16, 2048 4",
    32768: "32768 16, 16384 16, 16384 32, 8192 16, 8192 32, 4096 8",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Scores of `tokens` queries of each sequence, or with `tokens` 0 the choice of the best of one query's.

    Attributes:
      id: as in targets.json.
      operands: "bf16" or "fp8".
    """

    id: str
    batch: int
    tokens: int
    entries: int
    operands: str = ""

    @property
    def floor_us(self) -> float:
        """Of scores: of the arithmetic, or of reading keys and writing scores, causal in a prompt."""
        if not self.tokens:
            return self.batch * self.entries * 4 / COPY_BYTES_PER_S * 1e6
        pairs = self.batch * self.tokens * self.entries
        rate = FP8_FLOP_PER_S if self.operands == "fp8" else BF16_FLOP_PER_S
        width = 1 if self.operands == "fp8" else 2
        read = self.batch * (self.entries + self.tokens * HEADS) * CHANNELS * width + 4 * pairs
        return 1e6 * max(2 * pairs * HEADS * CHANNELS / rate, read / COPY_BYTES_PER_S)

    @functools.cached_property
    def inputs(self) -> list[Any]:
        one = jax.eval_shape(self._made_up, jax.random.key(0, impl="rbg"))
        copies = min(8, max(2, math.ceil(COLD_BYTES / size_bytes(one))))
        if self.tokens > 1:
            copies = 2
        return [jax.jit(self._made_up)(jax.random.key(n, impl="rbg")) for n in range(copies)]

    def _made_up(self, key: jax.Array) -> tuple[Any, ...]:
        keys = jax.random.split(key, 3)
        if not self.tokens:
            scores = jax.random.normal(keys[0], (self.batch, 1, self.entries))
            return scores, jnp.full((self.batch, 1), self.entries, jnp.int32)

        def operand(key: jax.Array, *sizes: int) -> Any:
            values = fake_quantize(jax.random.normal(key, sizes, jnp.bfloat16), "fp4_group32")
            return quantize(values, "fp8_token128") if self.operands == "fp8" else values

        q = operand(keys[0], self.batch, self.tokens, HEADS, CHANNELS)
        weights = jax.random.normal(keys[2], (self.batch, self.tokens, HEADS))
        return q, operand(keys[1], self.batch, self.entries, CHANNELS), weights

    def run(self, candidate: tuple[int, ...] = ()) -> Callable[..., jax.Array]:
        """The op, cut as the candidate says; as the kernels choose without one."""
        if self.tokens:
            if not candidate:
                return index_scores
            keys, queries, steps, in_registers, *rest = candidate
            return functools.partial(
                index_scores, tiling=Tiling(keys, queries, steps, bool(in_registers), *rest)
            )
        choices = dict(zip(("part", "num_warps"), candidate, strict=False))
        return functools.partial(index_top_k, top_k=CHOSEN, **choices)

    @property
    def candidates(self) -> list[tuple[int, ...]]:
        listed = (PREFILL if self.tokens > 1 else DECODE) if self.tokens else TOP_K[self.entries]
        return [tuple(map(int, each.split())) for each in listed.split(",")]

    def error(self, found: jax.Array) -> float:
        """Of scores relative, of choices the share that differs; not a number counts as infinite."""
        if not self.tokens:
            scores, visible = self.inputs[0]
            return float((found != reference.index_top_k(scores, visible, CHOSEN)).mean())
        q, keys, weights = self.inputs[0]
        some = min(CHECKED, self.tokens)
        last = jax.tree.map(lambda leaf: leaf[:1, -some:], (q, weights))
        expected = reference.index_scores(last[0], jax.tree.map(lambda leaf: leaf[:1], keys), last[1])
        apart = jnp.linalg.norm(found[:1, -some:] - expected) / jnp.linalg.norm(expected)
        return float(jnp.where(jnp.isfinite(apart), apart, jnp.inf))


def _cases() -> list[Case]:
    sizes = [("decode B=1 keys=32768", 1, 1, 32768)]
    sizes += [(f"decode B={batch} keys=8192", batch, 1, 8192) for batch in (32, 128)]
    sizes += [(f"prefill T=4096 keys={keys}", 1, 4096, keys) for keys in (4096, 16384, 32768)]
    scored = [
        Case(f"indexer logits {name}", batch, tokens, entries, kind)
        for name, batch, tokens, entries in sizes
        for kind in ("bf16", "fp8")
    ]
    choices = [(128, 8192), (128, 32768), (1, 8192)]
    return [Case(f"top-k {CHOSEN} B={b} keys={s}", b, 0, s) for b, s in choices] + scored


def prepare(case: Case, candidate: tuple[int, ...]) -> tuple[Any, float]:
    """The compiled program and its error; runs it once, since PTX is assembled on the first run."""
    compiled = program(case.run(candidate)).lower(case.inputs, jnp.int32(1)).compile()
    return compiled, case.error(compiled(case.inputs, jnp.int32(1))[0])


def time_us(case: Case, compiled: Any) -> float:
    """Of one call: what more rounds take longer than one, so that starting the program does not count."""

    def of(rounds: int) -> float:
        count = jnp.int32(rounds)
        return median_us(lambda: compiled(case.inputs, count), repeats=5)

    once = of(1)
    more = max(2, round(PROGRAM_US / once))
    return (of(1 + more) - once) / (more * len(case.inputs))


def main() -> int:
    cases = {f"{case.id} {case.operands}".strip(): case for case in _cases()}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="*", choices=list(cases), default=list(cases), metavar="CASE")
    parser.add_argument("--tune", action="store_true", help="time candidates too; saves no row of them")
    parser.add_argument("--seconds", type=float, default=60, help="time nothing new after so long")
    parser.add_argument("--results", type=Path, help="JSON file to add rows to")
    arguments = parser.parse_args()
    started = time.perf_counter()
    tried = [
        (cases[name], candidate)
        for name in arguments.cases
        for candidate in [(), *(cases[name].candidates if arguments.tune else [])]
    ]
    for name in arguments.cases:
        jax.block_until_ready(cases[name].inputs)  # made once, not by every thread
    with ThreadPoolExecutor(16) as pool:  # all are ready before the first is timed
        futures = [pool.submit(prepare, *each) for each in tried]
    print(f"# compiled and checked after {time.perf_counter() - started:.0f} s", flush=True)
    for (case, candidate), future in zip(tried, futures, strict=True):
        if time.perf_counter() - started > arguments.seconds:
            print("# stopped: out of time", flush=True)
            break
        label = " ".join(map(str, (case.id, case.operands, *candidate)))
        try:
            compiled, error = future.result()
            us = time_us(case, compiled)
        except Exception as failure:  # what does not fit the chip is a result too
            print(f"{label}: {type(failure).__name__} {str(failure)[:200]}", flush=True)
            continue
        most = 2e-3 if case.operands == "fp8" else 1e-5 if case.tokens else 0.0
        # Faster than the floor by more than its own uncertainty means that something was not run.
        doubt = "" if error <= most and us > 0.85 * case.floor_us else "  NOT BELIEVED"
        print(f"{label}: {us:.2f} us, floor {case.floor_us:.2f}, error {error:.1e}{doubt}", flush=True)
        if arguments.results and not doubt and not candidate:
            row = {"id": case.id, "implementation": f"triton {case.operands}".strip(), "us": round(us, 2)}
            more = {"floor_us": round(case.floor_us, 2), "rel_err": error}
            save([row | more | facts()], arguments.results)
    print(f"# done in {time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
