"""The compressor: every `ratio` tokens become one entry."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float32, Int32

from dsv4_jax.cache import CompressedCache, RecentRows
from dsv4_jax.config import Config
from dsv4_jax.nn.linear import PlainLinear
from dsv4_jax.nn.norm import RMSNorm
from dsv4_jax.nn.parameter import parameter
from dsv4_jax.nn.rope import rope_frequencies, rotation
from dsv4_jax.numerics import Numerics
from pallas_kernels import compressed_entries


class Compressor(nnx.Module):
    """Pools tokens into entries for attention, or (`for_index`) into keys for the indexer.

    With ratio 4 windows overlap: an entry also sees the window before its own.
    """

    def __init__(self, config: Config, numerics: Numerics, ratio: int, *, for_index: bool = False):
        self.head_dim = config.index_head_dim if for_index else config.head_dim
        channels = self.head_dim * (2 if ratio == 4 else 1)
        shape = (channels, config.hidden_size)
        # The released model runs both projections in float32: their softmax decides what is remembered.
        self.wkv = PlainLinear(shape, (None, "hidden"), jnp.float32)
        self.wgate = PlainLinear(shape, (None, "hidden"), jnp.float32)
        self.ape = parameter((ratio, channels), jnp.float32, None, None)
        self.norm = RMSNorm(self.head_dim, None, config.rms_norm_eps)
        self.config, self.numerics = config, numerics
        self.ratio, self.for_index = ratio, for_index

    @property
    def projections(self) -> tuple[PlainLinear, PlainLinear]:
        """What the columns that it reads are made with, in their order."""
        return self.wkv, self.wgate

    @property
    def columns(self) -> int:
        """How many columns it reads."""
        return 2 * self.ape.shape[-1]

    def __call__(
        self,
        projected: Float32[Array, "B T P"],
        column: int,
        position: Int32[Array, " B"],
        length: Int32[Array, " B"],
        cache: CompressedCache,
    ) -> CompressedCache:
        """Takes in `length` new tokens from `position` on, and stores the entries they complete.

        Its columns of `projected`, those of `projections` side by side, begin at `column`.
        """
        ratio, tokens = self.ratio, projected.shape[1]
        # T tokens close at most ceil(T / ratio) windows, the first of them the one `position` lies in.
        entry = (position // ratio)[:, None] + jnp.arange(-(-tokens // ratio))
        entries, kv, score = compressed_entries(
            projected,
            self.ape.get_value(),
            cache.entries,
            cache.kv.rows,
            cache.score.rows,
            position,
            length,
            self.norm.weight.get_value(),
            *rotation(entry * ratio, rope_frequencies(self.config, ratio)),
            column=column,
            eps=self.norm.eps,
            for_index=self.for_index,
            format=self.numerics.index if self.for_index else self.numerics.kv,
            dtype=jnp.dtype(self.numerics.dtype),
        )
        return CompressedCache(entries, RecentRows(kv), RecentRows(score))
