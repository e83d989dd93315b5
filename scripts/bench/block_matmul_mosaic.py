#!/usr/bin/env python3
"""Times the Mosaic GPU kernel of FP8 products at many tokens, over configurations of its tiles.

Cases, weights and timing are those of block_matmul.py. Every configuration is checked against the reference
before and after it is timed, row by row: one bad piece of a large result would hide in the error of all.

  python scripts/bench/block_matmul_mosaic.py --results scripts/bench/results/h200.json
  python scripts/bench/block_matmul_mosaic.py --shapes wo_b --tokens 8192 --configs "256 128 4 2 x,128 128 6"
"""

import argparse
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

sys.path.insert(0, str(Path(__file__).parent))

from block_matmul import COLD_BYTES, MOST_ERROR, SHAPES, Case, program, random_arrays
from harness import facts, median_us, save

from pallas_kernels.block_matmul import mosaic, reference
from pallas_kernels.block_matmul.mosaic import Config, Shape, config_for

# By the most tokens they are for: tokens, rows, stages, slots, share ("-" for none), band, product.
CANDIDATES = {
    512: "128 64 8,128 64 8 1 x,128 128 6,128 128 6 2 x,128 128 6 2 w,128 192 4 3,256 128 4,256 128 4 2 x,"
    "128 128 6 2 - 8 wgmma",
    2048: "256 128 4,256 128 4 2 x,256 128 4 2 w,128 256 4 2 w,256 128 3 4 x,128 192 4 3,128 192 4 3 w,"
    "128 128 6 2 x,128 128 6 2 - 8 wgmma",
    8192: "256 128 4,256 128 4 2 x,256 128 4 2 w,256 128 4 2 x 16,128 256 4 2 w,256 128 3 4 x,128 192 4 3 w,"
    "128 128 6 2 x,128 128 6 2 - 8 wgmma",
}
FEWEST_TILES = 48  # fewer leave most of the chip idle


def parse(text: str) -> Config:
    """The Config of "256 128 4 2 x 8 ptx"; what is missing at the end keeps its default."""
    fields: dict[str, Any] = dict(zip(Config._fields, text.split(), strict=False))
    for name, value in fields.items():
        if name == "share":
            fields[name] = value.replace("-", "")
        elif name != "product":
            fields[name] = int(value)
    return Config(**fields)


def shown(config: Config) -> str:
    return " ".join(str(field) if field != "" else "-" for field in config)


def configs(case: Case, listed: str | None) -> list[Config]:
    """Those to try, the default first; of the table only what gives most of the chip something to do."""
    rows, columns, _ = SHAPES[case.name]
    if listed:
        return [parse(each) for each in listed.split(",")]
    table = CANDIDATES[min((most for most in CANDIDATES if most >= case.tokens), default=max(CANDIDATES))]
    chosen = [config_for(Shape(case.tokens, rows, columns))]
    for config in map(parse, table.split(",")):
        tiles = math.ceil(case.tokens / config.tokens) * math.ceil(rows / config.rows)
        if config not in chosen and config.tokens <= case.tokens and tiles >= FEWEST_TILES:
            chosen.append(config)
    return chosen


@jax.jit
def worst_error(out: jax.Array, expected: jax.Array) -> jax.Array:
    """The largest relative error of a token's row; infinity if anything is not a number."""
    expected = expected[: out.shape[0]]
    difference = jnp.linalg.norm(out.astype(jnp.float32) - expected, axis=-1)
    worst = jnp.max(difference / jnp.linalg.norm(expected, axis=-1))
    return jnp.where(jnp.isfinite(worst), worst, jnp.inf)


