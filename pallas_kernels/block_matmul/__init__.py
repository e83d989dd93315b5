"""Products with a linear layer's weight: FP8 in 128x128 blocks, or unquantised."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.block_matmul import reference
from pallas_kernels.dispatch import Implementation, select
from pallas_kernels.formats import QuantArray

MATMUL = (Implementation("reference", reference.block_matmul),)
DIAGONAL = (Implementation("reference", reference.block_diagonal_matmul),)


def block_matmul(
    x: Float[Array, "*tokens K"] | QuantArray,
    weight: Float[Array, "N K"] | QuantArray,
    *,
    out_dtype=jnp.bfloat16,
    implementation: str | None = None,
) -> Float[Array, "*tokens N"]:
    """x @ weight.T with float32 accumulation, rounded once to `out_dtype`.

    Source: `fp8_gemm` in the released inference/kernel.py.

    Args:
      x: activations, plain or already quantised (`activation_quant`).
      weight: one row per output.

    Raises:
      ValueError: x and weight differ in K.
    """
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"x has {x.shape[-1]} columns, weight has {weight.shape[-1]}: {x.shape}, {weight.shape}"
        )
    return select(MATMUL, implementation, x, weight, out_dtype)


def block_diagonal_matmul(
    x: Float[Array, "*tokens G K"],
    weight: Float[Array, "G*O K"] | QuantArray,
    *,
    out_dtype=jnp.bfloat16,
    implementation: str | None = None,
) -> Float[Array, "*tokens G O"]:
    """Each group of `x` times its own slab of rows of `weight`: the product of `wo_a`.

    Source: the `einsum` with wo_a in the released inference/model.py. The weight is stored in FP8 and the
    product takes unquantised activations.

    Args:
      weight: the G slabs of O rows, one below the other.

    Raises:
      ValueError: the rows of `weight` do not divide by the groups of `x`, or K differs.
    """
    if weight.shape[0] % x.shape[-2] or x.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"weight {weight.shape} does not split into {x.shape[-2]} slabs of {x.shape[-1]} columns"
        )
    return select(DIAGONAL, implementation, x, weight, out_dtype)
