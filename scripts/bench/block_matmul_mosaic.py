#!/usr/bin/env python3
"""Times the Mosaic GPU kernels of FP8 products: the tiles they choose, or others as well.

Cases, weights and timing are those of block_matmul.py. Every configuration is checked against the reference
before and after it is timed, row by row: one bad piece of a large result would hide in the error of all.

  python scripts/bench/block_matmul_mosaic.py --results scripts/bench/results/h200.json
  python scripts/bench/block_matmul_mosaic.py --sweep
  python scripts/bench/block_matmul_mosaic.py --shapes wo_b --tokens 8192 --configs "256 128 4 2 8 2"
  python scripts/bench/block_matmul_mosaic.py --few --sweep       the kernel of few tokens
"""

import argparse
import functools
import itertools
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

from block_matmul import COLD_BYTES, MODELS, MOST_ERROR, SHAPES, Case, program, random_arrays
from harness import facts, median_us, save

from pallas_kernels.block_matmul import mosaic, mosaic_few, reference
from pallas_kernels.block_matmul.mosaic import Config
from pallas_kernels.block_matmul.mosaic_few import Config as FewConfig

# wo_a, whose groups are products of their own, takes bfloat16.
MODEL_SHAPES = {model: [name for name in names if SHAPES[name][2] == 1] for model, names in MODELS.items()}
WIDE = 1024  # tokens, from where on the larger tiles are worth a try


# How a product of few tokens may be cut: rows of a program, parts of K, programs that share tokens, and
# programs that share a multiprocessor.
CUTS = [
    *((256, 1, 1, 1), (256, 1, 2, 1), (128, 1, 1, 2), (128, 1, 1, 1), (128, 1, 2, 1), (64, 1, 1, 4)),
    *((128, 4, 1, 1), (128, 4, 2, 1), (128, 8, 1, 2), (128, 8, 1, 1), (256, 8, 1, 1), (256, 2, 1, 1)),
    *((64, 2, 1, 1), (64, 4, 1, 1), (64, 4, 1, 2), (64, 8, 1, 2), (128, 2, 1, 1), (128, 2, 2, 1)),
]


def parse(text: str, few: bool) -> Config | FewConfig:
    """The Config of "256 128 4 2 8 2"; what is missing at the end keeps its default."""
    kind: Any = FewConfig if few else Config
    return kind(*(int(number) for number in text.split()))


def shown(config: Config | FewConfig) -> str:
    kind = "few " if isinstance(config, FewConfig) else ""
    return kind + " ".join(str(int(field)) for field in config)


def shape_of(case: Case) -> mosaic.Shape:
    rows, columns, _ = SHAPES[case.name]
    return mosaic.Shape(case.tokens, rows, columns)


def configs(case: Case, arguments: argparse.Namespace) -> list[Config | FewConfig]:
    """Those to measure, the kernel's own choice first."""
    if arguments.configs:
        return [parse(each, arguments.few) for each in arguments.configs.split(",")]
    if arguments.few:
        return few_configs(case, arguments.sweep)
    chosen = mosaic.config_for(shape_of(case))
    if not arguments.sweep:
        return [chosen]
    others = [
        Config(128, 128, stages=6),
        Config(128, 192, stages=4, slots=3),
        Config(192, 128, stages=4, consumers=3),
        Config(256, 128, stages=4),
    ]
    if case.tokens < WIDE:
        others = [Config(128, 64, stages=8), *others]
    return list(dict.fromkeys([chosen, *others]))


