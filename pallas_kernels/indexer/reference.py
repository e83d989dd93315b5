"""The definition of the lightning indexer."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats import QuantArray, dequantize
from pallas_kernels.indexer.queries import TiledQueries, untile_queries

# Scores of all queries at once would not fit for long prompts.
QUERIES_AT_ONCE = 64


def hadamard(x: jax.Array) -> jax.Array:
    size = x.shape[-1]
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    rotated = jnp.einsum("...i,ij->...j", x.astype(jnp.float32), matrix, precision="highest")
    return (rotated * size**-0.5).astype(x.dtype)


def index_scores(q: jax.Array | TiledQueries, keys: jax.Array | QuantArray, weights: jax.Array) -> jax.Array:
    q_BTIJ = untile_queries(q) if isinstance(q, TiledQueries) else q.astype(jnp.float32)
    keys_BSJ = dequantize(keys) if isinstance(keys, QuantArray) else keys.astype(jnp.float32)
    hits_BTIS = jax.nn.relu(jnp.einsum("btij,bsj->btis", q_BTIJ, keys_BSJ, precision="highest"))
    return jnp.einsum("bti,btis->bts", weights.astype(jnp.float32), hits_BTIS, precision="highest")


def index_top_k(scores: jax.Array, visible: jax.Array, top_k: int) -> jax.Array:
    hidden_BTS = jnp.arange(scores.shape[-1]) >= visible[..., None]
    best, chosen = jax.lax.top_k(jnp.where(hidden_BTS, -jnp.inf, scores), min(top_k, scores.shape[-1]))
    entries = scores.shape[-1]
    in_order = jnp.sort(jnp.where(best == -jnp.inf, entries, chosen), axis=-1)
    return jnp.where(in_order == entries, -1, in_order).astype(jnp.int32)


def index_select(
    q: jax.Array | TiledQueries,
    keys: jax.Array | QuantArray,
    weights: jax.Array,
    visible: jax.Array,
    top_k: int,
) -> jax.Array:
    def one_query(query):
        q_BIJ, weights_BI, visible_B = query
        scores = index_scores(jax.tree.map(lambda leaf: leaf[:, None], q_BIJ), keys, weights_BI[:, None])
        return index_top_k(scores, visible_B[:, None], top_k)[:, 0]

    by_token = jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), (q, weights, visible))
    chosen_TBK = jax.lax.map(one_query, by_token, batch_size=QUERIES_AT_ONCE)
    return jnp.moveaxis(chosen_TBK, 0, 1)
