"""What the Triton kernels of this folder do to a tile of rows, [ROWS, WIDTH], one step a function.

All numbers are float32. A step takes what bfloat16 can hold, and gives what is still to be `rounded`: a
kernel rounds between two steps wherever the definition does.
"""

from typing import Any

import numpy as np
import triton
import triton.language as tl

from pallas_kernels.formats import FORMATS


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

    Dividing by such a scale moves exponents only, so a number is rounded where it is: to MANTISSA_BITS, or
    to the last bit of the smallest normal number times the scale. Adding and subtracting a number so large
    that its last bit is this one does it, ties to even, on chips that do not know the format. No number is
    too large for its scale. `constants` makes the last five arguments.
    """
    groups = tl.reshape(x, [ROWS, WIDTH // GROUP, GROUP])
    largest = tl.maximum(tl.max(tl.abs(groups), 2, keep_dims=True), FLOOR).to(tl.int32, bitcast=True)
    # The exponent of largest / MOST, one more if its mantissa is the greater one: that of the scale.
    exponent = ((largest + (0x7FFFFF - (MOST_BITS & 0x7FFFFF))) >> 23) - ((MOST_BITS >> 23) - 127)
    bits = groups.to(tl.int32, bitcast=True)
    power = tl.maximum(bits & 0x7F800000, (exponent + LOWEST_EXPONENT) << 23)
    large = (power + (((23 - MANTISSA_BITS) << 23) + 0x400000)).to(tl.float32, bitcast=True)
    nearest = (groups + large) - large
    SIGN: tl.constexpr = -0x80000000  # which a zero keeps
    nearest = (nearest.to(tl.int32, bitcast=True) | (bits & SIGN)).to(tl.float32, bitcast=True)
    nearest = tl.reshape(nearest, [ROWS, WIDTH])
    if COLUMNS < WIDTH:
        nearest = tl.where((tl.arange(0, WIDTH) < COLUMNS)[None, :], nearest, x)
    return nearest


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
