"""The definition of manifold-constrained hyper-connections."""

import jax
import jax.numpy as jnp


def _mix(streams: jax.Array, fn: jax.Array, norm_eps: float) -> tuple[jax.Array, jax.Array]:
    """The streams in float32, and their projection by `fn` divided by their root mean square."""
    streams_TXM = streams.astype(jnp.float32)
    flat = jax.lax.collapse(streams_TXM, streams.ndim - 2)  # stream-major
    rms = jax.lax.rsqrt(jnp.mean(flat * flat, -1, keepdims=True) + norm_eps)
    return streams_TXM, jnp.einsum("...k,nk->...n", flat, fn, precision="highest") * rms


def _collapse(
    pre: jax.Array, streams_TXM: jax.Array, dtype, norm_weight: jax.Array | None, norm_eps: float
) -> jax.Array:
    x = jnp.einsum("...x,...xm->...m", pre, streams_TXM, precision="highest").astype(dtype)
    if norm_weight is None:
        return x
    wide = x.astype(jnp.float32)
    normalized = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + norm_eps)
    return (normalized * norm_weight.astype(jnp.float32)).astype(dtype)


def sinkhorn(logits: jax.Array, iterations: int, eps: float) -> jax.Array:
    """Nearly doubly stochastic matrices from logits; the last step normalises columns."""

    def columns(comb):
        return comb / (comb.sum(-2, keepdims=True) + eps)

    def rows_then_columns(_, comb):
        return columns(comb / (comb.sum(-1, keepdims=True) + eps))

    comb = columns(jax.nn.softmax(logits, axis=-1) + eps)
    return jax.lax.fori_loop(0, iterations - 1, rows_then_columns, comb)


def hc_pre(
    streams: jax.Array,
    fn: jax.Array,
    scale: jax.Array,
    base: jax.Array,
    sinkhorn_iters: int,
    eps: float,
    norm_eps: float,
    norm_weight: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    n = streams.shape[-2]
    streams_TXM, mixed = _mix(streams, fn, norm_eps)
    pre = jax.nn.sigmoid(mixed[..., :n] * scale[0] + base[:n]) + eps
    post = 2 * jax.nn.sigmoid(mixed[..., n : 2 * n] * scale[1] + base[n : 2 * n])
    logits = (mixed[..., 2 * n :] * scale[2] + base[2 * n :]).reshape(*mixed.shape[:-1], n, n)
    x = _collapse(pre, streams_TXM, streams.dtype, norm_weight, norm_eps)
    return x, post, sinkhorn(logits, sinkhorn_iters, eps)


def hc_post(y: jax.Array, streams: jax.Array, post: jax.Array, comb: jax.Array) -> jax.Array:
    written = post[..., None] * y.astype(jnp.float32)[..., None, :]
    # The sum runs over the first index of comb: comb.T @ streams.
    kept = jnp.einsum("...ij,...im->...jm", comb, streams.astype(jnp.float32), precision="highest")
    return (written + kept).astype(streams.dtype)


def hc_post_pre(
    y: jax.Array,
    streams: jax.Array,
    post: jax.Array,
    comb: jax.Array,
    fn: jax.Array,
    scale: jax.Array,
    base: jax.Array,
    sinkhorn_iters: int,
    eps: float,
    norm_eps: float,
    norm_weight: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    streams = hc_post(y, streams, post, comb)
    return streams, *hc_pre(streams, fn, scale, base, sinkhorn_iters, eps, norm_eps, norm_weight)


def hc_head(
    streams: jax.Array,
    fn: jax.Array,
    scale: jax.Array,
    base: jax.Array,
    eps: float,
    norm_eps: float,
    norm_weight: jax.Array | None,
) -> jax.Array:
    streams_TXM, mixed = _mix(streams, fn, norm_eps)
    pre = jax.nn.sigmoid(mixed * scale + base) + eps
    return _collapse(pre, streams_TXM, streams.dtype, norm_weight, norm_eps)
