"""`activation_quant` in one pass: each program takes some blocks of 128 columns."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.formats import E4M3_MAX, FORMATS, QuantArray
from pallas_kernels.triton_call import triton_call

_BLOCKS = 16  # of 128 columns, in one program


@triton.jit
def quantized(numbers, FLOOR: tl.constexpr, MOST: tl.constexpr):
    """Rows of a block of 128 columns: E4M3 values, and the E8M0 exponent of each row as int32."""
    numbers = numbers.to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(numbers), 1), FLOOR)
    # The smallest power of two that is at least the correctly rounded quotient, from its bits.
    bits = tl.div_rn(largest, tl.full(largest.shape, MOST, tl.float32)).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    scaled = tl.clamp(numbers * inverse[:, None], -MOST, MOST, propagate_nan=tl.PropagateNan.ALL)
    return scaled.to(tl.float8e4nv), exponent


@triton.jit
def _activation_quant(
    x, values, scale, BLOCKS: tl.constexpr, TOTAL: tl.constexpr, FLOOR: tl.constexpr, MOST: tl.constexpr
):
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None].to(tl.int64) * 128 + tl.arange(0, 128)[None, :]
    real = block < TOTAL
    block_values, exponent = quantized(tl.load(x + at, mask=real[:, None], other=0.0), FLOOR, MOST)
    tl.store(values + at, block_values, mask=real[:, None])
    tl.store(scale + block, exponent.to(tl.uint8), mask=real)


def activation_quant(x: jax.Array) -> QuantArray:
    *outer, columns = x.shape
    blocks = x.size // 128
    values, scale = triton_call(
        _activation_quant,
        x,
        out=(
            jax.ShapeDtypeStruct(x.shape, jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((*outer, columns // 128), jnp.uint8),
        ),
        grid=(-(-blocks // _BLOCKS),),
        BLOCKS=_BLOCKS,
        TOTAL=blocks,
        FLOOR=FORMATS["fp8_token128"].floor,
        MOST=E4M3_MAX,
    )
    return QuantArray(values, scale, "fp8_token128")
