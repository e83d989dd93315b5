#!/usr/bin/env python3
"""Times the Mosaic GPU kernels of FP8 products: what the model would run, Triton's choice, and rivals.

Cases, weights and programs are those of block_matmul.py. Every configuration is checked against the reference
before and after it is timed, row by row: one bad piece of a large result would hide in the error of all.

  python scripts/bench/block_matmul_mosaic.py --results scripts/bench/results/h200.json
  python scripts/bench/block_matmul_mosaic.py --sweep --tiles-out FILE     writes what was fastest
  python scripts/bench/block_matmul_mosaic.py --shapes wo_b --tokens 8192 --configs "many 256 128 4,few 8 64"
  python scripts/bench/block_matmul_mosaic.py --sweep --dry      no GPU: lowers all, prints them
"""

import argparse
import functools
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parent))

from block_matmul import MODELS, MOST_ERROR, SHAPES, Bench, Case, fields, program
from harness import facts, save, timed

from pallas_kernels.block_matmul import mosaic, mosaic_few, triton
from pallas_kernels.block_matmul.mosaic_config import TILES, Few, Many, Shape, by_rule, chosen, tuned
from pallas_kernels.block_matmul.tiles import Tile, tile_for

Config = Few | Many | Tile
# wo_a, whose groups are products of their own, takes bfloat16.
MODEL_SHAPES = {model: [name for name in names if SHAPES[name][2] == 1] for model, names in MODELS.items()}
MODULES: dict[type, Any] = {Few: (mosaic_few, "config"), Many: (mosaic, "config"), Tile: (triton, "tile")}
KERNELS = {"few": Few, "many": Many}
# Rows of a program, parts of K, warpgroups side by side, blocks of a stage, and programs of a multiprocessor.
CUTS = [
    *((64, 1, 1, 2, 4), (64, 1, 1, 2, 2), (64, 1, 1, 4, 1), (64, 2, 1, 4, 1), (64, 2, 1, 8, 1)),
    *((64, 4, 1, 2, 1), (64, 4, 1, 4, 1), (64, 1, 1, 1, 1), (64, 2, 1, 1, 1), (64, 2, 2, 1, 1)),
    *((64, 4, 2, 1, 1), (128, 1, 1, 1, 2), (128, 2, 1, 1, 1), (256, 1, 1, 1, 1)),
]


def shape_of(case: Case) -> Shape:
    rows, columns, _ = SHAPES[case.name]
    return Shape(case.tokens, rows, columns)


def parse(text: str) -> Config:
    """The configuration of "few 8 64 2"; what is missing at the end keeps its default."""
    kernel, *numbers = text.split()
    return KERNELS[kernel](*map(int, numbers))


def shown(config: Config) -> str:
    name = next((name for name, kind in KERNELS.items() if isinstance(config, kind)), "triton")
    return " ".join([name, *(str(int(field)) for field in config)])


def configs(case: Case, arguments: argparse.Namespace) -> list[Config]:
    """Those to measure: the kernels' own choice, Triton's where it may be faster, and rivals."""
    if arguments.configs:
        return [parse(each) for each in arguments.configs.split(",")]
    shape = shape_of(case)
    found: list[Config | None] = [chosen(shape)]
    if case.tokens <= 128:
        found.append(tile_for("sm_90", "fp8", *shape))
    if arguments.sweep:
        found += [by_rule(shape), *rivals(shape)]
    return list(dict.fromkeys(each for each in found if each))


def rivals(shape: Shape) -> list[Few | Many]:
    """That keep most multiprocessors busy, and do not need far more rounds of programs than others."""
    found: list[Few | Many] = []
    for rows, splits, beside, blocks, resident in CUTS if shape.tokens <= 128 else []:
        for tokens in {8, 32, 64, 128} if shape.tokens == 128 else {max(8, shape.tokens)}:
            programs = -(-shape.rows // rows) * -(-shape.tokens // tokens) * splits
            if shape.columns // 128 % (splits * blocks) or not 90 <= programs <= 132 * resident:
                continue
            if tokens // beside >= 32:
                found.append(Few(tokens, rows, splits, 1, 1, beside, blocks).deepest(shape, resident))
            elif beside == 1:
                found.append(Few(tokens, rows, splits, 1, 1, 1, blocks).deepest(shape, resident))
    if shape.tokens >= 128:
        found += [tile for tile in TILES if tile.tokens <= shape.tokens]
    return [each for each in found if each.stages >= 2]


@jax.jit
def worst_error(out: jax.Array, expected: jax.Array) -> jax.Array:
    """The largest relative error of a token's row; infinity if anything is not a number."""
    expected = expected[: out.shape[0]]
    difference = jnp.linalg.norm(out.astype(jnp.float32) - expected, axis=-1)
    worst = jnp.max(difference / jnp.linalg.norm(expected, axis=-1))
    return jnp.where(jnp.isfinite(worst), worst, jnp.inf)


def run(config: Config) -> Any:
    """The product as a function of x and weight."""
    module, keyword = MODULES[type(config)]
    return functools.partial(module.block_matmul, out_dtype=jnp.bfloat16, **{keyword: config})


def measure(name: str, arguments: argparse.Namespace, started: float) -> dict[Case, dict[Config, Any]]:
    """Times and errors of all configurations of a weight that are right."""
    cases = [Case(name, tokens) for tokens in arguments.tokens]
    jobs = [(case, config) for case in cases for config in configs(case, arguments)]
    bench = Bench(name, max(arguments.tokens))

    def compile(case: Case, config: Config) -> Any:
        inputs = bench.inputs(case)
        return program(run(config), bench.calls(case)[0]).lower(*inputs).compile()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(compile, *job) for job in jobs]
    print(f"# {name}: {len(jobs)} programs ready at {time.perf_counter() - started:.0f} s", flush=True)

    found: dict[Case, dict[Config, Any]] = {case: {} for case in cases}
    for (case, config), future in zip(jobs, futures, strict=True):
        inputs, calls = bench.inputs(case), bench.calls(case)[1]
        try:
            compiled = future.result()
            first = float(worst_error(compiled(*inputs)[0], bench.expected))
            times = timed(functools.partial(compiled, *inputs), calls, arguments.sustained)
            error = max(first, float(worst_error(compiled(*inputs)[0], bench.expected)))
        except Exception as error:  # a configuration that does not fit is a result too
            print(f"{case.id} {shown(config)}: {type(error).__name__} {str(error)[:300]}", flush=True)
            continue
        # Faster than the floor by more than its own uncertainty: something was not run, or not read.
        believed = times["us"] >= 0.85 * case.floor_us and error < MOST_ERROR
        share = f"{case.floor_us / times['us']:4.0%} of {case.floor_us:.1f}"
        row = (
            f"{case.id:46} {shown(config):30} {times['us']:8.2f} us ({times['us_sustained']:8.2f} sustained)"
        )
        print(f"{row} {share:14} worst {error:.1e}{'' if believed else '  NOT BELIEVED'}", flush=True)
        if believed:
            found[case][config] = times | {"rel_err": error}
    return found


