"""One layer: attention and experts, each between the residual streams and back."""

from flax import nnx
from jaxtyping import Array, Float, Int32

from dsv4_jax.cache import LayerCache
from dsv4_jax.config import Config
from dsv4_jax.nn.attention import Attention
from dsv4_jax.nn.hyper_connection import HyperConnection, Unwritten
from dsv4_jax.nn.moe import MoE
from dsv4_jax.nn.norm import RMSNorm
from dsv4_jax.numerics import Numerics


class Block(nnx.Module):
    """A layer of the main model, or of the MTP head; `ratio` and `hashed` make its kind."""

    def __init__(self, config: Config, numerics: Numerics, ratio: int, *, hashed: bool):
        self.hc_attn = HyperConnection(config)
        self.attn_norm = RMSNorm(config.hidden_size, "hidden", config.rms_norm_eps)
        self.attn = Attention(config, numerics, ratio)
        self.hc_ffn = HyperConnection(config)
        self.ffn_norm = RMSNorm(config.hidden_size, "hidden", config.rms_norm_eps)
        self.ffn = MoE(config, numerics, hashed=hashed)

    def __call__(
        self,
        before: Float[Array, "B T X M"] | Unwritten,
        ids: Int32[Array, "B T"],
        position: Int32[Array, " B"],
        length: Int32[Array, " B"],
        cache: LayerCache,
    ) -> tuple[Unwritten, LayerCache]:
        """What this layer has for the streams, and its cache with the new tokens in it.

        On a mesh: of a device's own rows of the batch, by its own parts of the parameters.

        Args:
          before: the streams, or what the layer before has for them.
        """
        x, residual = self.hc_attn.read(before, self.attn_norm)
        y, cache = self.attn(x, position, length, cache)
        x, residual = self.hc_ffn.read(Unwritten(y, residual), self.ffn_norm)
        return Unwritten(self.ffn(x, ids), residual), cache
