"""The lightning indexer: a small, cheap attention that chooses what the large one reads."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from dsv4_jax.config import Config
from dsv4_jax.nn.compressor import Compressor
from dsv4_jax.nn.linear import Linear, PlainLinear
from dsv4_jax.nn.rope import Rotation
from dsv4_jax.numerics import Numerics
from pallas_kernels import QuantArray, TiledQueries, index_query, index_select


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

    @property
    def projections(self) -> tuple[PlainLinear, ...]:
        """What the columns that it and its compressor read are made with, in their order."""
        return *self.compressor.projections, self.weights_proj

    def queries(
        self,
        projected: Float32[Array, "B T P"],
        column: int,
        q_latent: Float[Array, "B T Q"] | QuantArray,
        turns: Rotation,
    ) -> tuple[Float[Array, "B T I J"] | TiledQueries, Float32[Array, "B T I"]]:
        """Index queries, rotated and quantised as the keys are, and the weight of each head.

        The columns of `projections` begin at `column` of `projected`.
        """
        q = self.wq_b(q_latent)
        q = q.reshape(*q.shape[:2], self.config.index_n_heads, self.config.index_head_dim)
        column += self.compressor.columns
        return index_query(q, projected, *turns, column=column, format=self.numerics.index)

    def __call__(
        self,
        projected: Float32[Array, "B T P"],
        column: int,
        q_latent: Float[Array, "B T Q"] | QuantArray,
        turns: Rotation,
        positions: Int32[Array, "B T"],
        keys: Float[Array, "B S J"] | QuantArray,
    ) -> Int32[Array, "B T K"]:
        """Entries each query attends to, -1 where fewer are visible."""
        visible = (positions + 1) // self.ratio  # an entry that closes at a position is seen from there
        if keys.shape[1] <= self.config.index_topk:
            return all_visible(visible, keys.shape[1])
        q, weights = self.queries(projected, column, q_latent, turns)
        return index_select(q, keys, weights, visible, self.config.index_topk)


def all_visible(visible: Int32[Array, "B T"], slots: int) -> Int32[Array, "B T slots"]:
    """Every entry that exists at each query, -1 for those to come."""
    entry = jnp.arange(slots)
    return jnp.where(entry < visible[..., None], entry, -1)
