"""The programs of a serving mesh, as shapes: parameters, caches, a prefill piece and a decode step."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from dsv4_jax.cache import Cache, make_cache
from dsv4_jax.checkpoint.layouts import Layout
from dsv4_jax.checkpoint.names import nest, parameters
from dsv4_jax.config import Config
from dsv4_jax.decode import Caches, Models, Requests, Sequences, step
from dsv4_jax.model import Params, bind
from dsv4_jax.numerics import Numerics
from dsv4_jax.parallel import parameter_specs_of, rows_of
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.sharding import Placement, Rules, placements, resolve, spec
from pallas_kernels import Target


class ShapeLayout(Layout):
    """Lays out shapes in place of arrays."""

    def _change(self, paths: list[Any], change: Callable[..., tuple[Any, ...]]) -> None:
        assert self._mesh is not None
        mesh, values = self._mesh, [self.leaves[path] for path in paths]

        def local(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)

        # Whether tiles hold a weight depends on its numbers; those of the released checkpoints fit.
        experts = importlib.import_module("pallas_kernels.expert_mlp")
        with mock.patch.object(experts, "tileable", lambda weight: True):
            parts = jax.eval_shape(change, *jax.tree.map(local, values))
        for path, part in zip(paths, parts, strict=True):
            specs = iter(parameter_specs_of(part, self._axes[path], self._rules))

            def whole(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
                sharding = NamedSharding(mesh, next(specs))
                one = sharding.shard_shape(tuple(size * mesh.size for size in leaf.shape))
                shape = [
                    size * size * mesh.size // whole for size, whole in zip(leaf.shape, one, strict=True)
                ]
                return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype, sharding=sharding)

            self.leaves[path] = jax.tree.map(whole, part)


def parameter_shapes(config: Config, mesh: Mesh, rules: Rules, target: Target) -> Params:
    """The main model's parameters, as `checkpoint.load` would lay them out on such a mesh."""
    declared = parameters(config, mtp=False)
    layout = ShapeLayout(target, mesh, rules, {each.path: each.axes for each in declared})

    def placed(place: Placement, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(place.shape, leaf.dtype, sharding=place.sharding)

    for each in declared:
        places = placements(config, mesh, rules, each.axes, each.value)
        layout.take(
            each.path,
            jax.tree.map(placed, places, each.value, is_leaf=lambda leaf: isinstance(leaf, Placement)),
        )
    return nest(layout.leaves)
