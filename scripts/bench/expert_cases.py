"""The routed experts of a layer as the benchmarks run them: made-up weights and requests, ways, checks.

A *way* is a kernel, or two, in a certain cut. Every way gives both products, to be checked against float32 on
the kernel's own inputs, and the whole layer but its plan, to be timed.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from floors import bytes_per_s
from harness import median_us, timed
from profile_kernels import kernel_times

from dsv4_jax.config import FLASH, PRO, Config
from pallas_kernels import QuantArray, current_target, dequantize, quantize
from pallas_kernels.expert_mlp import mosaic_few, mosaic_many, triton
from pallas_kernels.expert_mlp.interleave import interleave, separate
from pallas_kernels.expert_mlp.mosaic_config import Configs, FewConfig, configs_for, few_config_for
from pallas_kernels.expert_mlp.plan import Plan, plan
from pallas_kernels.expert_mlp.rows import ExpertRows, from_rows, to_rows
from pallas_kernels.expert_mlp.tiles import ExpertTiles, from_tiles, to_tiles
from pallas_kernels.expert_mlp.tilings import Tilings, tilings_for
from pallas_kernels.swiglu.reference import swiglu

MODELS = {"flash": FLASH, "pro": PRO}
LIMIT = 10.0
FP8_FLOP_PER_S = 1.48e15
MOST_ERROR = 3e-3  # relative: rounding to bfloat16 alone makes 1.7e-3
PROGRAM_US = 8_000  # how long one program of a measurement runs

Weight = ExpertTiles | ExpertRows


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


def made_up_experts(config: Config, weights: str, key: jax.Array) -> tuple[Weight, Weight]:
    """Gate and up, and down, laid out for the kernels, with scales that differ from block to block."""
    experts, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
    keys = [jax.random.fold_in(key, n) for n in range(3)]
    shapes = ((experts, inner, hidden), (experts, hidden, inner), (experts, inner, hidden))
    if weights == "fp4":
        w1, w2, w3 = (_stack(key, *shape) for key, shape in zip(keys, shapes, strict=True))
        return to_tiles(interleave(w1, w3)), to_tiles(w2)
    w1, w2, w3 = (to_rows(_fp8_stack(key, *shape)) for key, shape in zip(keys, shapes, strict=True))
    return interleave(w1, w3), w2


def requests(config: Config, tokens: int, count: int, key: jax.Array) -> list[tuple[jax.Array, ...]]:
    """`count` sets of activations, chosen experts and routing weights."""
    made = []
    for n in range(count):
        keys = jax.random.split(jax.random.fold_in(key, n), 3)
        x = (0.5 * jax.random.normal(keys[0], (tokens, config.hidden_size))).astype(jnp.bfloat16)
        affinity = jax.random.uniform(keys[1], (tokens, config.n_routed_experts))
        experts = jax.lax.top_k(affinity, config.num_experts_per_tok)[1]
        made.append((x, experts, jax.random.uniform(keys[2], experts.shape) / config.num_experts_per_tok))
    return made


def floor_us(config: Config, experts: Sequence[jax.Array], value_bytes: float, fp8: bool) -> float:
    """The longer of reading the chosen experts' weights once and doing the arithmetic."""
    size = 3 * config.hidden_size * config.moe_intermediate_size
    touched = sum(len(set(chosen.reshape(-1).tolist())) for chosen in experts) / len(experts)
    read = touched * size * value_bytes / bytes_per_s()
    compute = 2 * experts[0].size * size / (FP8_FLOP_PER_S if fp8 else FP8_FLOP_PER_S / 2)
    return max(read, compute) * 1e6


def program(run: Callable[..., Any], rounds: int) -> Any:
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


# --- ways


class Products(NamedTuple):
    """What both products gave, and what the second took.

    Attributes:
      inner: [R, F] in sorted order.
      operand: the same as the second product took it, float32.
      quantised: whether `inner` is rounded to E4M3 already.
      out: [R, M] in (token, choice) order.
    """

    inner: jax.Array
    operand: jax.Array
    quantised: bool
    out: jax.Array


class Way(NamedTuple):
    """A kernel in a certain cut.

    Attributes:
      tile_rows: of the plan.
      products, mlp: functions of (x, plan, routing weights, w13, w2).
      cut: as shown.
    """

    name: str
    tile_rows: int
    products: Callable[..., Products]
    mlp: Callable[..., jax.Array]
    cut: str


