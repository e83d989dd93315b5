#!/usr/bin/env python3
"""Times the routed experts of a layer at the shapes of DeepSeek-V4-Flash and -Pro.

Every case is checked against the reference in the same run. A call reads the weights of all experts that its
tokens chose, far more than the L2 holds; each call of a run has tokens and routing of its own. Calls run one
after the other inside one jitted program.

  python scripts/bench/expert_mlp.py --tokens 1 8 32 128 --results scripts/bench/results/h200.json
  python scripts/bench/expert_mlp.py --tune --tiles-out pallas_kernels/expert_mlp/tuned.json
  python scripts/bench/expert_mlp.py --profile   shows which kernels a call consists of
"""

import argparse
import functools
import json
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parent))

from harness import facts, median_us, save, timed
from profile_kernels import kernel_times, print_kernel_times

from dsv4_jax.config import FLASH, PRO
from pallas_kernels import QuantArray, current_target, dequantize, quantize
from pallas_kernels.expert_mlp import triton as kernels
from pallas_kernels.expert_mlp.interleave import interleave, separate
from pallas_kernels.expert_mlp.rows import from_rows, to_rows
from pallas_kernels.expert_mlp.tiles import ExpertTiles, from_tiles, to_tiles
from pallas_kernels.expert_mlp.tilings import Tiling, Tilings, tilings_for, tuned
from pallas_kernels.swiglu.reference import swiglu as reference_swiglu

MODELS = {"flash": FLASH, "pro": PRO}
LIMIT = 10.0
COPY_BYTES_PER_S = 4.3e12  # what a plain copy reaches on an H200
FP8_FLOP_PER_S = 1.48e15
MOST_ERROR = 3e-3  # relative: rounding to bfloat16 alone makes 1.7e-3
PROGRAM_US = 8_000  # how long one program of a measurement runs

