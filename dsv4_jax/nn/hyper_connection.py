"""Hyper-connections with their parameters: how a sub-layer reads and writes the residual streams."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from dsv4_jax.config import Config
from dsv4_jax.nn.parameter import parameter
from pallas_kernels import hc_head, hc_pre


class HyperConnection(nnx.Module):
    """What stands between the streams and one sub-layer, attention or experts."""

    def __init__(self, config: Config):
        n = config.hc_mult
        mixes = (2 + n) * n
        self.fn = parameter((mixes, n * config.hidden_size), jnp.float32, None, "hidden")
        self.base = parameter((mixes,), jnp.float32, None)
        self.scale = parameter((3,), jnp.float32, None)
        self.config = config

    def __call__(
        self, streams: Float[Array, "*tokens X M"]
    ) -> tuple[Float[Array, "*tokens M"], Float32[Array, "*tokens X"], Float32[Array, "*tokens X X"]]:
        """The sub-layer's input, and `post` and `comb` for `hc_post`."""
        return hc_pre(
            streams,
            self.fn.get_value(),
            self.scale.get_value(),
            self.base.get_value(),
            sinkhorn_iters=self.config.hc_sinkhorn_iters,
            eps=self.config.hc_eps,
            norm_eps=self.config.rms_norm_eps,
        )


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
