"""FP8 weights in the form of CDNA3 (gfx942), whose matrix units take float8_e4m3fnuz and no float8_e4m3fn.

The same bits stand for half the value in it, so a weight keeps its bits and doubles its scales. What differs:
0x80 is -0 in one and NaN in the other, and e4m3fn's NaN, 0x7F and 0xFF, are numbers in e4m3fnuz.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from pallas_kernels.formats import E8M0_NAN, QuantArray
from pallas_kernels.target import Target


def for_target(weight: QuantArray, target: Target) -> QuantArray:
    """The weight in the FP8 that the device multiplies; to be called once, at load.

    Always the same numbers: a weight whose scales cannot be doubled is left as it is, and so is FP4.
    """
    if not target.has_e4m3fnuz or weight.values.dtype != jnp.float8_e4m3fn or not has_fnuz(weight):
        return weight
    return to_fnuz(weight)


@jax.jit
def has_fnuz(weight: QuantArray) -> Bool[Array, ""]:
    """Whether every scale can be doubled: 2^127 of E8M0, and float32 from there on, cannot."""
    scale = weight.scale
    if scale.dtype == jnp.uint8:
        return (scale != E8M0_NAN - 1).all()
    return (jnp.isfinite(2 * scale) == jnp.isfinite(scale)).all()


@jax.jit
def to_fnuz(weight: QuantArray) -> QuantArray:
    """The same numbers in float8_e4m3fnuz; NaN stays NaN, and -0 becomes the only zero there is."""
    bits = jax.lax.bitcast_convert_type(weight.values, jnp.uint8)
    bits = jnp.where(bits == 0x80, jnp.uint8(0), bits)
    bits = jnp.where(jnp.isnan(weight.values), jnp.uint8(0x80), bits)
    scale = weight.scale
    doubled = (
        jnp.where(scale == E8M0_NAN, scale, scale + jnp.uint8(1)) if scale.dtype == jnp.uint8 else 2 * scale
    )
    values = jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fnuz)
    return dataclasses.replace(weight, values=values, scale=doubled)
