"""FP4 expert weights laid out for the tensor cores: bytes in the order in which threads need them.

A weight [N, K] becomes tiles of 64 x 128 values, each one contiguous block. Inside a tile, a thread's bytes
are its share of the matrix instruction's operand, so that they go from memory to registers to the tensor
core without a detour. Read in the checkpoint's order instead, the same kernel takes 2.5 times as long.

    tiles        [E, N/64, K/128, 4352] uint8   codes, then multipliers:
                     codes              4096    [n16 4][s2 2][t 8][q 4][s1 2][h 2][4 bytes]
                     multipliers         256    [n16 4][t 8][q 4][h 2]
    row_exponent [E, N]                 uint8   E8M0

Four bytes of codes are one little-endian word of eight values: row n16*16 + h*8 + t, columns
q*32 + s*8 + j*4 + b for value i = 4*j + b, where s = 2*s2 + s1. Its magnitude has bits 4*i to 4*i + 2 of the
word; its sign bit 8*b + 7 for j = 0 and 8*b + 3 for j = 1. A group of 32 columns keeps its scale as a
multiplier m: the scale is 2^(m - 11) times that of the row, the largest of its groups. E2M1 times 2^(m - 5)
is exact in E4M3, for m from 0 to 11; a row whose scales spread further has no such form.

Instruction s of the four that multiply a tile takes columns 4q to 4q + 3 and 16 + 4q to 19 + 4q of its 32
from thread q: a word. In the checkpoint's order these would be of group s for every thread, so each thread
would need the scales of all four. Instead all columns of group q go to thread q, and activations stand in the
same order: as a sum over columns may run in any order, they trade places on both sides (`tile_order`).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from pallas_kernels.formats import QuantArray, pack_nibbles, unpack_nibbles

ROWS, COLUMNS = 64, 128  # of a tile
CODES_BYTES = ROWS * COLUMNS // 2
TILE_BYTES = CODES_BYTES + ROWS * COLUMNS // 32
TILE_SHAPE = (34, 128)  # of its bytes, for copies, whose pieces are at most 256 long
HIGHEST_MULTIPLIER = 11

_SPLIT = (4, 2, 8, 4, 2, 2, 2, 4)  # n16 h t q s2 s1 j b of one 64 x 128 tile, as in a [N, K] matrix
_STORED = (0, 4, 2, 3, 5, 1, 6, 7)  # to n16 s2 t q s1 h j b
_SCALE_SPLIT = (4, 2, 8, 4)  # n16 h t q
_SCALE_STORED = (0, 2, 3, 1)  # to n16 t q h


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertTiles:
    """A stack of FP4 weights in the layout above."""

    tiles: jax.Array
    row_exponent: jax.Array

    @property
    def shape(self) -> tuple[int, int, int]:
        """[E, N, K] of the numbers it stands for."""
        experts, rows, columns = self.tiles.shape[:3]
        return experts, rows * ROWS, columns * COLUMNS

    @property
    def ndim(self) -> int:
        return 3


def tile_order(x: jax.Array) -> jax.Array:
    """[..., K] with the columns of every 128 in the order of the tiles: 32q + 4n + b goes to 16n + 4q + b."""
    parts = x.reshape(*x.shape[:-1], x.shape[-1] // COLUMNS, 4, 8, 4)
    return jnp.swapaxes(parts, -3, -2).reshape(x.shape)


def tileable(weight: QuantArray) -> Bool[Array, ""]:
    """Whether every row's scales lie close enough together; shapes are `to_tiles`' to check."""
    exponent = _group_exponents(weight).astype(jnp.int32)
    return (exponent.max(-1) - exponent.min(-1) <= HIGHEST_MULTIPLIER).all()


@jax.jit
def to_tiles(weight: QuantArray) -> ExpertTiles:
    """The weight in tiles, exactly, if it is `tileable`.

    Raises:
      NotImplementedError: it is not of multiples of 64 x 128, or not FP4 with E8M0 scales.
    """
    if weight.format != "fp4_group32" or weight.scale.dtype != jnp.uint8:
        raise NotImplementedError(f"tiles hold fp4_group32 with E8M0 scales, not {weight.format}")
    if weight.shape[-2] % ROWS or weight.shape[-1] % COLUMNS:
        raise NotImplementedError(f"tiles need multiples of {ROWS} x {COLUMNS}, got {weight.shape}")
    return jax.lax.map(_one_to_tiles, weight)


def _group_exponents(weight: QuantArray) -> jax.Array:
    """Scale exponents, where a group that is all zeros takes the row's largest: any scale serves it."""
    groups = weight.values.reshape(*weight.scale.shape, 16)
    empty = ((groups & 0x77) == 0).all(-1)
    return jnp.where(empty, weight.scale.max(-1, keepdims=True), weight.scale)


