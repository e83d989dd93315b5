"""Queries, key-values and index queries in Triton: one launch each, whose programs take some rows."""

import jax
import triton
import triton.language as tl

from pallas_kernels.attention_inputs.parts_triton import (
    constants,
    hadamard,
    normalized,
    requantized,
    rotated,
    rounded,
)
from pallas_kernels.triton_call import triton_call


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
def _key_value(
    kv,  # [TOTAL, WIDTH] bfloat16
    weight,  # [WIDTH]
    cos,  # [TOTAL, PAIRS] float32
    sin,
    out,  # as kv
    TOTAL: tl.constexpr,
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
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < TOTAL
    at = row[:, None].to(tl.int64) * WIDTH + tl.arange(0, WIDTH)[None, :]
    x = tl.load(kv + at, mask=real[:, None], other=0.0).to(tl.float32)
    weights = tl.load(weight + tl.arange(0, WIDTH)).to(tl.float32)
    x = rounded(normalized(x, WIDTH, EPS) * weights[None, :], VENDOR)
    x = rotated(x, cos, sin, row, real, ROWS, WIDTH, PAIRS, False)
    PLAIN: tl.constexpr = WIDTH - 2 * PAIRS
    x = requantized(x, ROWS, WIDTH, PLAIN, GROUP, FLOOR, MOST_BITS, LOWEST_EXPONENT, MANTISSA_BITS)
    tl.store(out + at, x.to(tl.bfloat16), mask=real[:, None])


@triton.jit
def _index_query(
    q,  # [TOTAL, WIDTH] bfloat16, a row for each head of each token
    cos,  # [tokens, PAIRS] float32
    sin,
    out,  # as q
    TOTAL: tl.constexpr,
    HEADS: tl.constexpr,
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
    x = requantized(x, ROWS, WIDTH, WIDTH, GROUP, FLOOR, MOST_BITS, LOWEST_EXPONENT, MANTISSA_BITS)
    tl.store(out + at, x.to(tl.bfloat16), mask=real[:, None])


# --- launches


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


def key_value(
    kv: jax.Array, weight: jax.Array, cos: jax.Array, sin: jax.Array, eps: float, format: str
) -> jax.Array:
    width = kv.shape[-1]
    rows, total = _rows_of_a_program(kv), kv.size // width
    return triton_call(
        _key_value,
        kv,
        weight,
        cos,
        sin,
        out=jax.ShapeDtypeStruct(kv.shape, kv.dtype),
        grid=(-(-total // rows),),
        TOTAL=total,
        WIDTH=width,
        PAIRS=cos.shape[-1],
        EPS=eps,
        ROWS=rows,
        **constants(format),
    )


def index_query(q: jax.Array, cos: jax.Array, sin: jax.Array, format: str) -> jax.Array:
    *_, heads, width = q.shape
    rows, total = _rows_of_a_program(q), q.size // width
    return triton_call(
        _index_query,
        q,
        cos,
        sin,
        out=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(-(-total // rows),),
        TOTAL=total,
        HEADS=heads,
        WIDTH=width,
        LOG2_WIDTH=width.bit_length() - 1,
        PAIRS=cos.shape[-1],
        ROWS=rows,
        **constants(format),
    )


def _rows_of_a_program(x: jax.Array) -> int:
    """Rows of 2048 numbers, 16 a thread; of 4096 where that still fills the chip."""
    numbers = 2048 if x.size < 2**22 else 4096
    return max(1, numbers // x.shape[-1])
