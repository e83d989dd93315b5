"""Hyper-connections with their parameters: how a sub-layer reads and writes the residual streams."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from dsv4_jax.config import Config
from dsv4_jax.nn.norm import RMSNorm
from dsv4_jax.nn.parameter import parameter
from pallas_kernels import hc_head, hc_post, hc_post_pre, hc_pre


class Residual(NamedTuple):
    """The streams that a sub-layer read, and how its output goes back: what `hc_post` takes besides that."""

    streams: Float[Array, "*tokens X M"]
    post: Float32[Array, "*tokens X"]
    comb: Float32[Array, "*tokens X X"]


class Unwritten(NamedTuple):
    """A sub-layer's output, not yet written to the streams: the next one does that while it reads them."""

    y: Float[Array, "*tokens M"]
    residual: Residual

    def written(self) -> Float[Array, "*tokens X M"]:
        """The streams with it."""
        return hc_post(self.y, *self.residual)


class HyperConnection(nnx.Module):
    """What stands between the streams and one sub-layer, attention or experts."""

    def __init__(self, config: Config):
        n = config.hc_mult
        mixes = (2 + n) * n
        self.fn = parameter((mixes, n * config.hidden_size), jnp.float32, None, "hidden")
        self.base = parameter((mixes,), jnp.float32, None)
        self.scale = parameter((3,), jnp.float32, None)
        self.config = config

    def read(
        self, before: Float[Array, "*tokens X M"] | Unwritten, norm: RMSNorm | None
    ) -> tuple[Float[Array, "*tokens M"], Residual]:
        """The sub-layer's input, normalised unless `norm` is None, and how its output goes back."""
        if isinstance(before, Unwritten):
            y, residual = before
            streams, x, post, comb = hc_post_pre(y, *residual, *self._mixes(), **self._settings(norm))
        else:
            streams, (x, post, comb) = before, hc_pre(before, *self._mixes(), **self._settings(norm))
        return x, Residual(streams, post, comb)

    def _mixes(self) -> tuple[Array, Array, Array]:
        return self.fn.get_value(), self.scale.get_value(), self.base.get_value()

    def _settings(self, norm: RMSNorm | None) -> dict[str, Any]:
        return {
            "sinkhorn_iters": self.config.hc_sinkhorn_iters,
            "eps": self.config.hc_eps,
            "norm_eps": self.config.rms_norm_eps,
            "norm_weight": None if norm is None else norm.weight.get_value(),
        }


class HyperHead(nnx.Module):
    """The last collapse of the streams, before the final norm."""

    def __init__(self, config: Config):
        n = config.hc_mult
        self.fn = parameter((n, n * config.hidden_size), jnp.float32, None, "hidden")
        self.base = parameter((n,), jnp.float32, None)
        self.scale = parameter((1,), jnp.float32, None)
        self.config = config

    def __call__(self, streams: Float[Array, "*tokens X M"]) -> Float[Array, "*tokens M"]:
        return hc_head(
            streams,
            self.fn.get_value(),
            self.scale.get_value(),
            self.base.get_value(),
            eps=self.config.hc_eps,
            norm_eps=self.config.rms_norm_eps,
        )
