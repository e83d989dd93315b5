"""The activation between an expert's two products."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.dispatch import Implementation, select
from pallas_kernels.swiglu import reference

IMPLEMENTATIONS = (Implementation("reference", reference.swiglu),)


def swiglu(
    gate: Float[Array, "*rows F"],
    up: Float[Array, "*rows F"],
    weight: Float32[Array, "*rows"] | None = None,
    *,
    limit: float,
    out_dtype=jnp.bfloat16,
    implementation: str | None = None,
) -> Float[Array, "*rows F"]:
    """weight * silu(min(gate, limit)) * clip(up, -limit, limit), in float32, rounded once to `out_dtype`.

    The routing weight multiplies here, before the down projection. Source: `Expert.forward` of the
    released inference/model.py.

    Args:
      weight: routing weight of each row; None for the shared expert.
      limit: `swiglu_limit`.
    """
    return select(IMPLEMENTATIONS, implementation, gate, up, weight, limit, out_dtype)
