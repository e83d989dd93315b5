#!/usr/bin/env python3
"""Times the Mosaic GPU kernel of the routed experts, over configurations of its tiles.

Cases, weights and timing are those of expert_mlp.py. Of every configuration both products are checked against
float32 on the kernel's own inputs, then each kernel is timed alone, and without decoding or promotion, which
says what those cost. Whole layers are timed for the best, with all that stands around the kernels.

  python scripts/bench/expert_mlp_mosaic.py --results scripts/bench/results/h200.json
  python scripts/bench/expert_mlp_mosaic.py --tokens 8192 --configs "64 1 4,48+48 2 2" --profile
"""

import argparse
import functools
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parent))

from expert_mlp import LIMIT, MODELS, MOST_ERROR, Bench, Case, check
from harness import facts, median_us, save, timed
from profile_kernels import kernel_times, print_kernel_times

from pallas_kernels.activation_quant import activation_quant
from pallas_kernels.expert_mlp import mosaic
from pallas_kernels.expert_mlp.mosaic import Config, Configs, deepest
from pallas_kernels.expert_mlp.tiles import ExpertTiles

# By the most tokens they are for: tokens of each tensor core product, times 64 rows, and warpgroups.
CANDIDATES = {
    512: "16 1 4,32 1 4",
    2048: "64 1 4,32+32 1 4,64 2 2",
    8192: "64+64+48+48 1 2,32+32+32+16 1 4,64+48 2 2,64 1 4",
}
OFF = ("decoding", "promotion")


def parse(text: str) -> Configs:
    """Those of "64+48 2 2" or, with stages of both products, of "64+48 2 2 5 4"."""
    widths, waves, consumers, *stages = text.split()
    configs = deepest(tuple(map(int, widths.split("+"))), int(waves), int(consumers))
    if not stages:
        return configs
    first, second = map(int, stages)
    return Configs(configs.gate_up._replace(stages=first), configs.down._replace(stages=second))


def shown(config: Config) -> str:
    return f"{'+'.join(map(str, config.widths))} {config.waves} {config.consumers} {config.stages}"


class Prepared(NamedTuple):
    """Compiled programs, and the error of each product."""

    errors: tuple[float, float]
    programs: dict[str, Any]


def kernel_inputs(case: Case, config: Config) -> tuple[list[Any], list[Any]]:
    """What both kernels take, for each of the case's requests."""
    choices = case.bench.config.num_experts_per_tok
    columns = case.bench.config.moe_intermediate_size

    @jax.jit
    def gate_up(request):
        x, planned, weights = request
        values, exponents = mosaic._quant_sorted(x, planned, choices)
        shares = mosaic._by_tile(planned, config, weights.reshape(-1)[planned.order][:, None], 1)[..., 0]
        return values, mosaic._scales(planned, config, exponents, choices), shares, planned

    @functools.partial(jax.jit, static_argnums=1)
    def down(planned, rows):
        inner = jax.random.normal(jax.random.key(0, impl="rbg"), (rows, columns)).astype(jnp.bfloat16)
        quant = activation_quant(inner)
        return quant.values, mosaic._scales(planned, config, quant.scale, 1), planned.order, planned

    requests = case.planned(config.tokens)
    return [gate_up(each) for each in requests], [down(each[1], each[2].size) for each in requests]


def errors(case: Case, configs: Configs) -> tuple[float, float]:
    """Of both products against their definitions; not a number counts as infinite."""
    bench, (x, planned, shares) = case.bench, case.planned(configs.gate_up.tokens)[0]
    w13, w2 = cast(tuple[ExpertTiles, ExpertTiles], bench.weights)
    inner = mosaic.gate_up(x, planned, shares, w13, LIMIT, configs.gate_up)
    out = mosaic.down(inner, planned, w2, configs.down)
    found = check(x, case.inputs[0][1], planned, shares, inner, out, bench.weights, bench.activation)
    whole = bool(jnp.isfinite(inner).all() & jnp.isfinite(out).all())
    return tuple(error if whole and error == error else float("inf") for error in found)  # type: ignore[return-value]


def prepare(case: Case, configs: Configs, off: bool) -> Prepared:
    """Checks both products and compiles the kernels alone; `off`: without parts of their work, too."""
    programs = {}
    products = zip(
        configs._asdict().items(), kernel_inputs(case, configs.gate_up), (LIMIT, None), strict=True
    )
    for place, ((name, config), inputs, limit) in enumerate(products):
        for without in ("", *OFF) if off else ("",):
            less = config._replace(without=without)

            def run(request, weights, config=less, limit=limit, place=place):
                return mosaic._launch(weights[place], *request, config=config, limit=limit)

            # A kernel's PTX is assembled when it first runs.
            jax.block_until_ready(run(inputs[0], case.bench.weights))
            programs[f"{name} without {without}" if without else name] = case.prepare(run, inputs)
    return Prepared(errors(case, configs), programs)


