"""Logical axes to mesh axes: the only place that knows what a mesh looks like.

Parameters, caches and activations name their axes ("heads", "experts", ...); RULES says over which axes of
the mesh each is split. XLA does the rest. To lay the model out differently, edit the table or pass another.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dsv4_jax.config import Config
from dsv4_jax.errors import EXIT_USAGE, MemoryPlanError
from pallas_kernels import QuantArray

MESH_AXES = ("data", "expert", "tensor")

Rules = Mapping[str, str | tuple[str, ...] | None]

# None means replicated.
RULES: Rules = {
    "batch": "data",
    "tokens": None,
    "vocab": ("expert", "tensor"),
    "hidden": None,
    "streams": None,
    "q_lora": None,
    "heads": "tensor",  # heads * head_dim too: consecutive heads stay together
    "head_dim": None,
    "o_groups": "tensor",  # groups of heads, so they split with heads
    "o_lora": None,
    "experts": "expert",
    "expert_hidden": "tensor",
    "index_heads": None,  # every device chooses the same entries
    "cache_slots": None,  # one key-value head: nothing to split
}


def spec(*axes: str | None, rules: Rules = RULES) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions are `axes`.

    Raises:
      KeyError: an axis has no rule.
      ValueError: two dimensions would be split over one mesh axis.
    """
    mesh_axes = [None if axis is None else rules[axis] for axis in axes]
    used = [name for axis in mesh_axes for name in ((axis,) if isinstance(axis, str) else axis or ())]
    if len(used) != len(set(used)):
        raise ValueError(f"{axes} would split two dimensions over one mesh axis: {mesh_axes}")
    return PartitionSpec(*mesh_axes)


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


def check_mesh(config: Config, mesh_shape: Mapping[str, int]) -> None:
    """Refuses a mesh that does not divide the model, naming the sizes that do.

    Raises:
      MemoryPlanError: exit code 2.
    """
    divided = {
        "tensor": {
            "num_attention_heads": config.num_attention_heads,
            "o_groups": config.o_groups,
            "moe_intermediate_size": config.moe_intermediate_size,
        },
        "expert": {"n_routed_experts": config.n_routed_experts},
    }
    flags = {"tensor": "tp", "expert": "ep"}
    for axis, sizes in divided.items():
        ways = mesh_shape.get(axis, 1)
        wrong = [f"{name} {size}" for name, size in sizes.items() if size % ways]
        if wrong:
            common = math.gcd(*sizes.values())
            legal = [str(n) for n in range(1, common + 1) if common % n == 0]
            raise MemoryPlanError(
                f"{flags[axis]}={ways} does not divide {', '.join(wrong)}",
                hint=f"{flags[axis]} can be {', '.join(legal)}",
                exit_code=EXIT_USAGE,
            )
    ways = mesh_shape.get("expert", 1) * mesh_shape.get("tensor", 1)
    if config.vocab_size % ways:
        raise MemoryPlanError(
            f"tp * ep = {ways} does not divide vocab_size {config.vocab_size}",
            hint="choose tp * ep to divide it",
            exit_code=EXIT_USAGE,
        )


def _divisible(partition: PartitionSpec, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """`partition` without the axes that do not divide `shape`, which stay whole on every device."""
    kept = []
    for axis, size in zip(partition, shape, strict=True):
        names = (axis,) if isinstance(axis, str) else axis or ()
        kept.append(axis if size % math.prod(mesh.shape[name] for name in names) == 0 else None)
    return PartitionSpec(*kept)


def named_sharding(mesh: Mesh, axes: Sequence[str | None], shape: tuple[int, ...]) -> NamedSharding:
    """Where an array with these logical axes lies; a dimension that does not divide is replicated.

    The sizes that matter are refused by `check_mesh`; what is left are block scales, of which a small
    model can have fewer than there are devices.
    """
    return NamedSharding(mesh, _divisible(spec(*axes), shape, mesh))


def parameter_sharding(mesh: Mesh, axes: Sequence[str | None], value: jax.ShapeDtypeStruct | QuantArray):
    """The sharding of one parameter, a tree like `value`: a quantised one's scale splits with its values."""
    return jax.tree.map(lambda leaf: named_sharding(mesh, axes, leaf.shape), value)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tells the partitioner how an activation lies on the mesh of `jax.set_mesh`; without one, nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, _divisible(spec(*axes), x.shape, mesh))
