"""The definitions of what stands around attention, and the steps they are made of."""

import jax
import jax.numpy as jnp

from pallas_kernels.compressor.reference import compress
from pallas_kernels.formats import fake_quantize
from pallas_kernels.indexer.reference import hadamard

# --- steps


def rms_normalize(x: jax.Array, eps: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)).astype(x.dtype)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
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


def query(q: jax.Array, cos: jax.Array, sin: jax.Array, eps: float) -> jax.Array:
    return rotate(rms_normalize(q, eps), cos[:, :, None], sin[:, :, None])


def unrotate(out: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    return rotate(out, cos[:, :, None], -sin[:, :, None])


def key_value(
    kv: jax.Array, weight: jax.Array, cos: jax.Array, sin: jax.Array, eps: float, format: str | None
) -> jax.Array:
    return quantize_plain(rotate(rms_norm(kv, weight, eps), cos, sin), cos.shape[-1], format)


def index_query(q: jax.Array, cos: jax.Array, sin: jax.Array, format: str | None) -> jax.Array:
    return index_vector(q, cos[:, :, None], sin[:, :, None], format)


def compressed_entries(
    kv: jax.Array,
    score: jax.Array,
    kv_ring: jax.Array,
    score_ring: jax.Array,
    position: jax.Array,
    length: jax.Array,
    weight: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    ratio: int,
    eps: float,
    for_index: bool,
    format: str | None,
    dtype,
) -> jax.Array:
    head_dim, channels = weight.shape[0], kv.shape[-1]
    # The oldest token that the first entry can need lies this far back.
    reach = ratio * (channels // head_dim) - 1
    past_BR = position[:, None] - reach + jnp.arange(reach)
    kv_before, score_before = _rows(kv_ring, past_BR), _rows(score_ring, past_BR)
    score_before = jnp.where((past_BR < 0)[..., None], -jnp.inf, score_before)
    kv_rows = jnp.concatenate([kv_before, kv], axis=1)
    score_rows = jnp.concatenate([score_before, score], axis=1)

    entry_BN = (position // ratio)[:, None] + jnp.arange(cos.shape[1])
    first_row_BN = entry_BN * ratio - position[:, None] + reach
    pooled = compress(kv_rows, score_rows, first_row_BN, ratio, head_dim).astype(dtype)
    normed = rms_norm(pooled, weight, eps)
    if for_index:
        entries = index_vector(normed, cos, sin, format)
    else:
        entries = quantize_plain(rotate(normed, cos, sin), cos.shape[-1], format)
    complete_BN = (entry_BN + 1) * ratio <= (position + length)[:, None]
    return jnp.where(complete_BN[..., None], entries, 0)


def _rows(ring: jax.Array, position_BR: jax.Array) -> jax.Array:
    return jnp.take_along_axis(ring, (position_BR % ring.shape[1])[..., None], axis=1)
