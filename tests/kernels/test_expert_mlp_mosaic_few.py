"""The Mosaic kernel of the experts for few tokens: it lowers for Hopper, and computes what it should.

Its PTX runs in an emulator of a warpgroup, its copies, barriers and order of rows in Pallas' interpreter.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from test_expert_mlp import every_code_and_scale
from test_expert_mlp_mosaic import (
    LIMIT,
    THREADS,
    addresses,
    assert_right,
    gated,
    lowered,
    of_many_sizes,
    operand,
    planned_shapes,
    random_stack,
    stack,
    tiles_of,
    total,
)
from warpgroup import Space, Warpgroup

from pallas_kernels import QuantArray, Target, dequantize, expert_mlp, prepare_experts, quantize
from pallas_kernels.expert_mlp.interleave import interleave
from pallas_kernels.expert_mlp.mosaic_config import SHARED_BYTES, FewConfig, deepest_few, few_config_for
from pallas_kernels.expert_mlp.plan import plan
from pallas_kernels.expert_mlp.tiles import to_tiles

pytest.importorskip("triton")
plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
kernel = pytest.importorskip("pallas_kernels.expert_mlp.mosaic_few")

H200 = Target("cuda", "sm_90")
LANE = kernel.Lane(THREADS, THREADS // 32, THREADS % 32 // 4, THREADS % 4)

# --- 64 rows of a weight by a tile of tokens on warpgroups


def run_item(config, shape, weight, exponents, item, x, order, weights, result: np.ndarray) -> list[Any]:
    """What four consumers and the finisher make of an item; writes into `result`, returns what arrived."""
    memory, shared = Space(), Space()
    arrays = {"x": x, "order": order, "exponents": exponents, "weights": weights, "out": result}
    at = {name: memory.place(array) for name, array in arrays.items()}
    at["arrivals"] = memory.place(np.zeros(8, np.int32))
    each = config.blocks_each(shape.columns)
    values = shared.place(np.full(4 * each * config.places * 128, 0xFF, np.uint8))
    scales = shared.place(np.full(4 * each * config.scales * 4, 0xFF, np.uint8))
    parts = shared.place(np.zeros(2 * 4 * config.tokens * 64, np.float32))
    end, number, slot = shared.end, 1, 2
    tiles = np.asarray(weight)[item.expert, item.row // 64]
    for group in range(config.consumers):
        warpgroup = Warpgroup(shared.bytes, memory.bytes)
        found = kernel.load_places(config, shape, total, item, group)
        more = {"values": operand(values + found.pop("values"))}
        more |= {"scales": operand(scales + found.pop("scales")), "thread": operand(THREADS)}
        more |= {"count": operand(item.real), "start": operand(item.start)}
        more |= addresses(found, at, np.uint64)
        for first in range(0, item.real * each, kernel.ptx.TOGETHER):
            text = kernel.ptx.load_ptx(config, shape.columns, shape.activations)
            warpgroup.run(text, more | {"number": operand(first)})
        sums = [f"sum{n}" for n in range(config.places // 2)]
        operands = {name: np.zeros(128, np.float32) for name in sums}
        for step in range(shape.columns // config.columns):
            stage = 4 * config.blocks
            shared.end = end
            data = tiles[step * stage : (step + 1) * stage].reshape(1, -1)
            codes = shared.place(np.pad(data, ((slot, 0), (0, 0)), constant_values=0xFF))
            found = kernel.step_places(config, shape, total, slot, step, group, LANE)
            first = {"x": values, "scales": scales, "codes": codes, "multipliers": codes}
            text = kernel.step_ptx(config, (config.places,))
            warpgroup.run(text, operands | addresses(found, first, np.uint32))
            operands = {name: warpgroup.registers[f"${name}"] for name in sums}
        place = parts + kernel.part_place(config, total, number, group, LANE)
        warpgroup.run(kernel.ptx.part_ptx(config), operands | {"part": operand(place)})
    finisher = Warpgroup(shared.bytes, memory.bytes)
    more = addresses(kernel.finish_places(shape, total, item, LANE), at, np.uint64)
    more |= {"weights": np.full(128, at["weights"], np.uint64), "thread": operand(THREADS)}
    more |= {"count": operand(item.real)}
    finisher.run(kernel.ptx.warm_ptx(shape.limit is not None), more)
    place = parts + kernel.part_place(config, total, number, 0, LANE)
    text = kernel.ptx.finish_ptx(config, shape.stride, shape.limit, shape.arrivals[1])
    finisher.run(text, more | {"parts": operand(place)})
    result[:] = memory.read(at["out"], result)
    return [(thread, (place - at["arrivals"]) // 4, most) for thread, place, most in finisher.arrived]


CASES = [
    pytest.param(FewConfig(8), 3, id="three of eight tokens"),
    pytest.param(FewConfig(16, blocks=2), 16, id="two blocks, sixteen tokens"),
    pytest.param(FewConfig(24), 17, id="seventeen of 24 tokens"),
    pytest.param(FewConfig(8, terms=2), 5, id="bfloat16 activations, five of eight tokens"),
]


@functools.cache
def activations(terms: int) -> tuple[np.ndarray, np.ndarray]:
    """[32, 1024] in bfloat16, and the numbers that a kernel is to take them for."""
    x = np.concatenate([of_many_sizes(32) * jnp.bfloat16(2.0**n) for n in range(4)], axis=1)
    if terms == 2:
        return x, x.astype(np.float32)
    return x, np.asarray(dequantize(quantize(jnp.asarray(x), "fp8_token128")))


@functools.cache
def weights() -> tuple[Any, np.ndarray, np.ndarray, Any, np.ndarray]:
    """Tiles of gate and up, and their numbers; tiles of down, and its."""
    (w1, gate), (w3, up), (w2, down) = (
        stack(2, rows, 1024, seed) for seed, rows in ((1, 64), (3, 64), (2, 128))
    )
    return to_tiles(interleave(w1, w3)), gate, up, to_tiles(w2), down


def as_bf16(result: np.ndarray) -> np.ndarray:
    return result.view(jnp.bfloat16).astype(np.float32)


@pytest.mark.parametrize(("config", "real"), CASES)
def test_gate_and_up_are_what_their_definition_says(config, real):
    (weight, gate, up, *_), (x, numbers), random = (
        weights(),
        activations(config.terms),
        np.random.default_rng(3),
    )
    choices, start, order = 2, 2, random.permutation(64).astype(np.int32)
    shares = random.uniform(size=64).astype(np.float32)
    shape = kernel.Shape(128, 1024, choices, LIMIT, (8, 24))
    item = kernel.Item(3, 1, 64, start, real)
    result = np.full((64, 64), 0xFFFF, np.uint16)

    arrived = run_item(config, shape, weight.tiles, weight.row_exponent, item, x, order, shares, result)

    assert arrived == [(32 * warp, 3, 23) for warp in range(4)]
    pairs = order[start : start + real]
    expected = gated(numbers[pairs // choices], gate[1, 32:], up[1, 32:], shares[pairs])
    found = as_bf16(result)
    got = found[start : start + real, 32:]
    assert np.linalg.norm(got - expected) <= 3e-3 * np.linalg.norm(expected)
    # One by one, so that no element is another's: another order of a sum may round gate and up to another
    # bfloat16, which SiLU and the product make a few steps of.
    np.testing.assert_allclose(got, expected, rtol=3e-2, atol=1e-2 * np.abs(expected).max())
    found[start : start + real, 32:] = np.nan
    assert np.isnan(found).all()  # nothing else is written


@pytest.mark.parametrize(("config", "real"), CASES)
def test_down_is_what_its_definition_says(config, real):
    (*_, weight, down), (inner, numbers), start = weights(), activations(config.terms), 5
    order = np.random.default_rng(3).permutation(32).astype(np.int32)
    shape = kernel.Shape(128, 1024, "sorted", None, (8, 24))
    item = kernel.Item(2, 1, 64, start, real)
    result = np.full((32, 128), 0xFFFF, np.uint16)
    arguments = (weight.tiles, weight.row_exponent, item, inner, order, np.zeros(1, np.float32), result)

    run_item(config, shape, *arguments)

    expected = numbers[start : start + real] @ down[1, 64:].T
    found, pairs = as_bf16(result), order[start : start + real]
    got = found[pairs, 64:]
    assert np.linalg.norm(got - expected) <= 3e-3 * np.linalg.norm(expected)
    # One rounding to bfloat16, 2^-9; where terms cancel, float32 sums in another order. Two terms of E4M3
    # miss up to 2^-18 of a block's largest number.
    np.testing.assert_allclose(got, expected, rtol=2**-8, atol=1e-4 * np.abs(expected).max())
    found[pairs, 64:] = np.nan
    assert np.isnan(found).all()


# --- what runs on the CPU: the copies, the barriers and the order of the rows


def plain_weight(tiles: jax.Array) -> jax.Array:
    """[64, 128 n] numbers from n tiles of bytes: any that depend on all of them will do."""
    numbers = tiles.reshape(-1, 64, 68).astype(jnp.float32) / 256
    both = [numbers[..., :64] - numbers[..., 64:65], numbers[..., :64] - numbers[..., 65:66]]
    return jnp.concatenate(both, axis=-1).swapaxes(0, 1).reshape(64, -1)


def plain_load(config, shape, refs: Any, item, group: jax.Array) -> None:
    """A token's numbers as float32 bytes: the first of each block of 128."""
    x, order, values, _ = refs
    each = config.blocks_each(shape.columns)
    for token in range(config.tokens):

        @pl.when(token < item.real)
        def _(token: int = token) -> None:
            rows = shape.activations
            row = item.start + token if rows == "sorted" else order[item.start + token] // rows
            for block in range(each):
                at = (block // config.blocks * 4 + group) * config.blocks + block % config.blocks
                number = x[row, pl.ds(at * 128, 1)].astype(jnp.float32)
                place = ((group * each + block) * config.places + token) * 128
                values[pl.ds(place, 4)] = jax.lax.bitcast_convert_type(number, jnp.uint8).reshape(4)


def plain_multiply(config, shape, refs: Any, slot: Any, step: Any, group: Any, sums: Any) -> jax.Array:
    """Each block's first number times all of the block's weights."""
    tiles, values, _ = refs
    each = config.blocks_each(shape.columns)
    for block in range(config.blocks):
        weight = plain_weight(tiles[slot, pl.ds(group * config.blocks + block, 1)]).sum(1)
        place = (group * each + step * config.blocks + block) * config.places * 128
        numbers = values[pl.ds(place, config.places * 128)].reshape(config.places, 128)[:, :4]
        sums += weight[:, None] * jax.lax.bitcast_convert_type(numbers, jnp.float32)[None, :]
    return sums


def plain_hand_over(config, parts: Any, place: jax.Array, group: jax.Array, sums: jax.Array) -> None:
    size = 64 * config.tokens
    parts[pl.ds((place * 4 + group) * size, size)] = sums[:, : config.tokens].reshape(-1)


def plain_finish(config, shape, refs: Any, item, place: jax.Array, *, warm: bool = False) -> None:
    """Gate times up, eight rows by eight, and the routing weight; or the sums."""
    parts, _, order, weights, out, arrivals = refs
    if warm:
        return
    size = 64 * config.tokens
    sums = parts[pl.ds(place * 4 * size, 4 * size)].reshape(4, 64, config.tokens).sum(0)
    if shape.limit is not None:
        sums = (sums.reshape(4, 2, 8, -1)[:, 0] * sums.reshape(4, 2, 8, -1)[:, 1]).reshape(32, -1)
    for token in range(config.tokens):

        @pl.when(token < item.real)
        def _(token: int = token) -> None:
            pair, numbers = order[item.start + token], sums[:, token]
            if shape.limit is not None:
                columns = pl.ds(jax.lax.div(item.row, 2), 32)
                out[item.start + token, columns] = (numbers * weights[pair]).astype(jnp.bfloat16)
            else:
                out[pair, pl.ds(item.row, 64)] = numbers.astype(jnp.bfloat16)

    arrivals[item.tile] = jax.lax.rem(arrivals[item.tile] + 4, jnp.int32(shape.arrivals[1]))


def plain_await(arrivals: Any, tile: jax.Array, goal: int) -> None:
    jax.lax.while_loop(lambda _: arrivals[tile] < goal, lambda turns: turns + 1, jnp.int32(0))


@pytest.mark.parametrize("config", [FewConfig(8, stages=3)], ids=["eight tokens"])
def test_every_row_is_computed_once_from_its_own_operands(config, monkeypatch):
    plain = {"_load": plain_load, "_multiply": plain_multiply, "_hand_over": plain_hand_over}
    for name, function in (plain | {"_finish": plain_finish, "_await": plain_await}).items():
        monkeypatch.setattr(kernel, name, function)
    # The interpreter runs programs one after the other, so that none may wait for another.
    monkeypatch.setattr(kernel, "multiprocessors", lambda: 1)
    experts, hidden, inner = 2, 512, 512
    w13 = to_tiles(random_stack(experts, 2 * inner, hidden, 1))
    w2 = to_tiles(random_stack(experts, hidden, inner, 2))
    x = jnp.round(jax.random.normal(jax.random.key(0), (3, hidden)) * 4).astype(jnp.bfloat16) / 4
    chosen = jnp.asarray([[1, 0], [1, 0], [1, 1]], jnp.int32)
    weights = jnp.round(4 * jax.random.uniform(jax.random.key(2), chosen.shape)) / 4
    planned = plan(chosen, experts, config.tokens, implementation="reference")

    interpret = plgpu.InterpretGPUParams()
    _, out = kernel.products(x, planned, weights, w13, w2, limit=LIMIT, config=config, interpret=interpret)
    found = out.reshape(3, 2, hidden).astype(jnp.float32).sum(1)

    def product(rows: jax.Array, tiles: jax.Array) -> jax.Array:
        of_block = jnp.stack([plain_weight(row).reshape(64, -1, 128).sum(2) for row in tiles])
        return jnp.einsum("tk,nrk->tnr", rows[:, ::128].astype(jnp.float32), of_block).reshape(len(rows), -1)

    expected = jnp.zeros((3, hidden))
    for choice in range(2):
        for token in range(3):
            expert = int(chosen[token, choice])
            both = product(x[token, None], w13.tiles[expert]).reshape(-1, 2, 8)
            middle = (both[:, 0] * both[:, 1]).reshape(1, -1) * weights[token, choice]
            out = product(middle.astype(jnp.bfloat16), w2.tiles[expert])[0]
            expected = expected.at[token].add(out.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=2**-6, atol=1e-3 * float(jnp.abs(expected).max()))
    assert not np.asarray(planned.arrivals).any()


# --- it lowers


@pytest.mark.parametrize("activation", [None, "fp8_token128"], ids=["A16", "A8"])
@pytest.mark.parametrize("tokens", [1, 128, 300, 512])
@pytest.mark.parametrize(("experts", "hidden", "inner"), [(256, 4096, 2048), (384, 7168, 3072)])
def test_the_kernel_fits_and_lowers_for_the_experts_of_flash_and_pro(
    experts, hidden, inner, tokens, activation
):
    w13, w2 = tiles_of(experts, 2 * inner, hidden), tiles_of(experts, hidden, inner)
    config = few_config_for(tokens * 6, w13.shape, activation)
    if config is None:
        assert tokens > 128
        return
    assert config.shared_bytes(hidden) <= SHARED_BYTES
    arguments = (
        jax.ShapeDtypeStruct((tokens, hidden), jnp.bfloat16),
        planned_shapes(tokens * 6, experts, config.tokens),
        jax.ShapeDtypeStruct((tokens, 6), jnp.float32),
        w13,
        w2,
    )

    text = lowered(lambda *arrays: kernel.products(*arrays, limit=LIMIT, config=config), *arguments)

    assert text.count("@mosaic_gpu_v2") == 1


# --- on a device


@pytest.mark.gpu
@pytest.mark.parametrize("activation", [None, "fp8_token128"], ids=["A16", "A8"])
@pytest.mark.parametrize(
    ("tokens", "experts", "choices"),
    [(1, 8, 6), (3, 16, 6), (17, 16, 2), (17, 64, 6), (127, 64, 4), (129, 64, 6)],
    ids=["tokens=1", "tokens=3", "tokens=17 of two", "tokens=17", "tokens=127", "tokens=129"],
)
@pytest.mark.parametrize("skewed", [False, True], ids=["even", "skewed"])
def test_the_kernel_gives_what_the_definition_gives(skewed, tokens, experts, choices, activation):
    """Skewed: half of the experts have no token."""
    shapes = [(512, 1024), (1024, 512)] * 2
    stacks = [random_stack(experts, *shape, seed) for seed, shape in enumerate(shapes)]
    w13, w2, _ = prepare_experts(*stacks[:3], H200)
    keys = jax.random.split(jax.random.key(tokens), 3)
    x = jax.random.normal(keys[0], (tokens, 1024), jnp.bfloat16)
    likely = jax.random.uniform(keys[1], (tokens, experts)) - skewed * (jnp.arange(experts) % 2)
    chosen = jax.lax.top_k(likely, min(choices, experts // 2))[1]
    weights = jax.random.uniform(keys[2], chosen.shape)
    config = few_config_for(chosen.size, w13.shape, activation)
    planned = plan(chosen, experts, config.tokens)

    found, again = (kernel.planned_mlp(x, planned, weights, w13, w2, LIMIT, config) for _ in range(2))

    expected = expert_mlp(
        x, chosen, weights, w13, w2, None, limit=LIMIT, activation=activation, implementation="reference"
    )
    if activation:
        assert_right(found, expected)
    else:
        assert float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)) <= 3e-3
    np.testing.assert_array_equal(found, again)  # the same bits in every run
    assert not np.asarray(planned.arrivals).any()


@pytest.mark.gpu
def test_one_expert_takes_all_tokens_and_the_others_none():
    stacks = [random_stack(5, *shape, seed) for seed, shape in enumerate([(512, 1024), (1024, 512)] * 2)]
    w13, w2, _ = prepare_experts(*stacks[:3], H200)
    x = jax.random.normal(jax.random.key(0), (19, 1024), jnp.bfloat16)
    for expert in (0, 4):
        chosen, weights = jnp.full((19, 1), expert), jnp.ones((19, 1))
        config = few_config_for(19, w13.shape, "fp8_token128")
        planned = plan(chosen, 5, config.tokens)

        found = kernel.planned_mlp(x, planned, weights, w13, w2, LIMIT, config)

        request = (x, chosen, weights, w13, w2, None)
        assert_right(
            found, expert_mlp(*request, limit=LIMIT, activation="fp8_token128", implementation="reference")
        )


@pytest.mark.gpu
def test_codes_and_scales_decode_exactly_on_the_device():
    """Every byte of codes, times every multiplier, against one column of ones at a time."""
    up = every_code_and_scale(512)
    ones = QuantArray(jnp.full_like(up.values, 0x22), jnp.full_like(up.scale, 127), up.format)
    w13, w2 = to_tiles(interleave(ones, up)), to_tiles(random_stack(1, 512, 256, 0))
    x, chosen = jnp.eye(512, dtype=jnp.bfloat16), jnp.zeros((512, 1), jnp.int32)
    config = deepest_few(512, 8)
    planned = plan(chosen, 1, config.tokens)

    inner, _ = kernel.products(x, planned, jnp.ones((512, 1)), w13, w2, limit=LIMIT, config=config)

    expected = np.asarray(dequantize(up))[0].T * float(jax.nn.silu(1.0))
    # Numbers of E2M1 times powers of two differ by a third at least.
    np.testing.assert_allclose(np.asarray(inner, np.float32), expected, rtol=2**-8, atol=0)
