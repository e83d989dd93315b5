"""Root-mean-square normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsv4_jax.nn.parameter import parameter


def rms_normalize(x: Float[Array, "*rows D"], eps: float) -> Float[Array, "*rows D"]:
    """x / sqrt(mean(x^2) + eps) over the last axis, in float32, without a weight."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """`rms_normalize` times a weight, one rounding at the end."""

    def __init__(self, size: int, axis: str | None, eps: float):
        self.weight = parameter((size,), jnp.bfloat16, axis)
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        normalized = rms_normalize(x.astype(jnp.float32), self.eps)
        return (normalized * self.weight.get_value().astype(jnp.float32)).astype(x.dtype)
