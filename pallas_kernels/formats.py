"""The block formats of DeepSeek-V4: FP8 and FP4 values that share a scale per block.

A format says how wide a block is and how a value is stored:

    format         values                          one scale per           used for
    fp8_block128   float8_e4m3fn                   128 rows x 128 columns  linear weights
    fp4_group32    uint8, two e2m1 codes a byte    1 row x 32 columns      routed expert weights
    fp8_token128   float8_e4m3fn                   1 row x 128 columns     activations
    fp8_block64    float8_e4m3fn                   1 row x 64 columns      keys and values in the cache

Scales are powers of two kept as E8M0 exponents in a uint8 (byte b is 2^(b-127), 0xFF is NaN, there is no
zero), or float32 numbers in the FP8 "Base" checkpoints. Sources: the released inference/kernel.py
(act_quant, fp4_act_quant) and convert.py.
"""

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

E4M3_MAX = 448.0
E2M1_MAX = 6.0
E8M0_BIAS = 127
E8M0_NAN = 0xFF

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of codes 0..7; codes 8..15 are their negatives


class Format(NamedTuple):
    """How a block format stores a matrix; see the module's table."""

    block: tuple[int, int]  # rows, columns that share a scale
    max_value: float  # the largest number a stored value can be
    floor: float  # the smallest block maximum a scale is derived from
    packed: int = 1  # values in one stored element


