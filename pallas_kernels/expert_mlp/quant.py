"""Activations to FP8 for weights in tiles: columns in the order of `tiles.tile_order`, in one pass."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.activation_quant.triton import quantized
from pallas_kernels.expert_mlp.plan import Plan
from pallas_kernels.formats import E4M3_MAX, FORMATS
from pallas_kernels.triton_call import triton_call

BLOCK = 128  # columns that share a scale
ALIGNED = 4  # places: copies begin at multiples of 16 bytes, also of float32
_BLOCKS = 16  # of them in one program


@triton.jit
def _in_tile_order(values, BLOCKS: tl.constexpr):
    """Blocks of 128 columns, each as `tile_order` has it."""
    parts = tl.permute(tl.reshape(values, (BLOCKS, 4, 8, 4)), (0, 2, 1, 3))
    return tl.reshape(parts, (BLOCKS, 128))


@triton.jit
def _quant(
    x, values, scale, BLOCKS: tl.constexpr, TOTAL: tl.constexpr, FLOOR: tl.constexpr, MOST: tl.constexpr
):
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None].to(tl.int64) * 128 + tl.arange(0, 128)[None, :]
    real = block < TOTAL
    found, exponent = quantized(tl.load(x + at, mask=real[:, None], other=0.0), FLOOR, MOST)
    tl.store(values + at, _in_tile_order(found, BLOCKS), mask=real[:, None])
    tl.store(scale + block, exponent.to(tl.uint8), mask=real)


@triton.jit
def _sorted_quant(
    x,  # [T, K] bfloat16
    weight,  # [T * CHOICES] float32, of each pair
    place,  # [T * CHOICES] int32, of each pair
    values,  # [K/128, ROWS, 128] e4m3
    scale,  # [K/128, ROWS] float32
    share,  # [ROWS] float32
    ROWS: tl.constexpr,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCKS: tl.constexpr,
    FLOOR: tl.constexpr,
    MOST: tl.constexpr,
):
    token = tl.program_id(0) // (K // 128 // BLOCKS)
    first = tl.program_id(0) % (K // 128 // BLOCKS) * BLOCKS
    block = first + tl.arange(0, BLOCKS)
    column = tl.arange(0, 128)[None, :]
    numbers = tl.load(x + token.to(tl.int64) * K + block[:, None] * 128 + column)
    found, exponent = quantized(numbers, FLOOR, MOST)
    found = _in_tile_order(found, BLOCKS)
    power = tl.where(exponent == 255, 0x7FC00000, exponent << 23).to(tl.float32, bitcast=True)
    for choice in tl.static_range(CHOICES):
        pair = token * CHOICES + choice
        at = block.to(tl.int64) * ROWS + tl.load(place + pair)
        tl.store(values + at[:, None] * 128 + column, found)
        tl.store(scale + at, power)
        if first == 0:
            tl.store(share + tl.load(place + pair), tl.load(weight + pair))


_CONSTANTS: dict[str, Any] = {"FLOOR": FORMATS["fp8_token128"].floor, "MOST": E4M3_MAX}


def tile_quant(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [T, K] in `fp8_token128`: values [T, K] in the order of the tiles, E8M0 exponents [T, K/128]."""
    tokens, columns = x.shape
    return triton_call(
        _quant,
        x,
        out=(
            jax.ShapeDtypeStruct(x.shape, jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((tokens, columns // BLOCK), jnp.uint8),
        ),
        grid=(-(-x.size // BLOCK // _BLOCKS),),
        BLOCKS=_BLOCKS,
        TOTAL=x.size // BLOCK,
        **_CONSTANTS,
    )


def place_count(planned: Plan, n_routed_experts: int, tile_rows: int) -> int:
    """Places that the worst routing needs, and as many as the last tile may be short of; aligned too."""
    rows = planned.order.size
    places = rows + (ALIGNED - 1) * min(n_routed_experts, rows) + tile_rows
    return -(-places // ALIGNED) * ALIGNED


def places_of(planned: Plan) -> tuple[jax.Array, jax.Array]:
    """Rows with gaps, so that every expert begins at a multiple of `ALIGNED`: the place of each pair [R] and
    of the first row of each tile [tiles]. Tiles of the plan are a multiple of `ALIGNED` long.
    """
    real = planned.expert >= 0
    last = real & (planned.expert != jnp.append(planned.expert[1:], -1))  # of their experts
    gap = jnp.where(last, (planned.start - planned.end) % ALIGNED, 0)
    rows = planned.order.size
    gaps = jnp.zeros(rows + 1, jnp.int32).at[jnp.where(last, planned.end, rows)].add(gap)
    place = planned.row + jnp.cumsum(gaps)[planned.row]
    return place, jnp.where(real, planned.start + jnp.cumsum(gap) - gap, 0)


def sorted_tile_quant(
    x: jax.Array, weights: jax.Array, place: jax.Array, places: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [T, K] in `fp8_token128`, once for each choice, at its `place` [R] of P `places`: values
    [K/128, P, 128] with columns in the order of the tiles, scales [K/128, P] float32; and the routing weights
    [P]. Places without a pair are not written.
    """
    tokens, columns = x.shape
    blocks = math.gcd(columns // BLOCK, _BLOCKS)
    return triton_call(
        _sorted_quant,
        x,
        weights.reshape(-1),
        place,
        out=(
            jax.ShapeDtypeStruct((columns // BLOCK, places, BLOCK), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((columns // BLOCK, places), jnp.float32),
            jax.ShapeDtypeStruct((places,), jnp.float32),
        ),
        grid=(tokens * (columns // BLOCK // blocks),),
        ROWS=places,
        K=columns,
        CHOICES=weights.shape[1],
        BLOCKS=blocks,
        **_CONSTANTS,
    )
