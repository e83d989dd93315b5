"""What a layer remembers of a sequence.

Two kinds of memory: the most recent rows, in a ring, and compressed entries, which stay. Every slot follows
from the absolute position of its token, so there are no counters to keep and nothing to undo: a sequence
that is set back (a rejected draft, a retry) simply writes the same slots again. For that the rings hold
`max_draft` rows more than a step needs.
"""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from dsv4_jax.config import Config
from dsv4_jax.numerics import Numerics
from dsv4_jax.parallel import Along
from dsv4_jax.sharding import constrain, ways_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecentRows:
    """The last rows of each sequence, one per token; the row of position p is in slot p mod slots."""

    rows: Float[Array, "batch slots channels"]

    @classmethod
    def zeros(cls, batch: int, slots: int, channels: int, dtype) -> Self:
        return cls(_zeros(batch, slots, channels, dtype))

    def before(self, position: Int32[Array, " batch"], count: int) -> Float[Array, "batch count channels"]:
        """Rows of the `count` positions before `position`, oldest first; meaningless before the start."""
        slots = (position[:, None] - count + jnp.arange(count)) % self.rows.shape[1]
        return jnp.take_along_axis(self.rows, slots[..., None], axis=1)

    def write(
        self,
        rows: Float[Array, "batch tokens channels"],
        position: Int32[Array, " batch"],
        length: Int32[Array, " batch"],
    ) -> Self:
        """Stores the first `length` of `rows`, which belong to `position` and the positions after it."""
        slots = self.rows.shape[1]
        token, end = jnp.arange(rows.shape[1]), length[:, None]
        keep = (token < end) & (token >= end - slots)  # of rows that share a slot the last one stays
        return type(self)(_scatter(self.rows, rows, (position[:, None] + token) % slots, keep))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompressedCache:
    """Compressed entries of a layer, and the raw rows from which the entry under way is pooled.

    Entry i covers positions i * ratio to i * ratio + ratio - 1; it counts once its last token is there.
    """

    entries: Float[Array, "batch slots head_dim"]
    kv: RecentRows  # float32, before pooling
    score: RecentRows  # float32, with ape

    @classmethod
    def zeros(
        cls, batch: int, max_len: int, max_draft: int, ratio: int, overlap: bool, head_dim: int, dtype
    ) -> Self:
        channels, rows = (2 * head_dim, 2 * ratio) if overlap else (head_dim, ratio)
        kv, score = (RecentRows.zeros(batch, rows + max_draft, channels, jnp.float32) for _ in range(2))
        # Entries that an indexer chooses from may be split over devices, each of which has as many.
        axis, parts = ("cache_slots", ways_of("cache_slots")) if overlap else (None, 1)
        slots = -(-max_len // (ratio * parts)) * parts
        return cls(_zeros(batch, slots, head_dim, dtype, axis), kv, score)

    def write(
        self,
        entries: Float[Array, "batch count head_dim"],
        entry: Int32[Array, "batch count"],
        complete: Bool[Array, "batch count"],
    ) -> Self:
        """Stores those `entries` that are complete at their index `entry`, if there is a slot for it here."""
        return dataclasses.replace(self, entries=_scatter(self.entries, entries, entry, complete))

    def write_raw(
        self,
        kv: Float32[Array, "batch tokens channels"],
        score: Float32[Array, "batch tokens channels"],
        position: Int32[Array, " batch"],
        length: Int32[Array, " batch"],
    ) -> Self:
        """Stores the raw rows of new tokens, as `RecentRows.write`."""
        kv_rows, score_rows = self.kv.write(kv, position, length), self.score.write(score, position, length)
        return dataclasses.replace(self, kv=kv_rows, score=score_rows)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """All that one layer remembers: a window, and by kind of layer compressed entries and index keys."""

    window: RecentRows
    compressed: CompressedCache | None = None
    index: CompressedCache | None = None

    @classmethod
    def zeros(
        cls, config: Config, numerics: Numerics, ratio: int, *, batch: int, max_len: int, max_draft: int
    ) -> Self:
        """An empty cache for sequences of up to `max_len` tokens."""
        dtype = jnp.dtype(numerics.dtype)
        window = RecentRows.zeros(batch, config.sliding_window + max_draft, config.head_dim, dtype)
        if ratio == 0:
            return cls(window)
        overlap = ratio == 4
        shape = (batch, max_len, max_draft, ratio, overlap)
        compressed = CompressedCache.zeros(*shape, config.head_dim, dtype)
        index = CompressedCache.zeros(*shape, config.index_head_dim, dtype) if overlap else None
        return cls(window, compressed, index)

    @property
    def axes(self) -> Any:
        """How each array is split, in a tree like this one."""
        along = jax.tree.map(lambda _: Along("batch"), self)
        if self.index is None:
            return along
        chosen = Along("batch", "cache_slots")
        return dataclasses.replace(
            along,
            compressed=dataclasses.replace(along.compressed, entries=chosen),
            index=dataclasses.replace(along.index, entries=chosen),
        )


Cache = tuple[LayerCache, ...]


def make_cache(config: Config, numerics: Numerics, *, batch: int, max_len: int, max_draft: int = 0) -> Cache:
    """Empty caches of all layers of the main model.

    Args:
      max_len: tokens a sequence may have, prompt and answer.
      max_draft: how many drafted tokens a step may verify and reject.
    """
    return tuple(
        LayerCache.zeros(config, numerics, ratio, batch=batch, max_len=max_len, max_draft=max_draft)
        for ratio in config.main_ratios
    )


def _zeros(batch: int, slots: int, channels: int, dtype, axis: str | None = None) -> jax.Array:
    return constrain(jnp.zeros((batch, slots, channels), dtype), "batch", axis, None)


def _scatter(
    into: Float[Array, "batch slots channels"],
    rows: Float[Array, "batch count channels"],
    slot: Int32[Array, "batch count"],
    keep: Bool[Array, "batch count"],
) -> Float[Array, "batch slots channels"]:
    """Row (b, i) to slot (b, i) where it is to be kept; one for which there is no slot is dropped."""
    slot = jnp.where(keep & (slot >= 0), slot, into.shape[1])
    batch = jnp.arange(into.shape[0])[:, None]
    return into.at[batch, slot].set(rows.astype(into.dtype), mode="drop")
