#!/usr/bin/env python3
"""Times the Mosaic GPU kernels of the routed experts over configurations of their tiles.

Cases, weights and timing are those of expert_mlp.py. Of every configuration both products are checked against
float32 on the kernel's own inputs, then the layer is timed and its kernels' own times are read from a
profile; with --off without decoding, promotion or products, too, which says what those cost.

  python scripts/bench/expert_mlp_mosaic.py --tokens 8 --configs "few 8,few 8 2,few 16 1 5"
  python scripts/bench/expert_mlp_mosaic.py --tokens 2048 --configs "64 1 4 2,48/64 1 4 1" --off
"""

import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax

sys.path.insert(0, str(Path(__file__).parent))

from expert_cases import MODELS, MOST_ERROR, Bench, Case, Way, few_way, many_way
from harness import timed
from profile_kernels import kernel_times

from pallas_kernels.expert_mlp.mosaic_config import Configs, FewConfig, deepest, deepest_few

# By the most tokens they are for. For few tokens: those of a tile, blocks of columns in a stage, stages that
# are under way, and stages. For many: those of each product of the tensor core, behind the same for tiles
# with fewer; times 64 rows; warpgroups; blocks of columns in a stage; stages of both kernels. Stages are as
# many as fit if left out.
CANDIDATES = {
    8: "few 8 1 2,few 8 1 3,few 8 1 5,few 8 2 2,few 8 2 3",
    128: "few 8 1 3,few 8 1 5,few 8 2 2,few 8 2 3",
    512: "few 16 1 3,few 24 1 2,few 24 1 3,32 1 4 2",
    2048: "64 1 4 2,64 1 4 1,64 2 2 2",
    4096: "64+48 1 2 2,64+64 1 2 2,64 1 4 1",
    8192: "80+80+64 1 2 1,64+64+48+48 1 2 1,80+64 1 2 2",
}
OFF = ("decoding", "promotion", "products")


def parse(text: str, case: Case) -> FewConfig | Configs:
    first, *rest = text.split()
    if first == "few":
        tokens, blocks, ahead, stages = [*map(int, rest), *(1, 3, 0)[len(rest) - 1 :]]
        terms = 1 if case.bench.activation else 2
        columns = max(case.bench.config.hidden_size, case.bench.config.moe_intermediate_size)
        config = deepest_few(columns, tokens, terms=terms, blocks=blocks, ahead=ahead)
        return config._replace(stages=stages or config.stages)
    *shorter, widths = (tuple(map(int, each.split("+"))) for each in first.split("/"))
    waves, consumers, blocks, *stages = map(int, rest)
    configs = deepest(widths, shorter=tuple(shorter), waves=waves, consumers=consumers, blocks=blocks)
    if stages:
        configs = Configs(*(each._replace(stages=n) for each, n in zip(configs, stages, strict=True)))
    return configs


def way_of(config: FewConfig | Configs) -> Way:
    return few_way(config) if isinstance(config, FewConfig) else many_way(config)


class Prepared(NamedTuple):
    """A way, its errors, and compiled layers by what they leave out."""

    way: Way
    errors: tuple[float, float]
    layers: dict[str, Any]


def prepare(case: Case, text: str, off: bool) -> Prepared:
    config = parse(text, case)
    layers = {"": case.layer(way_of(config))}
    if off and isinstance(config, Configs):
        for part in OFF:
            less = Configs(*(each._replace(without=part) for each in config))
            layers[part] = case.layer(way_of(less))
    for layer in layers.values():  # a kernel's PTX is assembled when it first runs
        jax.block_until_ready(layer())
    return Prepared(way_of(config), case.errors(way_of(config)), layers)


def report(case: Case, prepared: Prepared) -> tuple[float, str]:
    """Microseconds of the layer, infinite if it is wrong, and what there is to say."""
    way, errors, layers = prepared
    times, lines = timed(layers[""], case.calls), []
    for part, layer in layers.items():
        kernels = kernel_times(layer, case.calls)
        said = ", ".join(f"{name[:28]} {us:.1f}" for name, (_, us) in list(kernels.items())[:4])
        lines.append(f"    {f'without {part}' if part else 'kernels'}: {said}")
    wrong = max(errors) > MOST_ERROR
    head = f"T={case.tokens} [{way.cut}]: {times['us']:.1f} us, floor {case.floor:.1f}"
    head += f" ({case.floor / times['us']:.0%}), sustained {times['us_sustained']:.1f},"
    head += f" errors {errors[0]:.1e} {errors[1]:.1e}{'  WRONG' * wrong}"
    return float("inf") if wrong else times["us"], "\n".join([head, *lines])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(MODELS), default="flash")
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 8, 32, 128, 512, 2048, 8192])
    parser.add_argument("--activation", choices=["fp8_token128", "none"], default="fp8_token128")
    parser.add_argument("--configs", help='in place of the table: "few 8 1,64+48 2 2 1,32 1 4 2 3 3"')
    parser.add_argument("--off", action="store_true", help="time the layer without parts of its work, too")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no new case after so long")
    parser.add_argument("--ptxas", action="store_true", help="let the assembler print registers and spills")
    arguments = parser.parse_args()
    started = time.perf_counter()
    if arguments.ptxas:
        os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    # Calls that do not depend on each other must not run side by side, as they never do in a model.
    flags = "--xla_gpu_command_buffer_scheduling_mode=SERIALIZE"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"

    bench = Bench(
        arguments.model, activation=None if arguments.activation == "none" else arguments.activation
    )
    jax.block_until_ready(bench.weights)
    print(f"# {bench.label}: weights at {time.perf_counter() - started:.1f} s", flush=True)
    cases = [Case(bench, tokens) for tokens in arguments.tokens]
    jobs = []
    for case in cases:
        table = CANDIDATES[min(most for most in CANDIDATES if most >= min(case.tokens, 8192))]
        jobs += [(case, text) for text in (arguments.configs or table).split(",")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(prepare, case, text, arguments.off) for case, text in jobs]
        for job, future in zip(jobs, futures, strict=True):
            if future.exception():  # a configuration that does not fit is a result too
                error = future.exception()
                print(f"T={job[0].tokens} {job[1]}: {type(error).__name__} {str(error)[:200]}", flush=True)
    print(f"# compiled at {time.perf_counter() - started:.1f} s", flush=True)
    found: dict[int, list[tuple[float, str]]] = {}
    for (case, text), future in zip(jobs, futures, strict=True):
        if future.exception() or time.perf_counter() - started > arguments.seconds:
            continue
        us, said = report(case, future.result())
        print(said, flush=True)
        found.setdefault(case.tokens, []).append((us, text))
    for tokens, listed in found.items():
        print(f"T={tokens} best: {min(listed)[1]} {min(listed)[0]:.1f} us", flush=True)
    print(f"# done in {time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