def _operand(rows: jax.Array, activation: str | None) -> jax.Array:
    return rows.astype(jnp.float32) if activation is None else dequantize(quantize(rows, activation))


def triton_way(sizes: Tilings, activation: str | None, weights: str) -> Way:
    def products(x, planned, shares, w13, w2):
        tile_rows = sizes.tile_rows
        inner = triton.gate_up(x, planned, shares, w13, LIMIT, activation, tile_rows, sizes.gate_up)
        out = triton.down(inner, planned, w2, activation, tile_rows, sizes.down)
        return Products(inner, _operand(inner, activation), False, out)

    def mlp(x, planned, shares, w13, w2):
        return triton.planned_mlp(x, planned, shares, w13, w2, LIMIT, activation, sizes)

    cut = f"{sizes.tile_rows} {tuple(sizes.gate_up)} {tuple(sizes.down)}"
    return Way(f"triton {_widths(weights, activation)}", sizes.tile_rows, products, mlp, cut)


def few_way(config: FewConfig) -> Way:
    activation = "fp8_token128" if config.terms == 1 else None

    def products(x, planned, shares, w13, w2):
        inner, out = mosaic_few.products(x, planned, shares, w13, w2, limit=LIMIT, config=config)
        return Products(inner, _operand(inner, activation), False, out)

    def mlp(x, planned, shares, w13, w2):
        return mosaic_few.planned_mlp(x, planned, shares, w13, w2, LIMIT, config)

    cut = f"few {config.tokens} {config.blocks} {config.ahead} {config.stages}"
    return Way(f"mosaic {_widths('fp4', activation)}", config.tokens, products, mlp, cut)


def many_way(configs: Configs) -> Way:
    def products(x, planned, shares, w13, w2):
        (values, scales), place, out = mosaic_many.products(x, planned, shares, w13, w2, LIMIT, configs)
        rows, at = shares.size, place[planned.order]
        # In the checkpoint's order of columns again, the inverse of `tile_order`.
        values = values[:, at].reshape(-1, rows, 8, 4, 4).swapaxes(2, 3).reshape(-1, rows, 128)
        inner = values.astype(jnp.float32) * scales[:, at, None]
        inner = inner.swapaxes(0, 1).reshape(rows, -1)
        return Products(inner, inner, True, out)

    def mlp(x, planned, shares, w13, w2):
        return mosaic_many.planned_mlp(x, planned, shares, w13, w2, LIMIT, configs)

    shown = [
        f"{'+'.join(map(str, each.widths))} {each.waves} {each.consumers} {each.blocks}x{each.stages}"
        for each in configs
    ]
    return Way("mosaic w4a8", configs.gate_up.tokens, products, mlp, " / ".join(shown))


def _widths(weights: str, activation: str | None) -> str:
    return f"w{weights[2:]}a{16 if activation is None else 8}"


# --- checks


def relative_error(found: jax.Array, expected: jax.Array) -> float:
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


