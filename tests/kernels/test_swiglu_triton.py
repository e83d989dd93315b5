"""The Triton kernels of `swiglu` and `swiglu_quant`: they compile for every chip, and are right on one."""

import functools
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import COMPILED_ARCH

from pallas_kernels import Target, activation_quant
from pallas_kernels.swiglu import IMPLEMENTATIONS, QUANT, reference, swiglu, swiglu_quant

kernels = pytest.importorskip("pallas_kernels.swiglu.triton")
triton_call = pytest.importorskip("pallas_kernels.triton_call")

F32, BF16 = jnp.float32, jnp.bfloat16
LIMIT = 10.0
H200, A100, MI300 = Target("cuda", "sm_90"), Target("cuda", "sm_80"), Target("rocm", "gfx942")


def shape(*sizes: int, dtype=BF16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def projections(tokens: int, columns: int, dtype=BF16) -> tuple[jax.Array, jax.Array]:
    """Gates beside ups, [tokens, 2 columns], of which the limit clamps some; and a weight for each row."""
    keys = jax.random.split(jax.random.key(tokens), 2)
    both = 6 * jax.random.normal(keys[0], (tokens, 2 * columns))
    return both.astype(dtype), jax.random.uniform(keys[1], (tokens,))


# --- anywhere


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_halves_of_one_product_are_as_two_products(weighted):
    both, weight = projections(5, 128)
    weight = weight if weighted else None

    for run in (swiglu, swiglu_quant):
        one, two = run(both, None, weight, limit=LIMIT), run(*jnp.split(both, 2, -1), weight, limit=LIMIT)

        jax.tree.map(np.testing.assert_array_equal, one, two)


def test_swiglu_quant_is_what_it_says():
    both, weight = projections(5, 384)

    found = swiglu_quant(both, None, weight, limit=LIMIT)

    expected = activation_quant(swiglu(both, None, weight, limit=LIMIT))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    ("gate", "up", "weight"),
    [
        (shape(2, 128), shape(2, 256), None),
        (shape(2, 129), None, None),
        (shape(2, 128), shape(2, 128), shape(3, dtype=F32)),
    ],
    ids=["other columns", "an odd number of columns", "another number of rows"],
)
def test_what_does_not_belong_together_is_refused(gate, up, weight):
    for run in (swiglu, swiglu_quant):
        with pytest.raises(ValueError, match="do not match"):
            run(gate, up, weight, limit=LIMIT)


def test_quantising_needs_an_axis_of_rows():
    with pytest.raises(ValueError, match="needs a token axis"):
        swiglu_quant(jnp.ones(128), jnp.ones(128), limit=LIMIT)


@pytest.mark.parametrize(
    ("target", "gate", "up", "plain", "quant"),
    [
        (H200, shape(3, 256), None, True, True),
        (H200, shape(3, 128), shape(3, 128), True, True),
        (H200, shape(3, 256, dtype=F32), None, True, True),
        (A100, shape(3, 256), None, True, False),
        (MI300, shape(3, 256), None, True, False),
        (H200, shape(3, 128), None, False, False),
        (H200, shape(0, 256), None, False, False),
        (H200, shape(3, 128), shape(3, 128, dtype=F32), False, False),
        (Target("cpu", ""), shape(3, 256), None, False, False),
    ],
    ids=[
        "halves",
        "two products",
        "float32",
        "Ampere",
        "CDNA3",
        "columns that are no multiple of 128",
        "no tokens",
        "two dtypes",
        "a CPU",
    ],
)
def test_the_kernels_take(target, gate, up, plain, quant):
    assert IMPLEMENTATIONS[0].fits(target, gate, up, None, LIMIT, BF16) is plain
    assert QUANT[0].fits(target, gate, up, None, LIMIT) is quant


@COMPILED_ARCH
@pytest.mark.parametrize("tokens", [1, 8192], ids="tokens={}".format)
def test_the_kernels_compile_for(tokens, arch):
    both, weight = shape(tokens, 4096), shape(tokens, dtype=F32)
    runs = [lambda both, weight: kernels.swiglu(both, None, weight, LIMIT, BF16)]
    if arch not in ("sm_80", "gfx942"):  # which have no float8_e4m3fn
        runs.append(lambda both, weight: kernels.swiglu_quant(both, None, weight, LIMIT))

    for run in runs:
        (launch,) = triton_call.launches(run, both, weight)
        binary = triton_call.compile_offline(launch, arch)

        (machine,) = struct.unpack_from("<H", binary.code, 18)
        assert binary.code[:4] == b"\x7fELF"
        assert machine == (190 if arch.startswith("sm_") else 224)


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3, 17, 127, 129, 1000], ids="tokens={}".format)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_the_kernel_gives_what_the_definition_gives(weighted, dtype, tokens):
    both, weight = projections(tokens, 384, dtype)
    weight = weight if weighted else None
    run = functools.partial(swiglu, limit=LIMIT, out_dtype=F32)

    expected = run(both, None, weight, implementation="reference")
    for operands in ((both, None), tuple(jnp.split(both, 2, -1))):
        found = run(*operands, weight, implementation="triton")
        # An exponential, a division and three products, each within an ulp or two of 6e-8.
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        narrow = swiglu(*operands, weight, limit=LIMIT, implementation="triton")
        np.testing.assert_array_equal(np.float32(narrow), np.float32(found.astype(BF16)))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3, 17, 127, 129, 1000], ids="tokens={}".format)
@pytest.mark.parametrize("columns", [128, 2048], ids="columns={}".format)
def test_the_fused_kernel_gives_the_bits_of_both_kernels(columns, tokens):
    both, weight = projections(tokens, columns)
    weight = weight * jnp.exp2(jnp.arange(tokens) % 40 - 20)

    found = swiglu_quant(both, None, weight, limit=LIMIT, implementation="triton")

    narrow = swiglu(both, None, weight, limit=LIMIT, implementation="triton")
    expected = activation_quant(narrow, implementation="triton")
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    jax.tree.map(np.testing.assert_array_equal, found, activation_quant(narrow, implementation="reference"))


@pytest.mark.gpu
def test_not_a_number_is_not_clamped_away_at_the_edges():
    gate = jnp.zeros((2, 128)).at[0, 5].set(jnp.nan)
    up = jnp.zeros((2, 128)).at[1, 7].set(jnp.nan)

    found = swiglu(gate, up, limit=LIMIT, out_dtype=F32, implementation="triton")

    np.testing.assert_array_equal(found, reference.swiglu(gate, up, None, LIMIT, F32))
    assert np.argwhere(np.isnan(found)).tolist() == [[0, 5], [1, 7]]


@pytest.mark.gpu
def test_no_tokens_give_nothing():
    empty = jnp.zeros((0, 256), BF16)

    assert swiglu(empty, None, limit=LIMIT).shape == (0, 128)
    assert swiglu_quant(empty, None, limit=LIMIT).shape == (0, 128)
