"""Rows of a cache, [batch, slots, width], as they are kept: plain, or in the formats of the released model.

    form         what is kept                                    a row of V4 takes    used for
    an array     its numbers                                     1024 or 256 bytes    unquantised caches
    QuantKV      fp8_block64 but for the rotated columns         584 bytes            keys and values
    QuantArray   fp4_group32                                     68 bytes             keys of the index

Numbers that have gone through the format once (`fake_quantize`) are kept exactly. Bytes that are all zero, as
in a slot that nobody has written, stand for zeros.
"""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.formats import FORMATS, QuantArray, dequantize, quantize, storage_shapes

KV_FORMAT, INDEX_FORMAT = "fp8_block64", "fp4_group32"
_SCALES_PER_WORD = 8  # so that the scales of a row are whole words; those beyond the last block are 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantKV:
    """Keys, which are also values: in FP8, but for the last columns, to which rotary embedding was applied.

    Attributes:
      nope: [..., width - rotated], float8_e4m3fn.
      scale: [..., 8 n], uint8: an E8M0 exponent for each 64 columns of `nope`, then zeros.
      rope: [..., rotated], as they are.
    """

    nope: jax.Array
    scale: jax.Array
    rope: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the numbers it stands for."""
        return (*self.nope.shape[:-1], self.nope.shape[-1] + self.rope.shape[-1])

    @property
    def ndim(self) -> int:
        return self.nope.ndim

    @property
    def size(self) -> int:
        """How many numbers it stands for."""
        return self.nope.size + self.rope.size

    @property
    def dtype(self) -> jnp.dtype:
        """Of its numbers, which it holds exactly."""
        return self.rope.dtype


KeyValues = jax.Array | QuantKV
IndexKeys = jax.Array | QuantArray
CachedRows = KeyValues | IndexKeys


def empty_kv(batch: int, slots: int, width: int, format: str | None, rotated: int, dtype) -> KeyValues:
    """Zeros: a QuantKV whose last `rotated` columns are plain, or with `format` None an array.

    Raises:
      ValueError: keys and values are not kept in such a format.
    """
    if format is None:
        return jnp.zeros((batch, slots, width), dtype)
    if format != KV_FORMAT:
        raise ValueError(f"keys and values are kept in {KV_FORMAT}, not in {format}")
    nope, blocks = width - rotated, -(-(width - rotated) // FORMATS[format].block[1])
    return QuantKV(
        jnp.zeros((batch, slots, nope), jnp.float8_e4m3fn),
        jnp.zeros((batch, slots, -(-blocks // _SCALES_PER_WORD) * _SCALES_PER_WORD), jnp.uint8),
        jnp.zeros((batch, slots, rotated), dtype),
    )


def empty_index_keys(batch: int, slots: int, width: int, format: str | None, dtype) -> IndexKeys:
    """Zeros: a QuantArray, or with `format` None an array.

    Raises:
      ValueError: keys of the index are not kept in such a format.
    """
    if format is None:
        return jnp.zeros((batch, slots, width), dtype)
    if format != INDEX_FORMAT:
        raise ValueError(f"keys of the index are kept in {INDEX_FORMAT}, not in {format}")
    values, scale = (jnp.zeros(shape, jnp.uint8) for shape in storage_shapes((batch, slots, width), format))
    return QuantArray(values, scale, format)


def encode_rows[Rows: CachedRows](rows: Float[Array, "... D"], like: Rows) -> Rows:
    """`rows` in the form of `like`."""
    return cast(Rows, _encoded(rows, like))


def _encoded(rows: jax.Array, like: CachedRows) -> CachedRows:
    if isinstance(like, QuantArray):
        return quantize(rows, like.format)
    if not isinstance(like, QuantKV):
        return rows.astype(like.dtype)
    nope, rope = jnp.split(rows, [like.nope.shape[-1]], axis=-1)
    encoded = quantize(nope, KV_FORMAT)
    padding = [(0, 0)] * (rows.ndim - 1) + [(0, like.scale.shape[-1] - encoded.scale.shape[-1])]
    return QuantKV(encoded.values, jnp.pad(encoded.scale, padding), rope.astype(like.dtype))


def decode_rows(rows: CachedRows, dtype=None) -> Float[Array, "... D"]:
    """The numbers that `rows` stand for; by default in the dtype of the model, float32 for a QuantArray."""
    if isinstance(rows, QuantArray):
        return dequantize(rows, dtype or jnp.float32)
    dtype = dtype or rows.dtype
    if not isinstance(rows, QuantKV):
        return rows.astype(dtype)
    blocks = -(-rows.nope.shape[-1] // FORMATS[KV_FORMAT].block[1])
    nope = dequantize(QuantArray(rows.nope, rows.scale[..., :blocks], KV_FORMAT), dtype)
    return jnp.concatenate([nope, rows.rope.astype(dtype)], axis=-1)


def read_rows(rows: CachedRows, index: Int32[Array, "B K"], dtype=None) -> Float[Array, "B K D"]:
    """The numbers of those rows of each sequence that `index` names; never reads outside."""
    index = jnp.clip(index, 0, rows.shape[1] - 1)

    def taken(leaf: jax.Array) -> jax.Array:
        return jnp.take_along_axis(leaf, index[..., None], axis=1)

    return decode_rows(jax.tree.map(taken, rows), dtype)


def write_rows[Rows: CachedRows](
    into: Rows, rows: Float[Array, "B N D"], slot: Int32[Array, "B N"], keep: Bool[Array, "B N"]
) -> Rows:
    """Row (b, n) to slot (b, n) where it is to be kept; a slot past the end is dropped."""
    slot = jnp.where(keep, slot, into.shape[1])
    batch = jnp.arange(into.shape[0])[:, None]

    def written(leaf: jax.Array, new: jax.Array) -> jax.Array:
        return leaf.at[batch, slot].set(new, mode="drop")

    return jax.tree.map(written, into, encode_rows(rows, into))
