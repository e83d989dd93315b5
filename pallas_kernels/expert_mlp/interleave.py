"""Gate and up projection as one weight, so that one product makes both and the activation sees them together.

Rows alternate eight by eight: row 16n + i of both is row 8n + i of the gate, row 16n + 8 + i that of the up
projection, for i < 8. The two that belong together then lie in one thread of the tensor core's result.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.expert_mlp.rows import ExpertRows
from pallas_kernels.formats import QuantArray

GROUP = 8


def interleave[W: (QuantArray, ExpertRows)](gate: W, up: W) -> W:
    """[E, 2F, K] of two [E, F, K]: FP4 as stored, or FP8 in rows. F is a multiple of 8."""
    groups = gate.shape[-2] // GROUP

    def leaf(first: jax.Array, second: jax.Array) -> jax.Array:
        *outer, rows, columns = first.shape
        parts = [each.reshape(*outer, groups, rows // groups, columns) for each in (first, second)]
        return jnp.stack(parts, axis=-3).reshape(*outer, 2 * rows, columns)

    return jax.tree.map(leaf, gate, up)


def separate[W: (QuantArray, ExpertRows)](both: W) -> tuple[W, W]:
    """The inverse of `interleave`."""
    groups = both.shape[-2] // GROUP // 2

    def leaf(array: jax.Array, which: int) -> jax.Array:
        *outer, rows, columns = array.shape
        parts = array.reshape(*outer, groups, 2, rows // groups // 2, columns)
        return parts[..., which, :, :].reshape(*outer, rows // 2, columns)

    return jax.tree.map(lambda array: leaf(array, 0), both), jax.tree.map(lambda array: leaf(array, 1), both)
