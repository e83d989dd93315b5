#!/usr/bin/env python3
"""Times attention to a window of 128 keys and 512 chosen entries, one new token a request and long prompts.

Every case is checked against the reference on a few queries in the same run. Calls run one after the other
inside one jitted program; those of decoding name rows of their own, together more than the L2 cache holds.

  python scripts/bench/sparse_attention.py --results scripts/bench/results/h200.json
  python scripts/bench/sparse_attention.py --tune     tries candidates beside what the table says
  python scripts/bench/sparse_attention.py --profile  shows which kernels a call consists of
"""

import argparse
import dataclasses
import functools
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parent))

from expert_mlp import program, relative_error
from harness import facts, median_us, save
from profile_kernels import kernel_times, print_kernel_times

from pallas_kernels import current_target
from pallas_kernels.sparse_attention import reference
from pallas_kernels.sparse_attention import triton as kernels
from pallas_kernels.sparse_attention.tilings import Tiling, tiling_for

WINDOW, CHOSEN, CHANNELS = 128, 512, 512
KEYS = WINDOW + CHOSEN
SCALE = CHANNELS**-0.5
ENTRIES = 4096  # of a prompt: those of 16k tokens
COPY_BYTES_PER_S = 4.3e12  # what a plain copy reaches on an H200
BF16_FLOP_PER_S = 8.04e14
COLD_BYTES = 100e6  # of keys between two uses of one; the L2 cache holds 60 MB
PROGRAM_US = 20_000  # how long one program of a measurement runs, so that starting it does not count
MOST_ERROR = 4e-3  # relative: weights, parts and the result in bfloat16, each 1.7e-3 at most

# Tried by --tune, by the most queries they are for: heads, keys, splits, warps, stages.
CANDIDATES = {
    1: "16 32 20 4 1, 16 32 20 4 2, 16 32 20 8 1, 16 64 10 4 1, 16 16 40 4 1, 32 32 20 4 1, 64 32 20 8 1",
    8: "16 32 20 4 1, 16 32 20 4 2, 16 32 10 4 2, 16 64 10 4 1, 32 32 20 4 1, 64 32 20 8 1, 64 64 10 8 1",
    32: "64 32 4 8 3, 64 64 5 8 3, 64 32 5 8 3, 64 64 4 8 3, 16 32 5 4 3, 16 32 4 4 2, 32 32 4 4 3",
    128: "64 64 1 8 3, 64 32 1 8 3, 64 32 1 8 4, 64 64 2 8 3, 32 32 1 4 3, 16 32 1 4 3",
    4096: "64 64 1 8 3, 64 64 1 8 2, 64 32 1 8 3, 64 32 1 8 4, 32 32 1 4 3",
}

Request = tuple[jax.Array, jax.Array, jax.Array]  # q, window_index, compressed_index
Cache = tuple[jax.Array, jax.Array, jax.Array]  # window_kv, compressed_kv, attn_sink


