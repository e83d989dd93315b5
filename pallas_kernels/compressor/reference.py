"""The definition of `compress`."""

import jax
import jax.numpy as jnp


def compress(kv: jax.Array, score: jax.Array, first_row: jax.Array, ratio: int, head_dim: int) -> jax.Array:
    own_BNL = first_row[..., None] + jnp.arange(ratio)
    if kv.shape[-1] == 2 * head_dim:  # overlap: the window before takes the first half of the channels
        values = [_rows(kv, own_BNL - ratio)[..., :head_dim], _rows(kv, own_BNL)[..., head_dim:]]
        scores = [_rows(score, own_BNL - ratio)[..., :head_dim], _rows(score, own_BNL)[..., head_dim:]]
        kv_BNLD, score_BNLD = jnp.concatenate(values, 2), jnp.concatenate(scores, 2)
    else:
        kv_BNLD, score_BNLD = _rows(kv, own_BNL), _rows(score, own_BNL)
    return (jax.nn.softmax(score_BNLD, axis=2) * kv_BNLD).sum(2)


def _rows(array_BRC: jax.Array, rows_BNL: jax.Array) -> jax.Array:
    batch = jnp.arange(array_BRC.shape[0])[:, None, None]
    return array_BRC[batch, jnp.clip(rows_BNL, 0, array_BRC.shape[1] - 1)]
