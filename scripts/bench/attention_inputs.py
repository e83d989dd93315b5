#!/usr/bin/env python3
"""Times what stands around attention, at the sizes of Flash: kernels, and references as XLA fuses them.

Up to 128 tokens are a decode step, a token of each sequence; more are one sequence's prefill. The first
sequence of a step completes an entry, of the others one in `ratio` does. What an op writes into is not given
away here, so that its copy counts; caches have room for no more than what is written. Every case is checked
against the reference, compiled so that it rounds wherever the definition does; how XLA compiles it otherwise
is what is timed.

  python scripts/bench/attention_inputs.py --results scripts/bench/results/h200.json
  python scripts/bench/attention_inputs.py --ops query latents --tokens 1
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

from floors import bytes_per_s
from harness import Repeated, facts, save, timed
from small_ops import COLD_BYTES, error, size_bytes

from dsv4_jax.config import FLASH
from dsv4_jax.nn.rope import rope_frequencies
from dsv4_jax.nn.rope import rotation as turns_of
from pallas_kernels import (
    attention_latents,
    attention_query,
    attention_unrotate,
    compressed_entries,
    index_query,
)
from pallas_kernels.cached_rows import empty_index_keys, empty_kv

MOST_INPUTS = {"triton": 16, "reference": 4}  # a reference is several kernels, which take long to compile
ROUND_US, PROGRAM_US = 400, 1500  # about how long a round and one program are to run
MOST_STEPS = 128  # more tokens than so many are one sequence
Inputs = tuple[Any, ...]
EPS, PAIRS = FLASH.rms_norm_eps, FLASH.qk_rope_head_dim // 2


@dataclasses.dataclass(frozen=True)
class Op:
    """An op at the sizes of Flash.

    Attributes:
      inputs: makes those of so many sequences and tokens of each, from a key.
      run: the op, which takes them and `implementation`.
      most_error: relative to the reference, all numbers together: a rounding to bfloat16 that goes the other
        way is 2^-8 of a number, and may move another to the next code of FP8 or FP4, up to a third of it.
    """

    inputs: Callable[[jax.Array, int, int], Inputs]
    run: Callable[..., Any]
    most_error: float


def rotation(start: jax.Array, tokens: int, every: int = 1) -> tuple[jax.Array, jax.Array]:
    return turns_of(start[:, None] + every * jnp.arange(tokens), rope_frequencies(FLASH, 4))


def starts(batch: int, tokens: int, ratio: int = 4) -> jax.Array:
    """A step's tokens complete the first sequence's entry; a prompt begins at its beginning."""
    return (ratio - 1 if tokens == 1 else 0) + jnp.arange(batch, dtype=jnp.int32)


def norm_weight(key: jax.Array, size: int) -> jax.Array:
    return (1 + jax.random.normal(key, (size,)) / 8).astype(jnp.bfloat16)


def of_heads(heads: int, width: int, *projected: int) -> Callable[[jax.Array, int, int], Inputs]:
    """Of vectors of each head, and products of so many columns besides."""

    def inputs(key: jax.Array, batch: int, tokens: int) -> Inputs:
        q = jax.random.normal(key, (batch, tokens, heads, width), jnp.bfloat16)
        products = [jax.random.normal(key, (batch, tokens, columns)) for columns in projected]
        return q, *products, *rotation(starts(batch, tokens), tokens)

    return inputs


def of_latents(key: jax.Array, batch: int, tokens: int) -> Inputs:
    x = jax.random.normal(key, (batch, tokens, FLASH.q_lora_rank + HEAD_DIM), jnp.bfloat16)
    window = empty_kv(batch, FLASH.sliding_window, HEAD_DIM, "fp8_block64", 2 * PAIRS, jnp.bfloat16)
    start, length = starts(batch, tokens), jnp.full(batch, tokens, jnp.int32)
    weights = norm_weight(key, FLASH.q_lora_rank), norm_weight(key, HEAD_DIM)
    return x, *weights, window, start, length, *rotation(start, tokens)


def of_entries(ratio: int, width: int) -> Op:
    windows = 2 if ratio == 4 else 1  # with ratio 4 they overlap
    for_index = width == FLASH.index_head_dim
    format = "fp4_group32" if for_index else "fp8_block64"

    def inputs(key: jax.Array, batch: int, tokens: int) -> Inputs:
        channels, slots = windows * width, (ratio + batch + tokens) // ratio + 1
        ring = (batch, windows * ratio, channels)
        keys = jax.random.split(key, 4)
        projected = jax.random.normal(keys[0], (batch, tokens, 2 * channels))
        ape = jax.random.normal(keys[1], (ratio, channels))
        if for_index:
            entries = empty_index_keys(batch, slots, width, format, jnp.bfloat16)
        else:
            entries = empty_kv(batch, slots, width, format, 2 * PAIRS, jnp.bfloat16)
        rings = [jax.random.normal(one, ring) for one in keys[2:]]
        start, length = starts(batch, tokens, ratio), jnp.full(batch, tokens, jnp.int32)
        turns = rotation(start // ratio * ratio, -(-tokens // ratio), ratio)
        return projected, ape, entries, *rings, start, length, norm_weight(key, width), *turns

    settings = {"column": 0, "eps": EPS, "for_index": for_index, "format": format}
    return Op(inputs, functools.partial(compressed_entries, **settings), 5e-3 if for_index else 2e-3)


HEADS, HEAD_DIM = FLASH.num_attention_heads, FLASH.head_dim
INDEX_HEADS, INDEX_DIM = FLASH.index_n_heads, FLASH.index_head_dim
LATENTS = {"eps": EPS, "format": "fp8_block64", "activation": "fp8_token128"}
OPS = {
    "query": Op(of_heads(HEADS, HEAD_DIM), functools.partial(attention_query, eps=EPS), 2e-4),
    "unrotate": Op(of_heads(HEADS, HEAD_DIM), attention_unrotate, 2e-4),
    "latents": Op(of_latents, functools.partial(attention_latents, **LATENTS), 2e-3),
    "index_query": Op(
        of_heads(INDEX_HEADS, INDEX_DIM, INDEX_HEADS),
        functools.partial(index_query, column=0, format="fp4_group32"),
        5e-3,
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
    def expected(self) -> Any:
        run = functools.partial(self.op.run, implementation="reference")
        strictly = {"xla_allow_excess_precision": False}
        return jax.jit(run, compiler_options=strictly)(*self.inputs[0])

    @property
    def floor_us(self) -> float:
        """Reading what is given and writing what is returned, once."""
        return (size_bytes(self.inputs[0]) + size_bytes(self.expected)) / bytes_per_s() * 1e6


def prepare(case: Case, implementation: str) -> tuple[Repeated, float]:
    """A program and its error. Runs it once, since PTX is assembled on the first run."""
    inputs = case.inputs[: MOST_INPUTS[implementation]]
    run = functools.partial(case.op.run, implementation=implementation)
    of_reference = implementation == "reference"
    passes = 1 if of_reference else max(1, round(ROUND_US / (case.floor_us + 4) / len(inputs)))
    program = Repeated(run, inputs, passes)
    return program, error(program.found[0], case.expected)


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
                program, off = future.result()
                floor = case.floor_us
                rounds = max(2, round(PROGRAM_US / (floor + 4) / program.calls))
                times = timed(functools.partial(program, rounds), rounds * program.calls)
                # A reference that XLA compiles as it likes leaves roundings out, and is not the definition.
                right = off <= case.op.most_error or implementation == "reference"
                wrong += not right
                doubt = "" if right and times["us"] > 0.85 * floor else "  NOT BELIEVED"
                what = f"{case.id:28} {implementation:10} {times['us']:9.2f} us"
                print(f"{what}  floor {floor:7.2f}  error {off:.1e}{doubt}", flush=True)
                row = {"id": case.id, "implementation": implementation} | times
                row |= {"floor_us": float(f"{floor:.2g}"), "rel_err": off} | here
                rows += [row] if not doubt else []
            print(f"# {tokens} tokens: {time.perf_counter() - started:.0f} s", flush=True)
    if arguments.results:
        save(rows, arguments.results)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
