#!/usr/bin/env python3
"""Times attention to a window of 128 keys and 512 chosen entries, one new token a request and long prompts.

Triton and Mosaic kernels side by side, a few configurations of the latter. Each is checked in the same run:
against the reference on a few queries, against the first of its case on all of them, and against itself, bit
by bit. Calls run one after the other inside one jitted program; those of decoding name rows of their own, and
what they leave of the L2 cache others read. Rows are kept as the model keeps them, in FP8, or in bfloat16.

  python scripts/bench/sparse_attention.py --results scripts/bench/results/h200.json
  python scripts/bench/sparse_attention.py --heads 64 128 --prefill 2048 4096 --forms fp8
  python scripts/bench/sparse_attention.py --turned   with the rotation of the result, as a layer calls it
  python scripts/bench/sparse_attention.py --tune     tries more candidates beside what the tables say
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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from expert_cases import relative_error
from floors import bytes_per_s
from harness import Repeated, facts, save, timed
from profile_kernels import kernel_times, print_kernel_times

from pallas_kernels import KeyValues, current_target, empty_kv, encode_rows
from pallas_kernels.sparse_attention import mosaic, reference, triton
from pallas_kernels.sparse_attention.mosaic_config import HEADS, PAIRS, Config, Sizes, config_for
from pallas_kernels.sparse_attention.tilings import Tiling, tiling_for

WINDOW, CHOSEN, CHANNELS = 128, 512, 512
KEYS = WINDOW + CHOSEN
SCALE = CHANNELS**-0.5
ENTRIES = 4096  # of a prompt: those of 16k tokens
BF16_FLOP_PER_S = 8.04e14
# Of keys between two uses of one, for the L2 cache holds 60 MB; what the most requests leave, others read.
COLD_BYTES, MOST_SETS = 100e6, 12
PROGRAM_US = 3000  # about how long one is to run
ROW_BYTES = {"bf16": 1024, "fp8": 584}
MOST_ERROR = 4e-3  # relative: weights, parts and the result in bfloat16, each 1.7e-3 at most

# Tried by --tune, by the most queries they are for: heads, keys, splits, warps, stages.
TILINGS = {
    1: "16 32 20 4 1, 16 32 20 4 2, 16 32 20 8 1, 16 64 10 4 1, 16 16 40 4 1, 32 32 20 4 1, 64 32 20 8 1",
    8: "16 32 20 4 1, 16 32 20 4 2, 16 32 10 4 2, 16 64 10 4 1, 32 32 20 4 1, 64 32 20 8 1, 64 64 10 8 1",
    32: "64 32 4 8 3, 64 64 5 8 3, 64 32 5 8 3, 64 64 4 8 3, 16 32 5 4 3, 16 32 4 4 2, 32 32 4 4 3",
    128: "64 64 1 8 3, 64 32 1 8 3, 64 32 1 8 4, 64 64 2 8 3, 32 32 1 4 3, 16 32 1 4 3",
    4096: "64 64 1 8 3, 64 64 1 8 2, 64 32 1 8 3, 64 32 1 8 4, 32 32 1 4 3",
}
# Always tried, likewise.
CONFIGS = {
    1: [Config(5)],
    8: [Config(5), Config(3, look=False)],
    32: [Config(2, look=False), Config(3, look=False)],
    128: [Config(look=False)],
    4096: [Config(slack=0.0)],
}

Variant = Tiling | Config  # of the Triton kernels, of Mosaic's
Request = tuple[jax.Array, jax.Array, jax.Array]  # q, window_index, compressed_index
Cache = tuple[KeyValues, KeyValues, jax.Array, Any]  # window_kv, compressed_kv, attn_sink, turns or None


@dataclasses.dataclass(eq=False)
class Case:
    """So many sequences with so many new tokens each; the first tokens of a "start" see fewer keys."""

    kind: str
    batch: int
    tokens: int
    heads: int
    form: str
    turned: bool

    @property
    def id(self) -> str:
        kind, size = (
            ("decode", f"B={self.batch}") if self.kind == "decode" else ("prefill", f"T={self.tokens}")
        )
        more = "" if self.heads == 64 else f" H={self.heads}"
        # A step reads what caches keep; of a prompt's rows some are there as numbers, so all are made so.
        usual = "fp8" if self.kind == "decode" else "bf16"
        more += " from 0" * (self.kind == "start") + f" {self.form}" * (self.form != usual)
        more += " turned" * self.turned
        return f"sparse attention {kind} {size} keys={KEYS}{more}"

    @property
    def queries(self) -> int:
        return self.batch * self.tokens

    @property
    def floor_us(self) -> float:
        """The longer of moving all keys that are named, queries and the result once, and of the products."""
        named = self.batch * KEYS if self.kind == "decode" else WINDOW + self.tokens + ENTRIES
        bytes_ = ROW_BYTES[self.form] * named + 4 * self.queries * (self.heads * CHANNELS + KEYS)
        present = self.queries * KEYS if self.kind != "start" else int(_present(self.tokens).sum())
        flop = 4 * self.heads * present * CHANNELS
        return max(bytes_ / bytes_per_s(), flop / BF16_FLOP_PER_S) * 1e6

    @functools.cached_property
    def sets(self) -> int:
        if self.tokens > 1:
            return 1
        return min(MOST_SETS, max(2, math.ceil(COLD_BYTES / (self.batch * KEYS * ROW_BYTES[self.form]))))

    @functools.cached_property
    def others(self) -> jax.Array:
        """What a pass over the requests reads besides: little, or enough to empty the L2 cache."""
        named = self.sets * self.batch * KEYS * ROW_BYTES[self.form]
        return jnp.ones(1 if self.tokens > 1 or named >= COLD_BYTES else int(COLD_BYTES / 4))

    @functools.cached_property
    def cache(self) -> Cache:
        rows, entries = self.tokens + WINDOW - 1, ENTRIES
        if self.kind == "decode":
            rows, entries = self.sets * WINDOW, self.sets * CHOSEN
        keys = jax.random.split(jax.random.key(self.queries, impl="rbg"), 4)

        @functools.partial(jax.jit, static_argnums=1)
        def made_up(key: jax.Array, slots: int) -> KeyValues:
            format, dtype = "fp8_block64" if self.form == "fp8" else None, jnp.bfloat16
            numbers = jax.random.normal(key, (self.batch, slots, CHANNELS), dtype)
            return encode_rows(numbers, empty_kv(self.batch, slots, CHANNELS, format, 2 * PAIRS, dtype))

        angles = jax.random.uniform(keys[3], (self.batch, self.tokens, PAIRS), maxval=1e4)
        turns = (jnp.cos(angles), jnp.sin(angles)) if self.turned else None
        sinks = jax.random.normal(keys[2], (self.heads,))
        return made_up(keys[0], rows), made_up(keys[1], entries), sinks, turns

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
        compressed_index = scattered % ENTRIES
        if self.kind == "start":
            recent, chosen = _present(self.tokens).T[:, :, None]
            window_index = jnp.where(jnp.arange(WINDOW) < WINDOW - recent, -1, window_index)
            compressed_index = jnp.where(jnp.arange(CHOSEN) < chosen, compressed_index, -1)
        return q, window_index[None], compressed_index

    @property
    def rounds(self) -> int:
        return max(2, round(PROGRAM_US / (self.floor_us + 5) / self.sets))

    def error(self, out: jax.Array) -> float:
        """Relative to the reference in float32, for the first, the middle and the last query."""
        return relative_error(self._some(out).astype(jnp.float32), self._expected)

    @functools.cached_property
    def _expected(self) -> jax.Array:
        @jax.jit
        def expected(request: Request, cache: Cache) -> jax.Array:
            q, window_index, compressed_index = map(self._some, request)
            window_kv, compressed_kv, sink, turns = cache
            window_kv, compressed_kv, turns = jax.tree.map(
                self._of_batches, (window_kv, compressed_kv, turns)
            )
            turns = jax.tree.map(self._of_tokens, turns)
            keys = window_kv, window_index, compressed_kv, compressed_index
            return reference.sparse_attention(q.astype(jnp.float32), *keys, sink, turns, SCALE)

        return expected(self.requests[0], self.cache)

    def _some(self, array: jax.Array) -> jax.Array:
        return self._of_tokens(self._of_batches(array))

    def _of_batches(self, array: jax.Array) -> jax.Array:
        return array[jnp.array(sorted({0, self.batch // 2, self.batch - 1}))]

    def _of_tokens(self, array: jax.Array) -> jax.Array:
        return array[:, jnp.array(sorted({0, self.tokens // 2, self.tokens - 1}))]

    def prepare(self, variant: Variant):
        """A program of many calls, how many, the result of one and its error; runs the op twice."""
        # A jitted function is lowered once, however often the program calls it.
        one = jax.jit(functools.partial(attend, variant=variant))

        def run(requests: list[Request], cache: Cache, others: jax.Array) -> list[jax.Array]:
            return [others.sum(), *(one(request, cache) for request in requests)]

        out, again = (one(self.requests[0], self.cache) for _ in range(2))
        error = self.error(out) if (out == again).all() else float("nan")
        program = Repeated(run, [(self.requests, self.cache, self.others)], 1)
        return functools.partial(program, self.rounds), self.rounds * self.sets, out, error

    def others_us(self) -> float:
        """What a program without requests takes, of the time of each."""
        if self.others.size == 1:
            return 0.0
        inputs = [(self.requests, self.cache, self.others)]
        program = Repeated(lambda requests, cache, others: [others.sum()], inputs, 1)
        return timed(lambda: program(self.rounds), self.rounds)["us"] / self.sets


def _present(tokens: int) -> np.ndarray:
    """[tokens, 2]: how many recent keys and chosen entries each token of a prompt sees."""
    before = np.arange(1, tokens + 1)
    return np.stack([np.minimum(before, WINDOW), np.minimum(before // 4, CHOSEN)], 1)


def attend(request: Request, cache: Cache, variant: Variant) -> jax.Array:
    q, window_index, compressed_index = request
    window_kv, compressed_kv, sink, turns = cache
    arguments = (q, window_kv, window_index, compressed_kv, compressed_index, sink, turns, SCALE)
    if isinstance(variant, Config):
        return mosaic.sparse_attention(*arguments, variant)
    return triton.sparse_attention(*arguments, variant)


@jax.jit
def difference(out: jax.Array, other: jax.Array) -> jax.Array:
    """Relative, of the query where it is largest."""
    out, other = (array.astype(jnp.float32).reshape(-1, *array.shape[2:]) for array in (out, other))
    difference, size = (jnp.linalg.norm(array, axis=(1, 2)) for array in (out - other, other))
    return (difference / size).max()


def tables(case: Case) -> dict[str, Variant]:
    """What each implementation would choose."""
    sizes = Sizes(case.batch, case.tokens, case.heads // HEADS, 0, WINDOW, ENTRIES, CHOSEN)
    tiling = tiling_for(current_target().arch, case.queries, case.heads, KEYS)
    return {"triton": tiling, "mosaic": config_for(sizes)}


def variants(case: Case, tune: bool) -> list[Variant]:
    """The tables', some configs, and with `tune` candidate tilings; Triton's goes first."""
    most = min(most for most in TILINGS if most >= min(case.queries, 4096))
    tilings = [Tiling(*map(int, each.split())) for each in TILINGS[most].split(",")] if tune else []
    chosen = tables(case)
    configs = [chosen["mosaic"], *CONFIGS[most]] if CONFIGS[most] else []
    return list(dict.fromkeys([chosen["triton"], *configs, *tilings]))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 8, 32, 128], help="batch sizes")
    parser.add_argument("--prefill", type=int, nargs="*", default=[4096], help="prompt lengths")
    parser.add_argument("--heads", type=int, nargs="*", default=[64])
    parser.add_argument("--forms", nargs="*", choices=list(ROW_BYTES), default=list(ROW_BYTES))
    parser.add_argument("--turned", action="store_true", help="turn results back by their angles")
    parser.add_argument("--mosaic-only", action="store_true", help="leave the Triton kernels out")
    parser.add_argument(
        "--tune", action="store_true", help="time candidate tilings too; saves no row of them"
    )
    parser.add_argument("--profile", action="store_true", help="print the kernels of a call and their times")
    parser.add_argument("--results", type=Path, help="JSON file to add rows to")
    arguments = parser.parse_args()
    # Calls that do not depend on each other must not run side by side, as they never do in a model.
    flags = "--xla_gpu_command_buffer_scheduling_mode=SERIALIZE --xla_gpu_autotune_level=0"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"
    started = time.perf_counter()

    # Prompts take the same kernel whatever the number of groups of 64 heads.
    kinds = [("decode", batch, 1, heads) for heads in arguments.heads for batch in arguments.decode]
    kinds += [
        (kind, 1, tokens, min(arguments.heads))
        for kind in ("prefill", "start")
        for tokens in arguments.prefill
    ]
    cases = [Case(*kind, form, arguments.turned) for kind in kinds for form in arguments.forms]
    some = [
        (case, variant)
        for case in cases
        for variant in variants(case, arguments.tune)
        if isinstance(variant, Config) or not arguments.mosaic_only
    ]
    with ThreadPoolExecutor(16) as pool:
        # All are compiled before any is timed: a compiling host disturbs the clock.
        jax.block_until_ready([(case.requests, case.cache) for case in cases])
        futures = [pool.submit(some[0][0].prepare, some[0][1])]
        futures[0].exception()  # waits: the first also imports what all of them share
        futures += [pool.submit(case.prepare, variant) for case, variant in some[1:]]
        prepared = {
            each: future for each, future in zip(some, futures, strict=True) if not future.exception()
        }
        for (case, variant), future in zip(some, futures, strict=True):
            if failure := future.exception():  # one that does not fit the chip is a result too
                print(f"{case.id} {variant} {type(failure).__name__} {str(failure)[:150]}", flush=True)
    print(f"# compiled; {time.perf_counter() - started:.0f} s", flush=True)

    rows, wrong, here = [], 0, facts()
    for case in cases:
        chosen, first, others_us = tables(case), None, 0.0
        for variant in (variant for each, variant in some if each is case):
            name = "mosaic" if isinstance(variant, Config) else "triton"
            if (case, variant) not in prepared:
                wrong += variant == chosen[name]
                continue
            run, calls, out, error = prepared.pop((case, variant)).result()
            first = out if first is None else first
            others_us = others_us or case.others_us()
            times = {name: round(us - others_us, 2) for name, us in timed(run, calls).items()}
            off = float(difference(out, first))
            right = error <= MOST_ERROR and off <= 2 * MOST_ERROR
            wrong += not right
            doubt = "" if right and times["us"] > 0.85 * case.floor_us else "  NOT BELIEVED"
            mark = "*" if variant == chosen[name] else " "
            print(
                f"{case.id:48} {name} {' '.join(map(str, variant)):20}{mark} {times['us']:8.2f} us"
                f" (others {others_us:.2f}), sustained {times['us_sustained']:8.2f},"
                f" floor {case.floor_us:7.2f}, error {error:.1e} {off:.1e}{doubt}",
                flush=True,
            )
            if variant == chosen[name] and not doubt:
                row = {"id": case.id, "implementation": name, **times}
                row |= {"floor_us": round(case.floor_us, 2), "rel_err": error, "tiling": list(variant)}
                rows.append(row | here)
                if arguments.profile:
                    print_kernel_times(case.id, kernel_times(run, calls))
        if arguments.results:
            save(rows, arguments.results)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
