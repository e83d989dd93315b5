#!/usr/bin/env python3
"""Times the routed experts of a layer, FP4 weights, at the shapes of DeepSeek-V4-Flash and -Pro.

Every case is checked against the reference in the same run. A call reads the weights of all experts that its
tokens chose, far more than the L2 holds; each call of a run has tokens and routing of its own.

  python scripts/bench/expert_mlp.py --tokens 1 8 32 128 --results scripts/bench/results/h200.json
  python scripts/bench/expert_mlp.py --sweep     times candidate tilings, best last
"""

import argparse
import functools
import itertools
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parent))

from harness import facts, save

from dsv4_jax.config import FLASH, PRO
from pallas_kernels import ExpertTiles, QuantArray, dequantize, quantize
from pallas_kernels.expert_mlp import triton as kernels
from pallas_kernels.expert_mlp.tiles import from_tiles, to_tiles
from pallas_kernels.expert_mlp.triton import Tiling
from pallas_kernels.swiglu.reference import swiglu as reference_swiglu

MODELS = {"flash": FLASH, "pro": PRO}
LIMIT = 10.0
COPY_BYTES_PER_S = 4.3e12  # what a plain copy reaches on an H200
FP8_FLOP_PER_S = 1.48e15

# Tokens in a tile, then the tilings to try for both products.
CANDIDATES = {
    16: [(128, 4, 3), (128, 4, 4), (128, 4, 5), (256, 8, 4)],
    32: [(128, 4, 3), (128, 4, 4), (256, 8, 3)],
    64: [(128, 4, 3), (256, 8, 3), (256, 8, 4)],
}


