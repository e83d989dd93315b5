"""Programs that every device of a mesh runs on its own parts, and all that the devices tell each other.

`spread` runs a function on each device with what it holds of the arguments: kernels, which no compiler can
split, are called there. Inside, the functions below are the only traffic. They name logical axes; where an
axis is not split, and so without any mesh, each of them does nothing.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from dsv4_jax.sharding import Axes, Rules, constrain, current_rules, resolve, spec, ways
from pallas_kernels import ExpertTiles


class Along:
    """The logical axes of an array's leading dimensions; the others are whole. For a tree: of each leaf."""

    def __init__(self, *axes: str | None):
        self.axes = axes


# The rules for the program inside of which we are, in `spread`; None outside.
_inside: Any = jax.make_user_context(None)

_SIZED = ("batch", "vocab")  # axes whose rules depend on their size


def spread(
    function: Callable[..., Any],
    modules: Sequence[nnx.Module],
    arguments: Sequence[tuple[Any, Any]],
    out: Any,
) -> Any:
    """`function(*modules, *arguments)`, by each device of the mesh on its own parts.

    Args:
      modules: with parameters in them; each is given its parts of these.
      arguments: pairs of a tree of arrays and a tree of Along, or a prefix of it, that says how it is split.
      out: how the result is put together again; axes over which it is not split hold the same everywhere.

    Returns:
      The result; without a mesh that of the function itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    values = [value for value, _ in arguments]
    if mesh.empty or _inside.value is not None:
        return function(*modules, *values)
    split = [nnx.split(module) for module in modules]
    leaves = [jax.tree.leaves(state) for _, state in split]
    sizes = _sizes([*arguments, *(pair for _, state in split for pair in _parameters(state))])
    rules = resolve(current_rules(), mesh.shape, sizes)

    def specs(tree: Any) -> Any:
        return jax.tree.map(lambda along: spec(*along.axes, rules=rules), tree)

    parameter_specs = [
        [each for value, along in _parameters(state) for each in parameter_specs_of(value, along.axes, rules)]
        for _, state in split
    ]
    value_leaves, tree = jax.tree.flatten(values)
    value_specs = jax.tree.leaves(jax.tree.broadcast([specs(along) for _, along in arguments], values))
    # The partitioner fails on arguments without any number in them: those are made inside.
    real = [leaf.size > 0 for leaf in value_leaves]

    def local(leaves: list[list[jax.Array]], passed: list[jax.Array]) -> Any:
        parts = [
            nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), own))
            for (graphdef, state), own in zip(split, leaves, strict=True)
        ]
        given = iter(passed)
        own_values = [
            next(given)
            if is_real
            else jnp.zeros(NamedSharding(mesh, each).shard_shape(leaf.shape), leaf.dtype)
            for leaf, each, is_real in zip(value_leaves, value_specs, real, strict=True)
        ]
        with _inside(rules):
            return function(*parts, *jax.tree.unflatten(tree, own_values))

    run = jax.shard_map(
        local,
        in_specs=(parameter_specs, list(itertools.compress(value_specs, real))),
        out_specs=specs(out),
        check_vma=False,
    )
    return run(leaves, list(itertools.compress(value_leaves, real)))


def _parameters(state: Any) -> list[tuple[Any, Along]]:
    """Values and axes of a module's parameters, in the order of its leaves."""
    variables = jax.tree.leaves(state, is_leaf=lambda each: isinstance(each, nnx.Variable))
    return [(each.get_value(), Along(*each.axes)) for each in variables]


def parameter_specs_of(value: Any, axes: Sequence[str | None], rules: Rules) -> list[PartitionSpec]:
    """How each leaf of a parameter is split, in whichever layout it is."""
    if isinstance(value, ExpertTiles):
        experts, rows, columns = (() if axis is None else getattr(rules, axis) for axis in axes)
        # A row's exponent is that of its largest group, so each device that has a piece of it has its own.
        return [spec(*axes, rules=rules), PartitionSpec(experts or None, (rows + columns) or None)]
    return [spec(*axes, rules=rules)] * len(jax.tree.leaves(value))


def _sizes(pairs: Sequence[tuple[Any, Any]]) -> Mapping[str, int]:
    """The size of each axis whose rules depend on it.

    Raises:
      ValueError: an axis has two sizes.
    """
    sizes: dict[str, int] = {}

    def note(along: Along, tree: Any) -> None:
        for leaf in jax.tree.leaves(tree):
            for axis, size in zip(along.axes, leaf.shape, strict=False):
                if axis in _SIZED and sizes.setdefault(axis, size) != size:
                    raise ValueError(f"{axis} has sizes {sizes[axis]} and {size} in one program")

    for value, along in pairs:
        jax.tree.map(note, along, value)
    return sizes


# --- inside


def axes_of(*axes: str) -> Axes:
    """The axes of the mesh over which these logical axes are split, without those of one device."""
    rules = _inside.value
    if rules is None:
        return ()
    shape = jax.sharding.get_abstract_mesh().shape
    names = dict.fromkeys(name for axis in axes for name in getattr(rules, axis))
    return tuple(name for name in names if shape[name] > 1)


def size_of(names: Axes) -> int:
    """Devices along these axes of the mesh."""
    return ways(names, jax.sharding.get_abstract_mesh().shape) if names else 1


def parts(axis: str) -> int:
    """Into how many parts a logical axis is split."""
    return size_of(axes_of(axis))


def part(axis: str) -> jax.Array | int:
    """Which of them this device has."""
    names = axes_of(axis)
    return jax.lax.axis_index(names) if names else 0


