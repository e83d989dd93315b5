"""The compressor: every `ratio` tokens become one entry."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from dsv4_jax.cache import CompressedCache
from dsv4_jax.config import Config
from dsv4_jax.nn.linear import PlainLinear
from dsv4_jax.nn.norm import RMSNorm
from dsv4_jax.nn.parameter import parameter
from dsv4_jax.nn.rope import rope_angles, rope_frequencies, rotate
from dsv4_jax.numerics import Numerics
from pallas_kernels import compress, hadamard


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

    def __call__(
        self,
        x: Float[Array, "B T M"],
        position: Int32[Array, " B"],
        length: Int32[Array, " B"],
        cache: CompressedCache,
    ) -> CompressedCache:
        """Takes in `length` new tokens from `position` on, and stores the entries they complete."""
        ratio, tokens = self.ratio, x.shape[1]
        positions = position[:, None] + jnp.arange(tokens)
        kv, score = self.wkv(x), self.wgate(x) + self.ape.get_value()[positions % ratio]

        # The oldest token that the first entry under way can need lies this far back.
        reach = (2 * ratio if self.ratio == 4 else ratio) - 1
        absent = (position[:, None] - reach + jnp.arange(reach)) < 0
        before = jnp.where(absent[..., None], -jnp.inf, cache.score.before(position, reach))
        kv_rows = jnp.concatenate([cache.kv.before(position, reach), kv], axis=1)
        score_rows = jnp.concatenate([before, score], axis=1)

        # T tokens close at most ceil(T / ratio) windows, the first of them the one `position` lies in.
        entry = (position // ratio)[:, None] + jnp.arange(-(-tokens // ratio))
        first_row = entry * ratio - position[:, None] + reach
        pooled = compress(kv_rows, score_rows, first_row, ratio=ratio, head_dim=self.head_dim)
        complete = (entry + 1) * ratio <= (position + length)[:, None]
        cache = cache.write(self._finish(pooled, entry), entry, complete)
        return cache.write_raw(kv, score, position, length)

    def _finish(self, pooled: Float[Array, "B N D"], entry: Int32[Array, "B N"]) -> Float[Array, "B N D"]:
        """Norm, rotation to the first position of the window, and quantisation as the cache keeps it."""
        normed = self.norm(pooled.astype(self.numerics.dtype))
        angles = rope_angles(entry * self.ratio, rope_frequencies(self.config, self.ratio))
        rotated = rotate(normed, angles)
        if self.for_index:
            return self.numerics.quantize_index(hadamard(rotated))
        return self.numerics.quantize_kv(rotated, self.config.qk_rope_head_dim)