def _one_to_tiles(weight: QuantArray) -> ExpertTiles:
    rows, columns = weight.shape
    outer = (rows // ROWS, columns // COLUMNS)
    exponent = _group_exponents(weight)
    row_exponent = exponent.max(-1)
    multiplier = (exponent + (HIGHEST_MULTIPLIER - row_exponent)[:, None]).astype(jnp.uint8)
    codes = _words(_tile(unpack_nibbles(weight.values), COLUMNS, _SPLIT, _STORED).reshape(-1, 8))
    multipliers = _tile(multiplier, COLUMNS // 32, _SCALE_SPLIT, _SCALE_STORED)
    tiles = jnp.concatenate([codes.reshape(*outer, -1), multipliers.reshape(*outer, -1)], axis=-1)
    return ExpertTiles(tiles, row_exponent)


def _tile(matrix: jax.Array, columns: int, split: tuple[int, ...], order: tuple[int, ...]) -> jax.Array:
    """[N, K] to [N/128, K/columns, ...]: tiles of 64 x `columns`, each split and put in order."""
    high, wide = matrix.shape[0] // ROWS, matrix.shape[1] // columns
    # The first three parts of a split are rows, the others columns.
    parts = matrix.reshape(high, *split[:3], wide, *split[3:]).transpose(
        0, 4, 1, 2, 3, *range(5, len(split) + 2)
    )
    return parts.transpose(0, 1, *(2 + axis for axis in order))


def _words(codes: jax.Array) -> jax.Array:
    """Eight codes, in order, to the four bytes of their word."""
    magnitude, sign = pack_nibbles(codes & 7), codes >> 3  # byte b: values 2b and 2b + 1
    return magnitude | (sign[:, :4] << 7) | (sign[:, 4:] << 3)


def from_tiles(tiles: ExpertTiles) -> QuantArray:
    """The weight in the checkpoint's order again; groups of zeros have got their row's scale."""
    return jax.lax.map(_one_from_tiles, tiles)


def _one_from_tiles(tiles: ExpertTiles) -> QuantArray:
    outer = tiles.tiles.shape[:2]
    bytes_ = tiles.tiles[..., :CODES_BYTES].reshape(-1, 4)
    magnitude = unpack_nibbles(bytes_ & 0x77)
    sign = jnp.concatenate([bytes_ >> 7, (bytes_ >> 3) & 1], axis=-1)
    codes = _untile(magnitude | (sign << 3), outer, COLUMNS, _SPLIT, _STORED)
    multiplier = _untile(tiles.tiles[..., CODES_BYTES:], outer, COLUMNS // 32, _SCALE_SPLIT, _SCALE_STORED)
    exponent = (multiplier + tiles.row_exponent[:, None] - HIGHEST_MULTIPLIER).astype(jnp.uint8)
    return QuantArray(pack_nibbles(codes), exponent, "fp4_group32")


def _untile(
    stored: jax.Array, outer: tuple[int, ...], columns: int, split: tuple[int, ...], order: tuple[int, ...]
) -> jax.Array:
    """The inverse of `_tile`."""
    parts = stored.reshape(*outer, *(split[axis] for axis in order))
    inverse = sorted(range(len(order)), key=order.__getitem__)
    parts = parts.transpose(0, 1, *(2 + axis for axis in inverse))
    parts = parts.transpose(0, 2, 3, 4, 1, *range(5, len(split) + 2))
    return parts.reshape(outer[0] * ROWS, outer[1] * columns)