def few_configs(case: Case, sweep: bool) -> list[Config | FewConfig]:
    """Those of the kernel of few tokens that keep all multiprocessors busy, and the other kernel's choice."""
    shape = mosaic_few.Shape(*shape_of(case))
    chosen = mosaic_few.config_for(shape)
    if not sweep:
        return [chosen]
    found: list[Config | FewConfig] = [chosen, chosen._replace(early=True)]
    if case.tokens >= 128:
        found.append(mosaic.config_for(shape_of(case)))
    tokens, blocks = chosen.tokens, shape.columns // 128
    for (rows, splits, sharers, resident), beside in itertools.product(CUTS, (1, 2)):
        programs = -(-shape.rows // rows) * -(-shape.tokens // tokens) * splits
        at_once = resident * mosaic_few.MULTIPROCESSORS
        right_size = 90 <= programs <= (at_once if tokens < 64 or splits > 1 else 4 * at_once)
        # Two programs need registers for both; few tokens are not worth sharing, many make a high tile pay.
        right_kind = resident == 1 if tokens >= 64 else beside == 1 and (sharers == 1 or tokens >= 32)
        right_height = rows >= 128 if tokens == 128 else True
        if not (right_size and right_kind and right_height and blocks % splits == 0 and rows * beside <= 256):
            continue
        config = mosaic_few.deepest(FewConfig(tokens, rows, splits, sharers, beside=beside), shape, resident)
        if config.stages >= min(2, blocks // splits):
            found.append(config)
    return list(dict.fromkeys(found))


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

    def prepare(self, case: Case, config: Config | FewConfig) -> tuple[Any, float]:
        """The compiled program and its error; runs it once, since PTX is assembled on the first run."""
        module: Any = mosaic_few if isinstance(config, FewConfig) else mosaic
        x, run = (
            self.inputs(case),
            functools.partial(module.block_matmul, out_dtype=jnp.bfloat16, config=config),
        )
        compiled = program(run, self.rounds(case)).lower(x, self.weights).compile()
        return compiled, float(worst_error(compiled(x, self.weights)[0], self.expected))

    def measure(self, case: Case, compiled: Any) -> tuple[float, float]:
        """Microseconds of one product, and the error of the last run."""
        x = self.inputs(case)
        calls = self.rounds(case) * len(self.weights)
        us = median_us(lambda: compiled(x, self.weights), repeats=5, inner=3) / calls
        return us, float(worst_error(compiled(x, self.weights)[0], self.expected))


def print_row(case: Case, config: Config | FewConfig, us: float, error: float) -> None:
    # Faster than the floor by more than its own uncertainty means that something was not run, or not read.
    doubt = "  NOT BELIEVED" if us < 0.85 * case.floor_us or not error < MOST_ERROR else ""
    share = f"{case.floor_us / us:4.0%} of {case.floor_us:.1f}"
    print(f"{case.id:46} {shown(config):28} {us:8.2f} us  {share:16} worst {error:.1e}{doubt}", flush=True)


def measure(arguments: argparse.Namespace, started: float) -> None:
    """Prints all and saves a row of results for each case: its fastest configuration that is right."""
    for name in arguments.shapes or MODEL_SHAPES[arguments.model]:
        cases = [Case(name, tokens) for tokens in sorted(arguments.tokens, reverse=True)]
        bench = Bench(name, max(arguments.tokens))
        jobs = [(case, config) for case in cases for config in configs(case, arguments)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            futures = [pool.submit(bench.prepare, *job) for job in jobs]
        print(f"# {name}: {len(jobs)} programs ready at {time.perf_counter() - started:.0f} s", flush=True)

        best: dict[Case, tuple[float, Config | FewConfig, float]] = {}
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
            if arguments.results:
                save([row | more | facts()], arguments.results)
            print(f"# best {case.id}: {config} {us:.2f} us", flush=True)
        if time.perf_counter() - started > arguments.seconds:
            print(f"# stopped after {name}: out of time", flush=True)
            break


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(MODELS), default="flash")
    parser.add_argument(
        "--shapes",
        nargs="*",
        choices=[name for names in MODEL_SHAPES.values() for name in names],
        help="in place of --model",
    )
    parser.add_argument("--few", action="store_true", help="the kernel of few tokens")
    parser.add_argument("--tokens", type=int, nargs="*", help="512 2048 8192, or with --few 8 32 128 512")
    parser.add_argument("--sweep", action="store_true", help="measure what might be faster, too")
    parser.add_argument("--configs", help='these alone, fields of Config: "256 128 4 2 8 2,128 128 6"')
    parser.add_argument("--seconds", type=float, default=1e9, help="start no new shape after so long")
    parser.add_argument("--ptxas", action="store_true", help="let the assembler print registers and spills")
    parser.add_argument("--results", type=Path, help="JSON file to add rows to")
    arguments = parser.parse_args()
    arguments.tokens = arguments.tokens or ([8, 32, 128, 512] if arguments.few else [512, 2048, 8192])
    started = time.perf_counter()
    if arguments.ptxas:
        os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    # Calls that do not depend on each other must not run side by side, as they never do in a model.
    flags = "--xla_gpu_command_buffer_scheduling_mode=SERIALIZE"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"
    measure(arguments, started)
    print(f"# done in {time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
