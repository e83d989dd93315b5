"""The multi-token-prediction head: one more block, which drafts the token after the next."""

import functools

from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from dsv4_jax.cache import LayerCache
from dsv4_jax.config import Config
from dsv4_jax.model import Params, Transformer, logits, run_blocks
from dsv4_jax.nn.block import Block
from dsv4_jax.nn.hyper_connection import HyperHead
from dsv4_jax.nn.linear import Linear
from dsv4_jax.nn.norm import RMSNorm
from dsv4_jax.numerics import Numerics
from dsv4_jax.parallel import Along, spread


class MTPHead(nnx.Module):
    """From the main model's streams at position p and the token at p + 1, logits of the token at p + 2.

    Shares embedding and output head with the main model. To draft further, feed the streams it returns
    back in with the drafted token. Source: `MTPBlock` of the released inference/model.py.
    """

    def __init__(self, config: Config, numerics: Numerics):
        hidden = config.hidden_size
        self.enorm = RMSNorm(hidden, "hidden", config.rms_norm_eps)
        self.hnorm = RMSNorm(hidden, "hidden", config.rms_norm_eps)
        self.e_proj = Linear((hidden, hidden), (None, "hidden"), config, numerics)
        self.h_proj = Linear((hidden, hidden), (None, "hidden"), config, numerics)
        self.block = Block(config, numerics, ratio=0, hashed=False)
        self.hc_head = HyperHead(config)
        self.norm = RMSNorm(hidden, "hidden", config.rms_norm_eps)

    def __call__(
        self,
        model: Transformer,
        streams: Float[Array, "B T X M"],
        next_ids: Int32[Array, "B T"],
        position: Int32[Array, " B"],
        length: Int32[Array, " B"],
        cache: LayerCache,
    ) -> tuple[Float[Array, "B T X M"], LayerCache]:
        """The head's own streams, to be fed back or turned into `logits`, and its cache.

        Args:
          model: whose embedding is shared.
          streams: the main model's, at the positions `position` and after.
          next_ids: the token that follows each of these positions.
          position, length, cache: as in `Transformer.__call__`; the cache is a window of the head's own.
        """
        modules = self.enorm, self.e_proj, self.hnorm, self.h_proj
        arguments = (model.embed(next_ids), Along("batch")), (streams, Along("batch"))
        mixed = spread(_mix, modules, arguments, Along("batch"))
        streams, (cache,) = run_blocks([self.block], mixed, next_ids, position, length, (cache,))
        return streams, cache

    def logits(self, model: Transformer, streams: Float[Array, "*tokens X M"]) -> Float32[Array, "*tokens V"]:
        """Draft logits from the streams of `__call__`."""
        return logits(self.hc_head, self.norm, model.head, streams)


def _mix(
    enorm: RMSNorm,
    e_proj: Linear,
    hnorm: RMSNorm,
    h_proj: Linear,
    token: Float[Array, "B T M"],
    streams: Float[Array, "B T X M"],
) -> Float[Array, "B T X M"]:
    """What the head's block reads."""
    return (e_proj(enorm(token))[:, :, None] + h_proj(hnorm(streams))).astype(streams.dtype)


@functools.cache
def declare_mtp(config: Config, numerics: Numerics) -> MTPHead:
    """The head with shapes in place of numbers."""
    return MTPHead(config, numerics)


def bind_mtp(config: Config, numerics: Numerics, params: Params) -> MTPHead:
    """The head with `params` in it; to be called inside `jax.jit`."""
    return nnx.merge(nnx.split(declare_mtp(config, numerics))[0], params)


def make_mtp_cache(
    config: Config, numerics: Numerics, *, batch: int, max_len: int, max_draft: int = 0
) -> LayerCache:
    """An empty window for the head."""
    return LayerCache.zeros(config, numerics, 0, batch=batch, max_len=max_len, max_draft=max_draft)
