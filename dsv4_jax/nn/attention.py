"""Attention of three kinds: the window alone (SWA), with chosen (CSA) or all (HCA) compressed entries."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from dsv4_jax.cache import LayerCache, RecentRows
from dsv4_jax.config import Config
from dsv4_jax.nn.compressor import Compressor
from dsv4_jax.nn.indexer import Indexer, all_visible
from dsv4_jax.nn.linear import BlockDiagonalLinear, Linear, side_by_side
from dsv4_jax.nn.norm import RMSNorm
from dsv4_jax.nn.parameter import parameter
from dsv4_jax.nn.rope import Rotation, rope_frequencies, rotation
from dsv4_jax.numerics import Numerics
from dsv4_jax.sharding import constrain
from pallas_kernels import (
    QuantArray,
    QuantKV,
    attention_latents,
    attention_query,
    sparse_attention,
)
from pallas_kernels.debug import check


class Attention(nnx.Module):
    """Multi-query latent attention: one 512-wide vector per token is key and value of every head.

    `ratio` is the layer's entry of `compress_ratios`: 0 makes it SWA, 4 CSA, 128 HCA.
    """

    def __init__(self, config: Config, numerics: Numerics, ratio: int):
        heads, head_dim, hidden = config.num_attention_heads, config.head_dim, config.hidden_size
        groups, o_lora = config.o_groups, config.o_lora_rank

        def linear(out_features: int, in_features: int, *axes: str) -> Linear:
            return Linear((out_features, in_features), axes, config, numerics)

        self.wq_a = linear(config.q_lora_rank, hidden, "q_lora", "hidden")
        self.q_norm = RMSNorm(config.q_lora_rank, "q_lora", config.rms_norm_eps)
        self.wq_b = linear(heads * head_dim, config.q_lora_rank, "heads", "q_lora")
        self.wkv = linear(head_dim, hidden, "head_dim", "hidden")
        self.kv_norm = RMSNorm(head_dim, "head_dim", config.rms_norm_eps)
        self.attn_sink = parameter((heads,), jnp.float32, "heads")
        wo_a_shape = (groups * o_lora, heads * head_dim // groups)
        self.wo_a = BlockDiagonalLinear(wo_a_shape, ("o_groups", "head_dim"), config, numerics)
        self.wo_b = linear(hidden, groups * o_lora, "hidden", "o_groups")
        if ratio:
            self.compressor = Compressor(config, numerics, ratio)
        if ratio == 4:
            self.indexer = Indexer(config, numerics, ratio)
        self.config, self.numerics, self.ratio = config, numerics, ratio

    def __call__(
        self,
        x: Float[Array, "B T M"],
        position: Int32[Array, " B"],
        length: Int32[Array, " B"],
        cache: LayerCache,
    ) -> tuple[Float[Array, "B T M"], LayerCache]:
        """Attends from `length` new tokens, which stand from `position` on, to all before and themselves."""
        out, cache = self.attend(x, position, length, cache)
        return self._project(out), cache

    def attend(
        self,
        x: Float[Array, "B T M"],
        position: Int32[Array, " B"],
        length: Int32[Array, " B"],
        cache: LayerCache,
    ) -> tuple[Float[Array, "B T H D"], LayerCache]:
        """`__call__` before the heads' results are projected."""
        positions = position[:, None] + jnp.arange(x.shape[1])
        # Layers of one kind turn alike: XLA makes this once for all that are in one program.
        turns = rotation(positions, rope_frequencies(self.config, self.ratio))
        q_latent, kv, window = self.latents(x, turns, cache.window, position, length)
        projected = self.projected(x)
        q = self.queries(q_latent, turns)

        window_kv, window_index = self._window(kv, position, cache.window, window)
        cache = self.remember(projected, position, length, dataclasses.replace(cache, window=window))
        compressed_kv, compressed_index = None, None
        if cache.compressed is not None:
            compressed_kv = cache.compressed.entries
            compressed_index = self.choose(projected, q_latent, turns, positions, cache)

        out = sparse_attention(
            q,
            window_kv,
            window_index,
            compressed_kv,
            compressed_index,
            self.attn_sink.get_value(),
            softmax_scale=self.config.head_dim**-0.5,
            turns=turns,
        )
        return out, cache

    def latents(
        self,
        x: Float[Array, "B T M"],
        turns: Rotation,
        window: RecentRows,
        position: Int32[Array, " B"],
        length: Int32[Array, " B"],
    ) -> tuple[Float[Array, "B T Q"] | QuantArray, Float[Array, "B T D"], RecentRows]:
        """What queries are made of, which the indexer reads too; key-values; the window with them in it."""
        readers = (self.wq_b, self.indexer.wq_b) if self.ratio == 4 else (self.wq_b,)
        formats = {reader.activation for reader in readers}
        q_latent, kv, rows = attention_latents(
            side_by_side(x, self.wq_a, self.wkv),
            self.q_norm.weight.get_value(),
            self.kv_norm.weight.get_value(),
            window.rows,
            position,
            length,
            *turns,
            eps=self.config.rms_norm_eps,
            format=self.numerics.kv,
            activation=formats.pop() if len(formats) == 1 else None,
        )
        return q_latent, kv, RecentRows(rows)

    def projected(self, x: Float[Array, "B T M"]) -> Float32[Array, "B T P"] | None:
        """All that compressor and indexer read of `x`, column by column; None in layers without them."""
        if not self.ratio:
            return None
        indexers = self.indexer.projections if self.ratio == 4 else ()
        return side_by_side(x, *self.compressor.projections, *indexers)

    def queries(
        self, q_latent: Float[Array, "B T Q"] | QuantArray, turns: Rotation
    ) -> Float[Array, "B T H D"]:
        """The queries of all heads."""
        q = self.wq_b(q_latent)
        q = q.reshape(*q.shape[:2], self.config.num_attention_heads, self.config.head_dim)
        q = constrain(q, "batch", "tokens", "heads", "head_dim")
        return attention_query(q, *turns, eps=self.config.rms_norm_eps)

    def remember(
        self,
        projected: Float32[Array, "B T P"] | None,
        position: Int32[Array, " B"],
        length: Int32[Array, " B"],
        cache: LayerCache,
    ) -> LayerCache:
        """The cache with the new tokens in what is compressed of them."""
        if projected is None or cache.compressed is None:
            return cache
        room, end = cache.compressed.entries.shape[1] * self.ratio, position + length
        check("the cache", (position >= 0) & (end <= room), f"holds {room} tokens of a sequence, given", end)
        compressed = self.compressor(projected, 0, position, length, cache.compressed)
        cache = dataclasses.replace(cache, compressed=compressed)
        if cache.index is not None:
            column = self.compressor.columns
            index = self.indexer.compressor(projected, column, position, length, cache.index)
            cache = dataclasses.replace(cache, index=index)
        return cache

    def choose(
        self,
        projected: Float32[Array, "B T P"] | None,
        q_latent: Float[Array, "B T Q"] | QuantArray,
        turns: Rotation,
        positions: Int32[Array, "B T"],
        cache: LayerCache,
    ) -> Int32[Array, "B T K"]:
        """Compressed entries each query attends to, -1 where there are fewer; of layers that have any."""
        assert projected is not None
        assert cache.compressed is not None
        if cache.index is not None:
            columns = projected, self.compressor.columns
            return self.indexer(*columns, q_latent, turns, positions, cache.index.entries)
        return all_visible((positions + 1) // self.ratio, cache.compressed.entries.shape[1])

    def _window(
        self, kv: Float[Array, "B T D"], position: Int32[Array, " B"], before: RecentRows, after: RecentRows
    ) -> tuple[Float[Array, "B R D"] | QuantKV, Int32[Array, "B T W"]]:
        """Recent and new key-values, and the rows that each query sees of them, in text order.

        `before` and `after` are the window without and with the new rows.
        """
        window, tokens, slots = self.config.sliding_window, kv.shape[1], after.rows.shape[1]
        # Query t sees itself and the rows before it, back to the start of the text.
        seen = position[:, None, None] + jnp.arange(tokens)[:, None] + jnp.arange(1 - window, 1)
        if tokens <= slots - window + 1:  # a step's new rows take no slot of one that its first query sees
            return after.rows, jnp.where(seen >= 0, seen % slots, -1)
        rows = jnp.concatenate([before.before(position, window - 1), kv], axis=1)
        return rows, jnp.where(seen >= 0, seen - position[:, None, None] + window - 1, -1)

    def _project(self, out: Float[Array, "B T H D"]) -> Float[Array, "B T M"]:
        """Groups of heads through `wo_a`, all together through `wo_b`."""
        grouped = self.wo_a(out.reshape(*out.shape[:2], self.config.o_groups, -1))
        return self.wo_b(grouped.reshape(*out.shape[:2], -1))
