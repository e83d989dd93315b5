#!/usr/bin/env python3
"""Times the hyper-connections around a sub-layer, kernels and references.

"boundary" is what stands between two sub-layers: `hc_post` of one, `hc_pre` of the next and its RMSNorm.
Calls run one after the other inside one jitted program, on streams and weights of their own in turn: together
more than the L2 cache holds. Launches are in the time. Every case is checked in the same run.

  python scripts/bench/hyper_connection.py --results scripts/bench/results/h200.json
  python scripts/bench/hyper_connection.py --tune      tries candidate tilings on the boundary
  python scripts/bench/hyper_connection.py --profile   shows which kernels a call consists of
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
from profile_kernels import kernel_times, print_kernel_times
from small_ops import size_bytes

from dsv4_jax.config import FLASH, PRO
from pallas_kernels.hyper_connection import hc_head, hc_post, hc_post_pre, hc_pre, reference
from pallas_kernels.hyper_connection import triton as kernels

MODELS = {"flash": FLASH, "pro": PRO}
COLD_BYTES = 134e6  # of inputs between two uses of one: twice the L2 cache
MOST_INPUTS = {"triton": 48, "reference": 2}  # the reference is many kernels, which take long to compile
ROUND_US, PROGRAM_US = 400, 1500  # about how long a round and one program are to run
MOST_ERROR = 1e-5  # of post and comb, relative to each number
MOST_ROUNDED_ERROR = 1e-3  # of what is rounded to bfloat16, relative to all: some go to the other neighbour

# By the most tokens they are for, fields of Tiling: tokens, channels, most_blocks, num_warps, num_stages, and
# a sixth where fn is cut up first.
CANDIDATES = {
    16: "16 32 1 4 1, 16 32 1 8 1, 16 64 1 4 1, 16 64 1 8 1, 16 32 2 4 2, 16 32 4 4 2",
    64: "64 32 1 8 1, 64 32 1 4 1, 16 32 1 4 1, 16 64 1 8 1, 64 32 2 8 2, 16 32 4 4 2, 64 32 2 4 2",
    512: "64 32 4 8 2, 64 32 8 8 2, 64 32 4 4 1, 64 32 4 4 2 1, 64 32 8 4 2 1, 64 32 2 4 1, 128 32 4 8 2 1",
    8192: "64 32 32 4 2 1, 64 32 32 8 2 1, 64 32 32 8 2, 64 32 32 4 1, 64 32 16 4 2 1, 64 32 32 4 3 1, "
    "128 32 16 8 2 1, 128 32 32 8 2 1",
}

Inputs = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Op:
    """An op on (y, streams, post, comb, fn, scale, base, norm_weight).

    Attributes:
      run: the op, which takes these and `implementation`.
      expected: what it should give, of these and of what it gave.
      rows: of M bfloat16 numbers that are read or written for every token.
      weight_bytes: read for all of them.
    """

    run: Callable[..., Any]
    expected: Callable[[Any, Any], Any]
    rows: int
    weight_bytes: int


def ops(model: str) -> dict[str, Op]:
    config = MODELS[model]
    iterations, eps, norm_eps = config.hc_sinkhorn_iters, config.hc_eps, config.rms_norm_eps
    settings = {"sinkhorn_iters": iterations, "eps": eps, "norm_eps": norm_eps}
    fn_bytes = 4 * 24 * 4 * config.hidden_size

    def boundary(*of, implementation: str):
        return hc_post_pre(*of[:-1], norm_weight=of[-1], implementation=implementation, **settings)

    def boundary_expected(of, found):
        y, streams, post, comb, fn, scale, base, weight = of
        # A stream that rounds to the other neighbour changes what follows, which has its own streams here.
        following = reference.hc_pre(found[0], fn, scale, base, iterations, eps, norm_eps, weight)
        return reference.hc_post(y, streams, post, comb), *following

    def pre(*of, implementation: str):
        return hc_pre(of[1], *of[4:7], implementation=implementation, **settings)

    def post(*of, implementation: str):
        return (hc_post(*of[:4], implementation=implementation),)

    def head(*of, implementation: str):
        fn, scale, base = of[4][:4], of[5][:1], of[6][:4]
        x = hc_head(of[1], fn, scale, base, eps=eps, norm_eps=norm_eps, implementation=implementation)
        return (x,)

    def pre_expected(of, found):
        _, streams, _, _, fn, scale, base, _ = of
        return reference.hc_pre(streams, fn, scale, base, iterations, eps, norm_eps, None)

    def post_expected(of, found):
        return (reference.hc_post(*of[:4]),)

    def head_expected(of, found):
        fn, scale, base = of[4][:4], of[5][:1], of[6][:4]
        return (reference.hc_head(of[1], fn, scale, base, eps, norm_eps, None),)

    return {
        "boundary": Op(boundary, boundary_expected, 10, fn_bytes),
        "pre": Op(pre, pre_expected, 5, fn_bytes),
        "post": Op(post, post_expected, 9, 0),
        "head": Op(head, head_expected, 5, fn_bytes // 6),
    }


def made_up(config, tokens: int, key: jax.Array) -> Inputs:
    """Numbers of a size that makes mixes of some units, and so matrices that are far from even."""
    keys = iter(jax.random.split(key, 8))
    hidden = config.hidden_size

    def normal(*sizes: int) -> jax.Array:
        return jax.random.normal(next(keys), sizes)

    return (
        normal(tokens, hidden).astype(jnp.bfloat16),
        normal(tokens, 4, hidden).astype(jnp.bfloat16),
        2 * jax.nn.sigmoid(normal(tokens, 4)),
        reference.sinkhorn(normal(tokens, 4, 4), config.hc_sinkhorn_iters, config.hc_eps),
        normal(24, 4 * hidden) / hidden**0.5,
        jnp.array([0.7, 1.2, 0.9]),
        normal(24),
        (1 + normal(hidden) / 8).astype(jnp.bfloat16),
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """An op of a model on so many tokens."""

    model: str
    name: str
    tokens: int

    @property
    def id(self) -> str:
        label = "" if self.model == "flash" else f" {self.model}"
        return f"hyper-connection {self.name}{label} T={self.tokens}"

    @functools.cached_property
    def op(self) -> Op:
        return ops(self.model)[self.name]

    @functools.cached_property
    def inputs(self) -> list[Inputs]:
        make = jax.jit(lambda key: made_up(MODELS[self.model], self.tokens, key))
        first = make(jax.random.key(self.tokens))
        count = min(max(MOST_INPUTS.values()), max(2, math.ceil(COLD_BYTES / size_bytes(first))))
        return [first] + [make(jax.random.fold_in(jax.random.key(self.tokens), n)) for n in range(1, count)]

    @property
    def floor_us(self) -> float:
        """Reading what is read and writing what is written, once."""
        row_bytes = 2 * MODELS[self.model].hidden_size
        return (self.op.rows * self.tokens * row_bytes + self.op.weight_bytes) / bytes_per_s() * 1e6

    def errors(self, found: Any) -> tuple[float, float]:
        """The largest of a number in float32, and that of an array in bfloat16."""
        strictly = {"xla_allow_excess_precision": False}  # streams are rounded before they are read again
        expected = jax.jit(self.op.expected, compiler_options=strictly)(self.inputs[0], found)
        exact, rounded = [0.0], [0.0]
        for got, wanted in zip(found, expected, strict=True):
            if wanted.dtype == jnp.float32:
                exact.append(float(jnp.abs(got / wanted - 1).max()))
            else:
                got, wanted = got.astype(jnp.float32), wanted.astype(jnp.float32)
                rounded.append(float(jnp.linalg.norm(got - wanted) / jnp.linalg.norm(wanted)))
        return max(exact), max(rounded)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A program of a case, and how far its results are off."""

    case: Case
    label: str
    program: Repeated
    exact: float
    rounded: float

    @property
    def right(self) -> bool:
        return self.exact <= MOST_ERROR and self.rounded <= MOST_ROUNDED_ERROR

    def report(self) -> tuple[dict[str, float], bool]:
        floor, calls = self.case.floor_us, self.program.calls
        rounds = max(2, round(PROGRAM_US / (floor + 6) / calls))
        times = timed(lambda: self.program(rounds), rounds * calls)
        believed = self.right and times["us"] > 0.85 * floor
        said = f"{times['us']:9.2f} us, sustained {times['us_sustained']:9.2f}  floor {floor:6.2f}"
        doubt = "" if believed else "  NOT BELIEVED"
        errors = f"errors {self.exact:.1e} {self.rounded:.1e}"
        print(f"{self.case.id:36} {self.label:24} {said}  {errors}{doubt}", flush=True)
        return times, believed