# By the most tokens they are for: tokens in a tile and the tiling, tried for both products.
CANDIDATES = {
    8: "16 128 4 4, 16 64 4 4",
    128: "16 128 4 4, 16 256 8 4",
    512: "16 128 4 4, 32 128 4 3, 16 256 8 4, 32 256 8 3, 32 256 8 4",
    2048: "64 128 4 3, 64 256 8 3, 64 256 8 4, 64 128 8 3",
    8192: "64 128 4 3, 64 256 8 3, 128 64 4 3, 128 128 8 3",
}


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _stack(key: jax.Array, experts: int, rows: int, columns: int) -> QuantArray:
    values = jax.random.bits(jax.random.fold_in(key, 0), (experts, rows, columns // 2), jnp.uint8)
    scale = jax.random.randint(jax.random.fold_in(key, 1), (experts, rows, columns // 32), 117, 121)
    return QuantArray(values, scale.astype(jnp.uint8), "fp4_group32")


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _fp8_stack(key: jax.Array, experts: int, rows: int, columns: int) -> QuantArray:
    def one(key: jax.Array) -> jax.Array:
        return (4 * jax.random.normal(key, (rows, columns), jnp.bfloat16)).astype(jnp.float8_e4m3fn)

    values = jax.lax.map(one, jax.random.split(key, experts))
    scale = jax.random.uniform(jax.random.fold_in(key, 1), (experts, rows // 128, columns // 128)) / 1024
    return QuantArray(values, scale, "fp8_block128")


def made_up_experts(config, weights: str, key: jax.Array) -> tuple[kernels.Weight, kernels.Weight]:
    """Gate and up, and down, laid out for the kernels, with scales that differ from block to block."""
    experts, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
    keys = [jax.random.fold_in(key, n) for n in range(3)]
    shapes = ((experts, inner, hidden), (experts, hidden, inner), (experts, inner, hidden))
    if weights == "fp4":
        w1, w2, w3 = (_stack(key, *shape) for key, shape in zip(keys, shapes, strict=True))
        return to_tiles(interleave(w1, w3)), to_tiles(w2)
    w1, w2, w3 = (to_rows(_fp8_stack(key, *shape)) for key, shape in zip(keys, shapes, strict=True))
    return interleave(w1, w3), w2


def requests(config, tokens: int, count: int, key: jax.Array) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """`count` sets of activations, chosen experts and routing weights."""
    made = []
    for n in range(count):
        keys = jax.random.split(jax.random.fold_in(key, n), 3)
        x = (0.5 * jax.random.normal(keys[0], (tokens, config.hidden_size))).astype(jnp.bfloat16)
        affinity = jax.random.uniform(keys[1], (tokens, config.n_routed_experts))
        experts = jax.lax.top_k(affinity, config.num_experts_per_tok)[1]
        made.append((x, experts, jax.random.uniform(keys[2], experts.shape) / config.num_experts_per_tok))
    return made


def floor_us(config, experts: list[jax.Array], value_bytes: float, fp8: bool) -> float:
    """The longer of reading the chosen experts' weights once and doing the arithmetic."""
    size = 3 * config.hidden_size * config.moe_intermediate_size
    touched = sum(len(set(chosen.reshape(-1).tolist())) for chosen in experts) / len(experts)
    read = touched * size * value_bytes / COPY_BYTES_PER_S
    compute = 2 * experts[0].size * size / (FP8_FLOP_PER_S if fp8 else FP8_FLOP_PER_S / 2)
    return max(read, compute) * 1e6


def program(run, rounds: int):
    """`rounds` times `run(inputs, weights)` on each of the inputs, as one jitted function."""

    def one_round(inputs, weights):
        return [run(each, weights) for each in inputs]

    def all_rounds(inputs, weights):
        def body(_, carry):
            # To XLA the next round's inputs hang on this one's results: it can neither hoist nor merge.
            inputs, weights, _ = carry
            return jax.lax.optimization_barrier((inputs, weights, one_round(inputs, weights)))

        zeros = [jnp.zeros(out.shape, out.dtype) for out in jax.eval_shape(one_round, inputs, weights)]
        return jax.lax.fori_loop(0, rounds, body, (inputs, weights, zeros))[2]

    return jax.jit(all_rounds)


def relative_error(out: jax.Array, expected: jax.Array) -> float:
    return float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected))


def check(x, experts, plan, shares, inner, out, weights, activation) -> tuple[float, ...]:
    """Relative error of each product against float32 on the kernel's own inputs, for three experts."""
    w13, w2 = weights
    choices = experts.shape[1]
    sorted_experts = experts.reshape(-1)[plan.order]
    chosen = jnp.unique(sorted_experts)[:3]

    def one(stack, expert):
        return jax.tree.map(lambda leaf: leaf[expert, None], stack)

    def operand(rows):
        return rows.astype(jnp.float32) if activation is None else dequantize(quantize(rows, activation))

    def product(rows, weight):
        return jnp.einsum("rk,nk->rn", operand(rows), dequantize(weight)[0], precision="highest")

    wanted_inner, wanted_out, got_inner, got_out = [], [], [], []
    for expert in chosen.tolist():
        both, second = one(w13, expert), one(w2, expert)
        if isinstance(both, ExpertTiles):
            first, second = separate(from_tiles(both)), from_tiles(second)
        else:
            first, second = [from_rows(each) for each in separate(both)], from_rows(second)
        rows = jnp.nonzero(sorted_experts == expert)[0]
        pairs = plan.order[rows]
        gate, up = (product(x[pairs // choices], each).astype(jnp.bfloat16) for each in first)
        share = shares.reshape(-1)[pairs]
        wanted_inner.append(reference_swiglu(gate, up, share, LIMIT, jnp.float32))
        wanted_out.append(product(inner[rows], second))
        got_inner.append(inner[rows])
        got_out.append(out[pairs])
    return tuple(
        relative_error(jnp.concatenate(got).astype(jnp.float32), jnp.concatenate(wanted))
        for got, wanted in ((got_inner, wanted_inner), (got_out, wanted_out))
    )


class Bench:
    """The experts of one layer, and what runs on them."""

    def __init__(self, arguments: argparse.Namespace):
        self.config = MODELS[arguments.model]
        self.activation = None if arguments.activation == "none" else arguments.activation
        self.weights = made_up_experts(self.config, arguments.weights, jax.random.key(1, impl="rbg"))
        self.name = f"triton w{arguments.weights[2:]}a{16 if self.activation is None else 8}"
        # The scales: a byte for 32 values; in FP8, four for 128 x 8.
        self.value_bytes = 0.5 + 1 / 32 if arguments.weights == "fp4" else 1 + 1 / 256
        other = [" fp8 weights"] * (arguments.weights == "fp8") + [" bf16 activations"] * (
            not self.activation
        )
        self.label = f"moe {arguments.model}{''.join(other)}"

    def case(self, tokens: int) -> "Case":
        return Case(self, tokens)


class Case:
    """So many tokens for a `Bench`."""

    def __init__(self, bench: Bench, tokens: int):
        self.bench, self.tokens = bench, tokens
        self.inputs = requests(bench.config, tokens, max(4, min(8, 64 // tokens)), jax.random.key(tokens))
        chosen = [experts for _, experts, _ in self.inputs]
        self.floor = floor_us(bench.config, chosen, bench.value_bytes, bench.activation is not None)
        self.rounds = max(1, round(PROGRAM_US / (1.5 * self.floor * len(self.inputs))))

    @property
    def calls(self) -> int:
        """Of the op in one program."""
        return self.rounds * len(self.inputs)

    @functools.cached_property
    def sizes(self):
        operands = kernels.operands(self.bench.weights[0], self.bench.activation)
        rows = self.tokens * self.bench.config.num_experts_per_tok
        return tilings_for(current_target().arch, operands, rows)

    def planned(self, tile_rows: int):
        count = self.bench.config.n_routed_experts
        plan = jax.jit(lambda experts: kernels.plan(experts, count, tile_rows))
        return [(x, plan(experts), shares) for x, experts, shares in self.inputs]

    def error(self, sizes: Tilings) -> float:
        """Both products against their definitions."""
        bench, tile_rows = self.bench, sizes.tile_rows
        x, plan, shares = self.planned(tile_rows)[0]
        first = functools.partial(kernels.gate_up, limit=LIMIT, activation=bench.activation)
        inner = first(x, plan, shares, bench.weights[0], tile_rows=tile_rows, tiling=sizes.gate_up)
        out = kernels.down(inner, plan, bench.weights[1], bench.activation, tile_rows, sizes.down)
        return max(*check(x, self.inputs[0][1], plan, shares, inner, out, bench.weights, bench.activation))

    def mlp(self, sizes):
        """All but the plan, as a function of a planned request and the weights."""

        def run(request, weights):
            (x, plan, shares), (w13, w2) = request, weights
            return kernels.planned_mlp(x, plan, shares, w13, w2, LIMIT, self.bench.activation, sizes)

        return run

    def mlp_with_plan(self, sizes):
        count = self.bench.config.n_routed_experts

        def run(request, weights):
            x, experts, shares = request
            return self.mlp(sizes)((x, kernels.plan(experts, count, sizes.tile_rows), shares), weights)

        return run

    def prepare(self, run, inputs):
        compiled = program(run, self.rounds).lower(inputs, self.bench.weights).compile()
        return functools.partial(compiled, inputs, self.bench.weights)

    def time_us(self, prepared) -> float:
        return median_us(prepared) / self.calls

    def measure(self, sizes) -> dict[str, float]:
        """Times with and without the plan, once the result is checked.

        `us_kernels` adds the kernels' own times up, without launches.
        """
        error = self.error(sizes)
        prepared = self.prepare(self.mlp(sizes), self.planned(sizes.tile_rows))
        kernels_us = sum(us for _, us in kernel_times(prepared, self.calls).values())
        times = timed(prepared, self.calls)
        with_plan = self.time_us(self.prepare(self.mlp_with_plan(sizes), self.inputs))
        return {
            "rel_err": error,
            **times,
            "us_kernels": round(kernels_us, 1),
            "us_with_routing": round(with_plan, 1),
        }


def sweep(case: Case, deadline: float) -> Tilings | None:
    """The fastest of the candidates that give the right result, each product timed alone."""
    listed = CANDIDATES[min(most for most in CANDIDATES if most >= min(case.tokens, 8192))]
    candidates = [
        (numbers[0], Tiling(*numbers[1:]))
        for numbers in (tuple(map(int, each.split())) for each in listed.split(","))
    ]
    bench = case.bench

    def prepare(tile_rows: int, tiling: Tiling):
        planned = case.planned(tile_rows)
        error = case.error(Tilings(0, tile_rows, tiling, tiling))
        inner = jnp.zeros((planned[0][2].size, bench.config.moe_intermediate_size), jnp.bfloat16) + 0.5

        def first(request, weights):
            x, plan, shares = request
            return kernels.gate_up(x, plan, shares, weights[0], LIMIT, bench.activation, tile_rows, tiling)

        def second(request, weights):
            x, plan, _ = request
            return kernels.down(x, plan, weights[1], bench.activation, tile_rows, tiling)

        down_inputs = [(inner, plan, shares) for _, plan, shares in planned]
        return error, case.prepare(first, planned), case.prepare(second, down_inputs)

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
    rows = case.tokens * bench.config.num_experts_per_tok
    best = [
        (
            min(each[0] for each in timed) + min(each[1] for each in timed),
            Tilings(rows, tile_rows, min(timed)[2], min(timed, key=lambda each: each[1])[2]),
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
    parser.add_argument(
        "--tune",
        type=int,
        nargs="*",
        help="try candidate tilings first for these --tokens, by default for all",
    )
    parser.add_argument("--tiles-out", type=Path, help="where --tune writes the table of tilings")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a call and their times")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no new case after so long")
    parser.add_argument("--results", type=Path, help="JSON file to add rows to")
    arguments = parser.parse_args()
    # Calls that do not depend on each other must not run side by side, as they never do in a model.
    flags = "--xla_gpu_command_buffer_scheduling_mode=SERIALIZE"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"
    started = time.perf_counter()
    deadline = started + arguments.seconds

    bench = Bench(arguments)
    jax.block_until_ready(bench.weights)
    print(f"# {bench.label} {bench.name}: weights at {time.perf_counter() - started:.1f} s", flush=True)
    tilings: list[Tilings] = []
    for tokens in sorted(arguments.tokens):
        if time.perf_counter() > deadline:
            print(f"# stopped before T={tokens}: out of time", flush=True)
            break
        case = bench.case(tokens)
        sizes = case.sizes
        if arguments.tune is not None and tokens in (arguments.tune or arguments.tokens):
            sizes = sweep(case, deadline) or sizes
            tilings.append(sizes)
        row = case.measure(sizes)
        print(
            f"{bench.label} T={tokens} {bench.name}: {row['us']:.1f} us, floor {case.floor:.1f}"
            f" ({case.floor / row['us']:.0%}), sustained {row['us_sustained']:.1f},"
            f" error {row['rel_err']:.1e},"
            f" kernels alone {row['us_kernels']:.1f} us, with routing {row['us_with_routing']:.1f} us",
            flush=True,
        )
        if arguments.profile:
            times = kernel_times(case.prepare(case.mlp_with_plan(sizes), case.inputs), case.calls)
            print_kernel_times(f"T={tokens}", times)
        if arguments.results:
            head = {
                "id": f"{bench.label} T={tokens}",
                "implementation": bench.name,
                "floor_us": round(case.floor, 1),
            }
            save([head | row | facts()], arguments.results)
    if tilings and arguments.tiles_out:
        write_tilings(kernels.operands(bench.weights[0], bench.activation), tilings, arguments.tiles_out)
    print(f"# done in {time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
