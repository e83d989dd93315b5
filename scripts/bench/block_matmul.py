#!/usr/bin/env python3
"""Times products with FP8 weights at the shapes of DeepSeek-V4-Flash; activations are already quantised.

Calls run one after the other inside one jitted program, over enough copies of the weight that none is left
in the L2 cache when its turn comes again. Every case is checked against the reference in the same run.

  python scripts/bench/block_matmul.py --results scripts/bench/results/h200.json      the tiles of the table
  python scripts/bench/block_matmul.py --tune --tiles-out pallas_kernels/block_matmul/tuned.py
  python scripts/bench/block_matmul.py --dry      no GPU: compiles all candidates, prints what they need
"""

import argparse
import dataclasses
import functools
import inspect
import itertools
import math
import os
import pprint
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parent))

from harness import facts, median_us, save

from pallas_kernels import QuantArray, current_target
from pallas_kernels.block_matmul import reference, tuned
from pallas_kernels.block_matmul import triton as kernels
from pallas_kernels.block_matmul.tiles import BLOCK, Operand, Tile, tile_for
from pallas_kernels.triton_call import compile_offline, launches

COPY_BYTES_PER_S = 4.3e12  # what a plain copy reaches on an H200
FP8_FLOP_PER_S = 1.5e15
COLD_BYTES = 134e6  # of weights between two uses of one: twice the L2 cache
SHARED_BYTES = 227 * 1024
MOST_ERROR = 3e-3  # relative: rounding to bfloat16 alone makes 1.7e-3

SHAPES = {
    "wq_b": (32768, 1024, 1),
    "wo_b": (4096, 8192, 1),
    "wq_a+wkv": (1536, 4096, 1),
    "shared w1+w3": (4096, 4096, 1),
    "wo_a": (8192, 4096, 8),  # in groups, with bfloat16 activations
}

