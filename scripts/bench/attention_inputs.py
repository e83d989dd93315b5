#!/usr/bin/env python3
"""Times what stands around attention, at the sizes of Flash: kernels, and references as XLA fuses them.

Up to 128 tokens are a decode step, a token of each sequence; more are one sequence's prefill. The first
sequence of a step completes an entry, of the others one in `ratio` does. Calls run one after the other inside
one jitted program, on inputs of their own. Every case is checked against the reference, compiled so that it
rounds wherever the definition does; how XLA compiles it otherwise is what is timed.

  python scripts/bench/attention_inputs.py --results scripts/bench/results/h200.json
  python scripts/bench/attention_inputs.py --ops query key_value --tokens 1
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

sys.path.insert(0, str(Path(__file__).parent))

from harness import facts, median_us, save
from small_ops import COLD_BYTES, COPY_BYTES_PER_S, Inputs, error, program, size_bytes

from dsv4_jax.config import FLASH
from dsv4_jax.nn.rope import rope_angles, rope_frequencies
from pallas_kernels import (
    attention_key_value,
    attention_query,
    attention_unrotate,
    compressed_entries,
    index_query,
)

MOST_INPUTS = {"triton": 16, "reference": 4}  # a reference is several kernels, which take long to compile
PROGRAM_US = 4000  # about how long one program is to run
MOST_STEPS = 128  # more tokens than so many are one sequence
LAST = 2**20  # where the longest text ends
EPS, PAIRS = FLASH.rms_norm_eps, FLASH.qk_rope_head_dim // 2


@dataclasses.dataclass(frozen=True)
class Op:
    """An op at the sizes of Flash.

    Attributes:
      inputs: makes those of so many sequences and tokens of each, from a key.
      run: the op, which takes them and `implementation`.
      most_error: relative to the reference, all numbers together: a rounding to bfloat16 that goes the other
        way is 2^-8 of a number, and may move another to the next code of FP8 or FP4, up to a third of it.
      bytes: what inputs of so many sequences and tokens must be read, where it is not all.
    """

    inputs: Callable[[jax.Array, int, int], Inputs]
    run: Callable[..., jax.Array]
    most_error: float
    bytes: Callable[[int, int], int] | None = None


def rotation(start: jax.Array, tokens: int, every: int = 1) -> tuple[jax.Array, jax.Array]:
    angles = rope_angles(start[:, None] + every * jnp.arange(tokens), rope_frequencies(FLASH, 4))
    return jnp.cos(angles), jnp.sin(angles)


def start_of(batch: int, tokens: int) -> jax.Array:
    return LAST - tokens - jnp.arange(batch, dtype=jnp.int32)


def norm_weight(key: jax.Array, size: int) -> jax.Array:
    return (1 + jax.random.normal(key, (size,)) / 8).astype(jnp.bfloat16)


def of_heads(heads: int, width: int) -> Callable[[jax.Array, int, int], Inputs]:
    def inputs(key: jax.Array, batch: int, tokens: int) -> Inputs:
        q = jax.random.normal(key, (batch, tokens, heads, width), jnp.bfloat16)
        return q, *rotation(start_of(batch, tokens), tokens)

    return inputs


def of_key_value(key: jax.Array, batch: int, tokens: int) -> Inputs:
    kv = jax.random.normal(key, (batch, tokens, FLASH.head_dim), jnp.bfloat16)
    return kv, norm_weight(key, FLASH.head_dim), *rotation(start_of(batch, tokens), tokens)


def of_entries(ratio: int, width: int) -> Op:
    windows = 2 if ratio == 4 else 1  # with ratio 4 they overlap

    def inputs(key: jax.Array, batch: int, tokens: int) -> Inputs:
        new, ring = (batch, tokens, windows * width), (batch, windows * ratio, windows * width)
        keys = jax.random.split(key, 4)
        rows = [jax.random.normal(one, size) for one, size in zip(keys, (new, new, ring, ring), strict=True)]
        start, length = start_of(batch, tokens), jnp.full(batch, tokens, jnp.int32)
        turns = rotation(start // ratio * ratio, -(-tokens // ratio), ratio)
        return *rows, start, length, norm_weight(key, width), *turns

    def read(batch: int, tokens: int) -> int:
        entries = batch * tokens // ratio if tokens > 1 else -(-batch // ratio)
        return entries * 2 * 4 * windows * ratio * width

    for_index = width == FLASH.index_head_dim
    format = "fp4_group32" if for_index else "fp8_block64"
    settings = {"ratio": ratio, "eps": EPS, "for_index": for_index, "format": format}
    run = functools.partial(compressed_entries, **settings)
    return Op(inputs, run, 5e-3 if for_index else 2e-3, read)


HEADS, HEAD_DIM = FLASH.num_attention_heads, FLASH.head_dim
INDEX_HEADS, INDEX_DIM = FLASH.index_n_heads, FLASH.index_head_dim
OPS = {
    "query": Op(of_heads(HEADS, HEAD_DIM), functools.partial(attention_query, eps=EPS), 2e-4),
    "unrotate": Op(of_heads(HEADS, HEAD_DIM), attention_unrotate, 2e-4),
    "key_value": Op(
        of_key_value, functools.partial(attention_key_value, eps=EPS, format="fp8_block64"), 2e-3
    ),
    "index_query": Op(
        of_heads(INDEX_HEADS, INDEX_DIM), functools.partial(index_query, format="fp4_group32"), 5e-3
    ),
    "CSA entries": of_entries(4, HEAD_DIM),
    "CSA index entries": of_entries(4, INDEX_DIM),
    "HCA entries": of_entries(128, HEAD_DIM),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """An op on so many tokens."""

    name: str
    tokens: int

    @property
    def id(self) -> str:
        return f"{self.name} flash N={self.tokens}"

    @property
    def op(self) -> Op:
        return OPS[self.name]

    @property
    def sizes(self) -> tuple[int, int]:
        """Sequences, and tokens of each."""
        return (self.tokens, 1) if self.tokens <= MOST_STEPS else (1, self.tokens)

    @functools.cached_property
    def inputs(self) -> list[Inputs]:
        def make(key: jax.Array) -> Inputs:
            return self.op.inputs(key, *self.sizes)

        each = size_bytes(jax.eval_shape(make, jax.random.key(0)))
        count = min(max(MOST_INPUTS.values()), max(2, math.ceil(COLD_BYTES / each)))
        return [jax.jit(make)(jax.random.fold_in(jax.random.key(self.tokens), n)) for n in range(count)]

    @functools.cached_property
    def expected(self) -> jax.Array:
        run = functools.partial(self.op.run, implementation="reference")
        strictly = {"xla_allow_excess_precision": False}
        return jax.jit(run, compiler_options=strictly)(*self.inputs[0])

    @property
    def floor_us(self) -> float:
        """Reading what is read and writing what is written, once."""
        read = self.op.bytes(*self.sizes) if self.op.bytes else size_bytes(self.inputs[0])
        return (read + size_bytes(self.expected)) / COPY_BYTES_PER_S * 1e6


def prepare(case: Case, implementation: str) -> tuple[Any, list[Inputs], float, float]:
    """The compiled program, what it takes, its error, and the share of numbers that are not the same.

    Runs it once, since PTX is assembled on the first run.
    """
    inputs = case.inputs[: MOST_INPUTS[implementation]]
    run = functools.partial(case.op.run, implementation=implementation)
    compiled = program(run).lower(inputs, jnp.int32(1)).compile()
    found = compiled(inputs, jnp.int32(1))[0]
    return compiled, inputs, error(found, case.expected), float((found != case.expected).mean())


def time_us(compiled: Any, inputs: list[Inputs]) -> float:
    """Of one call: what more rounds take longer than one, so that starting the program does not count."""

    def of(rounds: int) -> float:
        count = jnp.int32(rounds)
        return median_us(lambda: compiled(inputs, count), repeats=7)

    once = of(1)
    more = max(8, round(PROGRAM_US / once))
    return (of(1 + more) - once) / (more * len(inputs))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", choices=list(OPS), nargs="*", default=list(OPS))
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 32, 128, 4096])
    parser.add_argument("--implementations", nargs="*", default=["triton", "reference"])
    parser.add_argument("--seconds", type=float, default=55, help="time no new case after so long")
    parser.add_argument("--results", type=Path, help="JSON file to add rows to")
    arguments = parser.parse_args()
    started = time.perf_counter()

    rows, wrong, here = [], 0, facts()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for tokens in arguments.tokens:  # the inputs of many tokens are large: not all cases at once
            some = [Case(name, tokens) for name in arguments.ops]
            for case in some:
                jax.block_until_ready((case.inputs, case.expected))
            jobs = [(case, implementation) for case in some for implementation in arguments.implementations]
            futures = [pool.submit(prepare, *jobs[0])]
            futures[0].exception()  # waits: the first also imports what all of them share
            futures += [pool.submit(prepare, *job) for job in jobs[1:]]
            # All are compiled before any is timed: a compiling host disturbs the clock.
            failures = [future.exception() for future in futures]
            for (case, implementation), future, failure in zip(jobs, futures, failures, strict=True):
                if failure:
                    wrong += 1
                    print(f"{case.id:28} {implementation:10} {type(failure).__name__} {str(failure)[:200]}")
                    continue
                if time.perf_counter() - started > arguments.seconds:
                    continue
                compiled, inputs, off, differ = future.result()
                us, floor = time_us(compiled, inputs), case.floor_us
                # A reference that XLA compiles as it likes leaves roundings out, and is not the definition.
                right = off <= case.op.most_error or implementation == "reference"
                wrong += not right
                doubt = "" if right and us > 0.85 * floor else "  NOT BELIEVED"
                what = f"{case.id:28} {implementation:10} {us:9.2f} us  floor {floor:7.2f}"
                print(f"{what}  error {off:.1e}, {differ:.1e} of the numbers{doubt}", flush=True)
                row = {"id": case.id, "implementation": implementation, "us": round(us, 2)}
                row |= {"floor_us": float(f"{floor:.2g}"), "rel_err": off} | here
                rows += [row] if not doubt else []
            print(f"# {tokens} tokens: {time.perf_counter() - started:.0f} s", flush=True)
    if arguments.results:
        save(rows, arguments.results)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
