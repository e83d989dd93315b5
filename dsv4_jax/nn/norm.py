"""Root-mean-square normalisation with its weight."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsv4_jax.nn.parameter import parameter
from pallas_kernels.attention_inputs.reference import rms_norm


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) times a weight, in float32 with one rounding at the end."""

    def __init__(self, size: int, axis: str | None, eps: float):
        self.weight = parameter((size,), jnp.bfloat16, axis)
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        return rms_norm(x, self.weight.get_value(), self.eps)