class Bench:
    """The arrays of one weight of SHAPES, and what runs on them."""

    def __init__(self, name: str, most_tokens: int):
        rows, columns, _ = SHAPES[name]
        copies = max(2, math.ceil(COLD_BYTES / (rows * columns)))
        key, largest = jax.random.key(0, impl="rbg"), Case(name, most_tokens)
        self.weights = [random_arrays(jax.random.fold_in(key, n), Case(name, 1))[1] for n in range(copies)]
        self.x = random_arrays(key, largest)[0]
        definition = functools.partial(reference.block_matmul, out_dtype=jnp.float32)
        self.expected = jax.jit(definition)(self.x, self.weights[0])

    def inputs(self, case: Case) -> Any:
        return jax.tree.map(lambda leaf: leaf[: case.tokens], self.x)

    def rounds(self, case: Case) -> int:
        """As many as take some 3 ms."""
        return max(1, round(3000 / (1.5 * case.floor_us * len(self.weights))))

    def prepare(self, case: Case, config: Config) -> tuple[Any, float]:
        """The compiled program and its error; runs it once, since PTX is assembled on the first run."""
        x, run = (
            self.inputs(case),
            functools.partial(mosaic.block_matmul, out_dtype=jnp.bfloat16, config=config),
        )
        compiled = program(run, self.rounds(case)).lower(x, self.weights).compile()
        return compiled, float(worst_error(compiled(x, self.weights)[0], self.expected))

    def measure(self, case: Case, compiled: Any) -> tuple[float, float]:
        """Microseconds of one product, and the error of the last run."""
        x = self.inputs(case)
        calls = self.rounds(case) * len(self.weights)
        us = median_us(lambda: compiled(x, self.weights), repeats=5, inner=3) / calls
        return us, float(worst_error(compiled(x, self.weights)[0], self.expected))


def print_row(case: Case, config: Config, us: float, error: float) -> None:
    # Faster than the floor by more than its own uncertainty means that something was not run, or not read.
    doubt = "  NOT BELIEVED" if us < 0.85 * case.floor_us or not error < MOST_ERROR else ""
    share = f"{case.floor_us / us:4.0%} of {case.floor_us:.1f}"
    print(f"{case.id:46} {shown(config):28} {us:8.2f} us  {share:16} worst {error:.1e}{doubt}", flush=True)


def measure(arguments: argparse.Namespace, started: float) -> list[dict[str, Any]]:
    """The row of results of each case: its fastest configuration that is right."""
    rows = []
    for name in arguments.shapes:
        cases = [Case(name, tokens) for tokens in sorted(arguments.tokens, reverse=True)]
        bench = Bench(name, max(arguments.tokens))
        jobs = [(case, config) for case in cases for config in configs(case, arguments.configs)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            futures = [pool.submit(bench.prepare, *job) for job in jobs]
        print(f"# {name}: {len(jobs)} programs ready at {time.perf_counter() - started:.0f} s", flush=True)

        best: dict[Case, tuple[float, Config, float]] = {}
        for (case, config), future in zip(jobs, futures, strict=True):
            try:
                compiled, first = future.result()
                us, last = bench.measure(case, compiled)
            except Exception as error:  # a configuration that does not fit is a result too
                print(f"{case.id} {shown(config)}: {type(error).__name__} {str(error)[:300]}", flush=True)
                continue
            error = max(first, last)
            print_row(case, config, us, error)
            if error < MOST_ERROR and (case not in best or us < best[case][0]):
                best[case] = us, config, error
        for case, (us, config, error) in best.items():
            row = {"id": case.id, "implementation": "mosaic", "us": round(us, 2)}
            more = {"floor_us": round(case.floor_us, 1), "rel_err": error, "config": list(config)}
            rows.append(row | more | facts())
            print(f"# best {case.id}: {shown(config)} {us:.2f} us", flush=True)
        if time.perf_counter() - started > arguments.seconds:
            print(f"# stopped after {name}: out of time", flush=True)
            break
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    fp8 = [name for name, (_, _, groups) in SHAPES.items() if groups == 1]  # Flash, then Pro
    parser.add_argument("--shapes", nargs="*", choices=fp8, default=fp8[:4])
    parser.add_argument("--tokens", type=int, nargs="*", default=[512, 2048, 8192])
    parser.add_argument("--configs", help='in place of the table: "256 128 4 2 x 8 ptx,128 128 6"')
    parser.add_argument("--seconds", type=float, default=1e9, help="start no new shape after so long")
    parser.add_argument("--ptxas", action="store_true", help="let the assembler print registers and spills")
    parser.add_argument("--results", type=Path, help="JSON file to add rows to")
    arguments = parser.parse_args()
    started = time.perf_counter()
    if arguments.ptxas:
        os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    # Calls that do not depend on each other must not run side by side, as they never do in a model.
    flags = "--xla_gpu_command_buffer_scheduling_mode=SERIALIZE"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"
    rows = measure(arguments, started)
    if arguments.results and rows:
        save(rows, arguments.results)
    print(f"# done in {time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
