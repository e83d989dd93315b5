"""The definition of `swiglu` and `swiglu_quant`."""

import jax
import jax.numpy as jnp

from pallas_kernels.activation_quant import reference as activation_quant
from pallas_kernels.formats import QuantArray


def swiglu(
    gate: jax.Array, up: jax.Array | None, weight: jax.Array | None, limit: float, out_dtype
) -> jax.Array:
    if up is None:
        gate, up = jnp.split(gate, 2, axis=-1)
    gate = jnp.minimum(gate.astype(jnp.float32), limit)
    up = jnp.clip(up.astype(jnp.float32), -limit, limit)
    out = jax.nn.silu(gate) * up
    return (out if weight is None else weight[..., None] * out).astype(out_dtype)


def swiglu_quant(gate: jax.Array, up: jax.Array | None, weight: jax.Array | None, limit: float) -> QuantArray:
    return activation_quant.activation_quant(swiglu(gate, up, weight, limit, jnp.bfloat16))
