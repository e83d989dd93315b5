"""The definitions of what stands around attention, and the steps they are made of."""

import jax
import jax.numpy as jnp

from pallas_kernels.cached_rows import CachedRows, write_rows
from pallas_kernels.compressor.reference import compress
from pallas_kernels.formats import QuantArray, fake_quantize, quantize
from pallas_kernels.indexer.queries import TiledQueries, tile_queries
from pallas_kernels.indexer.reference import hadamard

# --- steps


def rms_normalize(x: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) over the last axis, in float32, without a weight."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)).astype(x.dtype)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """`rms_normalize` times a weight, one rounding at the end."""
    normalized = rms_normalize(x.astype(jnp.float32), eps)
    return (normalized * weight.astype(jnp.float32)).astype(x.dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the last 2 * pairs columns; `cos` and `sin` broadcast against the axes before."""
    plain, turned = jnp.split(x, [x.shape[-1] - 2 * cos.shape[-1]], axis=-1)
    even, odd = (turned[..., part::2].astype(jnp.float32) for part in (0, 1))
    pairs = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return jnp.concatenate([plain, pairs.reshape(turned.shape).astype(x.dtype)], axis=-1)


def quantize_plain(x: jax.Array, pairs: int, format: str | None) -> jax.Array:
    """The columns that are not rotated, through `format`."""
    if format is None:
        return x
    plain, turned = jnp.split(x, [x.shape[-1] - 2 * pairs], axis=-1)
    return jnp.concatenate([fake_quantize(plain, format), turned], axis=-1)


def index_vector(x: jax.Array, cos: jax.Array, sin: jax.Array, format: str | None) -> jax.Array:
    x = hadamard(rotate(x, cos, sin))
    return x if format is None else fake_quantize(x, format)


# --- ops


def latents(
    x: jax.Array,
    q_weight: jax.Array,
    kv_weight: jax.Array,
    window: CachedRows,
    position: jax.Array,
    length: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    eps: float,
    format: str | None,
    activation: str | None,
) -> tuple[jax.Array | QuantArray, jax.Array, CachedRows]:
    q, kv = jnp.split(x, [q_weight.size], axis=-1)
    q = rms_norm(q, q_weight, eps)
    kv = quantize_plain(rotate(rms_norm(kv, kv_weight, eps), cos, sin), cos.shape[-1], format)
    window = written(window, kv, position, length)
    return q if activation is None else quantize(q, activation), kv, window


def query(q: jax.Array, cos: jax.Array, sin: jax.Array, eps: float) -> jax.Array:
    return rotate(rms_normalize(q, eps), cos[:, :, None], sin[:, :, None])


def unrotate(out: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    return rotate(out, cos[:, :, None], -sin[:, :, None])


def index_query(
    q: jax.Array, projected: jax.Array, column: int, cos: jax.Array, sin: jax.Array, format: str | None
) -> tuple[jax.Array | TiledQueries, jax.Array]:
    *_, heads, head_dim = q.shape
    weights = projected[..., column : column + heads].astype(q.dtype) * (heads * head_dim) ** -0.5
    weights, q = weights.astype(jnp.float32), index_vector(q, cos[:, :, None], sin[:, :, None], format)
    return (q, weights) if format is None else tile_queries(q, weights)


def compressed_entries(
    projected: jax.Array,
    column: int,
    ape: jax.Array,
    entries: CachedRows,
    kv_ring: jax.Array,
    score_ring: jax.Array,
    position: jax.Array,
    length: jax.Array,
    weight: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    eps: float,
    for_index: bool,
    format: str | None,
    dtype,
) -> tuple[CachedRows, jax.Array, jax.Array]:
    (ratio, channels), head_dim = ape.shape, weight.shape[0]
    kv, score = raw_rows(projected, column, ape, position)

    # The oldest token that the first entry can need lies this far back.
    reach = ratio * (channels // head_dim) - 1
    past_BR = position[:, None] - reach + jnp.arange(reach)
    kv_before, score_before = _rows(kv_ring, past_BR), _rows(score_ring, past_BR)
    score_before = jnp.where((past_BR < 0)[..., None], -jnp.inf, score_before)
    kv_rows = jnp.concatenate([kv_before, kv], axis=1)
    score_rows = jnp.concatenate([score_before, score], axis=1)

    # T tokens close at most ceil(T / ratio) windows, the first of them the one `position` lies in.
    entry_BN = (position // ratio)[:, None] + jnp.arange(cos.shape[1])
    first_row_BN = entry_BN * ratio - position[:, None] + reach
    pooled = compress(kv_rows, score_rows, first_row_BN, ratio, head_dim).astype(dtype)
    normed = rms_norm(pooled, weight, eps)
    if for_index:
        made = index_vector(normed, cos, sin, format)
    else:
        made = quantize_plain(rotate(normed, cos, sin), cos.shape[-1], format)
    complete_BN = (entry_BN + 1) * ratio <= (position + length)[:, None]
    entries = write_rows(entries, made, entry_BN, complete_BN)
    return entries, written(kv_ring, kv, position, length), written(score_ring, score, position, length)


def raw_rows(
    projected: jax.Array, column: int, ape: jax.Array, position: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Values and scores of the new tokens, as the rings keep them."""
    ratio, channels = ape.shape
    kv, score = jnp.split(projected[..., column : column + 2 * channels], 2, axis=-1)
    return kv, score + ape[(position[:, None] + jnp.arange(score.shape[1])) % ratio]


def _rows(ring: jax.Array, position_BR: jax.Array) -> jax.Array:
    return jnp.take_along_axis(ring, (position_BR % ring.shape[1])[..., None], axis=1)


def written[Rows: CachedRows](ring: Rows, rows: jax.Array, position: jax.Array, length: jax.Array) -> Rows:
    """The ring with the first `length` of `rows` in it, which belong to `position` and after."""
    slots, token, end = ring.shape[1], jnp.arange(rows.shape[1]), length[:, None]
    keep = (token < end) & (token >= end - slots)  # of rows that share a slot the last one stays
    return write_rows(ring, rows, (position[:, None] + token) % slots, keep)
