"""FP8 weights in CDNA3's form: every byte and scale, and the same products."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import QuantArray, Target, block_diagonal_matmul, block_matmul, dequantize, quantize
from pallas_kernels.fnuz import for_target, has_fnuz, to_fnuz

GFX942 = Target("rocm", "gfx942")
CODES = np.arange(256, dtype=np.uint8)


def stored(codes: np.ndarray, scale: np.ndarray) -> QuantArray:
    """A row of FP8 codes under one scale for each 128 of them."""
    values = jax.lax.bitcast_convert_type(jnp.asarray(codes), jnp.float8_e4m3fn)
    return QuantArray(values[None], jnp.asarray(scale)[None], "fp8_block128")


def numbers(weight: QuantArray) -> np.ndarray:
    """What ml_dtypes says that the bytes stand for, in float64."""
    kind = {"float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz}
    bits = np.asarray(jax.lax.bitcast_convert_type(weight.values, jnp.uint8))
    scale = np.asarray(weight.scale)
    scale = scale.view(ml_dtypes.float8_e8m0fnu) if scale.dtype == np.uint8 else scale
    values = bits.view(kind[weight.values.dtype.name]).astype(np.float64)
    return values * np.repeat(scale.astype(np.float64), 128, axis=-1)


@pytest.mark.parametrize("scale", [np.uint8([127, 90]), np.float32([1, 0.3])], ids=["E8M0", "float32"])
def test_every_byte_stands_for_the_same_number(scale):
    weight = stored(CODES, scale)

    found = for_target(weight, GFX942)

    assert found.values.dtype == jnp.float8_e4m3fnuz
    np.testing.assert_array_equal(numbers(found), numbers(weight))  # two NaN count as equal
    np.testing.assert_array_equal(dequantize(found), dequantize(weight))
    assert np.isnan(numbers(found)).sum() == 2


def test_every_scale_but_the_largest_is_doubled_and_not_a_number_stays_so():
    scales = CODES[CODES != 254]
    weight = stored(np.full(len(scales) * 128, 0x3A, np.uint8), scales)

    found = for_target(weight, GFX942)

    assert found.values.dtype == jnp.float8_e4m3fnuz
    np.testing.assert_array_equal(numbers(found), numbers(weight))


@pytest.mark.parametrize(
    "scale", [np.uint8([1, 254]), np.float32([1, 2.0**127]), np.float32([1, -3e38])], ids=str
)
def test_a_weight_whose_scales_cannot_be_doubled_is_left_as_it_is(scale):
    weight = stored(CODES, scale)

    assert not has_fnuz(weight)
    assert for_target(weight, GFX942) is weight


@pytest.mark.parametrize("scale", [np.float32([np.inf, 1]), np.float32([np.nan, 1])], ids=str)
def test_a_float32_scale_that_is_not_finite_stays_so(scale):
    found = for_target(stored(CODES, scale), GFX942)

    assert found.values.dtype == jnp.float8_e4m3fnuz
    np.testing.assert_array_equal(found.scale[0], 2 * scale)


@pytest.mark.parametrize(
    "target", [Target("cpu", ""), Target("cuda", "sm_90"), Target("rocm", "gfx950")], ids=str
)
def test_other_chips_keep_the_checkpoints_form(target):
    weight = stored(CODES, np.uint8([127, 127]))

    assert for_target(weight, target) is weight


def test_fp4_is_left_as_it_is():
    weight = quantize(jnp.ones((2, 64)), "fp4_group32")

    assert for_target(weight, GFX942) is weight


def test_products_with_either_form_are_the_same():
    keys = jax.random.split(jax.random.key(0), 3)
    weight = quantize(jax.random.normal(keys[0], (256, 384)), "fp8_block128")
    x, groups = jax.random.normal(keys[1], (5, 384)), jax.random.normal(keys[2], (5, 2, 384))
    found = to_fnuz(weight)

    for operand in (x, quantize(x, "fp8_token128")):
        np.testing.assert_array_equal(block_matmul(operand, found), block_matmul(operand, weight))
    np.testing.assert_array_equal(block_diagonal_matmul(groups, found), block_diagonal_matmul(groups, weight))


def test_stacks_are_converted_whole():
    stack = quantize(jax.random.normal(jax.random.key(0), (3, 128, 256)), "fp8_block128")

    found = for_target(stack, GFX942)

    np.testing.assert_array_equal(dequantize(found), dequantize(stack))
    np.testing.assert_array_equal(dequantize(found[1]), dequantize(stack[1]))
