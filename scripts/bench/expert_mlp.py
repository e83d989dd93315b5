#!/usr/bin/env python3
"""Times the routed experts of a layer at the shapes of DeepSeek-V4-Flash and -Pro.

Every case is checked against the definition in the same run. A call reads the weights of all experts that its
tokens chose, far more than the L2 holds; each call of a run has tokens and routing of its own. Calls run one
after the other inside one jitted program. All programs are compiled before one is timed.

  python scripts/bench/expert_mlp.py --results scripts/bench/results/h200.json
  python scripts/bench/expert_mlp.py --check --tokens 1 3 17 127 129 1000   only whether it is right
  python scripts/bench/expert_mlp.py --profile   shows which kernels a call consists of
  python scripts/bench/expert_mlp.py --weights fp8 --implementations triton   Mosaic takes FP4 only
  python scripts/bench/expert_mlp.py --implementations triton --tune --tiles-out tuned.json
"""

import argparse
import json
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parent))

from expert_cases import LIMIT, MODELS, MOST_ERROR, Bench, Case, Way, triton_way
from harness import facts, save
from profile_kernels import kernel_times, print_kernel_times

from pallas_kernels import current_target
from pallas_kernels.expert_mlp import triton as kernels
from pallas_kernels.expert_mlp.tilings import Tiling, Tilings, tuned

# By the most tokens they are for: tokens in a tile and the tiling, tried for both products.
CANDIDATES = {
    8: "16 128 4 4, 16 64 4 4",
    128: "16 128 4 4, 16 256 8 4",
    512: "16 128 4 4, 32 128 4 3, 16 256 8 4, 32 256 8 3, 32 256 8 4",
    2048: "64 128 4 3, 64 256 8 3, 64 256 8 4, 64 128 8 3",
    8192: "64 128 4 3, 64 256 8 3, 128 64 4 3, 128 128 8 3",
}


class Prepared(NamedTuple):
    """A way, its errors, and compiled programs unless it is only checked."""

    way: Way
    errors: tuple[float, float]
    layer: Any
    with_plan: Any


def prepare(case: Case, implementation: str, check: bool, sizes: Tilings | None) -> Prepared:
    if sizes is None:
        way = case.way(implementation)
    else:
        way = triton_way(sizes, case.bench.activation, case.bench.of_weights)
    errors = case.errors(way)
    if check:
        return Prepared(way, errors, None, None)
    return Prepared(way, errors, case.layer(way), case.layer_with_plan(way))


def sweep(case: Case, deadline: float) -> Tilings | None:
    """The fastest of the Triton candidates that give the right result, each product timed alone."""
    listed = CANDIDATES[min(most for most in CANDIDATES if most >= min(case.tokens, 8192))]
    candidates = [
        (numbers[0], Tiling(*numbers[1:]))
        for numbers in (tuple(map(int, each.split())) for each in listed.split(","))
    ]
    bench = case.bench

    def prepare(tile_rows: int, tiling: Tiling):
        planned = case.planned(tile_rows)
        way = triton_way(Tilings(0, tile_rows, tiling, tiling), bench.activation, bench.of_weights)
        inner = jnp.zeros((planned[0][2].size, bench.config.moe_intermediate_size), jnp.bfloat16) + 0.5

        def first(request, weights):
            x, plan, shares = request
            return kernels.gate_up(x, plan, shares, weights[0], LIMIT, bench.activation, tile_rows, tiling)

        def second(request, weights):
            x, plan, _ = request
            return kernels.down(x, plan, weights[1], bench.activation, tile_rows, tiling)

        down_inputs = [(inner, plan, shares) for _, plan, shares in planned]
        return max(case.errors(way)), case.prepare(first, planned), case.prepare(second, down_inputs)

    with ThreadPoolExecutor(16) as pool:
        futures = [pool.submit(prepare, *each) for each in candidates]
    found: dict[int, list[tuple[float, float, Tiling]]] = {}
    for (tile_rows, tiling), future in zip(candidates, futures, strict=True):
        label = f"{tile_rows} {tiling.rows} {tiling.num_warps} {tiling.num_stages}"
        if future.exception():  # a tiling that does not fit the chip is a result too
            print(f"T={case.tokens} {label}: {str(future.exception())[:150]}", flush=True)
            continue
        if time.perf_counter() > deadline:
            break
        error, *prepared = future.result()
        times = [case.time_us(each) for each in prepared]
        print(
            f"T={case.tokens} {label}: gate_up {times[0]:.1f} down {times[1]:.1f} error {error:.1e}",
            flush=True,
        )
        if error < MOST_ERROR:
            found.setdefault(tile_rows, []).append((times[0], times[1], tiling))
    best = [
        (
            min(each[0] for each in timed) + min(each[1] for each in timed),
            Tilings(case.rows, tile_rows, min(timed)[2], min(timed, key=lambda each: each[1])[2]),
        )
        for tile_rows, timed in found.items()
    ]
    if not best:
        return None
    us, sizes = min(best)
    print(f"T={case.tokens} best {us:.1f} us, floor {case.floor:.1f}: {sizes}", flush=True)
    return sizes


