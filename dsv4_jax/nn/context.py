"""Compressed entries of one text in parts on several devices: each searches its own, and lends what is chosen.

What devices tell each other grows with the entries that a query chooses, not with the length of the text.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from dsv4_jax import parallel
from pallas_kernels import QuantArray, index_scores, index_select

AXIS = "cache_slots"
_QUERIES_AT_ONCE = 64  # scores of all queries at once would not fit for long prompts


def select(
    q: Float[Array, "B T I J"] | QuantArray,
    keys: Float[Array, "B S J"] | QuantArray,
    weights: Float32[Array, "B T I"],
    visible: Int32[Array, "B T"],
    top_k: int,
) -> Int32[Array, "B T K"]:
    """`index_select` among the keys of all devices: entries are numbered through, in the order of the parts."""
    if parallel.parts(AXIS) == 1:
        return index_select(q, keys, weights, visible, top_k)
    slots = keys.shape[1]
    first = parallel.part(AXIS) * slots
    here = jnp.clip(visible - first, 0, slots)

    def one_query(query):
        q, weights, here = (jax.tree.map(lambda each: each[:, None], part) for part in query)
        hidden = jnp.arange(slots) >= here[..., None]
        scores = jnp.where(hidden, -jnp.inf, index_scores(q, keys, weights))
        return tuple(each[:, 0] for each in jax.lax.top_k(scores, min(top_k, slots)))

    by_token = jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), (q, weights, here))
    best, found = jax.lax.map(one_query, by_token, batch_size=_QUERIES_AT_ONCE)
    best, found = (jnp.moveaxis(each, 0, 1) for each in (best, found + first))
    # Candidates come in the order of their numbers where scores are equal, so ties still go to the smaller.
    best, found = (parallel.gathered(each, AXIS, dimension=2) for each in (best, found))
    best, place = jax.lax.top_k(best, min(top_k, slots * parallel.parts(AXIS)))
    chosen = jnp.take_along_axis(found, place, axis=2)
    return jnp.where(best == -jnp.inf, -1, chosen).astype(jnp.int32)


def borrow(
    entries: Float[Array, "B S D"], chosen: Int32[Array, "B T K"]
) -> tuple[Float[Array, "B R D"], Int32[Array, "B T K"]]:
    """Rows among which are all that were chosen, wherever they lie, and where they are among those.

    Args:
      entries: this device's.
      chosen: by their numbers in the whole text; -1 for none.
    """
    if parallel.parts(AXIS) == 1:
        return entries, chosen
    batch, tokens, count = chosen.shape
    slots = entries.shape[1]
    if tokens * count >= slots * parallel.parts(AXIS):  # a long piece of a prompt: all of them are fewer
        return parallel.gathered(entries, AXIS, dimension=1), chosen
    here = chosen.reshape(batch, -1) - parallel.part(AXIS) * slots
    mine = (here >= 0) & (here < slots) & (chosen.reshape(batch, -1) >= 0)
    rows = jnp.take_along_axis(entries, jnp.clip(here, 0, slots - 1)[..., None], axis=1)
    rows = parallel.total(jnp.where(mine[..., None], rows, 0), AXIS)  # one device has each: an exact sum
    place = jnp.arange(tokens * count, dtype=jnp.int32).reshape(tokens, count)
    return rows, jnp.where(chosen >= 0, place, -1)
