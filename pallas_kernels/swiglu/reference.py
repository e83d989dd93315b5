"""The definition of `swiglu`."""

import jax
import jax.numpy as jnp


def swiglu(gate: jax.Array, up: jax.Array, weight: jax.Array | None, limit: float, out_dtype) -> jax.Array:
    gate = jnp.minimum(gate.astype(jnp.float32), limit)
    up = jnp.clip(up.astype(jnp.float32), -limit, limit)
    out = jax.nn.silu(gate) * up
    return (out if weight is None else weight[..., None] * out).astype(out_dtype)
