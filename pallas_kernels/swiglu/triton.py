"""`swiglu` and `swiglu_quant` in one pass: each program takes some blocks of 128 columns."""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from triton.language.extra import libdevice

from pallas_kernels.activation_quant.triton import quantized
from pallas_kernels.formats import E4M3_MAX, FORMATS, QuantArray
from pallas_kernels.triton_call import triton_call


@triton.jit
def _inner(
    gate,
    up,
    weight,
    block,
    real,
    LIMIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIDE: tl.constexpr,
    UP_AT: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """[blocks, 128] of weight * silu(min(gate, LIMIT)) * clip(up, -LIMIT, LIMIT); NaN where either is."""
    ALL: tl.constexpr = tl.PropagateNan.ALL
    BLOCKS: tl.constexpr = COLUMNS // 128
    row = (block // BLOCKS).to(tl.int64)
    at = (row * STRIDE + block % BLOCKS * 128)[:, None] + tl.arange(0, 128)[None, :]
    gates = tl.load(gate + at, mask=real[:, None], other=0.0).to(tl.float32)
    ups = tl.load(up + UP_AT + at, mask=real[:, None], other=0.0).to(tl.float32)
    gates = tl.minimum(gates, LIMIT, propagate_nan=ALL)
    ups = tl.minimum(tl.maximum(ups, -LIMIT, propagate_nan=ALL), LIMIT, propagate_nan=ALL)
    sigmoid = 1.0 / (1.0 + libdevice.exp(-gates))  # pyright: ignore[reportOperatorIssue]  (a stub says None)
    inner = gates * sigmoid * ups
    if WEIGHTED:
        inner = tl.load(weight + row, mask=real, other=0.0)[:, None] * inner
    return inner


@triton.jit
def _swiglu(
    gate,  # [rows, STRIDE], of which COLUMNS are gates
    up,  # [rows, STRIDE], of which COLUMNS from UP_AT on are taken
    weight,  # [rows] float32; never read unless WEIGHTED
    out,  # [rows, COLUMNS]
    LIMIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIDE: tl.constexpr,
    UP_AT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TOTAL: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    real = block < TOTAL
    inner = _inner(gate, up, weight, block, real, LIMIT, COLUMNS, STRIDE, UP_AT, WEIGHTED)
    at = block[:, None].to(tl.int64) * 128 + tl.arange(0, 128)[None, :]
    tl.store(out + at, inner.to(out.dtype.element_ty), mask=real[:, None])


@triton.jit
def _swiglu_quant(
    gate,
    up,
    weight,
    values,  # [rows, COLUMNS] e4m3
    scale,  # [rows, COLUMNS/128] uint8
    LIMIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIDE: tl.constexpr,
    UP_AT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TOTAL: tl.constexpr,
    BLOCKS: tl.constexpr,
    FLOOR: tl.constexpr,
    MOST: tl.constexpr,
):
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    real = block < TOTAL
    inner = _inner(gate, up, weight, block, real, LIMIT, COLUMNS, STRIDE, UP_AT, WEIGHTED)
    block_values, exponent = quantized(inner.to(tl.bfloat16), FLOOR, MOST)
    at = block[:, None].to(tl.int64) * 128 + tl.arange(0, 128)[None, :]
    tl.store(values + at, block_values, mask=real[:, None])
    tl.store(scale + block, exponent.to(tl.uint8), mask=real)


def swiglu(
    gate: jax.Array, up: jax.Array | None, weight: jax.Array | None, limit: float, out_dtype
) -> jax.Array:
    out = jax.ShapeDtypeStruct(_shape(gate, up), out_dtype)
    return _launch(_swiglu, gate, up, weight, limit, out, {})


def swiglu_quant(gate: jax.Array, up: jax.Array | None, weight: jax.Array | None, limit: float) -> QuantArray:
    *outer, columns = shape = _shape(gate, up)
    out = (
        jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn),
        jax.ShapeDtypeStruct((*outer, columns // 128), jnp.uint8),
    )
    format = FORMATS["fp8_token128"]
    constants = {"FLOOR": format.floor, "MOST": E4M3_MAX}
    values, scale = _launch(_swiglu_quant, gate, up, weight, limit, out, constants)
    return QuantArray(values, scale, "fp8_token128")


def _shape(gate: jax.Array, up: jax.Array | None) -> tuple[int, ...]:
    return (*gate.shape[:-1], gate.shape[-1] // (2 if up is None else 1))


def _launch(kernel: Any, gate, up, weight, limit, out, constants: dict[str, Any]) -> Any:
    shape = _shape(gate, up)
    total = gate.size // gate.shape[-1] * (shape[-1] // 128)
    blocks = 16 if total > 4096 else 4  # few rows are spread over more programs
    return triton_call(
        kernel,
        gate,
        gate if up is None else up,
        gate if weight is None else weight,
        out=out,
        grid=(-(-total // blocks),),
        LIMIT=limit,
        COLUMNS=shape[-1],
        STRIDE=gate.shape[-1],
        UP_AT=shape[-1] if up is None else 0,
        WEIGHTED=weight is not None,
        TOTAL=total,
        BLOCKS=blocks,
        **constants,
    )
