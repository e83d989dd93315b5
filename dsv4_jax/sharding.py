"""Logical axes to mesh axes: the only place that knows what a mesh looks like.

Parameters, caches and activations name their axes ("heads", "experts", ...); a table of RULES says over which
axes of the mesh each is split. To lay the model out differently, name another table or write one.

A device's part is a whole matrix in its own right: quantised weights are split between their blocks, never
inside of one. Where the blocks of a dimension do not come out even, the last devices have fewer of them, or
none, and zeros in their place: 3,072 rows on 16 devices are two blocks of 128 on twelve of them.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dsv4_jax.config import Config
from dsv4_jax.errors import EXIT_USAGE, MemoryPlanError
from pallas_kernels import QuantArray
from pallas_kernels.formats import FORMATS

MESH_AXES = ("data", "expert", "tensor")
_FLAGS = {"data": "dp", "expert": "ep", "tensor": "tp"}
BLOCK = 128  # numbers of a weight, or of an activation, that share a scale: no device has a part of these

Axes = tuple[str, ...]
_ALL: Axes = ("expert", "tensor")  # all devices that work on the same tokens


@dataclasses.dataclass(frozen=True)
class Rules:
    """Over which axes of the mesh each logical axis is split; () leaves it whole on every device.

    The defaults are those of the table "tp+ep".
    """

    batch: Axes = ("data",)
    tokens: Axes = ()
    vocab: Axes = _ALL
    hidden: Axes = ()
    streams: Axes = ()
    q_lora: Axes = ()
    heads: Axes = _ALL  # heads * head_dim too: consecutive heads stay together
    head_dim: Axes = ()
    o_groups: Axes = _ALL  # groups of heads, so they split with heads
    o_lora: Axes = ()
    experts: Axes = ("expert",)
    expert_hidden: Axes = ("tensor",)
    shared_hidden: Axes = _ALL
    index_heads: Axes = ()  # every device chooses the same entries
    cache_slots: Axes = ()  # of entries that an indexer chooses from; all heads share one key-value


RULES: Mapping[str, Rules] = {
    "tp+ep": Rules(),
    "tp": Rules(experts=(), expert_hidden=_ALL),
    "ep": Rules(experts=_ALL, expert_hidden=()),
    # Other tokens on every device of the expert axis: they travel to their experts and back.
    "dp-attention": Rules(
        batch=("data", "expert"),
        vocab=("tensor",),
        heads=("tensor",),
        o_groups=("tensor",),
        experts=_ALL,
        expert_hidden=(),
        shared_hidden=("tensor",),
    ),
    # For long contexts: every device keeps and searches its own part of the text.
    "context": Rules(cache_slots=_ALL),
}
DEFAULT_RULES = "tp+ep"

# The table in use beside the mesh of `jax.set_mesh`; as that, part of the key of every cache of jax.jit.
_rules = jax.make_user_context(RULES[DEFAULT_RULES])

_FEWER = ("batch", "vocab")  # split over fewer axes of the mesh where their size does not divide by all
_BY_BLOCK = ("expert_hidden", "shared_hidden")  # split between blocks, and padded


def current_rules() -> Rules:
    """The table that `on_mesh` set."""
    return _rules.value


@contextmanager
def on_mesh(mesh: Mesh | None, rules: Rules | str = DEFAULT_RULES) -> Iterator[None]:
    """In a `with`, lays out what is called or traced inside it over this mesh; None changes nothing."""
    if mesh is None:
        yield
        return
    with jax.set_mesh(mesh), _rules(find_rules(rules)):
        yield


@contextmanager
def under_rules(mesh: AbstractMesh, rules: Rules) -> Iterator[None]:
    """As `on_mesh`, for a mesh of devices that need not exist: to ask for shapes."""
    with jax.sharding.use_abstract_mesh(mesh), _rules(rules):
        yield


def find_rules(rules: Rules | str) -> Rules:
    """The table of this name.

    Raises:
      MemoryPlanError: there is none; exit code 2.
    """
    if isinstance(rules, Rules):
        return rules
    if rules not in RULES:
        raise MemoryPlanError(
            f"no rules are called {rules!r}", hint=f"have {', '.join(RULES)}", exit_code=EXIT_USAGE
        )
    return RULES[rules]


def spec(*axes: str | None, rules: Rules | None = None) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions are `axes`.

    Raises:
      AttributeError: an axis has no rule.
      ValueError: two dimensions would be split over one mesh axis.
    """
    rules = rules or current_rules()
    names = [() if axis is None else getattr(rules, axis) for axis in axes]
    used = [name for each in names for name in each]
    if len(used) != len(set(used)):
        raise ValueError(f"{axes} would split two dimensions over one mesh axis: {names}")
    return PartitionSpec(*(each if len(each) > 1 else each[0] if each else None for each in names))


def ways(axes: Axes, mesh_shape: Mapping[str, int]) -> int:
    """Into how many parts these axes of the mesh split something."""
    return math.prod(mesh_shape.get(name, 1) for name in axes)


def resolve(rules: Rules, mesh_shape: Mapping[str, int], sizes: Mapping[str, int]) -> Rules:
    """The rules for a batch or a vocabulary of these sizes, which need not divide by all their mesh axes."""
    changes = {}
    for axis, size in sizes.items():
        names = getattr(rules, axis)
        while size % ways(names, mesh_shape):
            names = names[1:]
        changes[axis] = names
    return dataclasses.replace(rules, **changes)


