"""Parameters in the layouts that this device's kernels read fastest, made once while a checkpoint loads.

The numbers stay the same. What changes is where they lie: the gate and up projections of the routed experts
become one weight in tiles, and linears that read the same input one weight of all their rows. The others of
those are None from then on; `nn` asks for that. On a mesh each device lays out its own parts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from dsv4_jax.checkpoint.names import Parameter, nest
from dsv4_jax.config import Config
from dsv4_jax.model import Params
from dsv4_jax.parallel import parameter_specs_of
from dsv4_jax.sharding import DEFAULT_RULES, RULES, Rules
from pallas_kernels import QuantArray, Target, current_target, join_rows, prepare_experts
from pallas_kernels.fnuz import for_target

Path = tuple[str | int, ...]

_EXPERTS = ("w1", "w2", "w3")  # below `experts`
# Below one module, in the order in which `nn` reads their columns; not every module has all of a group.
_TOGETHER = (
    ("wq_a", "wkv"),
    ("w1", "w3"),
    (
        "compressor.wkv",
        "compressor.wgate",
        "indexer.compressor.wkv",
        "indexer.compressor.wgate",
        "indexer.weights_proj",
    ),
)


class Layout:
    """Takes parameters as a checkpoint has them, and lays them out as soon as all are there that it takes.

    Attributes:
      leaves: the parameters so far, by path.
    """

    def __init__(
        self,
        target: Target,
        mesh: Mesh | None = None,
        rules: Rules = RULES[DEFAULT_RULES],
        axes: Mapping[Path, Sequence[str | None]] | None = None,
    ):
        """`axes`: of each parameter, where there is a mesh."""
        self.leaves: dict[Path, Any] = {}
        self._target, self._mesh, self._rules, self._axes = target, mesh, rules, axes or {}

    def take(self, path: Path, value: Any) -> None:
        """Takes a parameter, and lays out those that are complete with it."""
        self.leaves[path] = value
        if path[-2] == "experts":
            paths = [(*path[:-1], name) for name in _EXPERTS]
            if all(each in self.leaves for each in paths):
                self._change(paths, lambda w1, w2, w3: prepare_experts(w1, w2, w3, self._target))
        for names in _TOGETHER:
            endings = [(*name.split("."), "weight") for name in names]
            for ending in endings:
                if path[-len(ending) :] == ending:
                    self._join([(*path[: -len(ending)], *each) for each in endings])

    def _join(self, paths: list[Path]) -> None:
        """Joins neighbours among these weights; some may be joined already, some not there (yet)."""
        for number, path in enumerate(paths):
            before = [each for each in paths[:number] if self.leaves.get(each) is not None]
            arrived = all(each in self.leaves for each in paths[: number + 1])
            if before and arrived and self.leaves[path] is not None:
                self._change([before[-1], path], lambda one, two: join_rows(one, two, self._target))

    def _change(self, paths: list[Path], change: Callable[..., tuple[Any, ...]]) -> None:
        """Puts what `change` makes of these parameters in their places."""
        values = [self.leaves[path] for path in paths]
        if self._mesh is None:
            changed = change(*values)
        elif self._target.vendor == "cpu":
            return
        else:
            changed = self._changed_by_parts(values, [self._axes[path] for path in paths], change)
        self.leaves.update(zip(paths, changed, strict=True))

    def _changed_by_parts(
        self, values: list[Any], axes: list[Sequence[str | None]], change: Callable[..., tuple[Any, ...]]
    ) -> Sequence[Any]:
        """What `change` makes of each device's parts; the values as they are, where devices would differ."""
        assert self._mesh is not None
        devices = [each for each in self._mesh.devices.flat if each.process_index == jax.process_index()]
        parts = [change(*_parts_on(device, values)) for device in devices]
        shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), each) for each in parts]
        if not _everywhere(all(each == shapes[0] for each in shapes)):
            return values
        changed = []
        for number, its_axes in enumerate(axes):
            leaves = [jax.tree.leaves(each[number]) for each in parts]
            specs = parameter_specs_of(parts[0][number], its_axes, self._rules)
            arrays = [
                _whole(NamedSharding(self._mesh, spec), [own[place] for own in leaves])
                for place, spec in enumerate(specs)
            ]
            changed.append(jax.tree.unflatten(jax.tree.structure(parts[0][number]), arrays))
        return changed


def assemble(
    config: Config, stored: list[Parameter], arrays: Iterator[jax.Array], mesh: Mesh | None, rules: Rules
) -> tuple[Params, Params | None]:
    """The parameters of the model and of its MTP head, from their arrays, laid out for this device.

    Args:
      stored: the parameters as a checkpoint has them.
      arrays: of all of them, leaf by leaf.
    """
    target = current_target()
    layout = Layout(target, mesh, rules, {parameter.path: parameter.axes for parameter in stored})
    for parameter in stored:
        tree = jax.tree.structure(parameter.value)
        value = jax.tree.unflatten(tree, [next(arrays) for _ in range(tree.num_leaves)])
        # Experts are laid out by `prepare_experts`, which starts from the checkpoint's form.
        if isinstance(value, QuantArray) and not parameter.stacked:
            value = for_target(value, target)
        layout.take(parameter.path, value)
    params = nest(layout.leaves)
    heads = params.pop("mtp", None)
    return params, heads[0] if heads else None


def _parts_on(device: Any, values: list[Any]) -> list[Any]:
    def part(array: jax.Array) -> jax.Array:
        return next(shard.data for shard in array.addressable_shards if shard.device == device)

    return jax.tree.map(part, values)


def _whole(sharding: NamedSharding, parts: list[jax.Array]) -> jax.Array:
    """One array of the parts of all devices of this process."""
    one = parts[0].shape
    partition = (*sharding.spec, *[None] * (len(one) - len(sharding.spec)))
    ways = [
        np.prod([sharding.mesh.shape[name] for name in ((axis,) if isinstance(axis, str) else axis or ())])
        for axis in partition
    ]
    shape = tuple(int(size * times) for size, times in zip(one, ways, strict=True))
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def _everywhere(holds: bool) -> bool:
    """Whether it holds in all processes."""
    if jax.process_count() == 1:
        return holds
    return bool(np.all(multihost_utils.process_allgather(np.array(holds))))
