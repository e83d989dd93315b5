"""FP4 weights in tiles as operands of the tensor cores: by table on NVIDIA, by arithmetic elsewhere."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.expert_mlp.tiles import tile_order


@triton.jit
def _e4m3_by_table(words, shares, shift):
    """The eight values of a word times 2^(multiplier - 5): two words of four E4M3 bytes, values 0-3 and 4-7.

    The table of a multiplier m is the E4M3 byte of each e2m1 magnitude times 2^(m-5): one more in m is 8 more
    in the byte, from the subnormals up. `prmt` looks four magnitudes up at once.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 share, low, high, which, found;
        shr.u32 share, $3, $4;
        and.b32 share, share, 0xFF;
        mad.lo.u32 low, share, 0x08080800, 0x14100800;
        mad.lo.u32 high, share, 0x08080808, 0x24201C18;
        and.b32 which, $2, 0x77777777;
        prmt.b32 found, low, high, which;
        lop3.b32 $0, found, $2, 0x80808080, 0xF8;
        shr.u32 which, which, 16;
        prmt.b32 found, low, high, which;
        shl.b32 which, $2, 4;
        lop3.b32 $1, found, which, 0x80808080, 0xF8;
        }
        """,
        "=&r,=&r,r,r,r",
        [words, shares, shift],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _bfloat16_by_table(words, shares, shift):
    """As `_e4m3_by_table`, in pairs of bfloat16: values 0-1, 2-3, 4-5 and 6-7.

    The table has sixteen bytes: the lower and the upper ones of the magnitudes times 2^(multiplier - 5), for
    which one more in the multiplier is 0x80 more. Words of one row share it: the assembler makes it once.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 share, e01, e23, e45, e67, lower03, lower47, upper03, upper47, which, upper, lower, sign;
        shr.u32 share, $5, $6;
        and.b32 share, share, 0xFF;
        mad.lo.u32 e01, share, 0x00800000, 0x3C800000;
        mad.lo.u32 e23, share, 0x00800080, 0x3D403D00;
        mad.lo.u32 e45, share, 0x00800080, 0x3DC03D80;
        mad.lo.u32 e67, share, 0x00800080, 0x3E403E00;
        prmt.b32 lower03, e01, e23, 0x6420;
        prmt.b32 lower47, e45, e67, 0x6420;
        prmt.b32 upper03, e01, e23, 0x7531;
        prmt.b32 upper47, e45, e67, 0x7531;
        and.b32 which, $4, 0x77777777;
        prmt.b32 lower, lower03, lower47, which;
        prmt.b32 upper, upper03, upper47, which;
        lop3.b32 upper, upper, $4, 0x80808080, 0xF8;
        prmt.b32 $0, lower, upper, 0x5140;
        prmt.b32 $1, lower, upper, 0x7362;
        shr.u32 which, which, 16;
        prmt.b32 lower, lower03, lower47, which;
        prmt.b32 upper, upper03, upper47, which;
        shl.b32 sign, $4, 4;
        lop3.b32 upper, upper, sign, 0x80808080, 0xF8;
        prmt.b32 $2, lower, upper, 0x5140;
        prmt.b32 $3, lower, upper, 0x7362;
        }
        """,
        "=&r,=&r,=&r,=&r,r,r,r",
        [words, shares, shift],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _bytes(word):
    """The four bytes of a word, along a new pair of axes: [..., 2, 2] by bit 0 and bit 1 of their number."""
    even = tl.join(word.to(tl.uint8), (word >> 16).to(tl.uint8))
    odd = tl.join((word >> 8).to(tl.uint8), (word >> 24).to(tl.uint8))
    return tl.join(even, odd)  # high bit, low bit


@triton.jit
def _pairs(word):
    """The two halves of a word as bfloat16, along a new axis."""
    low, high = word.to(tl.uint16), (word >> 16).to(tl.uint16)
    return tl.join(low.to(tl.bfloat16, bitcast=True), high.to(tl.bfloat16, bitcast=True))


@triton.jit
def _by_arithmetic(words, multipliers, BN: tl.constexpr):
    """What the tables give, on any chip: float32 [n16 t q s1 h j pair b]."""
    # Value i has its magnitude in bits 4i to 4i + 2; its sign in bit 8b + 7 for i = b, 8b + 3 for i = 4 + b.
    value = tl.arange(0, 8)
    words = words[:, :, :, :, :, None]
    magnitude = (words >> (4 * value)) & 7
    sign = (words >> (8 * (value % 4) + 7 - value // 4 * 4)) & 1
    exponent, mantissa = magnitude >> 1, magnitude & 1
    twice = tl.where(exponent == 0, mantissa, ((2 + mantissa) << exponent) >> 1).to(tl.float32)
    power = ((multipliers + (127 - 6)) << 23).to(tl.float32, bitcast=True)
    values = tl.where(sign == 1, -twice, twice) * power[:, :, :, :, :, None]
    return tl.reshape(values, (BN // 16, 8, 4, 2, 2, 2, 2, 2))


@triton.jit
def _values(words, shares, shift, BN: tl.constexpr, VENDOR: tl.constexpr, FP8: tl.constexpr):
    """[n16 t q s1 h j pair b] of half of a tile's words: E4M3 or bfloat16 by table, or float32."""
    words = tl.reshape(words, (BN // 16, 8, 4, 2, 2))  # n16 t q s1 h
    if VENDOR == "cuda":
        if FP8:
            first, second = _e4m3_by_table(words, shares, shift)
            values = _bytes(tl.join(first, second))
        else:
            low0, high0, low1, high1 = _bfloat16_by_table(words, shares, shift)
            values = _pairs(tl.join(tl.join(low0, low1), tl.join(high0, high1)))
    else:
        values = _by_arithmetic(words, (shares >> shift) & 0xFF, BN)
    return values


@triton.jit
def fp4_operand(first, second, shares, BN: tl.constexpr, VENDOR: tl.constexpr, FP8: tl.constexpr):
    """A [BN, 128] operand, still to be scaled by row, from the words of both halves of a tile's columns.

    Its columns stand as in `tile_order`, in bfloat16 as in `pairs_in_tile_order`.
    """
    shares = tl.reshape(shares, (BN // 16, 8, 2, 1, 1, 1))  # a byte for two q, and for each h
    shares = tl.broadcast_to(shares, (BN // 16, 8, 2, 2, 2, 2))
    shares = tl.reshape(shares, (BN // 16, 8, 4, 2, 2))
    shift = tl.reshape(16 * (tl.arange(0, 4) % 2), (1, 1, 4, 1, 1))
    shift += tl.reshape(8 * tl.arange(0, 2), (1, 1, 1, 1, 2))
    shift = tl.broadcast_to(shift, (BN // 16, 8, 4, 2, 2))
    values = tl.join(
        _values(first, shares, shift, BN, VENDOR, FP8), _values(second, shares, shift, BN, VENDOR, FP8)
    )  # n16 t q s1 h j pair b s2
    if FP8:
        values = tl.permute(values, (0, 4, 1, 8, 3, 5, 2, 6, 7))  # n16 h t  s2 s1 j q pair b
        operand = tl.reshape(values, (BN, 128)).to(tl.float8e4nv, bitcast=VENDOR == "cuda")
    else:
        values = tl.permute(values, (0, 4, 1, 8, 3, 5, 6, 2, 7))  # n16 h t  s2 s1 j pair q b
        operand = tl.reshape(values, (BN, 128)).to(tl.bfloat16)
    return operand


def pairs_in_tile_order(x: jax.Array) -> jax.Array:
    """`tile_order` for bfloat16 instructions, where 4q + 2p + b of every sixteen columns goes to 8p + 2q + b.

    A word of a tile holds four neighbouring columns. An instruction takes two of them from a thread, and two
    eight further on.
    """
    x = tile_order(x)
    parts = x.reshape(*x.shape[:-1], x.shape[-1] // 16, 4, 2, 2)
    return jnp.swapaxes(parts, -3, -2).reshape(x.shape)
