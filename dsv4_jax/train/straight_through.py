"""The numbers that a file will hold, with the gradients of the ones that training keeps."""

import jax
import jax.numpy as jnp

from dsv4_jax.checkpoint.names import Parameter
from pallas_kernels import QuantArray, dequantize, fake_quantize, quantize


def straight_through(x: jax.Array, rounded: jax.Array) -> jax.Array:
    """`rounded`, whose gradient is that of `x`."""
    return x + jax.lax.stop_gradient(rounded.astype(x.dtype) - x)


def rounded(x: jax.Array, format: str | None) -> jax.Array:
    """Activations through `format`, as the caches of the released arithmetic keep them."""
    return x if format is None else straight_through(x, fake_quantize(jax.lax.stop_gradient(x), format))


def stored(parameter: Parameter, master: jax.Array) -> jax.Array | QuantArray:
    """A parameter as a checkpoint stores it."""
    if isinstance(parameter.value, QuantArray):
        return quantize(master, parameter.value.format)
    return master.astype(parameter.value.dtype)


def as_stored(parameter: Parameter, master: jax.Array) -> jax.Array:
    """The numbers that `stored` stands for, in float32; differentiable as if nothing had been rounded."""
    if not jnp.issubdtype(master.dtype, jnp.floating):
        return master
    kept = stored(parameter, jax.lax.stop_gradient(master))
    numbers = dequantize(kept) if isinstance(kept, QuantArray) else kept.astype(jnp.float32)
    return straight_through(master, numbers)
