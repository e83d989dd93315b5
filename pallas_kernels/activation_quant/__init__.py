"""Activations to FP8 before a quantised product."""

from jaxtyping import Array, Float

from pallas_kernels.activation_quant import reference
from pallas_kernels.dispatch import Implementation, select
from pallas_kernels.formats import QuantArray
from pallas_kernels.target import Target


def _run_triton(x) -> QuantArray:
    from pallas_kernels.activation_quant import triton  # Triton is an extra that a CPU does without

    return triton.activation_quant(x)


def _triton_fits(target: Target, x) -> bool:
    return target.has_e4m3 and x.shape[-1] % 128 == 0 and x.size > 0


IMPLEMENTATIONS = (
    Implementation("triton", _run_triton, fits=_triton_fits),
    Implementation("reference", reference.activation_quant),
)


def activation_quant(x: Float[Array, "*tokens K"], *, implementation: str | None = None) -> QuantArray:
    """`x` in `fp8_token128`: E4M3 with one power-of-two scale per token and 128 columns.

    Source: `act_quant` of the released inference/kernel.py.

    Raises:
      ValueError: `x` has fewer than two axes.
    """
    if x.ndim < 2:
        raise ValueError(f"x needs a token axis, got shape {x.shape}")
    return select(IMPLEMENTATIONS, implementation, x)
