"""Activations to FP8 before a quantised product."""

from jaxtyping import Array, Float

from pallas_kernels.activation_quant import reference
from pallas_kernels.dispatch import Implementation, select
from pallas_kernels.formats import QuantArray

IMPLEMENTATIONS = (Implementation("reference", reference.activation_quant),)


def activation_quant(x: Float[Array, "*tokens K"], *, implementation: str | None = None) -> QuantArray:
    """`x` in `fp8_token128`: E4M3 with one power-of-two scale per token and 128 columns.

    Source: `act_quant` of the released inference/kernel.py.

    Raises:
      ValueError: `x` has fewer than two axes.
    """
    if x.ndim < 2:
        raise ValueError(f"x needs a token axis, got shape {x.shape}")
    return select(IMPLEMENTATIONS, implementation, x)
