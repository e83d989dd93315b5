#!/usr/bin/env python3
"""Times products with FP8 weights at the shapes of DeepSeek-V4; activations are already quantised.

Calls run one after the other inside one jitted program: a loop over at least 24 copies of the weight, which
fill the L2 cache twice: none is left in it when its turn comes again, and the loop itself costs next to
nothing. Every case is checked against the reference in the same run.

  python scripts/bench/block_matmul.py --results scripts/bench/results/h200.json      the tiles of the table
  python scripts/bench/block_matmul.py --tune --tiles-out pallas_kernels/block_matmul/tuned.json
  python scripts/bench/block_matmul.py --dry      no GPU: compiles all candidates, prints what they need
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
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

from floors import bytes_per_s
from harness import facts, save, timed

from pallas_kernels import QuantArray, current_target
from pallas_kernels.block_matmul import reference
from pallas_kernels.block_matmul import triton as kernels
from pallas_kernels.block_matmul.tiles import BLOCK, Operand, Tile, tile_for, tuned
from pallas_kernels.triton_call import Engine, compile_offline, launches

FP8_FLOP_PER_S = 1.5e15
FEWEST_CALLS = 24  # in one turn of the loop
COLD_BYTES = 134e6  # of weights between two uses of one: twice the L2 cache
SHARED_BYTES = 227 * 1024
SUSTAINED_MS = 60
MOST_ERROR = 3e-3  # relative: rounding to bfloat16 alone makes 1.7e-3

# Rows, columns, groups; wo_a has groups and takes bfloat16 activations.
SHAPES = {
    "wq_b": (32768, 1024, 1),
    "wo_b": (4096, 8192, 1),
    "wq_a+wkv": (1536, 4096, 1),
    "shared w1+w3": (4096, 4096, 1),
    "wo_a": (8192, 4096, 8),
    "pro wq_b": (65536, 1536, 1),
    "pro wo_b": (7168, 16384, 1),
    "pro wq_a+wkv": (2048, 7168, 1),
    "pro shared w1+w3": (6144, 7168, 1),
    "pro wo_a": (16384, 4096, 16),
}
MODELS = {
    "flash": [name for name in SHAPES if not name.startswith("pro ")],
    "pro": [name for name in SHAPES if name.startswith("pro ")],
}


def streams(columns: int) -> list[Tile]:
    """For one token: 16 to 64 KiB of weights a program, 64 to 256 bytes a thread."""
    width = 1 << (columns - 1).bit_length()
    sizes = ((16, 4), (32, 4), (16, 8), (32, 8), (64, 8), (64, 16))  # KiB, warps
    tiles = [Tile(1, max(1, (kib << 10) // width), num_warps=warps, num_stages=1) for kib, warps in sizes]
    return list(dict.fromkeys(tiles))


# By the most tokens they are for. A candidate that does not suit a shape is left out by Case.candidates.
CANDIDATES = {
    1: [
        Tile(8, 32, span=4, num_stages=5),  # the tensor core's mma.sync, 4 warps along K
        Tile(8, 16, span=8, num_warps=8),
        Tile(8, 128, num_stages=5),
    ],
    8: [
        # mma.sync, warps along K: rows of a program against bytes in flight
        Tile(8, 32, span=4, num_stages=5),
        Tile(8, 32, span=8, num_warps=8),
        Tile(8, 16, span=8, num_warps=8),
        Tile(8, 16, span=4, num_stages=7),
        Tile(8, 64, span=4, num_warps=8),
        Tile(8, 32, span=4, num_warps=8, num_stages=5),
        # all of the loop on one tile: wide weights with few columns
        Tile(8, 128, num_stages=5),
        # weights as rows of wgmma, which converts nothing
        Tile(16, 128, num_stages=5),
        Tile(16, 64, num_stages=8),
        Tile(16, 128, num_warps=8, num_stages=6),
        Tile(16, 64, splits=4, num_stages=8),
        Tile(16, 128, splits=8, num_warps=8, num_stages=6),
    ],
    32: [
        # weights as rows of wgmma: 128 of them halve what is read of the tokens
        Tile(32, 128, num_stages=4),
        Tile(32, 128, num_warps=8, num_stages=5),
        Tile(32, 64, num_stages=6),
        Tile(32, 64, splits=2, num_stages=8),
        Tile(32, 64, splits=4, num_stages=6),
        Tile(32, 64, splits=4, num_stages=8),
        Tile(32, 128, splits=4, num_stages=6),
        Tile(32, 128, splits=4, num_warps=8, num_stages=8),
        Tile(32, 128, splits=8, num_stages=4),
        # tokens as rows, half of them missing
        Tile(64, 64, splits=4, num_stages=5),
        Tile(64, 128, num_stages=4),
        # mma.sync: no parts to add afterwards
        Tile(32, 32, span=4, num_stages=4),
        Tile(32, 16, span=8, num_warps=8),
    ],
    128: [
        Tile(128, 128, beside=2, num_warps=8, num_stages=4),  # reads least of the tokens
        Tile(128, 128, num_warps=8, num_stages=6),
        Tile(128, 128, splits=4, num_warps=8, num_stages=6),
        Tile(128, 128, splits=8, num_warps=8, num_stages=4),
        Tile(128, 64, num_warps=8, num_stages=5),
        Tile(128, 64, splits=2, num_warps=8, num_stages=8),
        Tile(128, 64, splits=4, num_warps=8, num_stages=4),
        Tile(64, 64, beside=2, splits=4, num_stages=4),  # two programs an SM from here on
        Tile(64, 64, stack=2, splits=4, num_stages=4),
        Tile(64, 128, stack=2, num_stages=3),
        Tile(64, 64, num_stages=5),
        Tile(64, 64, splits=2, num_stages=6),
        Tile(64, 128, num_stages=4),
    ],
    512: [
        Tile(128, 128, beside=2, num_warps=8, num_stages=4),
        Tile(128, 128, num_warps=8, num_stages=6),
        Tile(128, 64, num_warps=8, num_stages=4),
        Tile(128, 64, beside=2, num_warps=8, num_stages=3),
        Tile(64, 128, stack=2, num_stages=3),
        Tile(64, 128, num_stages=4),
        Tile(64, 64, stack=2, num_stages=4),
        Tile(64, 64, beside=2, num_stages=4),
    ],
    8192: [
        Tile(128, 128, beside=2, num_warps=8, num_stages=4),
        Tile(128, 128, num_warps=8, num_stages=6),
        Tile(64, 128, stack=2, num_stages=3),
        Tile(64, 128, num_stages=3),
    ],
}
# With bfloat16 activations the weights go through registers: tokens of a program against conversions.
BF16_CANDIDATES = {
    1: [Tile(8, 64, num_stages=6)],
    8: [
        Tile(8, 64, num_stages=6),
        Tile(16, 64, num_stages=6),
        Tile(16, 64, num_stages=8),
        Tile(16, 64, splits=2, num_stages=8),
        Tile(16, 128, splits=2, num_warps=8, num_stages=8),
        Tile(16, 128, splits=4, num_warps=8, num_stages=4),
        Tile(8, 32, span=8, num_warps=8, num_stages=3),
        Tile(8, 32, span=4, num_stages=4),
    ],
    32: [
        Tile(32, 64, num_stages=6),
        Tile(32, 64, num_stages=8),
        Tile(32, 64, splits=2, num_stages=6),
        Tile(32, 128, splits=2, num_warps=8, num_stages=6),
        Tile(32, 128, splits=4, num_warps=8, num_stages=4),
        Tile(32, 32, span=4, num_stages=3),
    ],
    128: [
        Tile(128, 64, num_stages=4),
        Tile(128, 64, splits=2, num_stages=3),
        Tile(128, 128, splits=2, num_warps=8, num_stages=4),
        Tile(64, 64, num_stages=4),
        Tile(64, 128, num_warps=8, num_stages=4),
        Tile(128, 64, num_stages=3),
    ],
    8192: [
        Tile(256, 128, num_warps=8, num_stages=3),
        Tile(256, 64, num_stages=3),
        Tile(128, 128, num_warps=8, num_stages=4),
        Tile(128, 64, num_stages=3),
        Tile(128, 128, num_warps=8, num_stages=3),
    ],
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
        return max(moved / bytes_per_s(), 2 * self.tokens * rows * columns / rate) * 1e6

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
        listed = streams(columns) + listed if self.tokens == 1 else listed
        return [
            tile for tile in listed if tile.divides(columns, rows // groups, groups) and self._suits(tile)
        ]

    def _suits(self, tile: Tile) -> bool:
        rows, columns, groups = SHAPES[self.name]
        if tile.tokens == 1:
            return rows // tile.rows >= 120
        across, down = -(-rows // (tile.rows * tile.beside)), -(-self.tokens // (tile.tokens * tile.stack))
        x_bytes, w_bytes = tile.tokens * tile.stack * (1 if groups == 1 else 2), tile.rows * tile.beside
        kept = tile.num_stages - 1 if tile.span > 1 or tile.tokens < 16 else tile.num_stages
        if (x_bytes + w_bytes) * BLOCK * tile.span * kept > SHARED_BYTES:
            return False
        split_for_a_reason = tile.splits == 1 or (across * down <= 128 and columns >= 4096)
        enough = across * down * tile.splits >= min(60, rows // 32)
        return split_for_a_reason and enough and (self.tokens > 128 or across * down <= 1024)

    def run(
        self, tile: Tile | None, engine: Engine = "ffi", out_dtype=jnp.bfloat16
    ) -> Callable[..., jax.Array]:
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
    one = jax.jit(run)  # so that all calls share one lowering

    def one_round(x: Any, weights: list[QuantArray]) -> list[jax.Array]:
        return [one(x, weight) for weight in weights]

    def all_rounds(x: Any, weights: list[QuantArray]) -> list[jax.Array]:
        def body(_: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            # To XLA the next round's inputs hang on this one's results: it can neither hoist nor merge.
            x, weights, _ = carry
            return jax.lax.optimization_barrier((x, weights, one_round(x, weights)))

        # The first round stands before the loop: zeros in its place would be written, and copied, each time.
        return jax.lax.fori_loop(1, rounds, body, (x, weights, one_round(x, weights)))[2]

    return jax.jit(all_rounds)


@jax.jit
def relative_error(out: jax.Array, expected: jax.Array) -> jax.Array:
    expected = expected[: out.shape[0]]
    return jnp.linalg.norm(out.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)


class Bench:
    """The arrays of one weight of SHAPES, and what runs on them."""

    def __init__(self, name: str, most_tokens: int):
        key, largest = jax.random.key(0, impl="rbg"), Case(name, most_tokens)
        copies = max(FEWEST_CALLS, self._cold_copies(name))
        self.weights = [random_arrays(jax.random.fold_in(key, n), Case(name, 1))[1] for n in range(copies)]
        self.x = random_arrays(key, largest)[0]
        self.expected = jax.jit(largest.run(None, out_dtype=jnp.float32))(self.x, self.weights[0])

    @staticmethod
    def _cold_copies(name: str) -> int:
        rows, columns, _ = SHAPES[name]
        return max(2, math.ceil(COLD_BYTES / (rows * columns)))

    def inputs(self, case: Case) -> tuple[Any, list[QuantArray]]:
        """x, and the weights: where a call takes long, the loop costs nothing and results take much room."""
        copies = len(self.weights) if case.tokens <= 512 else self._cold_copies(case.name)
        return jax.tree.map(lambda leaf: leaf[: case.tokens], self.x), self.weights[:copies]

    def calls(self, case: Case) -> tuple[int, int]:
        """Rounds, as many as take some 3 ms, and calls in all of them."""
        weights = self.inputs(case)[1]
        rounds = max(1, round(3000 / (1.3 * max(3, case.floor_us) * len(weights))))
        rounds = 1 if rounds == 2 else rounds  # XLA unrolls a loop of one turn, and its calls are made once
        return rounds, rounds * len(weights)

    def prepare(self, case: Case, tile: Tile | None, engine: Engine) -> tuple[Any, float]:
        """The compiled program and its error; runs it once, since PTX is assembled on the first run."""
        inputs = self.inputs(case)
        compiled = program(case.run(tile, engine), self.calls(case)[0]).lower(*inputs).compile()
        return compiled, float(relative_error(compiled(*inputs)[0], self.expected))

    def times(self, case: Case, compiled: Any) -> dict[str, float]:
        """`us` and `us_sustained` of one product."""
        return timed(functools.partial(compiled, *self.inputs(case)), self.calls(case)[1], SUSTAINED_MS)


def is_believed(case: Case, us: float, error: float) -> bool:
    """Faster than the floor by more than its own uncertainty: something was not run, or not read."""
    return us >= 0.85 * case.floor_us and error < MOST_ERROR


def _print_row(case: Case, label: str, us: float, error: float) -> None:
    doubt = "" if is_believed(case, us, error) else "  NOT BELIEVED"
    share = f"{case.floor_us / us:4.0%} of {case.floor_us:.1f}"
    print(f"{case.id:46} {label:62} {us:8.2f} us  {share:16} error {error:.1e}{doubt}", flush=True)


Times = dict[str, float]
Found = dict[Case, list[tuple[float, Tile, float, Times]]]  # microseconds, tile, error


def try_tiles(bench: Bench, jobs: list[tuple[Case, Tile]], engine: Engine) -> Found:
    """Compiles all jobs side by side, then times one after the other; keeps what is right."""
    found: Found = {}
    futures = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for number, job in enumerate(jobs):
            futures.append(pool.submit(bench.prepare, *job, engine))
            if number == 0:
                futures[0].exception()  # alone: the first also imports what all of them share
    for (case, tile), future in zip(jobs, futures, strict=True):
        if future.exception():  # a tile that does not fit the chip is a result too
            print(f"{case.id} {_shown(tile)}: {str(future.exception())[:200]}", flush=True)
            continue
        compiled, error = future.result()
        times = bench.times(case, compiled)
        us = times["us"]
        _print_row(case, f"{engine} {_shown(tile)}", us, error)
        if is_believed(case, us, error):
            found.setdefault(case, []).append((us, tile, error, times))
    return found


def _row(case: Case, implementation: str, times: Times, error: float, **more: Any) -> dict[str, Any]:
    row = {"id": case.id, "implementation": implementation} | times
    return row | {"floor_us": round(case.floor_us, 1), "rel_err": error} | more | facts()


def measure(name: str, arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[Case, Tile]]:
    """Rows of results of one weight, and the best tile for each number of tokens."""
    rows, best = [], {}
    cases, bench = [Case(name, tokens) for tokens in arguments.tokens], Bench(name, max(arguments.tokens))
    jobs = [(case, case.default()) for case in cases]
    if arguments.tune:
        jobs += [(case, tile) for case in cases for tile in case.candidates() if tile != case.default()]
    for case, tried in try_tiles(bench, jobs, arguments.engine).items():
        _, best[case], error, times = min(tried, key=lambda each: each[0])
        label = "triton" if arguments.engine == "ffi" else f"triton {arguments.engine}"
        rows.append(_row(case, label, times, error, tile=fields(best[case])))
    for case in (case for case in cases if case.tokens in arguments.control):
        compiled, error = bench.prepare(case, None, arguments.engine)
        times = bench.times(case, compiled)
        _print_row(case, "reference", times["us"], error)
        rows.append(_row(case, "reference", times, error))
    return rows, best


def compare_engines(name: str, best: dict[Case, Tile]) -> list[dict[str, Any]]:
    """The best tiles of one weight by the other engine."""
    jobs = [(case, tile) for case, tile in best.items() if case.name == name]
    found = try_tiles(Bench(name, max(case.tokens for case, _ in jobs)), jobs, "xla") if jobs else {}
    return [
        _row(case, "triton xla", times, error, tile=fields(tile))
        for case, [(_, tile, error, times)] in found.items()
    ]


def fields(tile: Any) -> dict[str, int]:
    """The fields of a tile, or another NamedTuple, that are not as by default."""
    return {name: value for name, value in tile._asdict().items() if value != tile._field_defaults.get(name)}


def _shown(tile: Tile) -> str:
    return " ".join(f"{name.removeprefix('num_')}={value}" for name, value in fields(tile).items())


def write_tiles(best: dict[Case, Tile], path: Path) -> None:
    """The table of tiles with these in it, one line each."""
    table = {
        arch: {op: {shape: dict(tiles) for shape, tiles in shapes.items()} for op, shapes in ops.items()}
        for arch, ops in tuned().items()
    }
    for case, tile in best.items():
        rows, columns, _ = SHAPES[case.name]
        shapes = table.setdefault(current_target().arch, {}).setdefault(case.operand, {})
        shapes.setdefault(f"{rows}x{columns}", {})[case.tokens] = tile
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_as_json(table) + "\n")
    print(f"# tiles of {len(best)} cases in {path}")


def _as_json(value: Any, indent: str = "") -> str:
    if isinstance(value, Tile):
        return json.dumps(fields(value))
    inner = indent + "  "
    lines = [f'{inner}"{key}": {_as_json(value[key], inner)}' for key in sorted(value)]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


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
    return f"{case.id:46} {_shown(tile):58} {'; '.join(lines)}"


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
    parser.add_argument("--model", choices=list(MODELS), default="flash", help="whose weights")
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), help="instead of those of --model")
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 8, 32, 128, 512, 2048, 8192])
    parser.add_argument("--engine", choices=["ffi", "xla"], default="ffi")
    parser.add_argument("--both-engines", choices=list(SHAPES), help="at last, its best tiles by engine xla")
    parser.add_argument("--tune", action="store_true", help="try all candidate tiles and keep the best")
    parser.add_argument("--tiles-out", type=Path, help="where --tune writes the table of tiles")
    parser.add_argument("--control", type=int, nargs="*", default=[128], help="also time the reference for")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no new shape after so long")
    parser.add_argument("--results", type=Path, help="JSON file to add rows to")
    parser.add_argument("--dry", action="store_true", help="only compile, without a GPU")
    parser.add_argument("--arch", default="sm_90", help="what --dry compiles for")
    arguments = parser.parse_args()
    arguments.shapes = arguments.shapes or MODELS[arguments.model]
    started = time.perf_counter()
    if arguments.dry:
        dry(arguments)
        return 0
    # Calls that do not depend on each other must not run side by side, as they never do in a model.
    flags = "--xla_gpu_command_buffer_scheduling_mode=SERIALIZE"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"

    best: dict[Case, Tile] = {}

    def keep(rows: list[dict[str, Any]]) -> None:
        """Saves as it goes: whoever stops the run has what was measured."""
        if arguments.tune and arguments.tiles_out:
            write_tiles(best, arguments.tiles_out)
        if arguments.results and rows:
            save(rows, arguments.results)
        print(f"# {time.perf_counter() - started:.0f} s", flush=True)

    for name in arguments.shapes:
        if time.perf_counter() - started > arguments.seconds:
            print(f"# out of time before {name}", flush=True)
            break
        rows, found = measure(name, arguments)
        best |= found
        keep(rows)
    if arguments.both_engines:
        keep(compare_engines(arguments.both_engines, best))
    return 0


if __name__ == "__main__":
    sys.exit(main())
