"""The definition of `expert_mlp`."""

import jax
import jax.numpy as jnp

from pallas_kernels.activation_quant import reference as activation_quant
from pallas_kernels.expert_mlp.interleave import separate
from pallas_kernels.expert_mlp.rows import ExpertRows, from_rows
from pallas_kernels.expert_mlp.tiles import ExpertTiles, from_tiles
from pallas_kernels.formats import QuantArray
from pallas_kernels.grouped_matmul import reference as grouped_matmul
from pallas_kernels.routing import reference as routing
from pallas_kernels.swiglu import reference as swiglu

Stored = jax.Array | QuantArray
Weight = Stored | ExpertTiles | ExpertRows


def _as_stored(w1: Weight, w2: Weight, w3: Weight | None) -> tuple[Stored, Stored, Stored]:
    """The three weights as in a checkpoint, of what `prepare_experts` made of them."""
    if isinstance(w1, ExpertTiles) and isinstance(w2, ExpertTiles):
        gate, up = separate(from_tiles(w1))
        return gate, from_tiles(w2), up
    if isinstance(w1, ExpertRows) and isinstance(w2, ExpertRows):
        gate, up = separate(w1)
        return from_rows(gate), from_rows(w2), from_rows(up)
    assert not isinstance(w1, ExpertTiles | ExpertRows)
    assert not isinstance(w2, ExpertTiles | ExpertRows)
    assert not isinstance(w3, ExpertTiles | ExpertRows | None)
    return w1, w2, w3


def expert_mlp(
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    w1: Weight,
    w2: Weight,
    w3: Weight | None,
    limit: float,
    activation: str | None,
) -> jax.Array:
    gate, down, up = _as_stored(w1, w2, w3)
    tokens, choices = experts.shape
    order, group_sizes = routing.sort_by_expert(experts, gate.shape[0])

    def product(rows: jax.Array, weight: Stored) -> jax.Array:
        quantised = activation is not None and isinstance(weight, QuantArray)
        operand = activation_quant.activation_quant(rows) if quantised else rows
        return grouped_matmul.grouped_matmul(operand, weight, group_sizes, x.dtype)

    rows = x[order // choices]
    share = weights.reshape(-1)[order]
    inner = swiglu.swiglu(product(rows, gate), product(rows, up), share, limit, x.dtype)
    out = product(inner, down)
    # Back to (token, choice) order before the sum: a token's terms add up in one fixed order.
    back = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))
    return out[back].reshape(tokens, choices, -1).astype(jnp.float32).sum(1)
