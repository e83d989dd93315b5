"""What the Triton kernels of this folder do to a tile of rows, [ROWS, WIDTH], one step a function.

All numbers are float32. A step takes what bfloat16 can hold, and gives what is still to be `rounded`: a
kernel rounds between two steps wherever the definition does.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from pallas_kernels.cached_rows import QuantKV
from pallas_kernels.formats import FORMATS, QuantArray


@triton.jit
def rounded(x, VENDOR: tl.constexpr):
    """The nearest bfloat16 number, as float32."""
    if VENDOR == "cuda":
        # A conversion of two numbers takes one slot, where ptxas gives one of a single number sixteen.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 pair;
            cvt.rn.bf16x2.f32 pair, $3, $2;
            shl.b32 $0, pair, 16;
            and.b32 $1, pair, 0xffff0000;
            }""",
            "=r,=r,r,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def normalized(x, WIDTH: tl.constexpr, EPS: tl.constexpr):
    """x / sqrt(mean(x^2) + EPS)."""
    return x * tl.rsqrt(tl.sum(x * x, 1) / WIDTH + EPS)[:, None]


@triton.jit
def rotated(
    x,
    cos,  # [tokens, PAIRS] float32
    sin,
    token,  # [ROWS]: which of them each row takes
    real,  # [ROWS]: whether there is one
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """The last 2 * PAIRS columns turned, pair by pair of neighbours; the others as they are."""
    pair = tl.arange(0, WIDTH // 2) - (WIDTH // 2 - PAIRS)
    turns = (pair >= 0)[None, :]
    at = token[:, None].to(tl.int64) * PAIRS + pair[None, :]
    c = tl.load(cos + at, mask=real[:, None] & turns, other=1.0)
    s = tl.load(sin + at, mask=real[:, None] & turns, other=0.0)
    if INVERSE:
        s = -s
    a, b = tl.split(tl.reshape(x, [ROWS, WIDTH // 2, 2]))
    even, odd = tl.where(turns, a * c - b * s, a), tl.where(turns, a * s + b * c, b)
    return tl.reshape(tl.join(even, odd), [ROWS, WIDTH])


@triton.jit
def hadamard(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, LOG2_WIDTH: tl.constexpr):
    """The transform in Sylvester's order, one bit of the column after the other, scaled to be orthogonal."""
    # Of two numbers one becomes their sum and the other sum - 2 * itself, which differs from their difference
    # by no more than the sum was rounded.
    minus_twice = (tl.arange(0, 2).to(tl.float32) * -2.0)[None, None, :, None]
    for bit in tl.static_range(LOG2_WIDTH):
        pairs = tl.reshape(x, [ROWS, WIDTH >> (bit + 1), 2, 1 << bit])
        x = tl.reshape(tl.sum(pairs, 2, keep_dims=True) + pairs * minus_twice, [ROWS, WIDTH])
    SCALE: tl.constexpr = WIDTH**-0.5
    return x * SCALE


@triton.jit
def _exponent_of_scale(largest, FLOOR: tl.constexpr, MOST_BITS: tl.constexpr):
    """The exponent of largest / MOST, one more if the mantissa of `largest` is the greater one."""
    bits = tl.maximum(largest, FLOOR).to(tl.int32, bitcast=True)
    return ((bits + (0x7FFFFF - (MOST_BITS & 0x7FFFFF))) >> 23) - ((MOST_BITS >> 23) - 127)


@triton.jit
def _nearest(x, exponent, LOWEST_EXPONENT: tl.constexpr, MANTISSA_BITS: tl.constexpr):
    """x as a format with such scales can say it; see `requantized`."""
    bits = x.to(tl.int32, bitcast=True)
    power = tl.maximum(bits & 0x7F800000, (exponent + LOWEST_EXPONENT) << 23)
    large = (power + (((23 - MANTISSA_BITS) << 23) + 0x400000)).to(tl.float32, bitcast=True)
    nearest = (x + large) - large
    sign = bits & -0x80000000  # which a zero keeps
    return (nearest.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def requantized(
    x,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    FLOOR: tl.constexpr,
    MOST_BITS: tl.constexpr,
    LOWEST_EXPONENT: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
):
    """The first COLUMNS through a format and back, GROUP columns with one power-of-two scale; below 2^100.

    Also the exponents, as E8M0 has them, of the scales with which the result is kept, [ROWS, WIDTH // GROUP]
    int32, of other columns meaningless. They are those of the result's own largest numbers: one that was
    rounded down to MOST times a smaller scale is kept with that.

    Dividing by such a scale moves exponents only, so a number is rounded where it is: to MANTISSA_BITS, or
    to the last bit of the smallest normal number times the scale. Adding and subtracting a number so large
    that its last bit is this one does it, ties to even, on chips that do not know the format. No number is
    too large for its scale. `constants` makes the last five arguments.
    """
    groups = tl.reshape(x, [ROWS, WIDTH // GROUP, GROUP])
    largest = tl.max(tl.abs(groups), 2, keep_dims=True)
    exponent = _exponent_of_scale(largest, FLOOR, MOST_BITS)
    nearest = tl.reshape(_nearest(groups, exponent, LOWEST_EXPONENT, MANTISSA_BITS), [ROWS, WIDTH])
    largest = _nearest(largest, exponent, LOWEST_EXPONENT, MANTISSA_BITS)
    exponent = _exponent_of_scale(largest, FLOOR, MOST_BITS)
    if COLUMNS < WIDTH:
        nearest = tl.where((tl.arange(0, WIDTH) < COLUMNS)[None, :], nearest, x)
    return nearest, tl.reshape(exponent, [ROWS, WIDTH // GROUP])


@triton.jit
def e4m3_byte(x):
    """The nearest of E4M3, of numbers that are not beyond it; on any chip, as some have other FP8, or none.

    Its bits are those of a float32 that is 2^-120 of it.
    """
    bits = (x * 2.0**-120).to(tl.int32, bitcast=True)
    nearest = bits + 0x7FFFF + ((bits >> 20) & 1)
    return (((nearest >> 20) & 0x7F) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _divided(x, exponent, ROWS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr):
    """x divided by its groups' powers of two."""
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    groups = tl.reshape(x, [ROWS, WIDTH // GROUP, GROUP])
    return tl.reshape(groups * tl.reshape(inverse, [ROWS, WIDTH // GROUP, 1]), [ROWS, WIDTH])


@triton.jit
def keep_key_values(
    x,  # [ROWS, WIDTH]: numbers that went through the format
    exponent,  # [ROWS, WIDTH // GROUP]
    nope,  # [.., WIDTH - 2 * PAIRS] bytes of E4M3
    scale,  # [.., SCALES] uint8
    rope,  # [.., 2 * PAIRS] bfloat16
    to,  # [ROWS] int64: rows of these
    kept,  # [ROWS]: whether to write there
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALES: tl.constexpr,
):
    """Rows as a QuantKV has them."""
    PLAIN: tl.constexpr = WIDTH - 2 * PAIRS
    channel, group, place = tl.arange(0, WIDTH), tl.arange(0, WIDTH // GROUP), tl.arange(0, SCALES)
    rows, there = to[:, None], kept[:, None]
    codes = e4m3_byte(_divided(x, exponent, ROWS, WIDTH, GROUP))
    tl.store(nope + rows * PLAIN + channel[None, :], codes, mask=there & (channel < PLAIN)[None, :])
    at = scale + rows * SCALES
    coded = (group < PLAIN // GROUP)[None, :]
    tl.store(at + group[None, :], exponent.to(tl.uint8), mask=there & coded)
    none = tl.zeros([ROWS, SCALES], tl.uint8)
    tl.store(at + place[None, :], none, mask=there & (place >= PLAIN // GROUP)[None, :])
    at = rope + rows * (2 * PAIRS) + (channel - PLAIN)[None, :]
    tl.store(at, x.to(tl.bfloat16), mask=there & (channel >= PLAIN)[None, :])


@triton.jit
def keep_index_keys(
    x,  # [ROWS, WIDTH]: numbers that went through the format
    exponent,  # [ROWS, WIDTH // GROUP]
    values,  # [.., WIDTH // 2] uint8
    scale,  # [.., WIDTH // GROUP] uint8
    to,  # [ROWS] int64: rows of these
    kept,  # [ROWS]: whether to write there
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Rows as a QuantArray in `fp4_group32` has them: the even column in the lower half of a byte."""
    # The bits of E2M1 are those of a float32 that is 2^-126 of it.
    bits = (_divided(x, exponent, ROWS, WIDTH, GROUP) * 2.0**-126).to(tl.int32, bitcast=True)
    codes = ((bits >> 22) & 7) | ((bits >> 28) & 8)
    even, odd = tl.split(tl.reshape(codes, [ROWS, WIDTH // 2, 2]))
    byte, group, rows = tl.arange(0, WIDTH // 2), tl.arange(0, WIDTH // GROUP), to[:, None]
    at = values + rows * (WIDTH // 2) + byte[None, :]
    tl.store(at, (even | (odd << 4)).to(tl.uint8), mask=kept[:, None])
    at = scale + rows * (WIDTH // GROUP) + group[None, :]
    tl.store(at, exponent.to(tl.uint8), mask=kept[:, None])


def as_bytes(rows: QuantKV | QuantArray) -> list[jax.Array]:
    """Its arrays as kernels take them: some chips' Triton knows no E4M3. XLA moves nothing for this."""
    return [
        leaf if leaf.dtype != jnp.float8_e4m3fn else jax.lax.bitcast_convert_type(leaf, jnp.uint8)
        for leaf in jax.tree.leaves(rows)
    ]


def from_bytes[Rows: QuantKV | QuantArray](bytes: Sequence[jax.Array], like: Rows) -> Rows:
    """The inverse."""
    leaves, structure = jax.tree.flatten(like)
    return jax.tree.unflatten(
        structure,
        [
            each if each.dtype == leaf.dtype else jax.lax.bitcast_convert_type(each, leaf.dtype)
            for each, leaf in zip(bytes, leaves, strict=True)
        ],
    )


_NARROW = {"fp8_block64": (-6, 3), "fp4_group32": (0, 1)}  # smallest normal exponent, mantissa bits


def constants(format: str) -> dict[str, Any]:
    """What `requantized` has to know of a format."""
    (_, group), most, floor, _ = FORMATS[format]
    lowest_exponent, mantissa_bits = _NARROW[format]
    return {
        "GROUP": group,
        "FLOOR": floor,
        "MOST_BITS": int(np.float32(most).view(np.int32)),
        "LOWEST_EXPONENT": lowest_exponent,
        "MANTISSA_BITS": mantissa_bits,
    }
