"""Block formats: every code against ml_dtypes, every rule against its definition in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import FORMATS, QuantArray, activation_quant, dequantize, fake_quantize, quantize
from pallas_kernels.formats import (
    e2m1_decode,
    e2m1_encode,
    e8m0_ceil,
    e8m0_decode,
    pack_nibbles,
    storage_shapes,
    unpack_nibbles,
    values_dtype,
)

quantize = jax.jit(quantize, static_argnums=1)
fake_quantize = jax.jit(fake_quantize, static_argnums=1)
dequantize = jax.jit(dequantize, static_argnums=1)

E2M1, E4M3, E8M0 = ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu
NARROW = {"fp8_block128": E4M3, "fp4_group32": E2M1, "fp8_token128": E4M3, "fp8_block64": E4M3}
ALL_BYTES = np.arange(256, dtype=np.uint8)

# Whole blocks, blocks cut on either axis, less than one block, and stacks of each.
SHAPES = [(128, 128), (1, 32), (3, 64), (130, 96), (129, 320), (5, 34), (2, 3, 200), (2, 2, 131, 66)]


def random_numbers(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Numbers over many binades, with rows of zeros and of tiny ones among them."""
    rng = np.random.default_rng([seed, *shape])
    x = rng.standard_normal(shape) * np.exp2(rng.integers(-12, 12, shape))
    x[..., rng.integers(shape[-2]), :] *= rng.choice([0.0, 1e-20])
    return x.astype(np.float32)


