"""Products with FP8 weights on the tensor cores, scales included.

A sum runs over 128 columns, the width of a block of scales, and is multiplied by the scales of both sides
before it is added in float32: the released arithmetic. Two kernels share it. `_tiled` walks along K with one
tile of each operand. `_spanned` is for few tokens, where reading the weights is all there is: its warps walk
along K side by side, so that a few rows of the weight make enough loads to keep a multiprocessor busy.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.block_matmul.tiles import BLOCK, Tile, tile_for
from pallas_kernels.formats import QuantArray
from pallas_kernels.target import current_target
from pallas_kernels.triton_call import Engine, triton_call


@triton.jit
def _number(scale):
    """A scale as float32. An E8M0 byte is its exponent: 0 becomes zero, 255 (not a number) infinity."""
    if scale.dtype == tl.uint8:
        scale = (scale.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def _bfloat16(values):
    """FP8 values, or their bits where the device has no FP8, as bfloat16: exact."""
    if values.dtype == tl.uint8:
        # Sign, exponent and mantissa in their places of a bfloat16, whose exponents start 120 lower.
        bits = ((values & 0x80).to(tl.uint16) << 8) | ((values & 0x7F).to(tl.uint16) << 4)
        values = bits.to(tl.bfloat16, bitcast=True) * tl.full((), 2.0**120, tl.bfloat16)
    elif values.dtype != tl.bfloat16:
        # By way of float32: Hopper turns float16, the first stop, into bfloat16 at a quarter of the speed.
        values = values.to(tl.float32).to(tl.bfloat16)
    return values


@triton.jit
def _product(x, w):
    """x @ w.T of the last two axes, summed in float32."""
    CONVERT: tl.constexpr = x.dtype != w.dtype or x.dtype == tl.uint8
    if CONVERT:
        # Hopper's tensor cores take their first operand from registers, where weights are converted.
        product = tl.trans(tl.dot(_bfloat16(w), tl.trans(_bfloat16(x))))
    elif x.shape[-2] < 16:
        product = tl.trans(tl.dot(w, tl.trans(x)))  # the second operand's side may be as short as 8
    else:
        product = tl.dot(x, tl.trans(w))
    return product


@triton.jit
def _scaled_product(x_at, x_scale_at, real, weights, scale):
    """[tokens, rows] sums over one block of columns."""
    product = _product(tl.load(x_at, mask=real[:, None], other=0.0), weights)
    if x_at.dtype.element_ty == tl.bfloat16:
        product *= scale
    else:
        product *= (_number(tl.load(x_scale_at, mask=real, other=0)) * scale)[:, None]
    return product


@triton.jit
def _tiled(
    x,  # [M, GROUPS, K] FP8 or its bits, or bfloat16 without scales
    x_scale,  # [M, GROUPS, K / 128]
    w,  # [N, K] FP8 or its bits
    w_scale,  # [N / 128, K / 128]
    out,  # [SPLITS, M, N]
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    STACK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    BLOCKS: tl.constexpr = K // 128
    STEPS: tl.constexpr = BLOCKS // SPLITS
    HEIGHT: tl.constexpr = TOKENS * STACK
    HIGH: tl.constexpr = (M + HEIGHT - 1) // HEIGHT
    WIDE: tl.constexpr = (N + ROWS - 1) // ROWS
    # Tiles of eight times HEIGHT tokens go before the next ones, so that the L2 cache holds what they share.
    band = tl.program_id(0) // (8 * WIDE) * 8
    place = tl.program_id(0) % (8 * WIDE)
    high = tl.minimum(HIGH - band, 8)
    first_token = (band + place % high) * HEIGHT
    first_row = place // high * ROWS
    group = first_row // (N // GROUPS)
    split = tl.program_id(1)

    # Offsets of 32 bits from the arrays' starts: with wider ones the accumulators would spill.
    tokens, columns = first_token + tl.arange(0, TOKENS), tl.arange(0, 128)
    rows = first_row + tl.arange(0, ROWS)
    known = rows if N % ROWS == 0 else tl.minimum(rows, N - 1)
    x_at = x + (tokens[:, None] * (GROUPS * K) + group * K + split * STEPS * 128 + columns[None, :])
    x_scale_at = x_scale + (tokens * (GROUPS * BLOCKS) + group * BLOCKS + split * STEPS)
    w_at = w + (known[:, None] * K + split * STEPS * 128 + columns[None, :])
    w_scale_at = w_scale + (first_row // 128 * BLOCKS + split * STEPS)

    upper = tl.zeros((TOKENS, ROWS), tl.float32)
    lower = tl.zeros((TOKENS, ROWS), tl.float32)
    for k in range(STEPS):
        weights, scale = tl.load(w_at + k * 128), _number(tl.load(w_scale_at + k))
        upper += _scaled_product(x_at + k * 128, x_scale_at + k, tokens < M, weights, scale)
        if STACK == 2:
            below, scale_below = x_at + TOKENS * GROUPS * K, x_scale_at + TOKENS * GROUPS * BLOCKS
            lower += _scaled_product(below + k * 128, scale_below + k, tokens < M - TOKENS, weights, scale)

    out_at = out + (split * M + tokens.to(tl.int64))[:, None] * N + rows[None, :]
    inside = (rows < N)[None, :]
    tl.store(out_at, upper.to(out.dtype.element_ty), mask=(tokens < M)[:, None] & inside)
    if STACK == 2:
        out_at += TOKENS * N
        tl.store(out_at, lower.to(out.dtype.element_ty), mask=(tokens < M - TOKENS)[:, None] & inside)


@triton.jit
def _spanned(
    x,  # as those of _tiled
    x_scale,
    w,
    w_scale,
    out,  # [M, N]
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
):
    BLOCKS: tl.constexpr = K // 128
    first_row = tl.program_id(0) * ROWS
    group = first_row // (N // GROUPS)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    rows = first_row + tl.arange(0, ROWS)
    known = rows if N % ROWS == 0 else tl.minimum(rows, N - 1)
    real = (tokens < M)[None, :]

    # [SPAN, TOKENS or ROWS, 128]: one block of columns for each warp.
    block = tl.arange(0, SPAN)[:, None]
    column = block[:, :, None] * 128 + tl.arange(0, 128)[None, None, :]
    x_at = x + (tokens[None, :, None] * (GROUPS * K) + group * K + column)
    x_scale_at = x_scale + (tokens[None, :] * (GROUPS * BLOCKS) + group * BLOCKS + block)
    w_at = w + (known[None, :, None] * K + column)
    w_scale_at = w_scale + (first_row // 128 * BLOCKS + block)

    total = tl.zeros((SPAN, TOKENS, ROWS), tl.float32)
    for k in range(0, BLOCKS, SPAN):
        weights, scale = tl.load(w_at + k * 128), _number(tl.load(w_scale_at + k))
        if x.dtype.element_ty != tl.bfloat16:
            scale = _number(tl.load(x_scale_at + k, mask=real, other=0)) * scale
        product = _product(tl.load(x_at + k * 128, mask=real[:, :, None], other=0.0), weights)
        total += product * scale[:, :, None]

    out_at = out + tokens.to(tl.int64)[:, None] * N + rows[None, :]
    inside = (tokens < M)[:, None] & (rows < N)[None, :]
    tl.store(out_at, tl.sum(total, 0).to(out.dtype.element_ty), mask=inside)


def block_matmul(
    x: jax.Array | QuantArray,
    weight: QuantArray,
    out_dtype,
    *,
    tile: Tile | None = None,
    engine: Engine = "ffi",
) -> jax.Array:
    return _launch(x, 1, weight, out_dtype, tile, engine).reshape(*x.shape[:-1], weight.shape[0])


def block_diagonal_matmul(
    x: jax.Array, weight: QuantArray, out_dtype, *, tile: Tile | None = None, engine: Engine = "ffi"
) -> jax.Array:
    return _launch(x, x.shape[-2], weight, out_dtype, tile, engine).reshape(*x.shape[:-1], -1)


def _launch(
    operand: jax.Array | QuantArray,
    groups: int,
    weight: QuantArray,
    out_dtype,
    tile: Tile | None,
    engine: Engine,
) -> jax.Array:
    """[tokens, rows] of the product, where each group of the operand has its share of the rows."""
    (rows, columns), target = weight.shape, current_target()
    if columns % BLOCK:
        raise NotImplementedError(f"the kernel takes multiples of {BLOCK} columns, not {columns}")
    if isinstance(operand, QuantArray):
        holds, x, x_scale = "fp8", operand.values, operand.scale
    else:
        holds, x, x_scale = "bf16", operand, weight.scale  # this scale only holds the place
    tokens, values = x.size // (groups * columns), weight.values
    if holds == "fp8" and values.dtype == jnp.float8_e4m3fnuz and x.dtype != values.dtype:
        x, x_scale = as_fnuz(x, x_scale)
    if target.vendor == "cuda" and int(target.arch[3:]) < 89:
        x, values = _without_fp8(x), _without_fp8(values)
    tile = tile or tile_for(target.arch, holds, tokens, rows, columns, groups)
    if not tile.divides(columns, rows // groups, groups):
        raise ValueError(f"{tile} does not divide {groups} groups of {rows // groups} x {columns}")

    across, down = -(-rows // tile.rows), -(-tokens // (tile.tokens * tile.stack))
    if tile.span > 1:
        kernel, grid, constants = _spanned, (across, down), {"SPAN": tile.span}
    else:
        kernel, grid = _tiled, (across * down, tile.splits)
        constants = {"STACK": tile.stack, "SPLITS": tile.splits}
    dtype = out_dtype if tile.splits == 1 else jnp.float32
    parts = triton_call(
        kernel,
        *(x, x_scale, values, weight.scale),
        out=jax.ShapeDtypeStruct((tile.splits, tokens, rows), dtype),
        grid=grid,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        engine=engine,
        **{"M": tokens, "N": rows, "K": columns, "GROUPS": groups, "TOKENS": tile.tokens, "ROWS": tile.rows},
        **constants,
    )
    # XLA adds the parts, always in this order, and whatever comes next may join its kernel.
    return functools.reduce(operator.add, list(parts)).astype(out_dtype)


def as_fnuz(values: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """E4M3 in the form of the CDNA3 chips: the same bits stand for half the value, and -0 for no number."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint8)
    bits = jnp.where(bits == 0x80, jnp.uint8(0), bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fnuz), scale + jnp.uint8(1)


def _without_fp8(values: jax.Array) -> jax.Array:
    """FP8 as its bits, for chips whose compiler has no such type."""
    return values if values.dtype == jnp.bfloat16 else jax.lax.bitcast_convert_type(values, jnp.uint8)
