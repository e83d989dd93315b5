"""Which arithmetic the model runs in: one value, passed down, that every layer follows."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import QuantArray, activation_quant, fake_quantize


@dataclasses.dataclass(frozen=True)
class Numerics:
    """Precision of what flows between the weights; the weights' own precision is the checkpoint's.

    Attributes:
      dtype: of the residual streams and of every op's result: "float32" or "bfloat16".
      activation: format of the input of quantised linears, "fp8_token128", or None to leave it.
      kv: format of the non-rotary part of cached key-values, "fp8_block64", or None.
      index: format of indexer queries and keys, "fp4_group32", or None.
    """

    dtype: str = "float32"
    activation: str | None = None
    kv: str | None = None
    index: str | None = None

    def __post_init__(self):
        allowed = {
            "dtype": ("float32", "bfloat16"),
            "activation": (None, "fp8_token128"),
            "kv": (None, "fp8_block64"),
            "index": (None, "fp4_group32"),
        }
        for name, values in allowed.items():
            if (found := getattr(self, name)) not in values:
                raise ValueError(f"{name}={found!r}, must be one of {values}")

    def quantize_activation(self, x: Float[Array, "*tokens K"]) -> jax.Array | QuantArray:
        """`x` as a quantised linear takes it."""
        return x if self.activation is None else activation_quant(x)

    def quantize_kv(self, kv: Float[Array, "*rows D"], rope_dim: int) -> Float[Array, "*rows D"]:
        """`kv` as the cache keeps it: the trailing `rope_dim` dimensions are not touched."""
        if self.kv is None:
            return kv
        nope, rope = jnp.split(kv, [kv.shape[-1] - rope_dim], axis=-1)
        return jnp.concatenate([fake_quantize(nope, self.kv), rope], axis=-1)

    def quantize_index(self, x: Float[Array, "*rows J"]) -> Float[Array, "*rows J"]:
        """An indexer query or key, already rotated, as it is scored."""
        return x if self.index is None else fake_quantize(x, self.index)


PLAIN = Numerics()
KVQUANT = Numerics(kv="fp8_block64", index="fp4_group32")
OFFICIAL = Numerics("bfloat16", activation="fp8_token128", kv="fp8_block64", index="fp4_group32")

PRESETS = {"plain": PLAIN, "kvquant": KVQUANT, "official": OFFICIAL}
