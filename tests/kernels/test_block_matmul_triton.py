"""The Triton kernels of the FP8 products: they compile for every chip, and are right where there is one."""

import dataclasses
import functools
import math
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import COMPILED_ARCH, EVERY_ARCH

from pallas_kernels import (
    QuantArray,
    Target,
    activation_quant,
    block_diagonal_matmul,
    block_matmul,
    dequantize,
    quantize,
)
from pallas_kernels.block_matmul import DIAGONAL, MATMUL, tiles
from pallas_kernels.block_matmul.tiles import Tile, tile_for, tuned
from pallas_kernels.formats import scale_values
from pallas_kernels.target import assume

kernels = pytest.importorskip("pallas_kernels.block_matmul.triton")
triton_call = pytest.importorskip("pallas_kernels.triton_call")

F32, BF16, FP8 = jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn
SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64, "gfx950": 160}
# What a chip's compiler takes: Ampere has no FP8 and gets its bits, CDNA3 has one of its own.
STORED = {"sm_80": jnp.uint8, "gfx942": jnp.float8_e4m3fnuz}

# (rows, columns) of the weights of V4-Flash: wq_b, wo_b, wq_a with wkv, w1 with w3 of the shared expert.
FLASH = [(32768, 1024), (4096, 8192), (1536, 4096), (4096, 4096)]
WO_A = (8, 1024, 4096)  # groups, rows and columns of each


