"""Which program works on which rows: a routing turned into tiles of rows that share an expert."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.routing import sort_by_expert

_FEW = 2048  # rows up to which comparing all with all is quicker than sorting


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Who works on what, for one routing: rows are (token, choice) pairs sorted by expert.

    Attributes:
      order: [R] the pair of each row.
      expert, start, end: [tiles] of each tile of rows: its expert, first row, and row after the last of its
        expert. Tiles that are left over have expert -1; there are as many as the worst routing needs, so no
        row is ever dropped.
    """

    order: jax.Array
    expert: jax.Array
    start: jax.Array
    end: jax.Array


def plan(experts: jax.Array, n_routed_experts: int, tile_rows: int) -> Plan:
    """The plan of a routing [T, A] for tiles of `tile_rows` rows."""
    pairs, rows = experts.reshape(-1), experts.size
    order, group_sizes = (
        _few_by_expert(pairs, n_routed_experts) if rows <= _FEW else sort_by_expert(experts, n_routed_experts)
    )
    tile = jnp.arange(rows // tile_rows + min(n_routed_experts, rows), dtype=jnp.int32)
    per_expert = (group_sizes + tile_rows - 1) // tile_rows
    last, ends = jnp.cumsum(per_expert), jnp.cumsum(group_sizes)
    expert = (last <= tile[:, None]).sum(1, dtype=jnp.int32)
    known = jnp.minimum(expert, n_routed_experts - 1)
    start = (ends - group_sizes)[known] + (tile - (last - per_expert)[known]) * tile_rows
    return Plan(order, jnp.where(expert < n_routed_experts, expert, -1), start, ends[known])


def _few_by_expert(pairs: jax.Array, n_routed_experts: int) -> tuple[jax.Array, jax.Array]:
    """`sort_by_expert` by comparing all with all: a few fused passes, where a sort takes many."""
    place = jnp.arange(pairs.size, dtype=jnp.int32)
    before = (pairs < pairs[:, None]) | ((pairs == pairs[:, None]) & (place < place[:, None]))
    order = jnp.zeros_like(place).at[before.sum(1)].set(place, unique_indices=True)
    group_sizes = (pairs == jnp.arange(n_routed_experts)[:, None]).sum(1, dtype=jnp.int32)
    return order, group_sizes