def made_up_experts(config, key: jax.Array) -> tuple[ExpertTiles, ExpertTiles, ExpertTiles]:
    """w1, w2, w3 in tiles, with scales that differ from group to group."""
    experts, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def stack(key, rows, columns):
        values = jax.random.bits(jax.random.fold_in(key, 0), (experts, rows, columns // 2), jnp.uint8)
        scale = jax.random.randint(jax.random.fold_in(key, 1), (experts, rows, columns // 32), 117, 121)
        return QuantArray(values, scale.astype(jnp.uint8), "fp4_group32")

    shapes = ((inner, hidden), (hidden, inner), (inner, hidden))
    w1, w2, w3 = (to_tiles(stack(jax.random.fold_in(key, n), *shape)) for n, shape in enumerate(shapes))
    return w1, w2, w3


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


def floor_us(config, experts: list[jax.Array], fp8: bool) -> float:
    """The longer of reading the chosen experts' weights once and doing the arithmetic."""
    size = 3 * config.hidden_size * config.moe_intermediate_size
    touched = sum(len(set(chosen.reshape(-1).tolist())) for chosen in experts) / len(experts)
    read = touched * size * (0.5 + 1 / 32) / COPY_BYTES_PER_S
    compute = 2 * experts[0].size * size / (FP8_FLOP_PER_S if fp8 else FP8_FLOP_PER_S / 2)
    return max(read, compute) * 1e6


def time_us(run, inputs, weights, repeats: int = 5) -> float:
    """Median microseconds of one call, of all of `inputs` in one program."""
    all_of_them = jax.jit(lambda inputs, weights: [run(*each, *weights) for each in inputs])
    jax.block_until_ready(all_of_them(inputs, weights))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(all_of_them(inputs, weights))
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2] / len(inputs) * 1e6


def relative_error(out: jax.Array, expected: jax.Array) -> float:
    return float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected))


def check(x, experts, plan, shares, inner, out, weights, activation) -> tuple[float, float]:
    """Relative error of each product against float32 on the kernel's own inputs, for three experts."""
    w1, w2, w3 = weights
    choices = experts.shape[1]
    sorted_experts = experts.reshape(-1)[plan.order]
    chosen = jnp.unique(sorted_experts)[:3]
    errors = []

    def numbers(stack, expert):
        return dequantize(from_tiles(jax.tree.map(lambda leaf: leaf[expert, None], stack)))[0]

    def operand(rows):
        return rows.astype(jnp.float32) if activation is None else dequantize(quantize(rows, activation))

    def product(rows, matrix):
        return jnp.einsum("rk,nk->rn", operand(rows), matrix, precision="highest")

    wanted_inner, wanted_out, got_inner, got_out = [], [], [], []
    for expert in chosen.tolist():
        rows = jnp.nonzero(sorted_experts == expert)[0]
        pairs = plan.order[rows]
        tokens = x[pairs // choices]
        gate, up = (product(tokens, numbers(each, expert)).astype(jnp.bfloat16) for each in (w1, w3))
        share = shares.reshape(-1)[pairs]
        wanted_inner.append(reference_swiglu(gate, up, share, LIMIT, jnp.float32))
        wanted_out.append(product(inner[rows], numbers(w2, expert)))
        got_inner.append(inner[rows])
        got_out.append(out[pairs])
    for got, wanted in ((got_inner, wanted_inner), (got_out, wanted_out)):
        errors.append(relative_error(jnp.concatenate(got).astype(jnp.float32), jnp.concatenate(wanted)))
    return errors[0], errors[1]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(MODELS), default="flash")
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 8, 32, 128, 512, 2048, 8192])
    parser.add_argument("--activation", choices=["fp8_token128", "none"], default="fp8_token128")
    parser.add_argument("--sweep", action="store_true", help="try candidate tilings instead of the table's")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop starting new cases after so long")
    parser.add_argument("--results", type=Path, help="JSON file to add rows to")
    arguments = parser.parse_args()
    started = time.perf_counter()

    config = MODELS[arguments.model]
    activation = None if arguments.activation == "none" else arguments.activation
    weights = made_up_experts(config, jax.random.key(1, impl="rbg"))
    jax.block_until_ready(weights)
    print(f"weights made in {time.perf_counter() - started:.1f} s", flush=True)

    top_k, experts_count = config.num_experts_per_tok, config.n_routed_experts
    w1, w2, w3 = weights

    for tokens in arguments.tokens:
        inputs = requests(config, tokens, max(4, min(64, 1024 // tokens)), jax.random.key(tokens))
        floor = floor_us(config, [each[1] for each in inputs], activation is not None)

        def measure(sizes, name, tokens=tokens, inputs=inputs, floor=floor) -> float:
            """Checks both products against their definitions, then times all but the plan, and all."""
            planned = [
                (x, kernels.plan(experts, experts_count, sizes[0]), shares) for x, experts, shares in inputs
            ]
            x, plan, shares = planned[0]
            inner = kernels.gate_up(x, plan, shares, w1, w3, LIMIT, activation, *sizes[:2])
            out = kernels.down(inner, plan, w2, activation, sizes[0], sizes[2])
            error = max(*check(x, inputs[0][1], plan, shares, inner, out, weights, activation))

            def run(x, plan, shares, w1, w2, w3):
                return kernels.planned_mlp(x, plan, shares, w1, w2, w3, LIMIT, activation, sizes)

            def whole(x, experts, shares, *weights):
                return run(x, kernels.plan(experts, experts_count, sizes[0]), shares, *weights)

            us, with_plan = time_us(run, planned, weights), time_us(whole, inputs, weights)
            print(
                f"T={tokens} {name}: {us:.1f} us, floor {floor:.1f} ({floor / us:.0%}), error {error:.1e},"
                f" with routing {with_plan:.1f} us",
                flush=True,
            )
            row = {"id": f"moe {arguments.model} T={tokens}", "implementation": name, "us": round(us, 1)}
            row |= {"floor_us": round(floor, 1), "rel_err": error, "us_with_routing": round(with_plan, 1)}
            if arguments.results and not arguments.sweep:
                save([row | facts()], arguments.results)
            return us

        if not arguments.sweep:
            measure(kernels.tilings_for(tokens * top_k), f"triton {'w4a8' if activation else 'w4a16'}")
            continue
        timed = []
        for tile_rows, tilings in CANDIDATES.items():
            for first, second in itertools.zip_longest(tilings, tilings):
                if time.perf_counter() - started > arguments.seconds:
                    break
                sizes = (tile_rows, Tiling(*first), Tiling(*second))
                try:
                    timed.append((measure(sizes, str(sizes)), sizes))
                except Exception as error:  # a tiling that does not fit the chip is a result too
                    print(f"T={tokens} {sizes}: {type(error).__name__} {str(error)[:150]}", flush=True)
        print(f"T={tokens} best: {min(timed, key=lambda each: each[0], default=None)}", flush=True)

    return 0


if __name__ == "__main__":
    sys.exit(main())