@dataclasses.dataclass(eq=False)
class Case:
    """So many sequences with so many new tokens each."""

    kind: str
    batch: int
    tokens: int
    heads: int

    @property
    def id(self) -> str:
        size = f"B={self.batch}" if self.kind == "decode" else f"T={self.tokens}"
        heads = "" if self.heads == 64 else f" H={self.heads}"
        return f"sparse attention {self.kind} {size} keys={KEYS}{heads}"

    @property
    def queries(self) -> int:
        return self.batch * self.tokens

    @property
    def floor_us(self) -> float:
        """The longer of moving all keys that are named, queries and the result once, and of the products."""
        named = self.batch * KEYS if self.kind == "decode" else WINDOW + self.tokens + ENTRIES
        bytes_ = 2 * CHANNELS * (named + 2 * self.queries * self.heads) + 4 * self.queries * KEYS
        flop = 4 * self.queries * self.heads * KEYS * CHANNELS
        return max(bytes_ / COPY_BYTES_PER_S, flop / BF16_FLOP_PER_S) * 1e6

    @functools.cached_property
    def sets(self) -> int:
        return max(2, math.ceil(COLD_BYTES / (self.batch * KEYS * 2 * CHANNELS))) if self.tokens == 1 else 1

    @functools.cached_property
    def cache(self) -> Cache:
        rows, entries = self.tokens + WINDOW - 1, ENTRIES
        if self.kind == "decode":
            rows, entries = self.sets * WINDOW, self.sets * CHOSEN
        keys = jax.random.split(jax.random.key(self.queries, impl="rbg"), 3)
        window_kv = jax.random.normal(keys[0], (self.batch, rows, CHANNELS), jnp.bfloat16)
        compressed_kv = jax.random.normal(keys[1], (self.batch, entries, CHANNELS), jnp.bfloat16)
        return window_kv, compressed_kv, jax.random.normal(keys[2], (self.heads,))

    @functools.cached_property
    def requests(self) -> list[Request]:
        make = jax.jit(self._request)
        return [make(jnp.int32(n)) for n in range(self.sets)]

    def _request(self, n: jax.Array) -> Request:
        """The n-th: no two of decoding name the same row. Entries are scattered, none is named twice."""
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1, impl="rbg"), n), 3)
        shape = (self.batch, self.tokens)
        q = jax.random.normal(keys[0], (*shape, self.heads, CHANNELS), jnp.bfloat16)
        start = jax.random.randint(keys[1], (*shape, 1), 0, ENTRIES)
        step = 2 * jax.random.randint(keys[2], (*shape, 1), 0, ENTRIES // 2) + 1
        scattered = start + step * jnp.arange(CHOSEN)
        if self.kind == "decode":
            window_index = jnp.broadcast_to(n * WINDOW + jnp.arange(WINDOW), (*shape, WINDOW))
            return q, window_index, n + self.sets * (scattered % CHOSEN)
        window_index = jnp.arange(self.tokens)[:, None] + jnp.arange(WINDOW)
        return q, window_index[None], scattered % ENTRIES

    def rounds(self, guess_us: float) -> int:
        return max(1, round(PROGRAM_US / (guess_us * self.sets)))

    def error(self, tiling: Tiling) -> float:
        """Relative to the reference in float32, for the first, the middle and the last query."""
        q, window_index, compressed_index = self.requests[0]
        window_kv, compressed_kv, sink = self.cache
        out = attend(self.requests[0], self.cache, tiling)
        batches = jnp.array(sorted({0, self.batch // 2, self.batch - 1}))
        tokens = jnp.array(sorted({0, self.tokens // 2, self.tokens - 1}))

        def some(array: jax.Array) -> jax.Array:
            return array[batches][:, tokens]

        expected = reference.sparse_attention(
            some(q).astype(jnp.float32),
            *(window_kv[batches], some(window_index), compressed_kv[batches], some(compressed_index)),
            *(sink, SCALE),
        )
        return relative_error(some(out).astype(jnp.float32), expected)

    def prepare(self, tiling: Tiling):
        """A program of many calls, how many, and its error; runs the op once."""
        error = self.error(tiling)
        rounds = self.rounds(2 * self.floor_us + 8)
        # A jitted function is lowered once, however often the program calls it.
        run = jax.jit(functools.partial(attend, tiling=tiling))
        compiled = program(run, rounds).lower(self.requests, self.cache).compile()
        return functools.partial(compiled, self.requests, self.cache), rounds * self.sets, error


def attend(request: Request, cache: Cache, tiling: Tiling) -> jax.Array:
    q, window_index, compressed_index = request
    window_kv, compressed_kv, sink = cache
    arguments = (q, window_kv, window_index, compressed_kv, compressed_index, sink, SCALE)
    return kernels.sparse_attention(*arguments, tiling)


def tilings(case: Case, tune: bool) -> list[Tiling]:
    """The table's, and with `tune` the candidates."""
    chosen = tiling_for(current_target().arch, case.queries, case.heads, KEYS)
    listed = CANDIDATES[min(most for most in CANDIDATES if most >= min(case.queries, 4096))]
    others = [Tiling(*map(int, each.split())) for each in listed.split(",")] if tune else []
    return [chosen, *(each for each in others if each != chosen)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 8, 32, 128], help="batch sizes")
    parser.add_argument("--prefill", type=int, nargs="*", default=[2048, 4096], help="prompt lengths")
    parser.add_argument("--heads", type=int, nargs="*", default=[64, 128])
    parser.add_argument(
        "--tune", action="store_true", help="time candidate tilings too; saves no row of them"
    )
    parser.add_argument("--profile", action="store_true", help="print the kernels of a call and their times")
    parser.add_argument("--seconds", type=float, default=60, help="start no new case after so long")
    parser.add_argument("--results", type=Path, help="JSON file to add rows to")
    arguments = parser.parse_args()
    # Calls that do not depend on each other must not run side by side, as they never do in a model.
    flags = "--xla_gpu_command_buffer_scheduling_mode=SERIALIZE"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"
    started = time.perf_counter()

    cases = [Case("decode", batch, 1, heads) for heads in arguments.heads for batch in arguments.decode]
    # Prompts take the same kernel whatever the number of groups of 64 heads.
    cases += [Case("prefill", 1, tokens, min(arguments.heads)) for tokens in arguments.prefill]
    rows, wrong, here = [], 0, facts()
    with ThreadPoolExecutor(16) as pool:
        for case in cases:
            if time.perf_counter() - started > arguments.seconds:
                print(f"# stopped before {case.id}: out of time", flush=True)
                break
            jax.block_until_ready((case.requests, case.cache))
            some = tilings(case, arguments.tune)
            futures = [pool.submit(case.prepare, some[0])]
            futures[0].exception()  # waits: the first also imports what all of them share
            futures += [pool.submit(case.prepare, each) for each in some[1:]]
            # All are compiled before any is timed: a compiling host disturbs the clock.
            failures = [future.exception() for future in futures]
            for tiling, future, failure in zip(some, futures, failures, strict=True):
                what = f"{case.id:44} {' '.join(map(str, tiling)):16}"
                if failure:  # a tiling that does not fit the chip is a result too, unless it is the table's
                    wrong += tiling == some[0]
                    print(f"{what} {type(failure).__name__} {str(failure)[:150]}", flush=True)
                    continue
                prepared, calls, error = future.result()
                us = median_us(prepared, repeats=5) / calls
                right = error <= MOST_ERROR
                wrong += not right
                doubt = "" if right and us > 0.85 * case.floor_us else "  NOT BELIEVED"
                print(
                    f"{what} {us:9.2f} us  floor {case.floor_us:7.2f}  error {error:.1e}{doubt}", flush=True
                )
                if tiling == some[0]:
                    row = {"id": case.id, "implementation": "triton", "us": round(us, 2)}
                    row |= {"floor_us": round(case.floor_us, 2), "rel_err": error, "tiling": list(tiling)}
                    rows += [row | here] if not doubt else []
                    if arguments.profile:
                        print_kernel_times(case.id, kernel_times(prepared, calls))
            del case.cache, case.requests  # makes room for the next case
            print(f"# {case.id}: {time.perf_counter() - started:.0f} s", flush=True)
    if arguments.results:
        save(rows, arguments.results)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
