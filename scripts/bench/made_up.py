"""Parameters and caches with made-up numbers, made on the device: for measuring models that no file holds."""

import functools
import importlib
import zlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from dsv4_jax.checkpoint.layouts import Layout
from dsv4_jax.checkpoint.names import Parameter, nest, parameters
from dsv4_jax.config import Config
from dsv4_jax.model import Params
from pallas_kernels import QuantArray, current_target
from pallas_kernels.formats import E8M0_BIAS


def made_up_params(
    config: Config, seed: int = 0, *, mtp: bool = False, within: tuple[Any, ...] = (), laid_out: bool = True
) -> tuple[Params, Params | None]:
    """Parameters of the model, and of its MTP head; None unless `mtp`.

    They keep activations in range: linears ~ N(0, 1 / columns). Only those whose path begins with `within`
    are made. With `laid_out` they lie as `checkpoint.load` lays them out for this device.
    """
    key = jax.random.key(seed, impl="rbg")  # threefry would take minutes for a hundred gigabytes
    layout = Layout(current_target())
    take = layout.take if laid_out else layout.leaves.__setitem__
    for parameter in parameters(config, mtp=mtp):
        if parameter.path[: len(within)] == within:
            take(parameter.path, _numbers(parameter, config, key))
    params = nest(layout.leaves)
    heads = params.pop("mtp", None)
    return params, heads and heads[0]


class _Shapes(Layout):
    """Lays out shapes in place of arrays."""

    def _change(self, paths: list[Any], change: Callable[..., tuple[Any, ...]]) -> None:
        # Whether tiles hold a weight depends on its numbers; those made up, and those released, fit.
        experts = importlib.import_module("pallas_kernels.expert_mlp")
        with mock.patch.object(experts, "tileable", return_value=True):
            changed = jax.eval_shape(change, *[self.leaves[path] for path in paths])
        self.leaves.update(zip(paths, changed, strict=True))


def parameter_shapes(config: Config, *, mtp: bool = False) -> tuple[Params, Params | None]:
    """What `made_up_params` gives, as shapes on the first device."""
    layout = _Shapes(current_target())
    for parameter in parameters(config, mtp=mtp):
        layout.take(parameter.path, parameter.value)
    params = shapes_on_device(nest(layout.leaves))
    heads = params.pop("mtp", None)
    return params, heads and heads[0]


def shapes_on_device(shapes: Any) -> Any:
    """As arrays that are on the first device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


def made_up_like(shapes: Any, seed: int = 0) -> Any:
    """Arrays of these shapes ~ N(0, 1), one after another, so that no more than one is there twice.

    Bytes are those of a quantised array: any FP4 codes, exponents of scales of about 1.

    Raises:
      TypeError: one of them is of neither.
    """
    key = jax.random.key(seed, impl="rbg")

    def of_leaf(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        of_name = jax.random.fold_in(key, zlib.crc32(name.encode()))
        if leaf.dtype == jnp.uint8 and name.endswith(".scale"):
            return jax.random.randint(of_name, leaf.shape, E8M0_BIAS - 2, E8M0_BIAS + 1, jnp.uint8)
        if leaf.dtype == jnp.uint8 and name.endswith(".values"):
            return _values(of_name, leaf.shape, leaf.dtype)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"{name} is of {leaf.dtype}: no number can be made up for it")
        return _normal(of_name, leaf.shape, leaf.dtype, 1.0)

    return jax.tree_util.tree_map_with_path(of_leaf, shapes)


def _numbers(parameter: Parameter, config: Config, key: jax.Array) -> jax.Array | QuantArray:
    key = jax.random.fold_in(key, zlib.crc32(repr(parameter.path).encode()))
    value, name = parameter.value, parameter.path[-1]
    if isinstance(value, QuantArray):
        values = _values(key, value.values.shape, value.values.dtype)
        # A uniform nibble has a standard deviation of 3; E4M3 values are drawn with one of 4.
        exponent = round(
            jnp.log2(value.shape[-1] ** -0.5 / (3 if value.format == "fp4_group32" else 4)).item()
        )
        scale_dtype = value.scale.dtype
        fill = E8M0_BIAS + exponent if scale_dtype == jnp.uint8 else 2.0**exponent
        return QuantArray(values, jnp.full(value.scale.shape, fill, scale_dtype), value.format)
    if name == "tid2eid":
        first = jax.random.randint(key, value.shape[:1], 0, config.n_routed_experts)
        step = config.n_routed_experts // config.num_experts_per_tok
        return (first[:, None] + step * jnp.arange(value.shape[1])) % config.n_routed_experts
    if "norm" in str(parameter.path[-2:]):
        return jnp.ones(value.shape, value.dtype)
    spread = 1.0 if parameter.path[0] == "embed" else value.shape[-1] ** -0.5
    return _normal(key, value.shape, value.dtype, spread)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _values(key, shape, dtype):
    if dtype == jnp.uint8:
        return jax.random.bits(key, shape, jnp.uint8)
    return (4 * jax.random.normal(key, shape, jnp.bfloat16)).astype(dtype)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(key, shape, dtype, spread):
    drawn = jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32  # half the bits for what may be large
    return (spread * jax.random.normal(key, shape, drawn)).astype(dtype)
