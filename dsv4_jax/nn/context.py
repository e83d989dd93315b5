"""Compressed entries of one text in parts on several devices: each searches its own, lends what is chosen.

What devices tell each other grows with the entries that a query chooses, not with the length of the text.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from dsv4_jax import parallel
from dsv4_jax.cache import CHOSEN
from pallas_kernels import CachedRows, KeyValues, QuantArray, TiledQueries, index_scores, index_select

_QUERIES_AT_ONCE = 64  # scores of all queries at once would not fit for long prompts

Compress = Callable[[CachedRows, Int32[Array, " B"]], tuple[CachedRows, Array, Array]]


def write(
    compress: Compress,
    entries: CachedRows,
    position: Int32[Array, " B"],
    length: Int32[Array, " B"],
    *,
    ratio: int,
    count: int,
    period: int,
) -> tuple[CachedRows, Array, Array]:
    """What `compress` makes, where this device has a part of the entries only.

    It writes into a few slots, for a text that is shorter by whole periods; what it wrote goes from there to
    those slots that are here.

    Args:
      compress: (entries, position) to entries and two rings, as `compressed_entries`.
      count: how many entries it may complete.
      period: of what depends on the position, but for where an entry goes; longer than an entry reaches back.
    """
    early = jnp.where(position < period, position, position % period + period)
    few = 2 * period // ratio + count
    scratch = jax.tree.map(lambda leaf: jnp.zeros((leaf.shape[0], few, *leaf.shape[2:]), leaf.dtype), entries)
    made, kv, score = compress(scratch, early)

    entry = (position // ratio)[:, None] + jnp.arange(count)
    complete = (entry + 1) * ratio <= (position + length)[:, None]
    slots = entries.shape[1]
    slot = entry - parallel.part(CHOSEN) * slots
    slot = jnp.where(complete & (slot >= 0), slot, slots)
    from_slot = (early // ratio)[:, None] + jnp.arange(count)
    batch = jnp.arange(entry.shape[0])[:, None]
    entries = jax.tree.map(
        lambda leaf, new: leaf.at[batch, slot].set(new[batch, from_slot], mode="drop"), entries, made
    )
    return entries, kv, score


def select(
    q: Float[Array, "B T I J"] | TiledQueries,
    keys: Float[Array, "B S J"] | QuantArray,
    weights: Float32[Array, "B T I"],
    visible: Int32[Array, "B T"],
    top_k: int,
) -> Int32[Array, "B T K"]:
    """`index_select` among the keys of all devices; entries are numbered through, part by part."""
    if parallel.parts(CHOSEN) == 1:
        return index_select(q, keys, weights, visible, top_k)
    slots = keys.shape[1]
    first, most = parallel.part(CHOSEN) * slots, slots * parallel.parts(CHOSEN)
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
    best, found = (parallel.gathered(each, CHOSEN, dimension=2) for each in (best, found))
    best, place = jax.lax.top_k(best, min(top_k, most))
    chosen = jnp.where(best == -jnp.inf, most, jnp.take_along_axis(found, place, axis=2))
    chosen = jnp.sort(chosen, axis=-1)
    return jnp.where(chosen == most, -1, chosen).astype(jnp.int32)


def borrow(entries: KeyValues, chosen: Int32[Array, "B T K"]) -> tuple[KeyValues, Int32[Array, "B T K"]]:
    """Rows among which are all that were chosen, wherever they lie, and where they are among those.

    Args:
      entries: [B, S, D], this device's.
      chosen: by their numbers in the whole text; -1 for none.
    """
    if parallel.parts(CHOSEN) == 1:
        return entries, chosen
    batch, tokens, count = chosen.shape
    slots = entries.shape[1]
    if tokens * count >= slots * parallel.parts(CHOSEN):  # a long piece of a prompt: all of them are fewer
        return jax.tree.map(_gathered, entries), chosen
    flat = chosen.reshape(batch, -1)
    here = flat - parallel.part(CHOSEN) * slots
    mine = (here >= 0) & (here < slots) & (flat >= 0)
    here = jnp.clip(here, 0, slots - 1)

    def lent(leaf: jax.Array) -> jax.Array:
        bits = _bits(leaf)
        rows = jnp.take_along_axis(bits, here[..., None], axis=1)
        # One device has each: an exact sum.
        rows = parallel.total(jnp.where(mine[..., None], rows, jnp.zeros_like(rows)), CHOSEN)
        return jax.lax.bitcast_convert_type(rows, leaf.dtype)

    place = jnp.arange(tokens * count, dtype=jnp.int32).reshape(tokens, count)
    return jax.tree.map(lent, entries), jnp.where(chosen >= 0, place, -1)


def _gathered(leaf: jax.Array) -> jax.Array:
    whole = parallel.gathered(_bits(leaf), CHOSEN, dimension=1)
    return jax.lax.bitcast_convert_type(whole, leaf.dtype)


def _bits(leaf: jax.Array) -> jax.Array:
    """FP8 as bytes, which every machine can send and add."""
    return jax.lax.bitcast_convert_type(leaf, jnp.uint8) if leaf.dtype.itemsize == 1 else leaf
