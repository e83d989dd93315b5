"""What a layer remembers of a sequence.

Two kinds of memory: the most recent rows, in a ring, and compressed entries, which stay. Every slot follows
from the absolute position of its token, so there are no counters to keep and nothing to undo: a sequence
that is set back (a rejected draft, a retry) simply writes the same slots again. For that the rings hold
`max_draft` rows more than a step needs. Keys, values and index keys are kept in the formats of the numerics.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from dsv4_jax.config import Config
from dsv4_jax.numerics import Numerics
from dsv4_jax.sharding import constrain
from pallas_kernels import (
    CachedRows,
    IndexKeys,
    KeyValues,
    empty_index_keys,
    empty_kv,
    read_rows,
    write_rows,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecentRows[Rows: KeyValues]:
    """The last rows of each sequence, one per token; the row of position p is in slot p mod slots."""

    rows: Rows  # [batch, slots, channels]

    def before(self, position: Int32[Array, " batch"], count: int) -> Float[Array, "batch count channels"]:
        """Numbers of the `count` positions before `position`, oldest first; meaningless before the start."""
        return read_rows(self.rows, (position[:, None] - count + jnp.arange(count)) % self.rows.shape[1])

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
        return type(self)(write_rows(self.rows, rows, (position[:, None] + token) % slots, keep))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompressedCache[Rows: CachedRows]:
    """Compressed entries of a layer, and the raw rows from which the entry under way is pooled.

    Entry i covers positions i * ratio to i * ratio + ratio - 1; it counts once its last token is there.
    """

    entries: Rows  # [batch, slots, head_dim]
    kv: RecentRows[jax.Array]  # float32, before pooling
    score: RecentRows[jax.Array]  # float32, with ape

    def write(
        self,
        entries: Float[Array, "batch count head_dim"],
        entry: Int32[Array, "batch count"],
        complete: Bool[Array, "batch count"],
    ) -> Self:
        """Stores those `entries` that are complete at their index `entry`."""
        return dataclasses.replace(self, entries=write_rows(self.entries, entries, entry, complete))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """All that one layer remembers: a window, and by kind of layer compressed entries and index keys."""

    window: RecentRows[KeyValues]
    compressed: CompressedCache[KeyValues] | None = None
    index: CompressedCache[IndexKeys] | None = None

    @classmethod
    def zeros(
        cls, config: Config, numerics: Numerics, ratio: int, *, batch: int, max_len: int, max_draft: int
    ) -> Self:
        """An empty cache for sequences of up to `max_len` tokens."""
        dtype = jnp.dtype(numerics.dtype)

        def kv_rows(slots: int) -> KeyValues:
            sizes = slots, config.head_dim, numerics.kv, config.qk_rope_head_dim
            return _placed(empty_kv(batch, *sizes, dtype))

        def compressed[Rows: CachedRows](entries: Rows, width: int) -> CompressedCache[Rows]:
            # Overlapping windows have channels of their own for the first and the second time they are seen.
            times = 2 if ratio == 4 else 1
            shape = batch, times * ratio + max_draft, times * width
            kv, score = (RecentRows(_placed(jnp.zeros(shape, jnp.float32))) for _ in range(2))
            return CompressedCache(entries, kv, score)

        window, slots = RecentRows(kv_rows(config.sliding_window + max_draft)), -(-max_len // max(ratio, 1))
        if ratio == 0:
            return cls(window)
        entries = compressed(kv_rows(slots), config.head_dim)
        if ratio != 4:
            return cls(window, entries)
        keys = _placed(empty_index_keys(batch, slots, config.index_head_dim, numerics.index, dtype))
        return cls(window, entries, compressed(keys, config.index_head_dim))


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


def plan_bytes(
    config: Config, numerics: Numerics, *, batch: int, max_len: int, max_draft: int = 0
) -> dict[str, int]:
    """Bytes of what `make_cache` makes, by what it keeps: "window", "entries", "index keys", "raw rows"."""
    sizes = {"batch": batch, "max_len": max_len, "max_draft": max_draft}
    plan = {"window": 0, "entries": 0, "index keys": 0, "raw rows": 0}
    for layer in jax.eval_shape(lambda: make_cache(config, numerics, **sizes)):
        plan["window"] += _nbytes(layer.window)
        for what, kept in (("entries", layer.compressed), ("index keys", layer.index)):
            if kept is not None:
                plan[what] += _nbytes(kept.entries)
                plan["raw rows"] += _nbytes((kept.kv, kept.score))
    return plan


def _placed[Rows: CachedRows](rows: Rows) -> Rows:
    return jax.tree.map(lambda leaf: constrain(leaf, "batch", "cache_slots", "head_dim"), rows)


def _nbytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