def write_tilings(operands: str, tilings: list[Tilings], path: Path) -> None:
    """The table of `tilings.tuned` with these in it, for these operands on this chip."""
    table = {arch: dict(listed) for arch, listed in tuned().items()}
    of_chip = table.setdefault(current_target().arch, {})
    by_rows = {each.rows: each for each in (*of_chip.get(operands, ()), *tilings)}
    of_chip[operands] = sorted(by_rows.values())

    def on_one_line(match: re.Match[str]) -> str:
        return re.sub(r"\s+", " ", match[0]).replace("[ ", "[").replace(" ]", "]")

    as_fields = {
        arch: {key: [each._asdict() for each in listed] for key, listed in ops.items()}
        for arch, ops in table.items()
    }
    lines = re.sub(r"\{\s+\"rows\"[^}]*\}", on_one_line, json.dumps(as_fields, indent=2))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(lines + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(MODELS), default="flash")
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 8, 32, 128, 512, 2048, 8192])
    parser.add_argument("--weights", choices=["fp4", "fp8"], default="fp4")
    parser.add_argument("--activation", choices=["fp8_token128", "none"], default="fp8_token128")
    parser.add_argument("--implementations", nargs="*", choices=["mosaic", "triton"], default=["mosaic"])
    parser.add_argument(
        "--tune",
        type=int,
        nargs="*",
        help="try candidates for Triton first for these --tokens, by default for all",
    )
    parser.add_argument("--tiles-out", type=Path, help="where --tune writes the table of tilings")
    parser.add_argument("--check", action="store_true", help="time nothing")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a call and their times")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no new case after so long")
    parser.add_argument("--results", type=Path, help="JSON file to add rows to")
    arguments = parser.parse_args()
    # Calls that do not depend on each other must not run side by side, as they never do in a model.
    flags = "--xla_gpu_command_buffer_scheduling_mode=SERIALIZE"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"
    started = time.perf_counter()
    deadline = started + arguments.seconds

    activation = None if arguments.activation == "none" else arguments.activation
    bench = Bench(arguments.model, arguments.weights, activation)
    jax.block_until_ready(bench.weights)
    print(f"# {bench.label}: weights at {time.perf_counter() - started:.1f} s", flush=True)
    cases = [Case(bench, tokens) for tokens in sorted(arguments.tokens)]
    tilings = {}
    if arguments.tune is not None:
        for case in cases:
            if case.tokens in (arguments.tune or arguments.tokens) and time.perf_counter() < deadline:
                tilings[case.tokens] = sweep(case, deadline)
        found = [each for each in tilings.values() if each is not None]
        if arguments.tiles_out:
            write_tilings(kernels.operands(bench.weights[0], activation), found, arguments.tiles_out)
    jobs = [(case, name) for case in cases for name in arguments.implementations]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [
            pool.submit(
                prepare, *job, arguments.check, tilings.get(job[0].tokens) if job[1] == "triton" else None
            )
            for job in jobs
        ]
        failures = [future.exception() for future in futures]  # waits: a compiling host disturbs the clock
    print(f"# compiled at {time.perf_counter() - started:.1f} s", flush=True)
    wrong = 0
    for (case, name), future, failure in zip(jobs, futures, failures, strict=True):
        label = f"{bench.label} T={case.tokens}"
        if failure:
            wrong += 1
            print(f"{label} {name}: {type(failure).__name__} {str(failure)[:300]}", flush=True)
            continue
        way, both, layer, with_plan = future.result()
        error = max(both)
        wrong += error > MOST_ERROR
        said = f"{label} {way.name} [{way.cut}]: errors {both[0]:.1e} {both[1]:.1e}"
        said += "  WRONG" * (error > MOST_ERROR)
        if arguments.check:
            print(said, flush=True)
            continue
        if time.perf_counter() > deadline:
            print(f"# stopped before {label}: out of time", flush=True)
            break
        row = {"rel_err": error} | case.measure(layer, with_plan)
        print(
            f"{said}, {row['us']:.1f} us, floor {case.floor:.1f} ({case.floor / row['us']:.0%}), sustained"
            f" {row['us_sustained']:.1f}, kernels alone {row['us_kernels']:.1f}, with routing"
            f" {row['us_with_routing']:.1f}",
            flush=True,
        )
        if arguments.profile:
            print_kernel_times(label, kernel_times(with_plan, case.calls))
        if arguments.results and error <= MOST_ERROR:
            head = {"id": label, "implementation": way.name, "floor_us": round(case.floor, 1)}
            save([head | row | {"config": way.cut} | facts()], arguments.results)
    print(f"# done in {time.perf_counter() - started:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