def total(x: Any, *axes: str) -> Any:
    """The sum of what all devices along these axes have."""
    names = axes_of(*axes)
    return jax.lax.psum(x, names) if names else x


def largest(x: jax.Array, *axes: str) -> jax.Array:
    """The largest of what all devices along these axes have, element by element."""
    names = axes_of(*axes)
    return jax.lax.pmax(x, names) if names else x


def gathered(x: jax.Array, axis: str, *, dimension: int) -> jax.Array:
    """The parts of all devices along an axis, one after the other in this dimension."""
    names = axes_of(axis)
    return jax.lax.all_gather(x, names, axis=dimension, tiled=True) if names else x


def total_of_terms(*terms: tuple[jax.Array, tuple[str, ...]], apart_from: str) -> jax.Array:
    """The sum over all devices of terms, each of which is split along logical axes of its own.

    One sum for all terms: what several devices have alike, only the first of them adds.

    Args:
      apart_from: a logical axis; devices along it have other things to add up.
    """
    apart = axes_of(apart_from)
    split = [[name for name in axes_of(*axes) if name not in apart] for _, axes in terms]
    everywhere = tuple(dict.fromkeys(name for names in split for name in names))
    added = []
    for (value, _), names in zip(terms, split, strict=True):
        alike = tuple(name for name in everywhere if name not in names)
        added.append(jnp.where(jax.lax.axis_index(alike) == 0, value, 0) if alike else value)
    together = sum(added[1:], added[0])
    return jax.lax.psum(together, everywhere) if everywhere else together


def largest_along(x: jax.Array, names: Axes) -> jax.Array:
    """As `largest`, along these axes of the mesh."""
    return jax.lax.pmax(x, names)


def exchanged(x: jax.Array, names: Axes) -> jax.Array:
    """x[i] goes to the i-th device along these axes of the mesh; of what comes back, [i] is from that one."""
    return jax.lax.all_to_all(x, names, 0, 0, tiled=True)


def scattered_in_groups(x: jax.Array, axis: str, size: int, *, dimension: int) -> jax.Array:
    """The sum within each group of `size` neighbours along an axis, of which each keeps its piece."""
    names = axes_of(axis)
    count = size_of(names)
    groups = np.arange(count).reshape(-1, size).tolist()
    return jax.lax.psum_scatter(x, names, scatter_dimension=dimension, axis_index_groups=groups, tiled=True)


# --- rows of a batch that is split


def rows_of(tree: Any) -> Any:
    """How a tree of arrays [B, ...] is split: as those objects in it say that have `axes`, else by rows."""

    def says(each: Any) -> bool:
        return hasattr(type(each), "axes")

    return jax.tree.map(lambda each: each.axes if says(each) else Along("batch"), tree, is_leaf=says)


def settled(tree: Any) -> Any:
    """The same arrays [B, ...], where `rows_of` says that they lie.

    Always there, so that no program that takes them is compiled twice.
    """
    return jax.tree.map(lambda along, leaf: constrain(leaf, *along.axes), rows_of(tree), tree)


def on_all(tree: Any) -> Any:
    """The same arrays, whole on every device: so each process can read them."""
    return jax.tree.map(constrain, tree)


def take_row(tree: Any, row: jax.Array) -> Any:
    """One row [1, ...] of each leaf [B, ...], on all devices alike."""

    def take(tree: Any, row: jax.Array) -> Any:
        return jax.tree.map(lambda leaf: _take(leaf, row), tree)

    split = rows_of(tree)
    return spread(take, (), ((tree, split), (row, Along())), jax.tree.map(_alike, split))


def put_row(tree: Any, values: Any, row: jax.Array) -> Any:
    """The leaves [B, ...] with one row replaced by those of `values` [1, ...]."""

    def put(tree: Any, values: Any, row: jax.Array) -> Any:
        return jax.tree.map(lambda leaf, new: _put(leaf, new, row), tree, values)

    split = rows_of(tree)
    values = jax.tree.map(lambda leaf, new: jnp.asarray(new, leaf.dtype), tree, values)
    return spread(put, (), ((tree, split), (values, jax.tree.map(_alike, split)), (row, Along())), split)


def _alike(along: Along) -> Along:
    return Along(None, *along.axes[1:])


def _local_row(leaf: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The number of a row among this device's own, and whether it is one of them."""
    rows = leaf.shape[0]
    local = row - part("batch") * rows
    return jnp.clip(local, 0, rows - 1), (local >= 0) & (local < rows)


def _take(leaf: jax.Array, row: jax.Array) -> jax.Array:
    if parts("batch") == 1:
        return jax.lax.dynamic_slice_in_dim(leaf, row, 1)
    local, mine = _local_row(leaf, row)
    found = jax.lax.dynamic_slice_in_dim(leaf, local, 1)
    # Numbers as they are stored, so that their sum with zeros is exact, whatever they are.
    found = jnp.where(mine, found, jnp.zeros_like(found))
    return (
        total(found.astype(jnp.int32), "batch").astype(bool) if found.dtype == bool else total(found, "batch")
    )


def _put(leaf: jax.Array, new: jax.Array, row: jax.Array) -> jax.Array:
    if parts("batch") == 1:
        return jax.lax.dynamic_update_slice_in_dim(leaf, new, row, 0)
    local, mine = _local_row(leaf, row)
    old = jax.lax.dynamic_slice_in_dim(leaf, local, 1)
    return jax.lax.dynamic_update_slice_in_dim(leaf, jnp.where(mine, new, old), local, 0)
