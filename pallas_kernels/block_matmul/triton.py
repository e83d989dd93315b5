"""Products with FP8 weights, scales included.

A sum runs over 128 columns, the width of a block of scales, and is multiplied by the scales of both sides
before it is added in float32: the released arithmetic. Four kernels share it, by how many tokens there are:

- `_streamed`: one token. Weights go through registers only, past the ordinary units: reading is all there is.
  Each program may quantise the token itself, all of it, which costs less than a launch.
- `_spanned`: few tokens. Warps walk along K side by side, so that a few rows of the weight make enough loads
  to keep a multiprocessor busy.
- `_tiled`: one tile of each operand walks along K. Below 64 tokens the weights are the rows of the tensor
  core's product, which are at least 64, and the tokens its columns, which may be as few as 8.
- `_dequantized`: bfloat16 activations. Weights take their scales in registers, exactly, on the way to the
  tensor core, which then sums over all of K.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.activation_quant.triton import quantized
from pallas_kernels.block_matmul.tiles import BLOCK, Operand, Tile, streamed_tile, tile_for
from pallas_kernels.formats import E4M3_MAX, FORMATS, QuantArray
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
def _float32(values):
    """FP8 values, their bits, or bfloat16, as float32."""
    return _bfloat16(values).to(tl.float32) if values.dtype == tl.uint8 else values.to(tl.float32)


@triton.jit
def _product(x, w):
    """x @ w.T of the last two axes, summed in float32."""
    CONVERT: tl.constexpr = x.dtype != w.dtype or x.dtype == tl.uint8
    # Tokens that fill fewer than 64 rows are columns instead: see the module.
    if CONVERT:
        # Hopper's tensor cores take their first operand from registers, where weights are converted.
        product = tl.trans(tl.dot(_bfloat16(w), tl.trans(_bfloat16(x))))
    elif x.shape[-2] < 16 or (x.shape[-2] < 64 and w.shape[-2] >= 64):
        product = tl.trans(tl.dot(w, tl.trans(x)))
    else:
        product = tl.dot(x, tl.trans(w))
    return product


@triton.jit
def _known(rows, N: tl.constexpr, ROWS: tl.constexpr):
    """Rows that can be read: the last one in place of any behind it, if tiles of ROWS do not end with it."""
    return rows if N % ROWS == 0 else tl.minimum(rows, N - 1)


@triton.jit
def _streamed(
    x,  # as those of _tiled
    x_scale,
    w,
    w_scale,
    out,  # [M, N]
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,  # the power of two that holds K
    FLOOR: tl.constexpr,  # of the largest number of a block of x that is quantised here; 0: it is not
    MOST: tl.constexpr,
):
    BLOCKS: tl.constexpr = K // 128
    first_row = tl.program_id(0) * ROWS
    token = tl.program_id(1)
    place = token * GROUPS + first_row // (N // GROUPS)
    rows, columns = first_row + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    known = _known(rows, N, ROWS)

    # All of the weights are asked for at once, and first: activations come out of the cache meanwhile.
    w_at = w + (known[:, None] * K + columns[None, :])
    weights = tl.load(w_at) if WIDTH == K else tl.load(w_at, mask=(columns < K)[None, :], other=0.0)

    block, column = tl.arange(0, WIDTH // 128), tl.arange(0, 128)
    inside = block < BLOCKS
    PLAIN: tl.constexpr = w.dtype.element_ty == tl.bfloat16
    scale = tl.full((WIDTH // 128,), 1.0, tl.float32)
    if not PLAIN:
        scale = _number(tl.load(w_scale + (first_row // 128 * BLOCKS + block), mask=inside, other=0))
    if x.dtype.element_ty != tl.bfloat16:
        scale *= _number(tl.load(x_scale + (place * BLOCKS + block), mask=inside, other=0))
    if FLOOR > 0:
        # A thread gets the columns whose weights it has, 16 side by side, in two loads of eight: nothing goes
        # through shared memory.
        half = tl.arange(0, 8)[:, None, None] * 16 + tl.arange(0, 8)[None, None, :]
        half_at = x + (place * K + block[None, :, None] * 128 + half)
        low = tl.load(half_at, mask=inside[None, :, None], other=0.0)
        high = tl.load(half_at + 8, mask=inside[None, :, None], other=0.0)
        both = tl.permute(tl.join(low, high), (1, 0, 3, 2))
        values, exponent = quantized(tl.reshape(both, (WIDTH // 128, 128)), FLOOR, MOST)
        scale *= _number(exponent.to(tl.uint8))
    else:
        x_at = x + (place * K + block[:, None] * 128 + column[None, :])
        values = tl.load(x_at, mask=inside[:, None], other=0.0)
    values = _float32(values) * scale[:, None]

    sums = tl.sum(_float32(weights) * tl.reshape(values, (WIDTH,))[None, :], 1)
    tl.store(out + (token.to(tl.int64) * N + rows), sums.to(out.dtype.element_ty), mask=rows < N)


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
    HAS_SCALES: tl.constexpr = x.dtype.element_ty != tl.bfloat16
    first_row = tl.program_id(0) * ROWS
    group = first_row // (N // GROUPS)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    rows = first_row + tl.arange(0, ROWS)
    known = _known(rows, N, ROWS)
    real = (tokens < M)[None, :]

    # [SPAN, TOKENS or ROWS, 128]: one block of columns for each warp.
    block = tl.arange(0, SPAN)[:, None]
    column = block[:, :, None] * 128 + tl.arange(0, 128)[None, None, :]
    x_at = x + (tokens[None, :, None] * (GROUPS * K) + group * K + column)
    x_scale_at = x_scale + (tokens[None, :] * (GROUPS * BLOCKS) + group * BLOCKS + block)
    w_at = w + (known[None, :, None] * K + column)
    w_scale_at = w_scale + (first_row // 128 * BLOCKS + block)

    # Scales are loaded one step ahead, so that no step waits for its own.
    w_scales = tl.load(w_scale_at)
    x_scales = tl.load(x_scale_at, mask=real, other=0) if HAS_SCALES else w_scales
    total = tl.zeros((SPAN, TOKENS, ROWS), tl.float32)
    for k in range(0, BLOCKS, SPAN):
        scale = _number(w_scales)
        if HAS_SCALES:
            scale *= _number(x_scales)
        ahead = tl.minimum(k + SPAN, BLOCKS - SPAN)
        w_scales = tl.load(w_scale_at + ahead)
        x_scales = tl.load(x_scale_at + ahead, mask=real, other=0) if HAS_SCALES else w_scales
        weights = tl.load(w_at + k * 128)
        product = _product(tl.load(x_at + k * 128, mask=real[:, :, None], other=0.0), weights)
        total += product * scale[:, :, None]

    out_at = out + tokens.to(tl.int64)[:, None] * N + rows[None, :]
    inside = (tokens < M)[:, None] & (rows < N)[None, :]
    tl.store(out_at, tl.sum(total, 0).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _scales(x_scale_at, w_scale_at, real, x):
    """Scales of a block of columns as stored: those of the tokens, if they have any, and the weight's."""
    w_scales = tl.load(w_scale_at)
    x_scales = w_scales
    if x.dtype.element_ty != tl.bfloat16:
        x_scales = tl.load(x_scale_at, mask=real, other=0)
    return x_scales, w_scales