def errors(
    request: tuple[jax.Array, ...], planned: Plan, found: Products, weights: Any, activation: str | None
) -> tuple[float, float]:
    """Relative error of each product against float32 on the kernel's own inputs, for three experts.

    Where inner activations are quantised already, only what their distance from the exact ones has over that
    of the exact ones' own rounding counts: next to a boundary either neighbour is right.
    """
    x, experts, shares = request
    w13, w2 = weights
    sorted_experts = experts.reshape(-1)[planned.order]

    def one(stack, expert):
        return jax.tree.map(lambda leaf: leaf[expert, None], stack)

    def product(rows, weight):
        return jnp.einsum("rk,nk->rn", rows, dequantize(weight)[0], precision="highest")

    over, inners, got, wanted = [], [], [], []
    for expert in jnp.unique(sorted_experts)[:3].tolist():
        both, second = one(w13, expert), one(w2, expert)
        if isinstance(both, ExpertTiles):
            first, second = separate(from_tiles(both)), from_tiles(second)
        else:
            first, second = [from_rows(each) for each in separate(both)], from_rows(second)
        rows = jnp.nonzero(sorted_experts == expert)[0]
        pairs = planned.order[rows]
        operand = _operand(x[pairs // experts.shape[1]], activation)
        gate, up = (product(operand, each).astype(jnp.bfloat16) for each in first)
        exact = swiglu(gate, up, shares.reshape(-1)[pairs], LIMIT, jnp.float32)
        off = jnp.abs(found.inner[rows].astype(jnp.float32) - exact)
        if found.quantised:
            off = jnp.maximum(off - jnp.abs(_operand(exact.astype(jnp.bfloat16), activation) - exact), 0)
        over.append(off)
        inners.append(exact)
        wanted.append(product(found.operand[rows], second))
        got.append(found.out[pairs].astype(jnp.float32))
    inner_error = jnp.linalg.norm(jnp.concatenate(over)) / jnp.linalg.norm(jnp.concatenate(inners))
    numbers = float(inner_error), relative_error(jnp.concatenate(got), jnp.concatenate(wanted))
    whole = bool(jnp.isfinite(found.inner.astype(jnp.float32)).all() & jnp.isfinite(found.out).all())
    # Not a number counts as infinite.
    return tuple(each if whole and each == each else float("inf") for each in numbers)  # type: ignore[return-value]


class Bench:
    """The experts of one layer."""

    def __init__(self, model: str = "flash", weights: str = "fp4", activation: str | None = "fp8_token128"):
        self.config, self.activation, self.of_weights = MODELS[model], activation, weights
        self.weights = made_up_experts(self.config, weights, jax.random.key(1, impl="rbg"))
        # The scales: a byte for 32 values; in FP8, four for 128 x 8.
        self.value_bytes = 0.5 + 1 / 32 if weights == "fp4" else 1 + 1 / 256
        other = [" fp8 weights"] * (weights == "fp8") + [" bf16 activations"] * (activation is None)
        self.label = f"moe {model}{''.join(other)}"


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

    @property
    def rows(self) -> int:
        return self.tokens * self.bench.config.num_experts_per_tok

    def way(self, implementation: str) -> Way:
        """What an implementation does with so many tokens."""
        bench = self.bench
        if implementation == "triton":
            operands = triton.operands(bench.weights[0], bench.activation)
            sizes = tilings_for(current_target().arch, operands, self.rows)
            return triton_way(sizes, bench.activation, bench.of_weights)
        few = few_config_for(self.rows, bench.weights[0].shape, bench.activation)
        if few is not None:
            return few_way(few)
        if bench.activation is None:
            raise NotImplementedError(f"{implementation} takes no bfloat16 activations at T={self.tokens}")
        return many_way(configs_for(self.rows, bench.config.n_routed_experts))

    def planned(self, tile_rows: int) -> list[tuple[jax.Array, Plan, jax.Array]]:
        count = self.bench.config.n_routed_experts
        make = jax.jit(lambda experts: plan(experts, count, tile_rows))
        return [(x, make(experts), shares) for x, experts, shares in self.inputs]

    def errors(self, way: Way) -> tuple[float, float]:
        """Of both products against their definitions."""
        x, planned, shares = self.planned(way.tile_rows)[0]
        found = way.products(x, planned, shares, *self.bench.weights)
        return errors(self.inputs[0], planned, found, self.bench.weights, self.bench.activation)

    def prepare(self, run: Callable[..., Any], inputs: Any) -> Callable[[], Any]:
        compiled = program(run, self.rounds).lower(inputs, self.bench.weights).compile()
        return functools.partial(compiled, inputs, self.bench.weights)

    def layer(self, way: Way) -> Callable[[], Any]:
        """All but the plan."""
        return self.prepare(lambda request, weights: way.mlp(*request, *weights), self.planned(way.tile_rows))

    def layer_with_plan(self, way: Way) -> Callable[[], Any]:
        count = self.bench.config.n_routed_experts

        def run(request, weights):
            x, experts, shares = request
            return way.mlp(x, plan(experts, count, way.tile_rows), shares, *weights)

        return self.prepare(run, self.inputs)

    def time_us(self, prepared: Callable[[], Any], repeats: int = 5) -> float:
        return median_us(prepared, repeats=repeats) / self.calls

    def measure(self, prepared: Callable[[], Any], with_plan: Callable[[], Any]) -> dict[str, float]:
        """Times of `layer` and `layer_with_plan`; `us_kernels` adds the kernels' own times up."""
        times = timed(prepared, self.calls)
        kernels_us = sum(us for _, us in kernel_times(prepared, self.calls).values())
        return {
            **times,
            "us_kernels": round(kernels_us, 1),
            "us_with_routing": round(timed(with_plan, self.calls, sustained_ms=0)["us"], 1),
        }