def make_mesh(dp: int = 1, ep: int = 1, tp: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of dp x ep x tp devices, the first ones of `devices` (default: all there are).

    Raises:
      MemoryPlanError: fewer devices than that.
    """
    devices = jax.devices() if devices is None else devices
    needed = dp * ep * tp
    if needed > len(devices):
        raise MemoryPlanError(
            f"mesh dp={dp},ep={ep},tp={tp} needs {needed} devices, found {len(devices)}",
            hint="choose a smaller mesh",
            exit_code=EXIT_USAGE,
        )
    return Mesh(np.asarray(devices[:needed]).reshape(dp, ep, tp), MESH_AXES)


def check_mesh(config: Config, mesh_shape: Mapping[str, int], rules: Rules) -> None:
    """Refuses a mesh over which the model cannot be split, naming the sizes with which it can.

    Raises:
      MemoryPlanError: exit code 2.
    """
    heads, groups, experts = config.num_attention_heads, config.o_groups, config.n_routed_experts

    def splits_heads(parts: int) -> bool:
        # A device has whole groups, or an equal part of one; both in blocks of wo_b's columns.
        by_group = groups % parts == 0 or parts % groups == 0
        in_blocks = parts == 1 or groups * config.o_lora_rank % (parts * BLOCK) == 0
        return heads % parts == 0 and by_group and in_blocks

    def splits_experts(parts: int) -> bool:
        return experts % parts == 0

    heads_of = f"num_attention_heads {heads} in o_groups {groups} of rank {config.o_lora_rank}"
    for axes, splits, what, most in (
        (rules.heads, splits_heads, heads_of, heads),
        (rules.experts, splits_experts, f"n_routed_experts {experts}", experts),
    ):
        parts = ways(axes, mesh_shape)
        if not splits(parts):
            names = " * ".join(_FLAGS[axis] for axis in axes if mesh_shape[axis] > 1)
            legal = ", ".join(str(number) for number in range(1, most + 1) if splits(number))
            raise MemoryPlanError(
                f"{names} = {parts} cannot split {what}",
                hint=f"{names} can be {legal}",
                exit_code=EXIT_USAGE,
            )


# --- parameters


class Placement(NamedTuple):
    """Where one array of a checkpoint lies on a mesh.

    Attributes:
      shape: of the whole, with what fills it up at the end of a dimension.
      sharding: how it is split.
      stored: its shape in the checkpoint.
      pieces: how many devices share each slab of rows, each with a piece of the columns (see `source`).
    """

    shape: tuple[int, ...]
    sharding: NamedSharding
    stored: tuple[int, ...]
    pieces: int = 1

    def source(self, index: tuple[slice, ...]) -> tuple[range, ...]:
        """What of the stored array fills the beginning of the part at `index`; the rest is filling.

        wo_a, split more finely than its groups: its devices are numbered by group, then by piece of the
        group's columns, and its parts lie one below the other in that order.
        """
        if self.pieces == 1:
            return tuple(range(size)[each] for size, each in zip(self.stored, index, strict=True))
        rows = range(self.shape[0])[index[0]]
        number = rows.start // len(rows)
        group, piece = divmod(number, self.pieces)
        width = self.shape[1]
        return range(group * len(rows), (group + 1) * len(rows)), range(piece * width, (piece + 1) * width)


def placements(
    config: Config,
    mesh: Mesh,
    rules: Rules,
    axes: Sequence[str | None],
    value: jax.ShapeDtypeStruct | QuantArray,
) -> Any:
    """The Placement of each array of a parameter, in a tree like `value`: a scale splits with its values."""
    if not isinstance(value, QuantArray):
        return _place(config, mesh, rules, axes, value.shape, (1, 1))
    (rows, columns), packed = FORMATS[value.format].block, FORMATS[value.format].packed
    return dataclasses.replace(
        value,
        values=_place(config, mesh, rules, axes, value.values.shape, (1, packed)),  # type: ignore[arg-type]
        scale=_place(config, mesh, rules, axes, value.scale.shape, (rows, columns)),  # type: ignore[arg-type]
    )


def _place(
    config: Config,
    mesh: Mesh,
    rules: Rules,
    axes: Sequence[str | None],
    stored: tuple[int, ...],
    numbers: tuple[int, int],
) -> Placement:
    """`numbers`: of the parameter, that an element stands for, along the last two dimensions."""
    per_element = (1,) * (len(stored) - 2) + numbers
    sizes = {axis: size for axis, size in zip(axes, stored, strict=True) if axis in _FEWER}
    rules = resolve(rules, mesh.shape, sizes)
    shape = []
    for axis, size, each in zip(axes, stored, per_element[-len(stored) :], strict=True):
        parts = 1 if axis is None else ways(getattr(rules, axis), mesh.shape)
        unit = BLOCK // each if axis in _BY_BLOCK and parts > 1 else 1
        shape.append(-(-size // (unit * parts)) * unit * parts)
    pieces = 1
    if axes[0] == "o_groups":  # wo_a
        pieces = max(1, ways(rules.o_groups, mesh.shape) // config.o_groups)
        shape = [shape[0] * pieces, shape[1] // pieces]
    return Placement(tuple(shape), NamedSharding(mesh, spec(*axes, rules=rules)), stored, pieces)


# --- activations


def ways_of(axis: str) -> int:
    """Into how many parts a logical axis is split on the mesh of `on_mesh`; 1 without one."""
    return ways(getattr(current_rules(), axis), jax.sharding.get_abstract_mesh().shape)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tells the partitioner how an activation lies on the mesh of `on_mesh`; without one, nothing.

    Args:
      axes: of its leading dimensions; the others are whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    sizes = {axis: size for axis, size in zip(axes, x.shape, strict=False) if axis in _FEWER}
    rules = resolve(current_rules(), mesh.shape, sizes)
    return jax.lax.with_sharding_constraint(x, spec(*axes, rules=rules))
