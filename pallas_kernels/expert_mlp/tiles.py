"""FP4 expert weights laid out for the tensor cores: bytes in the order in which threads need them.

A weight [N, K] becomes tiles of 128 x 128 values, each one contiguous block. Inside a tile, a thread's
sixteen bytes are its share of the matrix instruction's operand, so that they go from memory to registers to
the tensor core without a detour. Read in the checkpoint's order instead, the same kernel takes 2.5 times as
long.

    codes        [E, N/128, K/128, 8192] uint8   [n16 8][k64 2][t 8][q 4][g 2][h 2][4 bytes]
    multipliers  [E, N/128, K/128, 512]  uint8   [n16 8][k64 2][t 8][g 2][h 2]
    row_exponent [E, N]                  uint8   E8M0

Four bytes are one little-endian word of eight values: row n16*16 + h*8 + t, columns
k64*64 + g*32 + j*16 + q*4 + b for value i = 4*j + b. Its magnitude has bits 4*i to 4*i + 2 of the word; its
sign bit 8*b + 7 for j = 0 and 8*b + 3 for j = 1. A group of 32 columns keeps its scale as a multiplier m: the
scale is 2^(m - 11) times that of the row, the largest of its groups. E2M1 times 2^(m - 5) is exact in E4M3,
for m from 0 to 11; a row whose scales spread further has no such form.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from pallas_kernels.formats import QuantArray, pack_nibbles, unpack_nibbles

TILE = 128
HIGHEST_MULTIPLIER = 11

_SPLIT = (8, 2, 8, 2, 2, 2, 4, 4)  # n16 h t k64 g j q b of one 128 x 128 tile, as in a [N, K] matrix
_STORED = (0, 3, 2, 6, 4, 1, 5, 7)  # to n16 k64 t q g h j b
_SCALE_SPLIT = (8, 2, 8, 2, 2)  # n16 h t k64 g
_SCALE_STORED = (0, 3, 2, 4, 1)  # to n16 k64 t g h


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertTiles:
    """A stack of FP4 weights in the layout above."""

    codes: jax.Array
    multipliers: jax.Array
    row_exponent: jax.Array

    @property
    def shape(self) -> tuple[int, int, int]:
        """[E, N, K] of the numbers it stands for."""
        experts, rows, columns = self.codes.shape[:3]
        return experts, rows * TILE, columns * TILE

    @property
    def ndim(self) -> int:
        return 3


def tileable(weight: QuantArray) -> Bool[Array, ""]:
    """Whether every row's scales lie close enough together; shapes are `to_tiles`' to check."""
    exponent = _group_exponents(weight).astype(jnp.int32)
    return (exponent.max(-1) - exponent.min(-1) <= HIGHEST_MULTIPLIER).all()


@jax.jit
def to_tiles(weight: QuantArray) -> ExpertTiles:
    """The weight in tiles, exactly, if it is `tileable`.

    Raises:
      NotImplementedError: rows or columns are not a multiple of 128, or it is not FP4 with E8M0 scales.
    """
    if weight.format != "fp4_group32" or weight.scale.dtype != jnp.uint8:
        raise NotImplementedError(f"tiles hold fp4_group32 with E8M0 scales, not {weight.format}")
    if weight.shape[-2] % TILE or weight.shape[-1] % TILE:
        raise NotImplementedError(f"tiles need multiples of {TILE} rows and columns, got {weight.shape}")
    return jax.lax.map(_one_to_tiles, weight)


def _group_exponents(weight: QuantArray) -> jax.Array:
    """Scale exponents, where a group that is all zeros takes the row's largest: any scale serves it."""
    groups = weight.values.reshape(*weight.scale.shape, 16)
    empty = ((groups & 0x77) == 0).all(-1)
    return jnp.where(empty, weight.scale.max(-1, keepdims=True), weight.scale)


def _one_to_tiles(weight: QuantArray) -> ExpertTiles:
    rows, columns = weight.shape
    outer = (rows // TILE, columns // TILE)
    exponent = _group_exponents(weight)
    row_exponent = exponent.max(-1)
    multiplier = (exponent + (HIGHEST_MULTIPLIER - row_exponent)[:, None]).astype(jnp.uint8)
    codes = _tile(unpack_nibbles(weight.values), TILE, _SPLIT, _STORED).reshape(-1, 8)
    return ExpertTiles(
        _words(codes).reshape(*outer, -1),
        _tile(multiplier, TILE // 32, _SCALE_SPLIT, _SCALE_STORED).reshape(*outer, -1),
        row_exponent,
    )


def _tile(matrix: jax.Array, columns: int, split: tuple[int, ...], order: tuple[int, ...]) -> jax.Array:
    """[N, K] to [N/128, K/columns, ...]: tiles of 128 x `columns`, each split and put in order."""
    high, wide = matrix.shape[0] // TILE, matrix.shape[1] // columns
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
    bytes_ = tiles.codes.reshape(-1, 4)
    magnitude = unpack_nibbles(bytes_ & 0x77)
    sign = jnp.concatenate([bytes_ >> 7, (bytes_ >> 3) & 1], axis=-1)
    codes = _untile(magnitude | (sign << 3), tiles.codes.shape[:2], TILE, _SPLIT, _STORED)
    multiplier = _untile(tiles.multipliers, tiles.codes.shape[:2], TILE // 32, _SCALE_SPLIT, _SCALE_STORED)
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
    return parts.reshape(outer[0] * TILE, outer[1] * columns)