def fp8(rows: int, columns: int, format: str, values=FP8, scale=jnp.uint8) -> QuantArray:
    """The shapes of a quantised matrix."""
    scale_rows = rows if format == "fp8_token128" else -(-rows // 128)
    return QuantArray(
        jax.ShapeDtypeStruct((rows, columns), values),
        jax.ShapeDtypeStruct((scale_rows, columns // 128), scale),
        format,
    )


# The instruction that multiplies, by arch: on the ordinary units, for few tokens, and for as many as fill it.
PLAIN, FEW, MANY, FEW_BF16, MANY_BF16 = (
    {
        "sm_80": "fma.rn.f32",
        "sm_90": "fma.rn.f32",
        "sm_100": "fma.rn.f32",
        "gfx942": "v_fma",
        "gfx950": "v_fma",
    },
    {
        "sm_80": "mma.sync.aligned.m16n8k16.row.col.f32.bf16",
        "sm_90": "mma.sync.aligned.m16n8k16.row.col.f32.f16",
        "sm_100": "mma.sync.aligned.m16n8k16.row.col.f32.f16",
        "gfx942": "v_mfma_f32_16x16x32_fp8_fp8",
        "gfx950": "v_mfma_f32_16x16x128_f8f6f4",
    },
    {
        "sm_80": "mma.sync.aligned.m16n8k16.row.col.f32.bf16",
        "sm_90": "k32.f32.e4m3.e4m3",
        "sm_100": "tcgen05.mma.cta_group::1.kind::f8f6f4",
        "gfx942": "v_mfma_f32_32x32x16_fp8_fp8",
        "gfx950": "v_mfma_f32_32x32x64_f8f6f4",
    },
    {
        "sm_80": "mma.sync.aligned.m16n8k16.row.col.f32.bf16",
        "sm_90": "mma.sync.aligned.m16n8k16.row.col.f32.bf16",
        "sm_100": "mma.sync.aligned.m16n8k16.row.col.f32.bf16",
        "gfx942": "v_mfma_f32_16x16x16_bf16",
        "gfx950": "v_mfma_f32_16x16x32_bf16",
    },
    {
        "sm_80": "mma.sync.aligned.m16n8k16.row.col.f32.bf16",
        "sm_90": "k16.f32.bf16.bf16",
        "sm_100": "tcgen05.mma.cta_group::1.kind::f16",
        "gfx942": "v_mfma_f32_32x32x8_bf16",
        "gfx950": "v_mfma_f32_32x32x16_bf16",
    },
)
# name: tile, tokens, weight, dtype of its scale, what multiplies. All that a chip of 64 KiB can hold.
CASES = {
    "streamed": (Tile(1, 4, num_warps=8), 1, (4096, 8192), jnp.uint8, PLAIN),
    "streamed, by groups": (Tile(1, 8), 3, WO_A, jnp.uint8, PLAIN),
    "spanned": (Tile(16, 32, span=4, num_stages=2), 8, (4096, 8192), jnp.uint8, FEW),
    "spanned, by groups": (Tile(16, 32, span=2, num_stages=2), 3, WO_A, jnp.uint8, FEW_BF16),
    "tokens as columns": (Tile(32, 64, splits=4, num_stages=2), 32, (4096, 8192), jnp.uint8, MANY),
    "tokens as rows": (Tile(64, 64, num_stages=2), 33, (1536, 4096), F32, MANY),
    "stacked": (Tile(64, 64, stack=2, num_stages=2), 1000, (4096, 4096), jnp.uint8, MANY),
    "side by side": (Tile(64, 64, beside=2, num_stages=2), 1000, (32768, 1024), jnp.uint8, MANY),
    "dequantized": (Tile(64, 64, num_stages=2), 1000, WO_A, jnp.uint8, MANY_BF16),
    "bfloat16 and float32 scales": (Tile(64, 64, num_stages=2), 1000, WO_A, F32, MANY_BF16),
}


def launches_of(case: str, arch: str) -> list:
    tile, tokens, shape, scale, _ = CASES[case]
    stored = STORED.get(arch, FP8)
    if shape is WO_A:
        groups, rows, columns = shape
        x, run = jax.ShapeDtypeStruct((tokens, groups, columns), BF16), kernels.block_diagonal_matmul
        weight = fp8(groups * rows, columns, "fp8_block128", stored, scale)
    else:
        x, run = fp8(tokens, shape[1], "fp8_token128", stored), kernels.block_matmul
        weight = fp8(*shape, "fp8_block128", stored, scale)
    return triton_call.launches(functools.partial(run, out_dtype=BF16, tile=tile), x, weight)


@COMPILED_ARCH
@pytest.mark.parametrize("case", list(CASES))
def test_the_kernels_compile_for(case, arch):
    (launch,) = launches_of(case, arch)

    binary = triton_call.compile_offline(launch, arch)

    (machine,) = struct.unpack_from("<H", binary.code, 18)
    assert binary.code[:4] == b"\x7fELF"
    assert machine == (190 if arch.startswith("sm_") else 224)
    assert CASES[case][-1][arch] in binary.assembly
    assert binary.shared_bytes <= SHARED_KIB[arch] * 1024


@pytest.mark.parametrize("arch", EVERY_ARCH)
def test_a_single_token_is_quantised_in_the_product_where_a_program_has_all_of_it(arch):
    vendor = "cuda" if arch.startswith("sm_") else "rocm"
    weight = fp8(4096, 8192, "fp8_block128", STORED.get(arch, FP8))
    quantising = functools.partial(block_matmul, activation="fp8_token128")

    with assume(Target(vendor, arch)):
        one, three = (
            triton_call.launches(quantising, jax.ShapeDtypeStruct((tokens, 8192), BF16), weight)
            for tokens in (1, 3)
        )

    assert one[-1] != three[-1]
    if arch in ("sm_90", "sm_100"):
        (launch,) = one
        assert "e4m3x2" in triton_call.compile_offline(launch, arch).assembly
    else:
        assert "_streamed" not in [launch.kernel.__name__ for launch in one]


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
@pytest.mark.parametrize("rows", [256, 1024, 2624])
def test_a_token_by_a_small_plain_weight_is_streamed(rows, arch):
    x, weight = jax.ShapeDtypeStruct((1, 1, 4096), BF16), jax.ShapeDtypeStruct((rows, 4096), BF16)

    with assume(Target("cuda", arch)):
        (launch,) = triton_call.launches(block_matmul, x, weight, out_dtype=F32)

    assert "fma.rn.f32" in triton_call.compile_offline(launch, arch).assembly


# --- tiles


@pytest.mark.parametrize("arch", EVERY_ARCH)
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_every_shape_has_a_tile_that_divides_it(groups, arch):
    for tokens in (1, 8, 9, 16, 17, 64, 65, 128, 129, 1000, 8192):
        for rows in (16, 24, 128, 1024, 1536, 16384) if groups == 1 else (128, 2048, 8192):
            for columns in (128, 384, 512, 1536, 7168):
                for operand in ("fp8", "bf16"):
                    tile = tile_for(arch, operand, tokens, rows, columns, groups)
                    assert tile.divides(columns, rows // groups, groups), (tile, rows, columns)


def test_a_measured_tile_serves_up_to_its_number_of_tokens(monkeypatch):
    first, second = Tile(8, 32), Tile(64, 128)
    monkeypatch.setattr(tiles, "tuned", lambda: {"sm_90": {"fp8": {"128x256": {8: first, 128: second}}}})

    chosen = [tile_for("sm_90", "fp8", tokens, 128, 256) for tokens in (1, 8, 9, 128, 5000)]

    assert chosen == [first, first, second, second, second]


def test_a_measured_tile_that_does_not_divide_other_groups_is_left_to_them(monkeypatch):
    monkeypatch.setattr(tiles, "tuned", lambda: {"sm_90": {"bf16": {"128x256": {8: Tile(8, 128)}}}})

    chosen = [tile_for("sm_90", "bf16", 8, 128, 256, groups) for groups in (1, 4)]

    assert chosen[0] == Tile(8, 128)
    assert chosen[1].divides(256, 32, 4)


def test_measured_tiles_divide_the_weights_they_were_measured_for():
    for shapes in tuned()["sm_90"].values():
        for shape, by_tokens in shapes.items():
            rows, columns = map(int, shape.split("x"))
            assert all(tile.divides(columns, rows, 1) for tile in by_tokens.values()), shape


def test_a_tile_that_does_not_divide_the_product_is_refused():
    x, weight = fp8(4, 384, "fp8_token128"), fp8(64, 384, "fp8_block128")

    with pytest.raises(ValueError, match=r"span=2.* does not divide 1 groups of 64 x 384"):
        triton_call.launches(
            functools.partial(kernels.block_matmul, out_dtype=F32, tile=Tile(16, 16, span=2)), x, weight
        )


# --- which products they take

H200, A100, MI300, MI250 = (
    Target("cuda", "sm_90"),
    Target("cuda", "sm_80"),
    Target("rocm", "gfx942"),
    Target("rocm", "gfx90a"),
)
X, WEIGHT = fp8(3, 256, "fp8_token128"), fp8(40, 256, "fp8_block128")
PLAIN = jax.ShapeDtypeStruct((3, 256), BF16)


@pytest.mark.parametrize(
    ("target", "x", "weight", "out_dtype", "fits"),
    [
        (H200, X, WEIGHT, BF16, True),
        (H200, PLAIN, WEIGHT, F32, True),
        (MI300, X, WEIGHT, BF16, True),
        (A100, X, WEIGHT, BF16, True),
        (MI250, X, WEIGHT, BF16, False),
        (Target("cpu", ""), X, WEIGHT, BF16, False),
        (H200, PLAIN, jax.ShapeDtypeStruct((40, 256), BF16), BF16, False),
        (H200, jax.ShapeDtypeStruct((3, 256), F32), WEIGHT, BF16, False),
        (H200, fp8(3, 160, "fp8_token128"), fp8(40, 160, "fp8_block128"), BF16, False),
        (H200, dataclasses.replace(X, format="fp8_block64"), WEIGHT, BF16, False),
        (H200, X, WEIGHT, jnp.float16, False),
        (H200, fp8(2**24, 256, "fp8_token128"), WEIGHT, BF16, False),
    ],
    ids=[
        "FP8 by FP8",
        "bfloat16 by FP8",
        "CDNA3",
        "Ampere",
        "CDNA2",
        "a CPU",
        "a plain weight",
        "float32 activations",
        "columns that are no multiple of 128",
        "activations of another format",
        "another result",
        "more numbers than 32 bits count",
    ],
)
def test_the_kernels_take(target, x, weight, out_dtype, fits):
    implementation = next(each for each in MATMUL if each.name == "triton")

    assert implementation.fits(target, x, weight, out_dtype) is fits


@pytest.mark.parametrize(("rows", "fits"), [(16, True), (24, False)], ids=["whole tiles", "parts of tiles"])
def test_the_grouped_kernel_takes_groups_of(rows, fits):
    x, weight = jax.ShapeDtypeStruct((3, 2, 256), BF16), fp8(2 * rows, 256, "fp8_block128")

    implementation = next(each for each in DIAGONAL if each.name == "triton")
    assert implementation.fits(H200, x, weight, BF16) is fits


def test_other_columns_are_refused_with_the_multiple_that_is_missing():
    x, weight = fp8(3, 160, "fp8_token128"), fp8(40, 160, "fp8_block128")

    with pytest.raises(NotImplementedError, match="multiples of 128 columns, not 160"):
        kernels.block_matmul(x, weight, BF16)


def test_e4m3_in_the_form_of_cdna3_stands_for_the_same_numbers():
    codes = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)  # all but not-a-number
    values = jax.lax.bitcast_convert_type(jnp.asarray(codes), FP8)

    found, scale = kernels.as_fnuz(values, jnp.full((1,), 127, jnp.uint8))

    assert scale.tolist() == [128]
    np.testing.assert_array_equal(np.float32(found) * 2, np.float32(values))


# --- on a GPU


def random_pair(tokens: int, rows: int, columns: int) -> tuple[jax.Array, QuantArray]:
    """bfloat16 activations and an FP8 weight, with scales that differ between blocks, tokens and rows."""
    keys = jax.random.split(jax.random.key(tokens), 4)
    spread = [
        jnp.exp2(jax.random.randint(key, (count, 1), -3, 4))
        for key, count in zip(keys[:2], (tokens, rows), strict=True)
    ]
    x = spread[0] * jax.random.normal(keys[2], (tokens, columns))
    weight = spread[1] * jax.random.normal(keys[3], (rows, columns))
    octaves = jnp.repeat(jnp.exp2(jnp.arange(columns // 128) % 5), 128)
    return (x * octaves).astype(BF16), quantize(weight / octaves, "fp8_block128")


@functools.cache
def product_of_1000_tokens(operand: str, *shape: int) -> tuple[jax.Array | QuantArray, QuantArray, jax.Array]:
    """x, weight and what the definition gives, in float32; a shape of three has groups."""
    *groups, rows, columns = shape
    x, weight = random_pair(1000 * math.prod(groups), math.prod(groups) * rows, columns)
    if groups:
        x, run = x.reshape(1000, *groups, columns), block_diagonal_matmul
    else:
        x, run = quantize(x, "fp8_token128") if operand == "fp8" else x, block_matmul
    return x, weight, run(x, weight, out_dtype=F32, implementation="reference")


def relative_error(found: jax.Array, expected: jax.Array) -> float:
    """The largest of the rows' relative errors: small rows count as much as large ones."""
    difference = jnp.linalg.norm(found.astype(F32) - expected, axis=-1)
    return float((difference / jnp.linalg.norm(expected, axis=-1)).max())


# Rounding to bfloat16 makes 1.7e-3. Of a sum, Hopper's FP8 tensor cores keep some 14 bits.
BOUNDS = {"fp8": {BF16: 3e-3, F32: 1e-3}, "bf16": {BF16: 3e-3, F32: 1e-5}}
PRODUCTS = [(operand, *shape) for shape in FLASH for operand in BOUNDS] + [("bf16", *WO_A)]


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3, 17, 127, 129, 1000], ids="tokens={}".format)
@pytest.mark.parametrize("product", PRODUCTS, ids=lambda product: " ".join(map(str, product)))
def test_the_kernels_give_what_the_definition_gives(product, tokens):
    x, weight, expected = product_of_1000_tokens(*product)
    x = jax.tree.map(lambda leaf: leaf[:tokens], x)
    run = block_diagonal_matmul if len(product) == 4 else block_matmul

    for out_dtype, bound in BOUNDS[product[0]].items():
        found = run(x, weight, out_dtype=out_dtype, implementation="triton")

        assert found.dtype == out_dtype
        assert relative_error(found, expected[:tokens]) <= bound


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 5, 130], ids="tokens={}".format)
@pytest.mark.parametrize("rows", [8, 200, 1000], ids="rows={}".format)
def test_the_kernels_hold_at_the_edges_and_with_float32_scales(rows, tokens):
    x, weight = random_pair(tokens, rows, 384)
    weight = dataclasses.replace(weight, scale=1.1 * scale_values(weight.scale))

    found = block_matmul(x[:, None], weight, out_dtype=F32, implementation="triton")

    expected = np.float64(x) @ np.float64(dequantize(weight)).T
    assert found.shape == (tokens, 1, rows)
    assert relative_error(found[:, 0], jnp.asarray(expected, F32)) <= BOUNDS["bf16"][F32]


TILES = [
    Tile(1, 16, num_warps=8),
    Tile(8, 32, span=4),
    Tile(16, 128),
    Tile(32, 64, splits=2, num_stages=6),
    Tile(32, 128, num_warps=8),
    Tile(64, 64, stack=2),
    Tile(64, 64, beside=2),
    Tile(128, 128, beside=2, num_warps=8),
]


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 17, 129], ids="tokens={}".format)
@pytest.mark.parametrize("operand", list(BOUNDS))
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_kind_of_tile_is_right_where_it_does_not_fit(tile, operand, tokens):
    x, weight = random_pair(tokens, 1000, 1024)
    x = quantize(x, "fp8_token128") if operand == "fp8" else x

    found = kernels.block_matmul(x, weight, F32, tile=tile)

    expected = block_matmul(x, weight, out_dtype=F32, implementation="reference")
    assert relative_error(found, expected) <= BOUNDS[operand][F32]


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "columns"), [(256, 4096), (2624, 4096), (37, 384)])
def test_a_token_by_a_plain_weight_is_what_the_definition_gives(rows, columns):
    x, weight = (jax.random.normal(jax.random.key(n), (n, columns)).astype(BF16) for n in (1, rows))

    found = jax.jit(functools.partial(block_matmul, out_dtype=F32, implementation="triton"))(x, weight)

    exact = np.float64(x) @ np.float64(weight).T
    largest = np.abs(np.float64(x)) @ np.abs(np.float64(weight)).T
    assert (np.abs(found - exact) <= columns * 2.0**-24 * largest).all()  # each addition may round


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "columns"), [(4096, 8192), (1536, 4096), (200, 384)])
def test_a_token_that_the_product_quantises_gives_the_bits_of_one_that_was_quantised(rows, columns):
    scale = 10.0 ** jax.random.uniform(jax.random.key(0), (columns // 128, 1), minval=-7, maxval=3)
    x = (jax.random.normal(jax.random.key(1), (columns // 128, 128)) * scale).reshape(1, columns).astype(BF16)
    x = x.at[0, :128].set(0)
    weight = quantize(jax.random.normal(jax.random.key(2), (rows, columns)), "fp8_block128")

    found = jax.jit(functools.partial(block_matmul, activation="fp8_token128", implementation="triton"))(
        x, weight
    )

    expected = block_matmul(activation_quant(x), weight, implementation="triton")
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "tile",
    [Tile(1, 16), Tile(8, 32, span=4), Tile(32, 64, splits=2), Tile(64, 128, stack=2)],
    ids=str,
)
def test_a_product_is_the_same_every_time(tile):
    x, weight = random_pair(7, 256, 1024)
    run = jax.jit(functools.partial(kernels.block_matmul, out_dtype=F32, tile=tile))

    first, second = run(x, weight), run(x, weight)

    np.testing.assert_array_equal(first, second)