def rows(case: Case, found: dict[Config, Any]) -> list[dict[str, Any]]:
    """The fastest of each implementation."""
    best: dict[str, Config] = {}
    for config in sorted(found, key=lambda config: found[config]["us"]):
        best.setdefault("triton" if isinstance(config, Tile) else "mosaic", config)
    floor = {"floor_us": round(case.floor_us, 1)}
    return [
        {"id": case.id, "implementation": name} | found[config] | floor | {"config": shown(config)} | facts()
        for name, config in best.items()
    ]


def write_table(best: dict[Case, Config], path: Path) -> None:
    """The table of `mosaic_config` with these in it, one line each; null where Triton's kernel is faster."""
    table = {f"{rows}x{columns}": dict(entries) for (rows, columns), entries in tuned().items()}
    for case, config in best.items():
        rows, columns, _ = SHAPES[case.name]
        table.setdefault(f"{rows}x{columns}", {})[case.tokens] = None if isinstance(config, Tile) else config

    def entry(config: Config | None) -> str:
        kernel = next((name for name, kind in KERNELS.items() if isinstance(config, kind)), None)
        return json.dumps(config and {"kernel": kernel} | fields(config))

    lines = [
        f'  "{shape}": {{\n'
        + ",\n".join(f'    "{tokens}": {entry(entries[tokens])}' for tokens in sorted(entries))
        + "\n  }"
        for shape, entries in table.items()
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def dry(arguments: argparse.Namespace) -> None:
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("unused",), abstract_device=device)
    for name in arguments.shapes:
        for case in (Case(name, tokens) for tokens in arguments.tokens):
            for config in configs(case, arguments):
                if not isinstance(config, Tile):
                    with jax.sharding.use_abstract_mesh(mesh):
                        traced = jax.jit(run(config)).trace(*jax.eval_shape(case.arrays))
                        traced.lower(lowering_platforms=("cuda",))
                print(f"{case.id:46} {shown(config)}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(MODELS), default="flash")
    names = [name for names in MODEL_SHAPES.values() for name in names]
    parser.add_argument("--shapes", nargs="*", choices=names, help="in place of --model")
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 8, 32, 128, 512, 2048, 8192])
    parser.add_argument("--sweep", action="store_true", help="measure what might be faster, too")
    parser.add_argument("--configs", help='these alone: "few 8 64 2,many 256 128 4"')
    parser.add_argument("--sustained", type=float, default=300, help="milliseconds of load that lasts")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no new shape after so long")
    parser.add_argument("--results", type=Path, help="JSON file to add rows to")
    parser.add_argument("--tiles-out", type=Path, help="where to write the table of configurations")
    parser.add_argument("--dry", action="store_true", help="only lower, without a GPU")
    arguments = parser.parse_args()
    arguments.shapes = arguments.shapes or MODEL_SHAPES[arguments.model]
    started = time.perf_counter()
    if arguments.dry:
        dry(arguments)
        return 0
    # Calls that do not depend on each other must not run side by side, as they never do in a model.
    flags = "--xla_gpu_command_buffer_scheduling_mode=SERIALIZE"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"
    best: dict[Case, Config] = {}
    for name in arguments.shapes:
        if time.perf_counter() - started > arguments.seconds:
            print(f"# out of time before {name}", flush=True)
            break
        for case, found in measure(name, arguments, started).items():
            if found:
                best[case] = min(found, key=lambda config: found[config]["us"])
                if arguments.results:
                    save(rows(case, found), arguments.results)
        if arguments.tiles_out:
            write_table(best, arguments.tiles_out)
    for case, config in best.items():
        print(f"# best {case.id:46} {shown(config)}")
    print(f"# done in {time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