# The floors are those of the released kernels: 1e-4 for FP8, 6 * 2^-126 for FP4.
FORMATS = {
    "fp8_block128": Format((128, 128), E4M3_MAX, 1e-4),
    "fp4_group32": Format((1, 32), E2M1_MAX, 6 * 2.0**-126, packed=2),
    "fp8_token128": Format((1, 128), E4M3_MAX, 1e-4),
    "fp8_block64": Format((1, 64), E4M3_MAX, 1e-4),
}


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=["format"])
@dataclasses.dataclass(frozen=True)
class QuantArray:
    """A quantised matrix, or a stack of them: `dequantize` gives its numbers back.

    Attributes:
      values: [..., rows, columns / packed], float8_e4m3fn or packed uint8; float8_e4m3fnuz for chips
        that multiply no other FP8 (`fnuz.for_target`).
      scale: [..., ceil(rows / block rows), ceil(columns / block columns)], uint8 (E8M0) or float32.
      format: a key of FORMATS.
    """

    values: jax.Array
    scale: jax.Array
    format: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the numbers it stands for."""
        *outer, columns = self.values.shape
        return (*outer, columns * FORMATS[self.format].packed)

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def size(self) -> int:
        """How many numbers it stands for."""
        return math.prod(self.shape)

    @property
    def exact_dtype(self) -> jnp.dtype:
        """The narrowest dtype that holds every number of it exactly.

        E4M3 and E2M1 have at most four significant bits, so bfloat16 holds them times any power of two.
        """
        return jnp.dtype(jnp.bfloat16 if self.scale.dtype == jnp.uint8 else jnp.float32)

    def __getitem__(self, index) -> "QuantArray":
        """One matrix of a stack."""
        return dataclasses.replace(self, values=self.values[index], scale=self.scale[index])


def storage_shapes(shape: tuple[int, ...], format: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of `values` and `scale` of a QuantArray that stands for numbers of `shape`."""
    block, packed = FORMATS[format].block, FORMATS[format].packed
    *outer, rows, columns = shape
    if columns % packed:
        raise ValueError(f"{format} stores {packed} values a byte: {columns} columns are not a multiple")
    return (*outer, rows, columns // packed), (*outer, -(-rows // block[0]), -(-columns // block[1]))


def values_dtype(format: str) -> jnp.dtype:
    """dtype of the `values` of a QuantArray."""
    return jnp.dtype(jnp.uint8 if FORMATS[format].packed == 2 else jnp.float8_e4m3fn)


# --- scales


def e8m0_decode(exponent: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """2^(b-127) of each byte as float32; 0xFF gives NaN. Built from bits, never by a numeric cast."""
    wide = exponent.astype(jnp.uint32)
    # 2^-127, byte 0, lies below the normal range: its float32 is the subnormal 0x00400000.
    bits = jnp.where(wide == 0, jnp.uint32(1 << 22), wide << 23)
    bits = jnp.where(wide == E8M0_NAN, jnp.uint32(0x7FC00000), bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def e8m0_ceil(x: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """E8M0 exponent of the smallest power of two that is at least `x`; `x` positive and normal."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    return exponent.astype(jnp.uint8)


def scale_values(scale: jax.Array) -> Float[Array, "..."]:
    """Scales as float32, whether stored as E8M0 bytes or as float32."""
    return e8m0_decode(scale) if scale.dtype == jnp.uint8 else scale


def _spread(scale: jax.Array, shape: tuple[int, ...], block: tuple[int, int]) -> jax.Array:
    """One scale per block to one per value, the last blocks cut to `shape`."""
    for axis, width in zip((-2, -1), block, strict=True):
        scale = jnp.repeat(scale, width, axis=axis) if width > 1 else scale
    return scale[..., : shape[-2], : shape[-1]]


# --- FP8 and FP4 codes


def e4m3_encode(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The nearest float8_e4m3fn, ties to the even code; `x` within +-448, or NaN.

    It is rounded before it is cast: on GPUs XLA leaves out casts to a narrow type and back, if told nothing
    else (`xla_allow_excess_precision`).
    """
    smallest, quantum = 2.0**-6, 2.0**-9  # of numbers with four bits, and of those below
    rounded = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=3)
    rounded = jnp.where(jnp.abs(x) < smallest, jnp.round(x / quantum) * quantum, rounded)
    return rounded.astype(jnp.float8_e4m3fn)


def e2m1_encode(x: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """The code of the nearest e2m1 number, ties to the even code; `x` within +-6."""
    magnitude = jnp.abs(x)
    code = jnp.zeros(x.shape, jnp.uint8)
    for below, (low, high) in enumerate(itertools.pairwise(E2M1_VALUES)):
        middle = (low + high) / 2
        past = magnitude > middle if below % 2 == 0 else magnitude >= middle
        code += past.astype(jnp.uint8)
    return code | (jnp.signbit(x).astype(jnp.uint8) << 3)


def e2m1_decode(code: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """The float32 of each code 0..15."""
    table = np.array([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], np.float32)
    return jnp.asarray(table)[code]


def pack_nibbles(code: UInt8[Array, "... columns"]) -> UInt8[Array, "... columns/2"]:
    """Two codes a byte: the even column in the low nibble."""
    return code[..., 0::2] | (code[..., 1::2] << 4)


def unpack_nibbles(packed: UInt8[Array, "... columns/2"]) -> UInt8[Array, "... columns"]:
    """The inverse of `pack_nibbles`."""
    pairs = jnp.stack([packed & 0xF, packed >> 4], axis=-1)
    return pairs.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


# --- whole arrays


def _encode(x: jax.Array, format: str) -> tuple[jax.Array, jax.Array]:
    """Unpacked codes (uint8 e2m1 or float8_e4m3fn) and E8M0 scales of `x`: the rule of all formats.

    Division by a power of two is exact, so the only rounding is that of the narrow type.
    """
    (rows, columns), max_value, floor, packed = FORMATS[format]
    *outer, height, width = x.shape
    x = x.astype(jnp.float32)
    edge = [(0, 0)] * len(outer) + [(0, -height % rows), (0, -width % columns)]
    tiles = jnp.pad(jnp.abs(x), edge)
    tiles = tiles.reshape(*outer, tiles.shape[-2] // rows, rows, tiles.shape[-1] // columns, columns)
    largest = jnp.maximum(tiles.max(axis=(-3, -1)), floor)
    scale = e8m0_ceil(largest / max_value)
    scaled = jnp.clip(x / _spread(e8m0_decode(scale), x.shape, (rows, columns)), -max_value, max_value)
    return e2m1_encode(scaled) if packed == 2 else e4m3_encode(scaled), scale


def quantize(x: Float[Array, "... rows columns"], format: str) -> QuantArray:
    """Quantises `x` with power-of-two scales: the smallest that bring each block within range."""
    codes, scale = _encode(x, format)
    return QuantArray(pack_nibbles(codes) if FORMATS[format].packed == 2 else codes, scale, format)


def dequantize(q: QuantArray, dtype=jnp.float32) -> Float[Array, "... rows columns"]:
    """The numbers `q` stands for: value times scale in float32, then one cast to `dtype`."""
    block, packed = FORMATS[q.format].block, FORMATS[q.format].packed
    values = e2m1_decode(unpack_nibbles(q.values)) if packed == 2 else q.values.astype(jnp.float32)
    return (values * _spread(scale_values(q.scale), q.shape, block)).astype(dtype)


def fake_quantize(x: Float[Array, "... columns"], format: str) -> Float[Array, "... columns"]:
    """`x` through `format` and back in its own dtype, as training simulated it.

    Formats with one-row blocks only: `fp8_token128`, `fp8_block64`, `fp4_group32`. The last block may be
    narrower than the format's.
    """
    if FORMATS[format].block[0] != 1:
        raise ValueError(f"{format} shares scales between rows; use quantize and dequantize")
    rows = x[None] if x.ndim == 1 else x
    codes, scale = _encode(rows, format)
    values = e2m1_decode(codes) if codes.dtype == jnp.uint8 else codes.astype(jnp.float32)
    spread = _spread(e8m0_decode(scale), rows.shape, FORMATS[format].block)
    return (values * spread).astype(x.dtype).reshape(x.shape)
