"""How a module declares a parameter: shape, dtype and logical axes, no numbers."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsv4_jax.config import Config
from pallas_kernels import QuantArray
from pallas_kernels.formats import storage_shapes, values_dtype


def parameter(shape: tuple[int, ...], dtype, *axes: str | None) -> nnx.Param:
    """An unquantised parameter, in the dtype the checkpoint stores."""
    if len(shape) != len(axes):
        raise ValueError(f"shape {shape} has {len(shape)} dimensions, axes {axes} name {len(axes)}")
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), axes=axes)


def quantized_parameter(shape: tuple[int, ...], format: str, scale_dtype, *axes: str | None) -> nnx.Param:
    """A parameter in a block format of `pallas_kernels.FORMATS`."""
    if len(shape) != len(axes):
        raise ValueError(f"shape {shape} has {len(shape)} dimensions, axes {axes} name {len(axes)}")
    values_shape, scale_shape = storage_shapes(shape, format)
    values: Any = jax.ShapeDtypeStruct(values_shape, values_dtype(format))
    scale: Any = jax.ShapeDtypeStruct(scale_shape, scale_dtype)
    return nnx.Param(QuantArray(values, scale, format), axes=axes)


def scale_dtype(config: Config):
    """uint8 (E8M0) where experts are FP4, float32 in the Base checkpoints, whose experts are FP8."""
    return jnp.uint8 if config.expert_dtype == "fp4" else jnp.float32
