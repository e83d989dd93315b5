#!/usr/bin/env python3
"""Times the small ops around the experts: routing, the plan, SwiGLU and quantisation, kernels and references.

Calls run one after the other inside one jitted program, on inputs of their own: together more than the L2
cache holds where an op is large, so that such calls find it cold. What a call costs besides its kernels, its
launches, is in the time. Every case is checked against the reference in the same run.

  python scripts/bench/small_ops.py --results scripts/bench/results/h200.json
  python scripts/bench/small_ops.py --ops plan --tokens 8 8192
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
from harness import facts, median_us, save

from dsv4_jax.config import FLASH, PRO
from pallas_kernels import QuantArray, activation_quant, dequantize
from pallas_kernels.expert_mlp.plan import plan
from pallas_kernels.routing import route_by_id, route_by_score
from pallas_kernels.swiglu import swiglu, swiglu_quant

MODELS = {"flash": FLASH, "pro": PRO}
COLD_BYTES = 134e6  # of inputs between two uses of one: twice the L2 cache
MOST_INPUTS = 16
PROGRAM_US = 8000  # about how long one program is to run
VOCABULARY = 129280

Inputs = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Op:
    """An op at the sizes of a model.

    Attributes:
      inputs: makes those of so many tokens, from a key.
      run: the op, which takes them and `implementation`.
      most_error: relative to the reference; 0 asks for the same bits.
    """

    inputs: Callable[[jax.Array, int], Inputs]
    run: Callable[..., Any]
    most_error: float


def ops(model: str) -> dict[str, Op]:
    config = MODELS[model]
    experts, choices = config.n_routed_experts, config.num_experts_per_tok
    scaling, limit, inner = config.routed_scaling_factor, config.swiglu_limit, config.moe_intermediate_size

    def scores(key: jax.Array, tokens: int) -> Inputs:
        keys = jax.random.split(key)
        return jax.random.normal(keys[0], (tokens, experts)), jax.random.normal(keys[1], (experts,)) / 10

    def ids(key: jax.Array, tokens: int) -> Inputs:
        keys = jax.random.split(key, 3)
        table = jax.random.randint(keys[2], (VOCABULARY, choices), 0, experts)
        return (
            jax.random.normal(keys[0], (tokens, experts)),
            jax.random.randint(keys[1], (tokens,), 0, VOCABULARY),
            table,
        )

    def chosen(key: jax.Array, tokens: int) -> Inputs:
        return (jax.lax.top_k(jax.random.uniform(key, (tokens, experts)), choices)[1],)

    def halves(key: jax.Array, tokens: int) -> Inputs:
        return ((3 * jax.random.normal(key, (tokens, 2 * inner))).astype(jnp.bfloat16),)

    def hidden(key: jax.Array, tokens: int) -> Inputs:
        return (jax.random.normal(key, (tokens, config.hidden_size)).astype(jnp.bfloat16),)

    def planned(pairs: jax.Array, implementation: str) -> Any:
        return plan(pairs, experts, 16 if pairs.size <= 2048 else 64, implementation=implementation)

    return {
        # A choice between two scores that round differently may go either way, and takes its weight along.
        "routing": Op(scores, functools.partial(route_by_score, top_k=choices, scaling_factor=scaling), 1e-3),
        "routing by id": Op(ids, functools.partial(route_by_id, scaling_factor=scaling), 1e-6),
        "plan": Op(chosen, planned, 0),
        # In float32 they are within some ulps, so now and then a result rounds to the other neighbour.
        "swiglu": Op(halves, functools.partial(swiglu, up=None, limit=limit), 1e-3),
        "swiglu_quant": Op(halves, functools.partial(swiglu_quant, up=None, limit=limit), 2e-3),
        "activation_quant": Op(hidden, activation_quant, 0),
    }


def error(found: Any, expected: Any) -> float:
    """The largest over all results: share of integers that differ, relative error of numbers."""

    def is_quantised(leaf: Any) -> bool:
        return isinstance(leaf, QuantArray)

    def of_leaf(found: Any, expected: Any) -> jax.Array:
        if is_quantised(expected):
            found, expected = dequantize(found), dequantize(expected)
        if jnp.issubdtype(expected.dtype, jnp.integer):
            return (found != expected).mean()
        found, expected = found.astype(jnp.float32), expected.astype(jnp.float32)
        return jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)

    pairs = zip(*(jax.tree.leaves(each, is_leaf=is_quantised) for each in (found, expected)), strict=True)
    return max(float(of_leaf(*pair)) for pair in pairs)


def size_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Case:
    """An op of a model on so many tokens."""

    model: str
    name: str
    tokens: int

    @property
    def id(self) -> str:
        return f"{self.name} {self.model} N={self.tokens}"

    @functools.cached_property
    def op(self) -> Op:
        return ops(self.model)[self.name]

    @functools.cached_property
    def shapes(self) -> Inputs:
        return jax.eval_shape(lambda key: self.op.inputs(key, self.tokens), jax.random.key(0))

    @functools.cached_property
    def inputs(self) -> list[Inputs]:
        count = min(MOST_INPUTS, max(2, math.ceil(COLD_BYTES / size_bytes(self.shapes))))
        make = jax.jit(lambda key: self.op.inputs(key, self.tokens))
        return [make(jax.random.fold_in(jax.random.key(self.tokens), n)) for n in range(count)]

    @functools.cached_property
    def expected(self) -> Any:
        return jax.jit(functools.partial(self.op.run, implementation="reference"))(*self.inputs[0])

    @property
    def floor_us(self) -> float:
        """Reading what is read and writing what is written, once."""
        read = size_bytes(self.shapes)
        if (
            self.name == "routing by id"
        ):  # which reads of table and logits what its tokens and experts ask for
            _, ids, table = self.shapes
            read = size_bytes(ids) + 2 * 4 * self.tokens * table.shape[1]
        return (read + size_bytes(self.expected)) / bytes_per_s() * 1e6


def program(run: Callable[..., Any]) -> Any:
    """`rounds` times the op on each of the inputs, as one jitted function."""

    def one_round(inputs: list[Inputs]) -> list[Any]:
        return [run(*each) for each in inputs]

    def all_rounds(inputs: list[Inputs], rounds: jax.Array) -> list[Any]:
        def body(_: Any, carry: tuple[list[Inputs], list[Any]]) -> Any:
            # To XLA the next round's inputs hang on this one's results: it can neither hoist nor merge.
            return jax.lax.optimization_barrier((carry[0], one_round(carry[0])))

        zeros = jax.tree.map(lambda out: jnp.zeros(out.shape, out.dtype), jax.eval_shape(one_round, inputs))
        return jax.lax.fori_loop(0, rounds, body, (inputs, zeros))[1]

    return jax.jit(all_rounds)


def prepare(case: Case, implementation: str) -> tuple[Any, float]:
    """The compiled program and its error; runs it once, since PTX is assembled on the first run."""
    run = functools.partial(case.op.run, implementation=implementation)
    compiled = program(run).lower(case.inputs, jnp.int32(1)).compile()
    return compiled, error(compiled(case.inputs, jnp.int32(1))[0], case.expected)


def time_us(case: Case, compiled: Any) -> float:
    """Of one call: what more rounds take longer than one, so that starting the program does not count."""

    def of(rounds: int) -> float:
        count = jnp.int32(rounds)
        return median_us(lambda: compiled(case.inputs, count), repeats=7)

    once = of(1)
    more = max(8, round(PROGRAM_US / once))
    return (of(1 + more) - once) / (more * len(case.inputs))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", choices=list(MODELS), nargs="*", default=list(MODELS))
    parser.add_argument("--ops", choices=list(ops("flash")), nargs="*", default=list(ops("flash")))
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 8, 32, 128, 2048, 8192])
    parser.add_argument("--implementations", nargs="*", default=["triton", "reference"])
    parser.add_argument("--seconds", type=float, default=60, help="time no new case after so long")
    parser.add_argument("--results", type=Path, help="JSON file to add rows to")
    arguments = parser.parse_args()
    started = time.perf_counter()

    rows, wrong, here = [], 0, facts()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name in arguments.ops:
            # Pro differs in what is routed; its activations are the same kernels on longer rows.
            models = [model for model in arguments.models if model == "flash" or name in ("routing", "plan")]
            some = [Case(model, name, tokens) for model in models for tokens in arguments.tokens]
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
                compiled, off = future.result()
                us, floor = time_us(case, compiled), case.floor_us
                right = off <= case.op.most_error
                wrong += not right
                doubt = "" if right and us > 0.85 * floor else "  NOT BELIEVED"
                what = f"{case.id:28} {implementation:10} {us:9.2f} us"
                print(f"{what}  floor {floor:7.2f}  error {off:.1e}{doubt}", flush=True)
                row = {"id": case.id, "implementation": implementation, "us": round(us, 2)}
                row |= {"floor_us": float(f"{floor:.2g}"), "rel_err": off} | here
                rows += [row] if not doubt else []
            print(f"# {name}: {time.perf_counter() - started:.0f} s", flush=True)
    if arguments.results:
        save(rows, arguments.results)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
