"""Rows of a cache in the formats of the released model: the numbers they stand for, their bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    decode_rows,
    empty_index_keys,
    empty_kv,
    encode_rows,
    fake_quantize,
    read_rows,
    write_rows,
)
from pallas_kernels.formats import e8m0_decode

KV, INDEX = "fp8_block64", "fp4_group32"
ROTATED = 64


def numbers(width: int, dtype, *, rows: int = 300) -> jax.Array:
    """[1, rows, width]: rows of very different sizes, among them zeros and some below every floor."""
    keys = jax.random.split(jax.random.key(width), 2)
    size = 10.0 ** jax.random.uniform(keys[0], (1, rows, 1), minval=-8, maxval=4)
    return jnp.where(size < 1e-7, 0, size * jax.random.normal(keys[1], (1, rows, width))).astype(dtype)


def simulated(x: jax.Array, format: str) -> jax.Array:
    """Through the format and back, as training did it: of keys and values without the rotated columns."""
    if format == INDEX:
        return fake_quantize(x, format)
    nope, rope = jnp.split(x, [x.shape[-1] - ROTATED], axis=-1)
    return jnp.concatenate([fake_quantize(nope, format), rope], axis=-1)


def empty(batch: int, slots: int, width: int, format: str | None, dtype):
    if format == INDEX:
        return empty_index_keys(batch, slots, width, format, dtype)
    return empty_kv(batch, slots, width, format, ROTATED, dtype)


def kept(x: jax.Array, format: str | None):
    *_, slots, width = x.shape
    return encode_rows(x, empty(1, slots, width, format, x.dtype))


def bits(x: jax.Array) -> np.ndarray:
    return np.asarray(x).view(np.uint8)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("format", "width"), [(KV, 512), (KV, 128), (KV, 80), (INDEX, 128)])
def test_numbers_that_went_through_the_format_are_kept_to_the_bit(format, width, dtype):
    x = simulated(numbers(width, dtype), format)

    np.testing.assert_array_equal(bits(decode_rows(kept(x, format), dtype)), bits(x))


@pytest.mark.parametrize(("format", "width"), [(KV, 512), (INDEX, 128)])
def test_other_numbers_are_kept_as_the_format_rounds_them(format, width):
    x = numbers(width, jnp.bfloat16)

    np.testing.assert_array_equal(bits(decode_rows(kept(x, format), x.dtype)), bits(simulated(x, format)))


def test_a_key_value_takes_584_bytes_and_an_index_key_68():
    for format, width, nbytes in ((KV, 512, 584), (INDEX, 128, 68)):
        leaves = jax.tree.leaves(empty(1, 1, width, format, jnp.bfloat16))

        assert sum(leaf.nbytes for leaf in leaves) == nbytes


def test_scales_are_exponents_and_the_last_byte_pads():
    x = jnp.zeros((1, 1, 512)).at[0, 0, 64 * 3 + 5].set(448.0 * 2**7)

    rows = kept(x, KV)

    np.testing.assert_array_equal(e8m0_decode(rows.scale[0, 0, 3]), 2**7)
    assert rows.scale[0, 0, 7] == 0
    assert rows.nope[0, 0, 64 * 3 + 5] == 448


@pytest.mark.parametrize("format", [None, KV, INDEX], ids=["numbers", KV, INDEX])
def test_what_nobody_wrote_reads_as_zero(format):
    rows = empty(2, 3, 128, format, jnp.float32)

    assert rows.shape == (2, 3, 128)
    assert not decode_rows(rows).any()
    assert not any(jax.tree.leaves(jax.tree.map(lambda leaf: bool(bits(leaf).any()), rows)))


@pytest.mark.parametrize("format", [None, KV, INDEX], ids=["numbers", KV, INDEX])
def test_rows_are_written_where_they_are_to_be_kept_and_nowhere_else(format):
    width = 128
    x = numbers(width, jnp.float32, rows=8).reshape(2, 4, width)
    x = x if format is None else simulated(x, format)
    slot = jnp.array([[4, 0, 2, 9], [5, 1, 3, 0]])
    keep = jnp.array([[True, True, False, True], [False, True, True, True]])

    rows = write_rows(empty(2, 5, width, format, jnp.float32), x, slot, keep)

    expected = np.zeros((2, 5, width), np.float32)
    expected[0, 4], expected[0, 0] = x[0, 0], x[0, 1]
    expected[1, 1], expected[1, 3], expected[1, 0] = x[1, 1], x[1, 2], x[1, 3]
    np.testing.assert_array_equal(decode_rows(rows), expected)


def test_an_index_outside_reads_the_nearest_row():
    rows = kept(jnp.arange(3 * 128.0).reshape(1, 3, 128), None)

    found = read_rows(rows, jnp.array([[-1, 2, 3, 2**31 - 1]]))

    np.testing.assert_array_equal(found[0, :, 0], [0, 256, 256, 256])


def test_each_kind_of_row_has_its_format():
    with pytest.raises(ValueError, match="in fp8_block64, not in fp4_group32"):
        empty_kv(1, 4, 128, INDEX, ROTATED, jnp.float32)
    with pytest.raises(ValueError, match="in fp4_group32, not in fp8_block64"):
        empty_index_keys(1, 4, 128, KV, jnp.float32)