def kernel_us(case: Case, program: Any) -> float:
    return median_us(program, repeats=3) / case.calls


def sweep(case: Case, candidates: list[Configs], off: bool) -> list[tuple[float, Configs, float]]:
    """Of the candidates that are right: microseconds of both kernels, themselves, and their error."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(prepare, case, configs, off) for configs in candidates]
        for configs, future in zip(candidates, futures, strict=True):
            state = "failed" if future.exception() else "ready"
            print(f"# T={case.tokens} {shown(configs.gate_up)} {state}", flush=True)  # a hang shows which
    found = []
    for configs, future in zip(candidates, futures, strict=True):
        label = f"T={case.tokens} {shown(configs.gate_up)} / {configs.down.stages}"
        try:
            prepared = future.result()
            times = {name: kernel_us(case, program) for name, program in prepared.programs.items()}
        except Exception as error:  # a configuration that does not fit is a result too
            print(f"{label}: {type(error).__name__} {str(error)[:200]}", flush=True)
            continue
        wrong = "" if max(prepared.errors) < MOST_ERROR else "  WRONG"
        said = ", ".join(f"{name} {us:.1f}" for name, us in times.items())
        print(f"{label}: {said}; errors {prepared.errors[0]:.1e} {prepared.errors[1]:.1e}{wrong}", flush=True)
        if not wrong:
            found.append((times["gate_up"] + times["down"], configs, max(prepared.errors)))
    return sorted(found, key=lambda each: each[0])


def whole_layer(case: Case, configs: Configs, profile: bool) -> dict[str, float]:
    """Microseconds of all but the plan, as `harness.timed` gives them."""

    def run(request, weights):
        x, planned, shares = request
        w13, w2 = weights
        return mosaic.planned_mlp(x, planned, shares, w13, w2, LIMIT, configs)

    program = case.prepare(run, case.planned(configs.gate_up.tokens))
    times = timed(program, case.calls)
    if profile:
        print_kernel_times(f"T={case.tokens}", kernel_times(program, case.calls))
    return times


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(MODELS), default="flash")
    parser.add_argument("--tokens", type=int, nargs="*", default=[2048, 512, 8192])
    parser.add_argument("--configs", help='in place of the table: "64+48 2 2,32+32 1 4 6 6"')
    parser.add_argument(
        "--off", action="store_true", help="time the kernels without parts of their work, too"
    )
    parser.add_argument("--profile", action="store_true", help="print the kernels of a layer and their times")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no new case after so long")
    parser.add_argument("--ptxas", action="store_true", help="let the assembler print registers and spills")
    parser.add_argument("--results", type=Path, help="JSON file to add rows to")
    arguments = parser.parse_args()
    started = time.perf_counter()
    if arguments.ptxas:
        os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    # Calls that do not depend on each other must not run side by side, as they never do in a model.
    flags = "--xla_gpu_command_buffer_scheduling_mode=SERIALIZE"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"

    of_bench = argparse.Namespace(model=arguments.model, activation="fp8_token128", weights="fp4")
    bench = Bench(of_bench)
    jax.block_until_ready(bench.weights)
    print(f"# {bench.label}: weights at {time.perf_counter() - started:.1f} s", flush=True)
    for tokens in arguments.tokens:
        if time.perf_counter() - started > arguments.seconds:
            print(f"# stopped before T={tokens}: out of time", flush=True)
            break
        case = bench.case(tokens)
        table = CANDIDATES[min(most for most in CANDIDATES if most >= min(tokens, 8192))]
        candidates = [parse(each) for each in (arguments.configs or table).split(",")]
        best = sweep(case, candidates, arguments.off)
        print(f"# T={tokens}: swept at {time.perf_counter() - started:.0f} s", flush=True)
        for number, (kernels_us, configs, error) in enumerate(best[:2]):
            times = whole_layer(case, configs, arguments.profile and number == 0)
            print(
                f"{bench.label} T={tokens} mosaic {shown(configs.gate_up)}: {times['us']:.1f} us,"
                f" floor {case.floor:.1f} ({case.floor / times['us']:.0%}),"
                f" sustained {times['us_sustained']:.1f}, kernels {kernels_us:.1f}, error {error:.1e}",
                flush=True,
            )
            if number == 0 and arguments.results:
                row = {"id": f"{bench.label} T={tokens}", "implementation": "mosaic w4a8", **times}
                more = {"floor_us": round(case.floor, 1), "rel_err": error, "config": shown(configs.gate_up)}
                save([row | more | facts()], arguments.results)
    print(f"# done in {time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