def prepare(case: Case, label: str, run: Callable[..., Any]) -> Prepared:
    """Compiles and runs once, since PTX is assembled on the first run."""
    of_reference = label == "reference"  # which is many kernels, and these take long to compile
    inputs = case.inputs[: MOST_INPUTS["reference" if of_reference else "triton"]]
    passes = 1 if of_reference else max(1, round(ROUND_US / (case.floor_us + 6) / len(inputs)))
    program = Repeated(run, inputs, passes)
    return Prepared(case, label, program, *case.errors(program.found[0]))


def variants(case: Case, arguments: argparse.Namespace) -> list[tuple[str, Callable[..., Any]]]:
    """What is timed on a case, by name."""
    if not arguments.tune:
        names = arguments.implementations
        return [(name, functools.partial(case.op.run, implementation=name)) for name in names]
    config = MODELS[case.model]
    numbers = (config.hc_sinkhorn_iters, config.hc_eps, config.rms_norm_eps)

    def with_tiles(tiles: kernels.Tiling):
        def run(*of: Any) -> Any:
            everything: Any = (*of[:-1], *numbers, of[-1], tiles)
            return kernels.hc_post_pre(*everything)

        return run

    listed = CANDIDATES[min(most for most in CANDIDATES if most >= min(case.tokens, 8192))].split(",")
    return [
        (each.strip(), with_tiles(kernels.Tiling(*fields[:5], cuts_first=len(fields) > 5)))
        for each in listed
        for fields in (tuple(map(int, each.split())),)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(MODELS), default="flash")
    parser.add_argument("--ops", choices=list(ops("flash")), nargs="*", default=["boundary", "pre", "post"])
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 8, 32, 64, 512, 4096])
    parser.add_argument("--implementations", nargs="*", default=["triton", "reference"])
    parser.add_argument("--tune", action="store_true", help="try candidate tilings on the boundary")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a call and their times")
    parser.add_argument("--seconds", type=float, default=60, help="time nothing more after so long")
    parser.add_argument("--results", type=Path, help="JSON file to add rows to")
    arguments = parser.parse_args()
    # Calls that do not depend on each other must not run side by side, as they never do in a model.
    flags = "--xla_gpu_command_buffer_scheduling_mode=SERIALIZE"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"
    started = time.perf_counter()

    rows, wrong, here = [], 0, facts()
    names = ["boundary"] if arguments.tune else arguments.ops
    cases = [Case(arguments.model, name, tokens) for tokens in arguments.tokens for name in names]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for tokens in arguments.tokens:  # inputs of one size at a time
            some = [case for case in cases if case.tokens == tokens]
            for case in some:
                jax.block_until_ready(case.inputs)
            jobs = [(case, *variant) for case in some for variant in variants(case, arguments)]
            futures = [pool.submit(prepare, *jobs[0])]
            futures[0].exception()  # waits: the first also imports what all of them share
            futures += [pool.submit(prepare, *job) for job in jobs[1:]]
            # All are compiled before any is timed: a compiling host disturbs the clock.
            failures = [future.exception() for future in futures]
            for (case, label, _), future, failure in zip(jobs, futures, failures, strict=True):
                if failure:
                    wrong += 1
                    print(f"{case.id:36} {label:24} {type(failure).__name__} {str(failure)[:200]}")
                    continue
                if time.perf_counter() - started > arguments.seconds:
                    print(f"{case.id:36} {label:24} not timed: out of time")
                    continue
                prepared = future.result()
                times, believed = prepared.report()
                wrong += not believed
                if arguments.profile:
                    program = prepared.program
                    times_of = kernel_times(lambda program=program: program(2), 2 * program.calls)
                    print_kernel_times(case.id, times_of)
                if believed and not arguments.tune:
                    row = {"id": case.id, "implementation": label} | times
                    error = max(prepared.exact, prepared.rounded)
                    rows.append(row | {"floor_us": round(case.floor_us, 2), "rel_err": error} | here)
            for case in some:
                vars(case).pop("inputs")
            print(f"# T={tokens}: {time.perf_counter() - started:.0f} s", flush=True)
    if arguments.results:
        save(rows, arguments.results)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
