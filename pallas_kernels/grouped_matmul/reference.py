"""The definition of `grouped_matmul`."""

import jax
import jax.numpy as jnp

from pallas_kernels.block_matmul.reference import block_matmul
from pallas_kernels.formats import QuantArray


def grouped_matmul(
    x: jax.Array | QuantArray, weight: jax.Array | QuantArray, group_sizes: jax.Array, out_dtype
) -> jax.Array:
    rows, ends_E = jnp.arange(x.shape[0])[:, None], jnp.cumsum(group_sizes)

    def one_expert(out, expert):
        matrix, start, end = expert
        mine = (start <= rows) & (rows < end)

        def fill(out):
            return jnp.where(mine, block_matmul(x, matrix, out_dtype), out)

        # An expert without rows is skipped, not multiplied and thrown away.
        return jax.lax.cond(end > start, fill, lambda out: out, out), None

    nothing = jnp.zeros((x.shape[0], weight.shape[1]), out_dtype)
    out, _ = jax.lax.scan(one_expert, nothing, (weight, ends_E - group_sizes, ends_E))
    return out
