"""The lightning indexer: a small, cheap attention that chooses what the large one reads."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from dsv4_jax.config import Config
from dsv4_jax.nn.compressor import Compressor
from dsv4_jax.nn.linear import Linear, PlainLinear
from dsv4_jax.nn.rope import rotate
from dsv4_jax.numerics import Numerics
from pallas_kernels import hadamard, index_select


class Indexer(nnx.Module):
    """Scores compressed entries by keys of its own and names the best `index_topk` for each query."""

    def __init__(self, config: Config, numerics: Numerics, ratio: int):
        heads, head_dim = config.index_n_heads, config.index_head_dim
        shape, axes = (heads * head_dim, config.q_lora_rank), ("index_heads", "q_lora")
        self.wq_b = Linear(shape, axes, config, numerics)
        self.weights_proj = PlainLinear(
            (heads, config.hidden_size), ("index_heads", "hidden"), numerics.dtype
        )
        self.compressor = Compressor(config, numerics, ratio, for_index=True)
        self.config, self.numerics, self.ratio = config, numerics, ratio

    def queries(
        self,
        x: Float[Array, "B T M"],
        q_latent: Float[Array, "B T Q"],
        angles: Float32[Array, "B T 1 pairs"],
    ) -> tuple[Float[Array, "B T I J"], Float32[Array, "B T I"]]:
        """Index queries, rotated and quantised as the keys are, and the weight of each head."""
        heads, head_dim = self.config.index_n_heads, self.config.index_head_dim
        q = rotate(self.wq_b(q_latent).reshape(*x.shape[:2], heads, head_dim), angles)
        weights = self.weights_proj(x) * (heads * head_dim) ** -0.5
        return self.numerics.quantize_index(hadamard(q)), weights.astype(jnp.float32)

    def __call__(
        self,
        x: Float[Array, "B T M"],
        q_latent: Float[Array, "B T Q"],
        angles: Float32[Array, "B T 1 pairs"],
        positions: Int32[Array, "B T"],
        keys: Float[Array, "B S J"],
    ) -> Int32[Array, "B T K"]:
        """Entries each query attends to, -1 where fewer are visible."""
        visible = (positions + 1) // self.ratio  # an entry that closes at a position is seen from there
        if keys.shape[1] <= self.config.index_topk:
            return all_visible(visible, keys.shape[1])
        q, weights = self.queries(x, q_latent, angles)
        return index_select(q, keys, weights, visible, self.config.index_topk)


def all_visible(visible: Int32[Array, "B T"], slots: int) -> Int32[Array, "B T slots"]:
    """Every entry that exists at each query, -1 for those to come."""
    entry = jnp.arange(slots)
    return jnp.where(entry < visible[..., None], entry, -1)
