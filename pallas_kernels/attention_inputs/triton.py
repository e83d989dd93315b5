"""Latents, queries and index queries in Triton: one launch each, whose programs take some rows.

That of latents writes the window too: the program that makes a token's key-values puts them into the ring.
"""

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from pallas_kernels.activation_quant import activation_quant
from pallas_kernels.activation_quant.triton import quantized
from pallas_kernels.attention_inputs.parts_triton import (
    as_bytes,
    constants,
    e4m3_byte,
    from_bytes,
    hadamard,
    keep_key_values,
    normalized,
    requantized,
    rotated,
    rounded,
)
from pallas_kernels.cached_rows import QuantKV
from pallas_kernels.formats import E4M3_MAX, FORMATS, QuantArray
from pallas_kernels.indexer.queries import HIGHEST, LOWEST, TiledQueries
from pallas_kernels.target import current_target
from pallas_kernels.triton_call import triton_call

_FEW = 128  # rows, of which a program takes one: more programs start sooner


@triton.jit
def _query(
    q,  # [TOTAL, WIDTH] bfloat16, a row for each head of each token
    cos,  # [tokens, PAIRS] float32
    sin,
    out,  # as q
    TOTAL: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    INVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    VENDOR: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < TOTAL
    at = row[:, None].to(tl.int64) * WIDTH + tl.arange(0, WIDTH)[None, :]
    x = tl.load(q + at, mask=real[:, None], other=0.0).to(tl.float32)
    if NORM:
        x = rounded(normalized(x, WIDTH, EPS), VENDOR)
    x = rotated(x, cos, sin, row // HEADS, real, ROWS, WIDTH, PAIRS, INVERSE)
    tl.store(out + at, x.to(tl.bfloat16), mask=real[:, None])


@triton.jit
def _latents(
    x,  # [TOTAL, Q + WIDTH] bfloat16
    q_weight,  # [Q]
    kv_weight,  # [WIDTH]
    nope,  # the window, a ring of SLOTS rows for each sequence, as it was and as it becomes
    nope_scale,
    rope,
    position,  # [B] int32: of each sequence's first token here
    length,  # [B] int32: how many of its tokens are there
    cos,  # [TOTAL, PAIRS] float32
    sin,
    q,  # [TOTAL, Q] E4M3 or bfloat16
    scale,  # [TOTAL, Q / 128] uint8, not written without QUANTIZE
    kv,  # [TOTAL, WIDTH] bfloat16
    new_nope,
    new_nope_scale,
    new_rope,
    TOTAL: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
    SCALES: tl.constexpr,
    Q: tl.constexpr,
    Q_WIDTH: tl.constexpr,  # the power of two that is at least Q
    Q_ROWS: tl.constexpr,
    QUANTIZE: tl.constexpr,
    Q_FLOOR: tl.constexpr,
    Q_MOST: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    FLOOR: tl.constexpr,
    MOST_BITS: tl.constexpr,
    LOWEST_EXPONENT: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    VENDOR: tl.constexpr,
):
    Q_PROGRAMS: tl.constexpr = (TOTAL + Q_ROWS - 1) // Q_ROWS
    if tl.program_id(0) < Q_PROGRAMS:
        row = tl.program_id(0) * Q_ROWS + tl.arange(0, Q_ROWS)
        column = tl.arange(0, Q_WIDTH)
        real = (row < TOTAL)[:, None] & (column < Q)[None, :]
        at = row[:, None].to(tl.int64) * (Q + WIDTH) + column[None, :]
        numbers = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
        weights = tl.load(q_weight + column, mask=column < Q, other=0.0).to(tl.float32)
        numbers = rounded(normalized(numbers, Q, EPS) * weights[None, :], VENDOR)
        if QUANTIZE:
            BLOCKS: tl.constexpr = Q_WIDTH // 128
            values, scales = quantized(tl.reshape(numbers, [Q_ROWS * BLOCKS, 128]), Q_FLOOR, Q_MOST)
            tl.store(
                q + row[:, None].to(tl.int64) * Q + column[None, :],
                tl.reshape(values, [Q_ROWS, Q_WIDTH]),
                mask=real,
            )
            block = tl.arange(0, BLOCKS)
            tl.store(
                scale + row[:, None].to(tl.int64) * (Q // 128) + block[None, :],
                tl.reshape(scales.to(tl.uint8), [Q_ROWS, BLOCKS]),
                mask=(row < TOTAL)[:, None] & (block < Q // 128)[None, :],
            )
        else:
            tl.store(q + row[:, None].to(tl.int64) * Q + column[None, :], numbers.to(tl.bfloat16), mask=real)
    else:
        token = (tl.program_id(0) - Q_PROGRAMS) * ROWS + tl.arange(0, ROWS)
        there = token < TOTAL
        channel = tl.arange(0, WIDTH)
        from_ = token[:, None].to(tl.int64) * (Q + WIDTH) + Q + channel[None, :]
        vector = tl.load(x + from_, mask=there[:, None], other=0.0).to(tl.float32)
        kv_weights = tl.load(kv_weight + channel).to(tl.float32)
        vector = rounded(normalized(vector, WIDTH, EPS) * kv_weights[None, :], VENDOR)
        vector = rotated(vector, cos, sin, token, there, ROWS, WIDTH, PAIRS, False)
        PLAIN: tl.constexpr = WIDTH - 2 * PAIRS
        vector, exponent = requantized(
            vector, ROWS, WIDTH, PLAIN, GROUP, FLOOR, MOST_BITS, LOWEST_EXPONENT, MANTISSA_BITS
        )
        to = token[:, None].to(tl.int64) * WIDTH + channel[None, :]
        tl.store(kv + to, vector.to(tl.bfloat16), mask=there[:, None])
        # Of tokens that share a slot the last one stays.
        sequence, number = token // TOKENS, token % TOKENS
        end = tl.load(length + sequence, mask=there, other=0)
        kept = there & (number < end) & (number >= end - SLOTS)
        slot = (tl.load(position + sequence, mask=there, other=0) + number) % SLOTS
        keep_key_values(
            *(vector, exponent, new_nope, new_nope_scale, new_rope),
            *(sequence.to(tl.int64) * SLOTS + slot, kept),
            *(ROWS, WIDTH, PAIRS, GROUP, SCALES),
        )


@triton.jit
def _index_query(
    q,  # [TOTAL, WIDTH] bfloat16, a row for each head of each token
    projected,  # [tokens, COLUMNS] float32, with the weights of the heads from COLUMN on
    cos,  # [tokens, PAIRS] float32
    sin,
    out,  # [TOTAL, WIDTH] bytes of TiledQueries
    weights,  # [TOTAL] float32
    TOTAL: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COLUMN: tl.constexpr,
    WEIGHT_SCALE: tl.constexpr,
    HIGHEST: tl.constexpr,
    LOWEST: tl.constexpr,
    WIDTH: tl.constexpr,
    LOG2_WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    FLOOR: tl.constexpr,
    MOST_BITS: tl.constexpr,
    LOWEST_EXPONENT: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    VENDOR: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < TOTAL
    at = row[:, None].to(tl.int64) * WIDTH + tl.arange(0, WIDTH)[None, :]
    x = tl.load(q + at, mask=real[:, None], other=0.0).to(tl.float32)
    x = rounded(rotated(x, cos, sin, row // HEADS, real, ROWS, WIDTH, PAIRS, False), VENDOR)
    x = rounded(hadamard(x, ROWS, WIDTH, LOG2_WIDTH), VENDOR)
    x, _ = requantized(x, ROWS, WIDTH, WIDTH, GROUP, FLOOR, MOST_BITS, LOWEST_EXPONENT, MANTISSA_BITS)

    # As `tile_queries`: divided by a power of two, and channels in the order of `channel_order`.
    largest = tl.max(tl.abs(x), 1).to(tl.int32, bitcast=True)
    exponent = tl.maximum(largest >> 23, LOWEST)
    inverse = ((254 + HIGHEST - exponent) << 23).to(tl.float32, bitcast=True)
    channel = tl.arange(0, WIDTH)
    thread, word = channel // (WIDTH // 4), channel // 8 % (WIDTH // 32)
    place = word * 32 + channel // 4 % 2 * 16 + thread * 4 + channel % 4
    to = out + row[:, None].to(tl.int64) * WIDTH + place[None, :]
    tl.store(to, e4m3_byte(x * inverse[:, None]), mask=real[:, None])

    weight = tl.load(
        projected + (row // HEADS).to(tl.int64) * COLUMNS + COLUMN + row % HEADS, mask=real, other=0.0
    )
    weight = (weight.to(tl.bfloat16).to(tl.float32) * WEIGHT_SCALE).to(tl.bfloat16).to(tl.float32)
    power = ((exponent - HIGHEST) << 23).to(tl.float32, bitcast=True)
    tl.store(weights + row, weight * power, mask=real)


# --- launches


def latents(
    x: jax.Array,
    q_weight: jax.Array,
    kv_weight: jax.Array,
    window: QuantKV,
    position: jax.Array,
    length: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    eps: float,
    format: str,
    activation: str | None,
) -> tuple[jax.Array | QuantArray, jax.Array, QuantKV]:
    *outer, columns = x.shape
    width, q_columns, total = kv_weight.size, q_weight.size, x.size // columns
    q_width = 1 << (q_columns - 1).bit_length()
    # Where the chip has other FP8 numbers, or none, the definition makes them.
    quantize = activation is not None and current_target().has_e4m3
    q_rows, rows = (1 if total <= _FEW else max(1, 2048 // each) for each in (q_width, width))
    rings = as_bytes(window)
    q, scale, kv, *rings = triton_call(
        _latents,
        x,
        q_weight,
        kv_weight,
        *rings,
        position,
        length,
        cos,
        sin,
        out=(
            jax.ShapeDtypeStruct((*outer, q_columns), jnp.float8_e4m3fn if quantize else x.dtype),
            jax.ShapeDtypeStruct((*outer, q_columns // 128), jnp.uint8),
            jax.ShapeDtypeStruct((*outer, width), x.dtype),
            *(jax.ShapeDtypeStruct(ring.shape, ring.dtype) for ring in rings),
        ),
        aliases={3: 3, 4: 4, 5: 5},
        grid=(-(-total // q_rows) + -(-total // rows),),
        TOTAL=total,
        TOKENS=outer[-1],
        SLOTS=window.shape[1],
        SCALES=window.scale.shape[-1],
        Q=q_columns,
        Q_WIDTH=q_width,
        Q_ROWS=q_rows,
        QUANTIZE=quantize,
        Q_FLOOR=FORMATS["fp8_token128"].floor,
        Q_MOST=E4M3_MAX,
        WIDTH=width,
        PAIRS=cos.shape[-1],
        EPS=eps,
        ROWS=rows,
        **constants(format),
    )
    if activation is not None:
        q = QuantArray(q, scale, activation) if quantize else activation_quant(q)
    return q, kv, from_bytes(rings, window)


def query(q: jax.Array, cos: jax.Array, sin: jax.Array, eps: float) -> jax.Array:
    return _launch_query(q, cos, sin, NORM=True, EPS=eps, INVERSE=False)


def unrotate(out: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    return _launch_query(out, cos, sin, NORM=False, EPS=0.0, INVERSE=True)


def _launch_query(q: jax.Array, cos: jax.Array, sin: jax.Array, **constants) -> jax.Array:
    *_, heads, width = q.shape
    rows, total = _rows_of_a_program(q), q.size // width
    return triton_call(
        _query,
        q,
        cos,
        sin,
        out=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(-(-total // rows),),
        TOTAL=total,
        HEADS=heads,
        WIDTH=width,
        PAIRS=cos.shape[-1],
        ROWS=rows,
        **constants,
    )


def index_query(
    q: jax.Array, projected: jax.Array, column: int, cos: jax.Array, sin: jax.Array, format: str
) -> tuple[TiledQueries, jax.Array]:
    *outer, heads, width = q.shape
    rows, total = _rows_of_a_program(q), q.size // width
    values, weights = triton_call(
        _index_query,
        q,
        projected,
        cos,
        sin,
        out=(
            jax.ShapeDtypeStruct(q.shape, jnp.uint8),
            jax.ShapeDtypeStruct((*outer, heads), jnp.float32),
        ),
        grid=(-(-total // rows),),
        TOTAL=total,
        HEADS=heads,
        COLUMNS=projected.shape[-1],
        COLUMN=column,
        WEIGHT_SCALE=float(np.array((heads * width) ** -0.5, jnp.bfloat16)),
        HIGHEST=HIGHEST,
        LOWEST=LOWEST,
        WIDTH=width,
        LOG2_WIDTH=width.bit_length() - 1,
        PAIRS=cos.shape[-1],
        ROWS=rows,
        **constants(format),
    )
    return TiledQueries(jax.lax.bitcast_convert_type(values, jnp.float8_e4m3fn)), weights


def _rows_of_a_program(x: jax.Array) -> int:
    """Rows of 2048 numbers, 16 a thread; of 4096 where that still fills the chip."""
    numbers = 2048 if x.size < 2**22 else 4096
    return max(1, numbers // x.shape[-1])
