"""The activation between an expert's two products, and what the second of them takes."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.dispatch import Implementation, select
from pallas_kernels.formats import QuantArray
from pallas_kernels.swiglu import reference
from pallas_kernels.target import Target


def _run_triton(gate, up, weight, limit, out_dtype):
    from pallas_kernels.swiglu import triton  # Triton is an extra that a CPU does without

    return triton.swiglu(gate, up, weight, limit, out_dtype)


def _run_quant(gate, up, weight, limit) -> QuantArray:
    from pallas_kernels.swiglu import triton

    return triton.swiglu_quant(gate, up, weight, limit)


def _triton_fits(target: Target, gate, up, weight, limit, out_dtype) -> bool:
    columns = gate.shape[-1] // (2 if up is None else 1)
    floats = all(jnp.dtype(each) in (jnp.bfloat16, jnp.float32) for each in (gate.dtype, out_dtype))
    alike = (up is None or up.dtype == gate.dtype) and (weight is None or weight.dtype == jnp.float32)
    return target.vendor != "cpu" and floats and alike and gate.size > 0 and columns % 128 == 0


def _quant_fits(target: Target, gate, up, weight, limit) -> bool:
    return target.has_e4m3 and gate.ndim > 1 and _triton_fits(target, gate, up, weight, limit, jnp.bfloat16)


IMPLEMENTATIONS = (
    Implementation("triton", _run_triton, fits=_triton_fits),
    Implementation("reference", reference.swiglu),
)
QUANT = (
    Implementation("triton", _run_quant, fits=_quant_fits),
    Implementation("reference", reference.swiglu_quant),
)


def swiglu(
    gate: Float[Array, "*rows F"] | Float[Array, "*rows 2F"],
    up: Float[Array, "*rows F"] | None,
    weight: Float32[Array, "*rows"] | None = None,
    *,
    limit: float,
    out_dtype=jnp.bfloat16,
    implementation: str | None = None,
) -> Float[Array, "*rows F"]:
    """weight * silu(min(gate, limit)) * clip(up, -limit, limit), in float32, rounded once to `out_dtype`.

    The routing weight multiplies here, before the down projection. Source: `Expert.forward` of the
    released inference/model.py.

    Args:
      gate, up: the two products; with `up` None, `gate` holds both side by side, gates first.
      weight: routing weight of each row; None for the shared expert.
      limit: `swiglu_limit`.

    Raises:
      ValueError: shapes do not belong together.
    """
    _check_shapes(gate, up, weight)
    return select(IMPLEMENTATIONS, implementation, gate, up, weight, limit, out_dtype)


def swiglu_quant(
    gate: Float[Array, "*rows F"] | Float[Array, "*rows 2F"],
    up: Float[Array, "*rows F"] | None,
    weight: Float32[Array, "*rows"] | None = None,
    *,
    limit: float,
    implementation: str | None = None,
) -> QuantArray:
    """`activation_quant` of `swiglu` in bfloat16: the operand of a quantised down projection.

    Args, Raises: as `swiglu`; one axis of rows at least.
    """
    _check_shapes(gate, up, weight)
    if gate.ndim < 2:
        raise ValueError(f"gate needs a token axis, got shape {gate.shape}")
    return select(QUANT, implementation, gate, up, weight, limit)


def _check_shapes(gate, up, weight) -> None:
    halves = gate.shape[-1] % 2 == 0 if up is None else gate.shape == up.shape
    if not halves or (weight is not None and weight.shape != gate.shape[:-1]):
        shapes = [None if each is None else each.shape for each in (gate, up, weight)]
        raise ValueError("gate {}, up {} and weight {} do not match".format(*shapes))
