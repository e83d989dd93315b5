"""Attention of three kinds: the window alone (SWA), with chosen (CSA) or all (HCA) compressed entries."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from dsv4_jax.cache import LayerCache
from dsv4_jax.config import Config
from dsv4_jax.nn.compressor import Compressor
from dsv4_jax.nn.indexer import Indexer, all_visible
from dsv4_jax.nn.linear import BlockDiagonalLinear, Linear, products
from dsv4_jax.nn.norm import RMSNorm, rms_normalize
from dsv4_jax.nn.parameter import parameter
from dsv4_jax.nn.rope import rope_angles, rope_frequencies, rotate
from dsv4_jax.numerics import Numerics
from dsv4_jax.sharding import constrain
from pallas_kernels import sparse_attention


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
        positions = position[:, None] + jnp.arange(x.shape[1])
        angles = rope_angles(positions, rope_frequencies(self.config, self.ratio))
        q_latent, kv = self.latents(x)
        q, kv = self.queries(q_latent, angles), self.key_values(kv, angles)

        window_kv, window_index = self._window(kv, position, cache)
        cache = self.remember(x, kv, position, length, cache)
        compressed_kv, compressed_index = None, None
        if cache.compressed is not None:
            compressed_kv = cache.compressed.entries
            compressed_index = self.choose(x, q_latent, angles, positions, cache)

        out = sparse_attention(
            q,
            window_kv,
            window_index,
            compressed_kv,
            compressed_index,
            self.attn_sink.get_value(),
            softmax_scale=self.config.head_dim**-0.5,
        )
        return self._project(rotate(out, angles[:, :, None], inverse=True)), cache

    def latents(self, x: Float[Array, "B T M"]) -> tuple[Float[Array, "B T Q"], Float[Array, "B T D"]]:
        """What queries are made of, which the indexer reads too; and what key-values are made of."""
        q_latent, kv = products(x, self.wq_a, self.wkv)
        if kv is None:
            q_latent, kv = jnp.split(q_latent, [self.wq_a.rows], axis=-1)
        return self.q_norm(q_latent), kv

    def queries(
        self, q_latent: Float[Array, "B T Q"], angles: Float32[Array, "B T pairs"]
    ) -> Float[Array, "B T H D"]:
        """The queries of all heads."""
        heads, head_dim = self.config.num_attention_heads, self.config.head_dim
        q = self.wq_b(q_latent).reshape(*q_latent.shape[:2], heads, head_dim)
        q = constrain(q, "batch", "tokens", "heads", "head_dim")
        return rotate(rms_normalize(q, self.config.rms_norm_eps), angles[:, :, None])

    def key_values(
        self, kv: Float[Array, "B T D"], angles: Float32[Array, "B T pairs"]
    ) -> Float[Array, "B T D"]:
        """The key-value of each token, from its latent, as the window keeps it."""
        kv = rotate(self.kv_norm(kv), angles)
        return self.numerics.quantize_kv(kv, self.config.qk_rope_head_dim)

    def remember(
        self,
        x: Float[Array, "B T M"],
        kv: Float[Array, "B T D"],
        position: Int32[Array, " B"],
        length: Int32[Array, " B"],
        cache: LayerCache,
    ) -> LayerCache:
        """The cache with the new tokens in it."""
        cache = dataclasses.replace(cache, window=cache.window.write(kv, position, length))
        if cache.compressed is not None:
            compressed = self.compressor(x, position, length, cache.compressed)
            cache = dataclasses.replace(cache, compressed=compressed)
        if cache.index is not None:
            index = self.indexer.compressor(x, position, length, cache.index)
            cache = dataclasses.replace(cache, index=index)
        return cache

    def choose(
        self,
        x: Float[Array, "B T M"],
        q_latent: Float[Array, "B T Q"],
        angles: Float32[Array, "B T pairs"],
        positions: Int32[Array, "B T"],
        cache: LayerCache,
    ) -> Int32[Array, "B T K"]:
        """Compressed entries each query attends to, -1 where there are fewer; of layers that have any."""
        if cache.index is not None:
            return self.indexer(x, q_latent, angles[:, :, None], positions, cache.index.entries)
        assert cache.compressed is not None
        return all_visible((positions + 1) // self.ratio, cache.compressed.entries.shape[1])

    def _window(
        self, kv: Float[Array, "B T D"], position: Int32[Array, " B"], cache: LayerCache
    ) -> tuple[Float[Array, "B R D"], Int32[Array, "B T W"]]:
        """Recent and new key-values in text order, and the rows each query sees of them."""
        window = self.config.sliding_window
        rows = jnp.concatenate([cache.window.before(position, window - 1), kv], axis=1)
        # Query t sees itself (row t + window - 1) and the rows before it, back to the start of the text.
        row = jnp.arange(kv.shape[1])[:, None] + jnp.arange(window)
        exists = position[:, None, None] + row - (window - 1) >= 0
        return rows, jnp.where(exists, row, -1)

    def _project(self, out: Float[Array, "B T H D"]) -> Float[Array, "B T M"]:
        """Groups of heads through `wo_a`, all together through `wo_b`."""
        grouped = self.wo_a(out.reshape(*out.shape[:2], self.config.o_groups, -1))
        return self.wo_b(grouped.reshape(*out.shape[:2], -1))
