"""The programs of a serving mesh, as shapes: parameters, caches, a prefill piece and a decode step."""

import importlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv4_jax.cache import Cache, make_cache
from dsv4_jax.checkpoint.layouts import Layout
from dsv4_jax.checkpoint.names import nest, parameters
from dsv4_jax.config import Config
from dsv4_jax.decode import Caches, Models, Requests, Sequences, step
from dsv4_jax.model import Params, bind
from dsv4_jax.numerics import Numerics
from dsv4_jax.parallel import Along, parameter_specs_of, rows_of
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.sharding import Placement, Rules, current_rules, placements, resolve, spec
from dsv4_jax.slots import read_piece
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
        with mock.patch.object(experts, "tileable", return_value=True):
            parts = jax.eval_shape(change, *jax.tree.map(local, values))
        for path, part in zip(paths, parts, strict=True):
            specs = parameter_specs_of(part, self._axes[path], self._rules)
            leaves, tree = jax.tree.flatten(part)
            whole = [
                _whole(leaf, NamedSharding(mesh, each)) for leaf, each in zip(leaves, specs, strict=True)
            ]
            self.leaves[path] = jax.tree.unflatten(tree, whole)


def _whole(part: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """The array of which each device has a part of this shape."""
    large = tuple(size * sharding.mesh.size for size in part.shape)
    ways = [size // one for size, one in zip(large, sharding.shard_shape(large), strict=True)]
    shape = tuple(size * times for size, times in zip(part.shape, ways, strict=True))
    return jax.ShapeDtypeStruct(shape, part.dtype, sharding=sharding)


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


def cache_shapes(config: Config, numerics: Numerics, batch: int, max_len: int) -> Cache:
    """Empty caches; to be called inside of `on_mesh`."""
    return _laid_out(jax.eval_shape(lambda: make_cache(config, numerics, batch=batch, max_len=max_len)))


def _laid_out(tree: Any) -> Any:
    """Shapes [B, ...] where the engine has their arrays."""
    mesh = jax.sharding.get_mesh()

    def place(along: Along, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        pairs = zip(along.axes, leaf.shape, strict=False)
        sizes = {axis: size for axis, size in pairs if axis in ("batch", "vocab")}
        rules = resolve(current_rules(), mesh.shape, sizes)
        sharding = NamedSharding(mesh, spec(*along.axes, rules=rules))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, rows_of(tree), tree)


def decode_step(config: Config, numerics: Numerics, params: Params, batch: int, max_len: int) -> Any:
    """A decode step of `batch` sequences that draw their tokens, traced; to be called inside of `on_mesh`."""

    def run(params: Params, requests: Requests, sequences: Sequences) -> Any:
        return step(Models(bind(config, numerics, params)), requests, sequences, config.eos_token_id)

    def rows(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((batch, *shape), dtype)

    one = jax.eval_shape(lambda: Requests.stack([SamplingParams()]))
    requests = jax.tree.map(lambda leaf: rows(leaf.dtype, *leaf.shape[1:]), one)
    caches = Caches(jax.eval_shape(lambda: make_cache(config, numerics, batch=batch, max_len=max_len)))
    number, nothing = rows(jnp.int32), rows(jnp.float32, 0, config.vocab_size)
    sequences = Sequences(number, number, rows(jnp.int32, 0), nothing, number, rows(jnp.bool), caches)
    return jax.jit(run, donate_argnums=2).trace(params, _laid_out(requests), _laid_out(sequences))


def prefill_piece(
    config: Config, numerics: Numerics, params: Params, slots: int, max_len: int, tokens: int
) -> Any:
    """A piece of one prompt, read into the caches of one of the slots, traced; inside of `on_mesh`."""
    cache = cache_shapes(config, numerics, slots, max_len)
    whole = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())
    ids, numbers = (jax.ShapeDtypeStruct(shape, jnp.int32, sharding=whole) for shape in ((1, tokens), (3,)))
    return read_piece.trace(config, numerics, params, cache, ids, numbers)
