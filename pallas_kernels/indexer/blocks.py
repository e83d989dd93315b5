"""The best entries of every query, by blocks of queries: scores of a block, then the best of each."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.formats import QuantArray
from pallas_kernels.indexer.queries import TiledQueries
from pallas_kernels.indexer.top_k import index_top_k

SCORE_BYTES = 2**28  # of scores that are held at once, if one query of each sequence has no more
_ALIGNED = 128  # columns: a row of scores begins on a boundary that whole vectors are read from


def index_select(
    index_scores: Callable[..., jax.Array],
    q: jax.Array | TiledQueries,
    keys: jax.Array | QuantArray,
    weights: jax.Array,
    visible: jax.Array,
    top_k: int,
    score_bytes: int = SCORE_BYTES,
) -> jax.Array:
    """With the scores of a kernel, never more than `score_bytes` of them at a time."""
    (batch, tokens), entries = visible.shape, keys.shape[1]
    stride = -(-entries // _ALIGNED) * _ALIGNED
    blocks = -(-tokens // max(1, score_bytes // (4 * batch * stride)))
    rows = -(-tokens // blocks)

    def one_block(start: jax.Array) -> jax.Array:
        scores = index_scores(q, keys, weights, visible, first=start[None], rows=rows, stride=stride)
        seen = jax.lax.dynamic_slice_in_dim(visible, start, rows, 1)
        return index_top_k(scores, seen, top_k, columns=entries)

    if blocks == 1:
        return one_block(jnp.zeros((), jnp.int32))
    # The last block begins early enough to be whole; what it does again is dropped.
    starts = jnp.minimum(jnp.arange(blocks, dtype=jnp.int32) * rows, tokens - rows)
    chosen_NBTK = jax.lax.map(one_block, starts)
    again = blocks * rows - tokens
    whole = jnp.moveaxis(chosen_NBTK[:-1], 0, 1).reshape(batch, (blocks - 1) * rows, -1)
    return jnp.concatenate([whole, chosen_NBTK[-1][:, again:]], axis=1)
