"""What the tests of the Mosaic GPU kernels of FP8 products share."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import QuantArray, Target
from pallas_kernels.block_matmul import block_matmul

BF16, F32, FP8, U8 = jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn, jnp.uint8
# (rows, columns) of the weights: wq_b, wo_b, wq_a with wkv, w1 with w3 of the shared expert.
FLASH = [(32768, 1024), (4096, 8192), (1536, 4096), (4096, 4096)]
PRO = [(65536, 1536), (7168, 16384), (2048, 7168), (6144, 7168)]
H200 = Target("cuda", "sm_90")


def fp8(rows: int, columns: int, format: str, scale: Any = U8) -> QuantArray:
    """The shapes of a quantised matrix."""
    scale_rows = rows if format == "fp8_token128" else -(-rows // 128)
    values: Any = jax.ShapeDtypeStruct((rows, columns), FP8)
    scales: Any = jax.ShapeDtypeStruct((scale_rows, columns // 128), scale)
    return QuantArray(values, scales, format)


def numbers(tokens: int, rows: int, columns: int, scale: Any = U8) -> tuple[QuantArray, QuantArray]:
    """x and a weight, random, with scales that differ from block to block."""
    random = np.random.default_rng(tokens + rows + columns)

    def leaf(like: jax.ShapeDtypeStruct) -> jax.Array:
        if like.dtype == U8:
            return jnp.asarray(random.integers(117, 122, like.shape), U8)
        if like.dtype == F32:
            return jnp.asarray(4 * random.random(like.shape), F32)
        return jnp.asarray(4 * random.standard_normal(like.shape, np.float32), like.dtype)

    shapes = fp8(tokens, columns, "fp8_token128"), fp8(rows, columns, "fp8_block128", scale)
    return jax.tree.map(leaf, shapes)


def lowered(module: Any, tokens: int, rows: int, columns: int, config: Any = None, scale: Any = U8) -> str:
    """A kernel's program for an H200, as text; nothing of it needs a GPU."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("unused",), abstract_device=device)
    run = functools.partial(module.block_matmul, out_dtype=BF16, config=config)
    arguments = fp8(tokens, columns, "fp8_token128"), fp8(rows, columns, "fp8_block128", scale)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def worst_error(found: jax.Array, x: QuantArray, weight: QuantArray) -> float:
    """Of any token, relative to the definition; rounding to bfloat16 makes 1.7e-3."""
    expected = block_matmul(x, weight, out_dtype=F32, implementation="reference")
    error = jnp.linalg.norm(found.astype(F32) - expected, axis=-1) / jnp.linalg.norm(expected, axis=-1)
    return float(error.max())
