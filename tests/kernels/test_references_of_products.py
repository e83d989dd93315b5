"""The references of products with weights against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import OPERANDS, assert_sums_agree, normal, numbers, quantize

import pallas_kernels as pk
from pallas_kernels import QuantArray

F32 = jnp.float32

block_matmul = jax.jit(pk.block_matmul, static_argnames=("out_dtype", "activation"))
block_diagonal_matmul = jax.jit(pk.block_diagonal_matmul, static_argnames="out_dtype")
grouped_matmul = jax.jit(pk.grouped_matmul, static_argnames="out_dtype")


@pytest.mark.parametrize("weight", OPERANDS)
@pytest.mark.parametrize("quantised", [False, True], ids=["plain activations", "fp8 activations"])
def test_block_matmul_is_the_product_with_the_transposed_weight(weight, quantised):
    x, matrix = normal(2, 3, 160), OPERANDS[weight](normal(130, 160, seed=1))
    x = quantize(x, "fp8_token128") if quantised else x

    out = block_matmul(x, matrix, out_dtype=F32)

    assert_sums_agree(out, numbers(x)[..., None, :] * numbers(matrix))


def test_block_matmul_quantises_what_is_plain_if_it_is_told_to():
    x, weight, plain = (
        normal(3, 256),
        quantize(normal(64, 256, seed=1), "fp8_block128"),
        normal(64, 256, seed=1),
    )
    before = quantize(x, "fp8_token128")

    found = [block_matmul(each, weight, activation="fp8_token128", out_dtype=F32) for each in (x, before)]

    np.testing.assert_array_equal(found[0], block_matmul(before, weight, out_dtype=F32))
    np.testing.assert_array_equal(found[1], found[0])
    unquantised = block_matmul(x, plain, activation="fp8_token128", out_dtype=F32)
    np.testing.assert_array_equal(unquantised, block_matmul(x, plain, out_dtype=F32))


def test_block_matmul_keeps_a_float32_scale_exact():
    matrix = quantize(normal(64, 128), "fp8_block128")
    matrix = QuantArray(matrix.values, jnp.full((1, 1), 1 + 2**-20, F32), matrix.format)
    x = quantize(normal(3, 128, seed=1), "fp8_token128")

    out = block_matmul(x, matrix, out_dtype=F32)

    assert_sums_agree(out, numbers(x)[:, None] * numbers(matrix))


@pytest.mark.parametrize("op", ["block_matmul", "block_diagonal_matmul", "grouped_matmul"])
def test_products_round_once_to_the_dtype_asked_for(op):
    x, matrix = normal(4, 1, 64), normal(8, 64, seed=1)
    arguments = {
        "block_matmul": (block_matmul, x, matrix),
        "block_diagonal_matmul": (block_diagonal_matmul, x, matrix),
        "grouped_matmul": (grouped_matmul, x[:, 0], matrix[None], jnp.asarray([4], jnp.int32)),
    }
    run, *operands = arguments[op]

    narrow = run(*operands, out_dtype=jnp.bfloat16)

    assert narrow.dtype == jnp.bfloat16
    wide = run(*operands, out_dtype=F32)
    np.testing.assert_array_equal(np.float32(narrow), np.float32(wide.astype(jnp.bfloat16)))


@pytest.mark.parametrize("weight", ["plain", "fp8 blocks"])
def test_block_diagonal_matmul_gives_each_group_its_own_rows(weight):
    groups, rows = 2, 128
    x, matrix = normal(2, 3, groups, 64), OPERANDS[weight](normal(groups * rows, 64, seed=1))

    out = block_diagonal_matmul(x, matrix, out_dtype=F32)

    slabs = numbers(matrix).reshape(groups, rows, 64)
    assert_sums_agree(out, np.float64(x)[..., None, :] * slabs)


@pytest.mark.parametrize("weight", ["plain", "fp8 blocks", "fp4 groups"])
@pytest.mark.parametrize("quantised", [False, True], ids=["plain activations", "fp8 activations"])
@pytest.mark.parametrize(
    "sizes",
    [(3, 4, 2, 2), (0, 11, 0, 0), (0, 0, 0, 11), (2, 0, 5, 0), (0, 0, 0, 0)],
    ids=["every expert", "all on one", "all on the last", "rows past the end", "no rows at all"],
)
def test_grouped_matmul_takes_each_row_through_its_own_expert(sizes, quantised, weight):
    rows, experts, columns = 11, len(sizes), 64
    x, stack = normal(rows, columns), OPERANDS[weight](normal(experts, 40, columns, seed=1))
    x = quantize(x, "fp8_token128") if quantised else x

    out = grouped_matmul(x, stack, jnp.asarray(sizes, jnp.int32), out_dtype=F32)

    owner = np.repeat(np.arange(experts), sizes)
    terms = np.zeros((rows, 40, columns))
    terms[: len(owner)] = numbers(x)[: len(owner), None] * numbers(stack)[owner]
    assert_sums_agree(out, terms)


def test_a_nan_in_one_expert_stays_in_the_rows_of_that_expert():
    x, stack = normal(6, 32), normal(3, 8, 32, seed=1)
    stack[1] = np.nan

    out = np.asarray(grouped_matmul(x, stack, jnp.asarray([2, 1, 3], jnp.int32), out_dtype=F32))

    assert np.isnan(out[2]).all()
    assert np.isfinite(out[[0, 1, 3, 4, 5]]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pk.block_matmul(jnp.ones((2, 32)), jnp.ones((8, 64))), "x has 32 columns, weight has 64"),
        (
            lambda: pk.block_diagonal_matmul(jnp.ones((2, 3, 32)), jnp.ones((8, 32))),
            r"\(8, 32\) does not split into 3 slabs of 32",
        ),
        (
            lambda: pk.block_diagonal_matmul(jnp.ones((2, 2, 32)), jnp.ones((8, 64))),
            r"\(8, 64\) does not split into 2 slabs of 32",
        ),
        (
            lambda: pk.grouped_matmul(jnp.ones((2, 32)), jnp.ones((4, 8, 64)), jnp.zeros(4, jnp.int32)),
            "do not match",
        ),
        (
            lambda: pk.grouped_matmul(jnp.ones((2, 32)), jnp.ones((4, 8, 32)), jnp.zeros(3, jnp.int32)),
            "do not match",
        ),
        (lambda: pk.hadamard(jnp.ones((2, 96))), "power of two, got 96"),
        (
            lambda: pk.compress(
                jnp.ones((1, 8, 24)), jnp.ones((1, 8, 24)), jnp.zeros((1, 1), jnp.int32), ratio=4, head_dim=16
            ),
            "24 channels, neither head_dim 16 nor twice",
        ),
    ],
    ids=[
        "columns of a product",
        "rows of slabs",
        "columns of slabs",
        "columns of experts",
        "number of experts",
        "size of a transform",
        "channels of a window",
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