@triton.jit
def _scale(scales, x):
    """What the sums over a block of columns are multiplied by."""
    scale = _number(scales[1])
    if x.dtype.element_ty != tl.bfloat16:
        scale = (_number(scales[0]) * scale)[:, None]
    return scale


@triton.jit
def _place(M: tl.constexpr, N: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """First token and first row of this program's tile.

    Tiles of eight times HEIGHT tokens go before the next ones, so that the L2 cache holds what they share.
    """
    HIGH: tl.constexpr = (M + HEIGHT - 1) // HEIGHT
    WIDE: tl.constexpr = (N + WIDTH - 1) // WIDTH
    band = tl.program_id(0) // (8 * WIDE) * 8
    place = tl.program_id(0) % (8 * WIDE)
    high = tl.minimum(HIGH - band, 8)
    return (band + place % high) * HEIGHT, place // high * WIDTH


@triton.jit
def _store(out, sums, tokens, rows, M: tl.constexpr, N: tl.constexpr):
    """Writes [tokens, rows] of one split's [M, N]."""
    out_at = out + (tl.program_id(1) * M + tokens.to(tl.int64))[:, None] * N + rows[None, :]
    tl.store(out_at, sums.to(out.dtype.element_ty), mask=(tokens < M)[:, None] & (rows < N)[None, :])


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
    BESIDE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    BLOCKS: tl.constexpr = K // 128
    STEPS: tl.constexpr = BLOCKS // SPLITS
    TWO: tl.constexpr = STACK * BESIDE == 2
    first_token, first_row = _place(M, N, TOKENS * STACK, ROWS * BESIDE)
    group = first_row // (N // GROUPS)
    start = tl.program_id(1) * STEPS

    # Offsets of 32 bits from the arrays' starts: with wider ones the accumulators would spill.
    tokens, columns = first_token + tl.arange(0, TOKENS), tl.arange(0, 128)
    rows = first_row + tl.arange(0, ROWS)
    known = _known(rows, N, ROWS * BESIDE)
    x_at = x + (tokens[:, None] * (GROUPS * K) + (group * K + start * 128) + columns[None, :])
    x_scale_at = x_scale + (tokens * (GROUPS * BLOCKS) + group * BLOCKS + start)
    w_at = w + (known[:, None] * K + start * 128 + columns[None, :])
    w_scale_at = w_scale + (first_row // 128 * BLOCKS + start)
    real = tokens < M

    # The tile of the second accumulator, if there is one: other tokens, or other rows.
    tokens_2, rows_2 = tokens + (STACK - 1) * TOKENS, rows + (BESIDE - 1) * ROWS
    x_2_at = x_at + (STACK - 1) * TOKENS * GROUPS * K
    x_scale_2_at = x_scale_at + (STACK - 1) * TOKENS * GROUPS * BLOCKS
    w_2_at = w + (_known(rows_2, N, ROWS * BESIDE)[:, None] * K + start * 128 + columns[None, :])
    first_row_2 = _known(first_row + (BESIDE - 1) * ROWS, N, ROWS * BESIDE)
    w_scale_2_at = w_scale + (first_row_2 // 128 * BLOCKS + start)
    real_2 = tokens_2 < M

    # Scales are loaded one step ahead, so that no step waits for its own.
    scales = _scales(x_scale_at, w_scale_at, real, x)
    scales_2 = _scales(x_scale_2_at, w_scale_2_at, real_2, x) if TWO else scales
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    total_2 = tl.zeros((TOKENS, ROWS), tl.float32)
    for k in range(STEPS):
        scale, scale_2 = _scale(scales, x), _scale(scales_2, x)
        ahead = tl.minimum(k + 1, STEPS - 1)
        scales = _scales(x_scale_at + ahead, w_scale_at + ahead, real, x)
        scales_2 = _scales(x_scale_2_at + ahead, w_scale_2_at + ahead, real_2, x) if TWO else scales

        weights = tl.load(w_at + k * 128)
        values = tl.load(x_at + k * 128, mask=real[:, None], other=0.0)
        total += _product(values, weights) * scale
        if STACK == 2:
            values = tl.load(x_2_at + k * 128, mask=real_2[:, None], other=0.0)
        if BESIDE == 2:
            weights = tl.load(w_2_at + k * 128)
        if TWO:
            total_2 += _product(values, weights) * scale_2

    _store(out, total, tokens, rows, M, N)
    if TWO:
        _store(out, total_2, tokens_2, rows_2, M, N)


@triton.jit
def _dequantized(
    x,  # [M, GROUPS, K] bfloat16
    x_scale,  # not used: all kernels take the same arrays
    w,  # [N, K] FP8 or its bits
    w_scale,  # [N / 128, K / 128] E8M0
    out,  # [SPLITS, M, N]
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    BLOCKS: tl.constexpr = K // 128
    STEPS: tl.constexpr = BLOCKS // SPLITS
    first_token, first_row = _place(M, N, TOKENS, ROWS)
    group = first_row // (N // GROUPS)
    start = tl.program_id(1) * STEPS

    tokens, columns = first_token + tl.arange(0, TOKENS), tl.arange(0, 128)
    rows = first_row + tl.arange(0, ROWS)
    known = _known(rows, N, ROWS)
    x_at = x + (tokens[:, None] * (GROUPS * K) + (group * K + start * 128) + columns[None, :])
    w_at = w + (known[:, None] * K + start * 128 + columns[None, :])
    w_scale_at = w_scale + (known // 128 * BLOCKS + start)[:, None]

    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for k in range(STEPS):
        # The bits of a power of two in bfloat16: four significant bits of a weight stay what they are.
        scale = (tl.load(w_scale_at + k).to(tl.uint16) << 7).to(tl.bfloat16, bitcast=True)
        weights = _bfloat16(tl.load(w_at + k * 128)) * scale
        values = tl.load(x_at + k * 128, mask=(tokens < M)[:, None], other=0.0)
        total = tl.dot(weights, tl.trans(values), total)
    _store(out, tl.trans(total), tokens, rows, M, N)


def block_matmul(
    x: jax.Array | QuantArray,
    weight: QuantArray,
    out_dtype,
    activation: str | None = None,
    *,
    tile: Tile | None = None,
    engine: Engine = "ffi",
) -> jax.Array:
    """See `pallas_kernels.block_matmul`; `activation` quantises a single token on its way in."""
    out = _launch(x, 1, weight, out_dtype, activation, tile, engine)
    return out.reshape(*x.shape[:-1], weight.shape[0])


def plain_matmul(x: jax.Array, weight: jax.Array, out_dtype) -> jax.Array:
    """Of a single token, where neither is quantised."""
    rows, columns = weight.shape
    tile = streamed_tile(rows, columns, 2)
    out = triton_call(
        _streamed,
        *(x, x, weight, x),  # nothing has scales
        out=jax.ShapeDtypeStruct((1, rows), out_dtype),
        grid=(-(-rows // tile.rows), 1),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **{"M": 1, "N": rows, "K": columns, "GROUPS": 1, "ROWS": tile.rows},
        **{"WIDTH": 1 << (columns - 1).bit_length(), "FLOOR": 0.0, "MOST": E4M3_MAX},
    )
    return out.reshape(*x.shape[:-1], rows)


def block_diagonal_matmul(
    x: jax.Array, weight: QuantArray, out_dtype, *, tile: Tile | None = None, engine: Engine = "ffi"
) -> jax.Array:
    return _launch(x, x.shape[-2], weight, out_dtype, None, tile, engine).reshape(*x.shape[:-1], -1)


def _launch(
    operand: jax.Array | QuantArray,
    groups: int,
    weight: QuantArray,
    out_dtype,
    activation: str | None,
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
    tile = tile or tile_for(target.arch, "fp8" if activation else holds, tokens, rows, columns, groups)
    if activation and tile.tokens > 1:
        raise NotImplementedError(f"only a single token is quantised on its way in, not {tokens}")
    if not tile.divides(columns, rows // groups, groups):
        raise ValueError(f"{tile} does not divide {groups} groups of {rows // groups} x {columns}")

    across = -(-rows // (tile.rows * tile.beside))
    kernel, grid, constants = _kernel(tile, across, tokens, columns, holds, weight.scale.dtype)
    dtype = out_dtype if tile.splits == 1 else jnp.float32
    sizes: dict[str, Any] = {"M": tokens, "N": rows, "K": columns, "GROUPS": groups, "ROWS": tile.rows}
    if kernel is _streamed:
        constants |= {"FLOOR": FORMATS[activation].floor if activation else 0.0, "MOST": E4M3_MAX}
    parts = triton_call(
        kernel,
        *(x, x_scale, values, weight.scale),
        out=jax.ShapeDtypeStruct((tile.splits, tokens, rows), dtype),
        grid=grid,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        engine=engine,
        **sizes,
        **constants,
    )
    # XLA adds the parts, always in this order, and whatever comes next may join its kernel.
    return functools.reduce(operator.add, list(parts)).astype(out_dtype)


def _kernel(
    tile: Tile, across: int, tokens: int, columns: int, holds: Operand, scale_dtype
) -> tuple[Any, tuple[int, int], dict[str, Any]]:
    """The kernel a tile is for, its grid, and the constants that only it has."""
    if tile.tokens == 1:
        return _streamed, (across, tokens), {"WIDTH": 1 << (columns - 1).bit_length()}
    down, constants = -(-tokens // (tile.tokens * tile.stack)), {"TOKENS": tile.tokens}
    if tile.span > 1:
        return _spanned, (across, down), constants | {"SPAN": tile.span}
    grid, constants = (across * down, tile.splits), constants | {"SPLITS": tile.splits}
    if holds == "bf16" and scale_dtype == jnp.uint8 and tile.stack * tile.beside == 1:
        return _dequantized, grid, constants
    return _tiled, grid, constants | {"STACK": tile.stack, "BESIDE": tile.beside}


def as_fnuz(values: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """E4M3 in the form of the CDNA3 chips: the same bits stand for half the value, and -0 for no number."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint8)
    bits = jnp.where(bits == 0x80, jnp.uint8(0), bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fnuz), scale + jnp.uint8(1)


def _without_fp8(values: jax.Array) -> jax.Array:
    """FP8 as its bits, for chips whose compiler has no such type."""
    return values if values.dtype == jnp.bfloat16 else jax.lax.bitcast_convert_type(values, jnp.uint8)
