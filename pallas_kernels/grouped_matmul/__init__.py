"""Products of expert-sorted rows with many experts' weights, FP4 or FP8."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.dispatch import Implementation, select
from pallas_kernels.formats import QuantArray
from pallas_kernels.grouped_matmul import reference

IMPLEMENTATIONS = (Implementation("reference", reference.grouped_matmul),)


def grouped_matmul(
    x: Float[Array, "rows K"] | QuantArray,
    weight: Float[Array, "E N K"] | QuantArray,
    group_sizes: Int32[Array, " E"],
    *,
    out_dtype=jnp.bfloat16,
    implementation: str | None = None,
) -> Float[Array, "rows N"]:
    """Row i of `x` times the transposed weight of the expert whose group holds row i.

    Groups lie one after the other: the first group_sizes[0] rows belong to expert 0, and so on. Rows past
    the last group give zeros. Source: `fp4_gemm` and the expert loop of the released inference/model.py.

    Args:
      x: activations sorted by expert (`routing.sort_by_expert`), plain or quantised.
      weight: the experts' weights, one row per output.
      group_sizes: rows per expert, zero allowed.

    Raises:
      ValueError: shapes do not belong together.
    """
    if x.shape[-1] != weight.shape[-1] or group_sizes.shape[0] != weight.shape[0]:
        raise ValueError(f"x {x.shape}, weight {weight.shape}, group_sizes {group_sizes.shape} do not match")
    return select(IMPLEMENTATIONS, implementation, x, weight, group_sizes, out_dtype)
