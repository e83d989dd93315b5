"""Which program works on which rows: a routing turned into tiles of rows that share an expert."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation, select
from pallas_kernels.routing import reference as routing
from pallas_kernels.target import Target


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Who works on what, for one routing: rows are (token, choice) pairs sorted by expert, stably.

    Pairs of no expert are the last rows, and in no tile: nobody works on them.

    Attributes:
      order: [R] the pair of each row.
      row: [R] the row of each pair.
      expert, start, end: [tiles] of each tile of rows: its expert, first row, and row after the last of its
        expert. Tiles that are left over come last and have expert -1, start and end R; there are as many as
        the worst routing needs, so no row is ever dropped.
      count: [1] how many tiles are not left over.
      arrivals: [tiles] zeros. A kernel whose programs wait for each other counts in them; it leaves zeros, so
        that the plan stays what it is.
    """

    order: jax.Array
    row: jax.Array
    expert: jax.Array
    start: jax.Array
    end: jax.Array
    count: jax.Array
    arrivals: jax.Array


def plan(
    experts: jax.Array, n_routed_experts: int, tile_rows: int, *, implementation: str | None = None
) -> Plan:
    """The plan of a routing [T, A] int32, of experts 0 to `n_routed_experts` - 1, for such tiles.

    `n_routed_experts` itself stands for no expert.
    """
    return select(IMPLEMENTATIONS, implementation, experts, n_routed_experts, tile_rows)


def tile_count(rows: int, n_routed_experts: int, tile_rows: int) -> int:
    """Tiles that the worst routing needs: each expert that has rows may fill its last tile in part."""
    return rows // tile_rows + min(n_routed_experts, rows)


def total_of_choices(out: jax.Array, weights: jax.Array) -> jax.Array:
    """[T, M] float32, what a token's experts add, of out [R, M] in (token, choice) order and weights [T, A].

    Always in the order of the choices: the same bits in every run. Rows of pairs of no expert were never
    written; their weight is 0, and so is what they add.
    """
    terms = out.reshape(*weights.shape, -1).astype(jnp.float32)
    return jnp.where(weights[:, :, None] != 0, terms, 0).sum(1)


def _plan(experts: jax.Array, n_routed_experts: int, tile_rows: int) -> Plan:
    """The definition."""
    rows = experts.size
    order, group_sizes = routing.sort_by_expert(experts, n_routed_experts)
    row = jnp.zeros_like(order).at[order].set(jnp.arange(rows, dtype=order.dtype), unique_indices=True)
    tile = jnp.arange(tile_count(rows, n_routed_experts, tile_rows), dtype=jnp.int32)
    per_expert = (group_sizes + tile_rows - 1) // tile_rows
    last, ends = jnp.cumsum(per_expert), jnp.cumsum(group_sizes)
    expert = (last <= tile[:, None]).sum(1, dtype=jnp.int32)
    real, known = expert < n_routed_experts, jnp.minimum(expert, n_routed_experts - 1)
    start = (ends - group_sizes)[known] + (tile - (last - per_expert)[known]) * tile_rows
    return Plan(
        order,
        row,
        jnp.where(real, expert, -1),
        jnp.where(real, start, rows),
        jnp.where(real, ends[known], rows),
        last[-1:],
        jnp.zeros_like(tile),
    )


def _run_triton(experts, n_routed_experts, tile_rows) -> Plan:
    from pallas_kernels.expert_mlp import plan_triton  # Triton is an extra that a CPU does without

    return plan_triton.plan(experts, n_routed_experts, tile_rows)


def _triton_fits(target: Target, experts, n_routed_experts, tile_rows) -> bool:
    integers = experts.dtype == jnp.int32 and experts.size > 0
    return target.vendor != "cpu" and integers and n_routed_experts <= 1024


IMPLEMENTATIONS = (
    Implementation("triton", _run_triton, fits=_triton_fits),
    Implementation("reference", _plan),
)
