"""The Mosaic GPU kernel of FP8 products of few tokens: it lowers for Hopper, and interpreted it is right.

The interpreter runs all but our own PTX, for which these tests put plain functions: the product of the tensor
core, the table of scales, and what the programs of a cluster send each other. The PTX is checked on a GPU.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fp8_products import BF16, F32, FLASH, U8, fp8, lowered, numbers, worst_error
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.block_matmul import reference

plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
from pallas_kernels.block_matmul import mosaic_few  # noqa: E402
from pallas_kernels.block_matmul.mosaic_config import PADDING, Few  # noqa: E402

# --- it lowers


@pytest.mark.parametrize("tokens", [3, 8, 17, 64, 129])
@pytest.mark.parametrize(("rows", "columns"), FLASH)
def test_the_kernel_lowers_for_the_weights_of_flash(rows, columns, tokens):
    assert lowered(mosaic_few, tokens, rows, columns).count("@mosaic_gpu_v2") == 1


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        (Few(16, 64, splits=2, sharers=2), F32),
        (Few(128, 128, splits=4, sharers=2, stages=4, beside=2), U8),
        (Few(32, 128, splits=8, stages=1, blocks=2), U8),
    ],
    ids=str,
)
def test_the_kernel_lowers_with(config, scale):
    assert "@mosaic_gpu_v2" in lowered(mosaic_few, 100, 328, 2048, config, scale)


# --- it is right


def plain_factors(
    table: Any, x_scale: Any, w_scale: Any, place: Any, token: Any, row: Any, step: Any
) -> None:
    def numbers_of(scales: Any, rows: Any, column: Any) -> jax.Array:
        stored = scales[...][jnp.minimum(rows, scales.shape[0] - 1), column]
        return lax.bitcast_convert_type(stored.astype(jnp.int32) << 23, F32) if stored.dtype == U8 else stored

    _, steps, padded = table.shape
    count = padded - PADDING
    for other in range(steps):
        of_tokens = numbers_of(x_scale, token + jnp.arange(count), step + other)
        table[place, other, pl.ds(0, count)] = of_tokens * numbers_of(w_scale, row // 128, step + other)


@pytest.mark.parametrize(
    ("shape", "config", "scale"),
    [
        ((3, 200, 384), Few(8, 128, stages=2), F32),
        ((17, 328, 256), Few(32, 64, stages=2, sharers=2), U8),
        ((130, 320, 256), Few(128, 256, stages=1), U8),
        ((100, 64, 512), Few(128, 64, splits=2, stages=2), U8),
        ((5, 200, 1024), Few(8, 128, splits=4, stages=1, blocks=2), U8),
        ((70, 72, 1024), Few(64, 64, splits=4, stages=1, beside=2, sharers=2), F32),
    ],
    ids=[
        "fewer tokens than a tile",
        "two tiles of rows share tokens",
        "two tiles of tokens, two products of a consumer",
        "two parts of K",
        "more parts of K than pieces of the sums",
        "parts of K, shared tokens, consumers side by side",
    ],
)
def test_the_interpreter_agrees_with_the_reference(shape, config, scale, without_ptx, monkeypatch):
    without_ptx("tile", "tokens", "sharer")
    monkeypatch.setattr(mosaic_few, "_load_factors", plain_factors)
    x, weight = numbers(*shape, scale=scale)

    out = mosaic_few.block_matmul(x, weight, BF16, config=config, interpret=plgpu.InterpretGPUParams())

    expected = reference.block_matmul(x, weight, F32)
    # One rounding to bfloat16, 2^-9; where terms cancel, float32 sums in another order.
    np.testing.assert_allclose(out, expected, rtol=2**-8, atol=1e-3 * float(jnp.abs(expected).max()))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config",
    [
        Few(8, 64, splits=2),
        Few(16, 256, stages=4, sharers=2),
        Few(32, 128, splits=8, stages=2),
        Few(32, 128, splits=4, stages=2, blocks=2),
        Few(64, 128, splits=2, sharers=4, stages=4),
        Few(128, 128, splits=4, sharers=2, stages=2, beside=2),
        Few(128, 256, stages=3),
    ],
    ids=str,
)
def test_each_way_to_cut_gives_the_same_bits_every_time(config):
    x, weight = numbers(100, 712, 4096)  # rows for half of the last tile, or of the last tiles that share
    run = jax.jit(functools.partial(mosaic_few.block_matmul, out_dtype=BF16, config=config))

    first = run(x, weight)

    assert worst_error(first, x, weight) <= 3e-3
    for _ in range(5):
        np.testing.assert_array_equal(run(x, weight), first)


# --- what it refuses, and what it keeps


@pytest.mark.parametrize(
    ("config", "says"),
    [(Few(8, splits=8), "does not split 512 columns"), (Few(128, stages=9), "bytes of shared memory")],
)
def test_a_config_that_does_not_fit_is_refused(config, says):
    with pytest.raises(ValueError, match=says):
        lowered(mosaic_few, 100, 256, 512, config)


WEIGHT = fp8(320, 256, "fp8_block128")


def test_no_tokens_give_an_empty_result_without_a_launch():
    x = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), fp8(0, 256, "fp8_token128"))
    weight = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), WEIGHT)

    assert mosaic_few.block_matmul(x, weight, BF16, config=Few(8)).shape == (0, 320)


def test_tokens_in_several_axes_keep_them():
    x = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((2, 3, leaf.shape[-1]), leaf.dtype), fp8(6, 256, "fp8_token128")
    )

    out = jax.eval_shape(functools.partial(mosaic_few.block_matmul, out_dtype=BF16), x, WEIGHT)

    assert out.shape == (2, 3, 320)