# By the most tokens they are for: tokens, rows, stack, span, splits, num_warps, num_stages of each tile.
CANDIDATES = {
    8: "8 32 1 8 1 8 4, 8 32 1 8 1 8 5, 8 16 1 8 1 8 4, 8 16 1 8 1 8 6, 8 32 1 4 1 4 5, 8 64 1 4 1 4 4,"
    "8 128 1 1 1 4 5, 8 64 1 1 1 4 6, 64 128 1 1 1 4 4, 8 64 1 1 4 4 6, 64 64 1 1 4 4 5",
    32: "32 32 1 4 1 4 4, 32 32 1 8 1 8 4, 32 16 1 8 1 8 4, 32 64 1 1 1 4 6, 32 128 1 1 1 4 5,"
    "64 128 1 1 1 4 4, 64 64 1 1 2 4 5, 64 64 1 1 4 4 5, 64 128 1 1 4 4 4, 32 64 1 1 2 4 6",
    128: "64 128 2 1 1 4 3, 64 64 2 1 1 4 4, 64 64 2 1 2 4 4, 64 64 2 1 4 4 4, 64 128 2 1 4 4 4,"
    "64 64 1 1 1 4 5, 64 64 1 1 2 4 5, 128 64 1 1 1 8 5, 64 32 1 1 1 4 6",
    512: "64 128 2 1 1 4 3, 64 64 2 1 1 4 4, 128 128 1 1 1 8 5, 64 128 1 1 1 4 4, 128 128 2 1 1 8 3,"
    "64 128 2 1 2 4 3",
    8192: "64 128 2 1 1 4 3, 128 128 2 1 1 8 4, 128 128 2 1 1 8 3, 128 128 1 1 1 8 5, 64 128 1 1 1 4 3",
}
BF16_CANDIDATES = {
    8: "8 64 1 4 1 4 4, 8 32 1 8 1 8 4, 8 64 1 1 1 4 6, 16 64 1 1 1 4 6",
    32: "32 64 1 1 1 4 5, 32 32 1 4 1 4 3, 32 64 1 4 1 4 3",
    128: "128 64 1 1 1 4 3, 64 64 1 1 1 4 4, 128 128 1 1 1 8 3",
    8192: "128 128 1 1 1 8 3, 64 128 1 1 1 4 3, 128 64 1 1 1 4 3",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A weight of SHAPES and a number of tokens."""

    name: str
    tokens: int

    @property
    def id(self) -> str:
        rows, columns, groups = SHAPES[self.name]
        op = "fp8 matmul" if groups == 1 else "fp8 block diagonal matmul"
        return f"{op} {self.name} {rows}x{columns} m={self.tokens}"

    @property
    def floor_us(self) -> float:
        """The longer of moving each byte once and doing the arithmetic."""
        rows, columns, groups = SHAPES[self.name]
        x_bytes = self.tokens * columns * (1 if groups == 1 else 2 * groups)
        moved = rows * columns + x_bytes + 2 * self.tokens * rows
        rate = FP8_FLOP_PER_S if groups == 1 else FP8_FLOP_PER_S / 2
        return max(moved / COPY_BYTES_PER_S, 2 * self.tokens * rows * columns / rate) * 1e6

    @property
    def operand(self) -> Operand:
        return "fp8" if SHAPES[self.name][2] == 1 else "bf16"

    def arrays(self) -> tuple[jax.Array | QuantArray, QuantArray]:
        """x and weight, of zeros."""
        rows, columns, groups = SHAPES[self.name]

        def quantised(rows: int, scale_rows: int, format: str) -> QuantArray:
            scale = jnp.zeros((scale_rows, columns // BLOCK), jnp.uint8)
            return QuantArray(jnp.zeros((rows, columns), jnp.float8_e4m3fn), scale, format)

        weight = quantised(rows, rows // BLOCK, "fp8_block128")
        if groups > 1:
            return jnp.zeros((self.tokens, groups, columns), jnp.bfloat16), weight
        return quantised(self.tokens, self.tokens, "fp8_token128"), weight

    def default(self) -> Tile:
        rows, columns, groups = SHAPES[self.name]
        return tile_for(current_target().arch, self.operand, self.tokens, rows, columns, groups)

    def candidates(self) -> list[Tile]:
        """Tiles that divide the shape, fit the chip and give it neither too little to do nor far too much."""
        rows, columns, groups = SHAPES[self.name]
        table = CANDIDATES if groups == 1 else BF16_CANDIDATES
        listed = table[min((most for most in table if most >= self.tokens), default=max(table))]
        chosen = []
        for tile in (Tile(*map(int, each.split())) for each in listed.split(",")):
            across, down = -(-rows // tile.rows), -(-self.tokens // (tile.tokens * tile.stack))
            loaded = (tile.tokens * tile.stack * (1 if groups == 1 else 2) + tile.rows) * BLOCK * tile.span
            kept = tile.num_stages - 1 if tile.span > 1 or tile.tokens < 64 else tile.num_stages
            useful = tile.splits == 1 or across * down < 128
            if not useful or across * down * tile.splits < 60 or (self.tokens <= 128 and across > 1024):
                continue
            if tile.divides(columns, rows // groups, groups) and loaded * kept <= SHARED_BYTES:
                chosen.append(tile)
        return chosen

    def run(self, tile: Tile | None, engine: str = "ffi", out_dtype=jnp.bfloat16) -> Callable[..., jax.Array]:
        """The product as a function of x and weight; with no tile it is the reference."""
        module, keywords = (reference, {}) if tile is None else (kernels, {"tile": tile, "engine": engine})
        op = module.block_matmul if self.operand == "fp8" else module.block_diagonal_matmul
        return functools.partial(op, out_dtype=out_dtype, **keywords)


@functools.partial(jax.jit, static_argnums=1)
def random_arrays(key: jax.Array, case: Case) -> tuple[Any, QuantArray]:
    """Random x and weight, with scales that differ from block to block."""

    def leaf(key: jax.Array, like: Any) -> jax.Array:
        if like.dtype == jnp.uint8:
            return jax.random.randint(key, like.shape, 117, 122).astype(jnp.uint8)
        return (4 * jax.random.normal(key, like.shape, jnp.bfloat16)).astype(like.dtype)

    leaves, tree = jax.tree.flatten(jax.eval_shape(case.arrays))
    return tree.unflatten([leaf(jax.random.fold_in(key, n), each) for n, each in enumerate(leaves)])


def program(run: Callable[..., jax.Array], rounds: int) -> Any:
    """`rounds` times the product of x with each of the weights, as one jitted function."""

    def one_round(x: Any, weights: list[QuantArray]) -> list[jax.Array]:
        return [run(x, weight) for weight in weights]

    def all_rounds(x: Any, weights: list[QuantArray]) -> list[jax.Array]:
        if rounds == 1:
            return one_round(x, weights)

        def body(_: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            # To XLA the next round's inputs hang on this one's results: it can neither hoist nor merge.
            x, weights, _ = carry
            return jax.lax.optimization_barrier((x, weights, one_round(x, weights)))

        zeros = [jnp.zeros(out.shape, out.dtype) for out in jax.eval_shape(one_round, x, weights)]
        return jax.lax.fori_loop(0, rounds, body, (x, weights, zeros))[2]

    return jax.jit(all_rounds)


@jax.jit
def relative_error(out: jax.Array, expected: jax.Array) -> jax.Array:
    expected = expected[: out.shape[0]]
    return jnp.linalg.norm(out.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)


class Bench:
    """The arrays of one weight of SHAPES, and what runs on them."""

    def __init__(self, name: str, most_tokens: int, engine: str):
        rows, columns, _ = SHAPES[name]
        copies = max(2, math.ceil(COLD_BYTES / (rows * columns)))
        key, largest = jax.random.key(0, impl="rbg"), Case(name, most_tokens)
        self.engine = engine
        self.weights = [random_arrays(jax.random.fold_in(key, n), Case(name, 1))[1] for n in range(copies)]
        self.x = random_arrays(key, largest)[0]
        self.expected = jax.jit(largest.run(None, out_dtype=jnp.float32))(self.x, self.weights[0])

    def inputs(self, case: Case) -> Any:
        return jax.tree.map(lambda leaf: leaf[: case.tokens], self.x)

    def rounds(self, case: Case) -> int:
        """As many as take some 3 ms."""
        return max(1, round(3000 / (1.5 * case.floor_us * len(self.weights))))

    def prepare(self, case: Case, tile: Tile | None) -> tuple[Any, float]:
        """The compiled program and its error; runs it once, since PTX is assembled on the first run."""
        x = self.inputs(case)
        compiled = program(case.run(tile, self.engine), self.rounds(case)).lower(x, self.weights).compile()
        return compiled, float(relative_error(compiled(x, self.weights)[0], self.expected))

    def time_us(self, case: Case, compiled: Any) -> float:
        x = self.inputs(case)
        calls = self.rounds(case) * len(self.weights)
        return median_us(lambda: compiled(x, self.weights), repeats=5, inner=3) / calls


def _print_row(case: Case, label: str, us: float, error: float) -> None:
    # Faster than the floor by more than its own uncertainty means that something was not run, or not read.
    doubt = "  NOT BELIEVED" if us < 0.85 * case.floor_us or not error < MOST_ERROR else ""
    share = f"{case.floor_us / us:4.0%} of {case.floor_us:.1f}"
    print(f"{case.id:46} {label:44} {us:8.2f} us  {share:16} error {error:.1e}{doubt}", flush=True)


def measure(arguments: argparse.Namespace, started: float) -> tuple[list[dict[str, Any]], dict[Case, Tile]]:
    """Rows of results, and the best tile of each case."""
    rows, best = [], {}

    def add(case: Case, implementation: str, us: float, error: float, **more: Any) -> None:
        row = {"id": case.id, "implementation": implementation, "us": round(us, 2)}
        rows.append(row | {"floor_us": round(case.floor_us, 1), "rel_err": error} | more | facts())

    for name in arguments.shapes:
        cases = [Case(name, tokens) for tokens in arguments.tokens]
        bench = Bench(name, max(arguments.tokens), arguments.engine)
        jobs = [(case, case.default()) for case in cases]
        if arguments.tune:
            jobs += [(case, tile) for case in cases for tile in case.candidates() if (case, tile) not in jobs]
        bench.prepare(*jobs[0])  # alone: the first also imports what all of them share
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            futures = [pool.submit(bench.prepare, *job) for job in jobs]
        print(f"# {name}: {len(jobs)} programs ready at {time.perf_counter() - started:.0f} s", flush=True)

        found: dict[Case, list[tuple[float, Tile, float]]] = {}
        for (case, tile), future in zip(jobs, futures, strict=True):
            if future.exception():  # a tile that does not fit the chip is a result too
                print(f"{case.id} {tuple(tile)}: {str(future.exception())[:200]}", flush=True)
                continue
            compiled, error = future.result()
            us = bench.time_us(case, compiled)
            _print_row(case, " ".join(map(str, tile)), us, error)
            if error < MOST_ERROR:
                found.setdefault(case, []).append((us, tile, error))
        for case, timed in found.items():
            us, best[case], error = min(timed)
            label = "triton" if arguments.engine == "ffi" else f"triton {arguments.engine}"
            add(case, label, us, error, tile=list(best[case]))
        for case in (case for case in cases if case.tokens in arguments.control):
            compiled, error = bench.prepare(case, None)
            us = bench.time_us(case, compiled)
            _print_row(case, "reference", us, error)
            add(case, "reference", us, error)
        if time.perf_counter() - started > arguments.seconds:
            print(f"# stopped after {name}: out of time", flush=True)
            break
    return rows, best


def write_tiles(best: dict[Case, Tile], path: Path) -> None:
    """The module `tuned.py`, with these tiles in place of its own."""
    table = {arch: {op: dict(shapes) for op, shapes in ops.items()} for arch, ops in tuned.TUNED.items()}
    for case, tile in best.items():
        shapes = table.setdefault(current_target().arch, {}).setdefault(case.operand, {})
        shape = SHAPES[case.name][:2]
        shapes[shape] = {**shapes.get(shape, {}), case.tokens: tuple(tile)}
    declaration = inspect.getsource(tuned).split(" = ")[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{declaration} = {pprint.pformat(table, width=80)}\n")
    print(f"# tiles of {len(best)} cases in {path}")


# --- without a GPU


def _needs(job: tuple[Case, Tile, str]) -> str:
    """Registers, stack and shared memory of a candidate, as one line."""
    case, tile, arch = job
    lines = []
    for launch in launches(case.run(tile), *jax.eval_shape(case.arrays)):
        try:
            binary = compile_offline(launch, arch)
        except Exception as error:
            lines.append(f"{type(error).__name__} {str(error)[-200:]}")
            continue
        lines.append(f"shared {binary.shared_bytes:6} {_resources(binary.code)}")
    return f"{case.id:46} {' '.join(str(value) for value in tile):24} {'; '.join(lines)}"


def _resources(cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return f"registers {found[1]:>3} stack {found[2]}" if found else ""


def dry(arguments: argparse.Namespace) -> None:
    jobs = [
        (case, tile, arguments.arch)
        for case in itertools.starmap(Case, itertools.product(arguments.shapes, arguments.tokens))
        for tile in case.candidates()
    ]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for line in pool.map(_needs, jobs):
            print(line, flush=True)
    print(f"{len(jobs)} candidates")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 8, 32, 128, 512, 2048, 8192])
    parser.add_argument("--engine", choices=["ffi", "xla"], default="ffi")
    parser.add_argument("--tune", action="store_true", help="try all candidate tiles and keep the best")
    parser.add_argument("--tiles-out", type=Path, help="where --tune writes the table of tiles")
    parser.add_argument("--control", type=int, nargs="*", default=[128], help="also time the reference for")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no new shape after so long")
    parser.add_argument("--results", type=Path, help="JSON file to add rows to")
    parser.add_argument("--dry", action="store_true", help="only compile, without a GPU")
    parser.add_argument("--arch", default="sm_90", help="what --dry compiles for")
    arguments = parser.parse_args()
    started = time.perf_counter()
    if arguments.dry:
        dry(arguments)
        return 0
    # Calls that do not depend on each other must not run side by side, as they never do in a model.
    flags = "--xla_gpu_command_buffer_scheduling_mode=SERIALIZE"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"
    rows, best = measure(arguments, started)
    if arguments.tune and arguments.tiles_out:
        write_tiles(best, arguments.tiles_out)
    if arguments.results and rows:
        save(rows, arguments.results)
    print(f"# done in {time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