def blocks(x: np.ndarray, format: str):
    """Index and content of each block of a matrix."""
    rows, columns = FORMATS[format].block
    for top in range(0, x.shape[0], rows):
        for left in range(0, x.shape[1], columns):
            yield (top // rows, left // columns), x[top : top + rows, left : left + columns]


def definition(x: np.ndarray, format: str) -> tuple[np.ndarray, np.ndarray]:
    """Scale and dequantised numbers of a matrix, block by block in float64."""
    _, max_value, floor, _ = FORMATS[format]
    scale = np.empty(storage_shapes(x.shape, format)[1])
    numbers = np.empty(x.shape)
    for place, block in blocks(np.arange(x.size).reshape(x.shape), format):
        values = x.reshape(-1)[block].astype(np.float64)
        largest = max(np.abs(values).max(), floor)
        scale[place] = next(2.0**n for n in range(-127, 128) if largest <= max_value * 2.0**n)
        narrow = np.clip(values / scale[place], -max_value, max_value).astype(NARROW[format])
        numbers.reshape(-1)[block] = narrow.astype(np.float64) * scale[place]
    return scale, numbers


def matrices(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, *x.shape[-2:])


# Vectors worked out by hand from the released kernels.


def test_fp4_rounds_ties_to_even_at_the_scale_of_the_block():
    x = np.zeros(32, np.float32)
    x[:8] = [0.3, -1.7, 2.49, 2.5, 5.0, -5.1, 0.26, 7.0]

    out = fake_quantize(x, "fp4_group32")

    assert out[:8].tolist() == [0, -2, 2, 2, 4, -6, 0, 8]  # scale 2
    assert not out[8:].any()


def test_fp8_keeps_four_significant_bits_at_the_scale_of_the_block():
    x = np.linspace(-3, 3, 64, dtype=np.float32)

    out = fake_quantize(x, "fp8_block64")

    assert out[:6].tolist() == [-3, -3, -2.75, -2.75, -2.5, -2.5]


@pytest.mark.parametrize(
    ("byte", "weights"),
    [
        pytest.param(0x21, (0.03125, 0.0625), id="byte 0x21"),
        pytest.param(0xA3, (0.09375, -0.0625), id="byte 0xA3"),
        pytest.param(0x7F, (-0.375, 0.375), id="byte 0x7F"),
        pytest.param(0xE5, (0.1875, -0.25), id="byte 0xE5"),
    ],
)
def test_a_byte_holds_the_even_column_in_its_low_nibble(byte, weights):
    values = np.zeros((1, 16), np.uint8)
    values[0, 0] = byte
    stored = QuantArray(jnp.asarray(values), jnp.full((1, 1), 0x7B, jnp.uint8), "fp4_group32")

    out = dequantize(stored, jnp.float32)

    assert out.shape == stored.shape == (1, 32)
    assert tuple(out[0, :2].tolist()) == weights
    assert not out[0, 2:].any()


# Codes.


def test_every_e2m1_code_has_the_value_of_ml_dtypes():
    codes = np.arange(16, dtype=np.uint8)

    values = np.asarray(e2m1_decode(codes))

    expected = codes.view(E2M1).astype(np.float32)
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(np.signbit(values), np.signbit(expected))
    np.testing.assert_array_equal(e2m1_encode(values), codes)


def test_every_e8m0_byte_has_the_value_of_ml_dtypes():
    values = np.asarray(e8m0_decode(ALL_BYTES))

    # Compared as bits: byte 0 stands for a number below the normal range, which arithmetic may flush.
    expected = ALL_BYTES.view(E8M0).astype(np.float32)
    np.testing.assert_array_equal(values[:-1].view(np.uint32), expected[:-1].view(np.uint32))
    assert np.isnan(values[0xFF])


def test_every_e4m3_byte_dequantises_to_the_value_of_ml_dtypes():
    stored = QuantArray(
        jnp.asarray(ALL_BYTES.view(E4M3))[None], jnp.full((1, 2), 127, jnp.uint8), "fp8_token128"
    )

    out = np.asarray(dequantize(stored, jnp.float32))

    np.testing.assert_array_equal(out[0], ALL_BYTES.view(E4M3).astype(np.float32))


def test_rounding_to_e2m1_agrees_with_ml_dtypes_on_ties_and_their_neighbours():
    grid = np.unique(np.abs(ALL_BYTES[:16].view(E2M1).astype(np.float32)))
    ties = (grid[1:] + grid[:-1]) / 2
    magnitudes = np.concatenate([grid, ties, np.nextafter(ties, 0), np.nextafter(ties, np.float32(9))])
    x = np.concatenate([magnitudes, -magnitudes])

    codes = np.asarray(jax.jit(e2m1_encode)(x))

    np.testing.assert_array_equal(codes, x.astype(E2M1).view(np.uint8))


def test_rounding_to_e2m1_agrees_with_ml_dtypes_on_random_bits():
    bits = np.random.default_rng(1).integers(0, 2**32, 100_000, dtype=np.uint32)
    within = np.abs(bits.view(np.float32)) <= 6
    x = bits.view(np.float32)[within]

    codes = np.asarray(jax.jit(e2m1_encode)(x))

    np.testing.assert_array_equal(codes, x.astype(E2M1).view(np.uint8))


def test_rounding_to_e4m3_agrees_with_ml_dtypes_on_ties_and_random_bits():
    grid = np.unique(np.abs(ALL_BYTES.view(E4M3).astype(np.float32)))[:-1]  # without the NaN
    ties = (grid[1:] + grid[:-1]) / 2
    edges = np.concatenate([ties, np.nextafter(ties, 0), np.nextafter(ties, np.float32(500))])
    noise = np.random.default_rng(2).integers(0, 2**32, 60_000, dtype=np.uint32).view(np.float32)
    x = np.concatenate([edges, -edges, noise[np.abs(noise) <= 448]])
    x = np.pad(x, (0, -x.size % 127)).reshape(-1, 127)
    x = np.concatenate([x, np.full((len(x), 1), 448, np.float32)], axis=1)  # the scale of each block is 1

    stored = quantize(x, "fp8_token128")

    assert (np.asarray(stored.scale) == 127).all()
    np.testing.assert_array_equal(np.asarray(stored.values).view(np.uint8), x.astype(E4M3).view(np.uint8))


def test_packing_and_unpacking_are_inverse_for_every_byte():
    packed = ALL_BYTES.reshape(4, 64)

    codes = np.asarray(unpack_nibbles(packed))

    np.testing.assert_array_equal(codes[:, 0::2], packed & 0xF)
    np.testing.assert_array_equal(codes[:, 1::2], packed >> 4)
    np.testing.assert_array_equal(pack_nibbles(codes), packed)


# Scales.


@pytest.mark.parametrize("exponent", [-126, -20, -1, 0, 1, 9, 126], ids="two to the {}".format)
def test_a_scale_is_the_smallest_power_of_two_that_is_not_less(exponent):
    power = np.float32(2.0**exponent)
    x = np.array([power, np.nextafter(power, np.float32(np.inf)), power * np.float32(1.5)])

    exact, above, between = np.asarray(e8m0_ceil(x)).astype(int) - 127

    assert exact == exponent
    assert above == between == exponent + 1


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("content", [0.0, 1e-30], ids=["zeros", "tiny numbers"])
def test_the_floor_gives_empty_blocks_a_scale(format, content):
    columns = FORMATS[format].block[1]
    _, max_value, floor, _ = FORMATS[format]

    stored = quantize(np.full((1, columns), content, np.float32), format)

    scale = float(np.asarray(e8m0_decode(stored.scale))[0, 0])
    assert scale / 2 < max(content, floor) / max_value <= scale
    assert np.isfinite(np.asarray(dequantize(stored, jnp.float32))).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
def test_a_block_maximum_at_the_edge_of_the_range_keeps_its_scale(format, sign):
    columns, max_value = FORMATS[format].block[1], FORMATS[format].max_value
    x = np.zeros((1, columns), np.float32)
    x[0, -1] = sign * max_value
    past = np.where(x, np.nextafter(x, np.float32(sign * np.inf)), x)

    at_edge, beyond = quantize(x, format), quantize(past, format)

    assert int(at_edge.scale[0, 0]) == 127
    assert int(beyond.scale[0, 0]) == 128
    assert float(dequantize(at_edge, jnp.float32)[0, -1]) == sign * max_value


def test_scale_byte_ff_makes_a_block_nan():
    scale = jnp.asarray([[127, 0xFF]], jnp.uint8)
    stored = QuantArray(jnp.ones((1, 256), jnp.float8_e4m3fn), scale, "fp8_token128")

    out = np.asarray(dequantize(stored, jnp.float32))

    assert (out[:, :128] == 1).all()
    assert np.isnan(out[:, 128:]).all()


@pytest.mark.parametrize("format", FORMATS)
def test_float32_scales_multiply_directly(format):
    shape = (130, 160)
    stored = quantize(random_numbers(shape), format)
    scale = np.random.default_rng(3).uniform(0.5, 2, stored.scale.shape).astype(np.float32)
    ones = dataclasses.replace(stored, scale=jnp.full_like(stored.scale, 127))

    out = dequantize(dataclasses.replace(stored, scale=jnp.asarray(scale)), jnp.float32)

    rows, columns = FORMATS[format].block
    spread = scale.repeat(rows, 0).repeat(columns, 1)[: shape[0], : shape[1]]
    np.testing.assert_array_equal(out, np.asarray(dequantize(ones, jnp.float32)) * spread)


# Whole arrays.


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantisation_follows_its_definition_block_by_block(format, shape):
    x = random_numbers(shape)

    stored = quantize(x, format)
    out = np.asarray(dequantize(stored, jnp.float32))

    assert stored.format == format
    assert (stored.values.shape, stored.scale.shape) == storage_shapes(shape, format)
    assert stored.values.dtype == values_dtype(format)
    assert stored.scale.dtype == jnp.uint8
    for matrix, scale, numbers in zip(
        matrices(x), matrices(np.asarray(stored.scale)), matrices(out), strict=True
    ):
        expected_scale, expected = definition(matrix, format)
        np.testing.assert_array_equal(scale.view(E8M0).astype(np.float64), expected_scale)
        np.testing.assert_array_equal(numbers, expected)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_representable_arrays_come_back_unchanged(format, shape):
    once = dequantize(quantize(random_numbers(shape), format), jnp.float32)

    twice = dequantize(quantize(once, format), jnp.float32)

    np.testing.assert_array_equal(twice, once)


@pytest.mark.parametrize("format", FORMATS)
def test_a_stack_is_its_matrices_one_by_one(format):
    x = random_numbers((3, 140, 96))

    stack = quantize(x, format)

    assert (stack.shape, stack.ndim, stack.size) == (x.shape, 3, x.size)
    for number, matrix in enumerate(x):
        alone, chosen = quantize(matrix, format), stack[number]
        assert chosen.shape == matrix.shape
        assert chosen.format == format
        np.testing.assert_array_equal(chosen.values, alone.values)
        np.testing.assert_array_equal(chosen.scale, alone.scale)


def test_an_odd_number_of_columns_does_not_pack():
    with pytest.raises(ValueError, match=r"2 values a byte: 33 columns"):
        storage_shapes((4, 33), "fp4_group32")


@pytest.mark.parametrize(
    ("shape", "format", "values", "scale"),
    [
        ((512, 4096), "fp8_block128", (512, 4096), (4, 32)),
        ((129, 127), "fp8_block128", (129, 127), (2, 1)),
        ((256, 2048, 4096), "fp4_group32", (256, 2048, 2048), (256, 2048, 128)),
        ((7, 34), "fp4_group32", (7, 17), (7, 2)),
        ((2, 3, 200), "fp8_token128", (2, 3, 200), (2, 3, 2)),
        ((5, 448), "fp8_block64", (5, 448), (5, 7)),
    ],
    ids=["flash wkv", "partial blocks", "flash experts", "partial group", "stack of tokens", "key-values"],
)
def test_storage_shapes_count_partial_blocks(shape, format, values, scale):
    assert storage_shapes(shape, format) == (values, scale)


def test_a_quantised_array_passes_through_jit_as_a_tree():
    stored = quantize(random_numbers((4, 64)), "fp4_group32")

    again = jax.jit(lambda each: each)(stored)

    assert jax.tree.structure(again) == jax.tree.structure(stored)
    assert again.format == "fp4_group32"


# Precision.


@pytest.mark.parametrize("format", FORMATS)
def test_exact_dtype_loses_no_number_of_the_format(format):
    codes = np.arange(256 if NARROW[format] is E4M3 else 16, dtype=np.uint8)
    numbers = codes.view(NARROW[format]).astype(np.float32)
    stored = quantize(numbers[np.isfinite(numbers)][None, :32], format)
    scales = np.exp2(np.arange(-100, 100, 7, dtype=np.float32))

    products = numbers[np.isfinite(numbers)] * scales[:, None]

    assert stored.exact_dtype == jnp.bfloat16
    np.testing.assert_array_equal(products.astype(ml_dtypes.bfloat16).astype(np.float32), products)


def test_exact_dtype_is_float32_where_scales_are():
    values, scale = jnp.ones((128, 128), jnp.float8_e4m3fn), jnp.full((1, 1), 1 + 2**-20, jnp.float32)
    stored = QuantArray(values, scale, "fp8_block128")

    out = dequantize(stored, stored.exact_dtype)

    assert stored.exact_dtype == jnp.float32
    assert (np.asarray(out) == 1 + 2**-20).all()


@pytest.mark.parametrize("format", ["fp8_token128", "fp8_block64", "fp4_group32"])
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(jnp.float32, id="float32"),
        pytest.param(jnp.bfloat16, id="bfloat16"),
        # XLA leaves out casts to FP8 and back there
        pytest.param(jnp.float32, id="float32 on a GPU", marks=pytest.mark.gpu),
        pytest.param(jnp.bfloat16, id="bfloat16 on a GPU", marks=pytest.mark.gpu),
    ],
)
def test_fake_quantisation_is_a_round_trip_in_the_dtype_of_its_input(format, dtype):
    x = jnp.asarray(random_numbers((3, 5, 160)), dtype)

    out = fake_quantize(x, format)

    assert out.dtype == dtype
    expected = dequantize(quantize(x, format), dtype)
    np.testing.assert_array_equal(np.float32(out), np.float32(expected))
    np.testing.assert_array_equal(np.float32(fake_quantize(out, format)), np.float32(out))


def test_fake_quantisation_takes_a_single_vector_with_a_partial_block():
    x = random_numbers((1, 77))[0]

    out = fake_quantize(x, "fp8_block64")

    np.testing.assert_array_equal(out, definition(x[None], "fp8_block64")[1][0])


def test_fake_quantisation_rejects_blocks_that_span_rows():
    with pytest.raises(ValueError, match="shares scales between rows"):
        fake_quantize(np.ones((128, 128), np.float32), "fp8_block128")


def test_activation_quant_scales_each_token_by_itself():
    x = random_numbers((2, 3, 256))

    stored = activation_quant(x)

    assert stored.format == "fp8_token128"
    expected = quantize(x, "fp8_token128")
    np.testing.assert_array_equal(stored.values, expected.values)
    np.testing.assert_array_equal(stored.scale, expected.scale)


def test_activation_quant_wants_a_token_axis():
    with pytest.raises(ValueError, match="needs a token axis"):
        activation_quant(jnp.ones(128))
