"""Which Mosaic kernel a product gets, and how it is cut; on a GPU, that what was chosen is right."""

import jax
import jax.numpy as jnp
import pytest
from fp8_products import BF16, F32, FLASH, H200, PRO, U8, fp8, numbers, worst_error

from pallas_kernels import Target
from pallas_kernels.block_matmul import MATMUL, block_matmul

mosaic_config = pytest.importorskip("pallas_kernels.block_matmul.mosaic_config")
Few, Many, Shape = mosaic_config.Few, mosaic_config.Many, mosaic_config.Shape
WEIGHT = fp8(320, 256, "fp8_block128")


def x_of(tokens: int) -> object:
    return fp8(tokens, 256, "fp8_token128")


def assert_takes(config: object, shape: object) -> None:
    blocks = shape.columns // 128
    if isinstance(config, Many):
        assert config.tokens <= shape.tokens
        assert config.stages >= 2
        assert config.shared_bytes <= mosaic_config.SHARED_BYTES
        return
    steps = blocks // config.splits
    assert blocks % config.splits == 0
    assert steps % config.blocks == 0
    assert 0 < config.stages <= steps // config.blocks
    assert config.shared_bytes(steps) <= mosaic_config.SHARED_BYTES
    assert config.tokens % 8 == config.piece % 8 == 0


@pytest.mark.parametrize("tokens", [1, 2, 3, 17, 64, 100, 128, 129, 256, 300, 1000, 8192])
@pytest.mark.parametrize(("rows", "columns"), [*FLASH, *PRO, (72, 128), (200, 384)])
def test_whatever_is_chosen_takes_the_shape(rows, columns, tokens):
    shape = Shape(tokens, rows, columns)

    assert_takes(mosaic_config.by_rule(shape), shape)
    if config := mosaic_config.chosen(shape):
        assert_takes(config, shape)


def test_the_table_takes_the_shapes_that_it_was_measured_for():
    for weight, entries in mosaic_config.tuned().items():
        for tokens, config in entries.items():
            if config:
                assert_takes(config, Shape(tokens, *weight))


def test_no_more_clusters_are_asked_for_than_run_at_once():
    for weight in [*FLASH, *PRO]:
        for tokens in (2, 8, 32, 128):
            config = mosaic_config.few_for(Shape(tokens, *weight))
            programs = -(-weight[0] // config.rows)
            assert config.splits == 1 or programs <= mosaic_config.MOST_CLUSTERS[config.splits]


@pytest.mark.parametrize(
    ("target", "x", "weight", "out_dtype", "takes"),
    [
        (H200, x_of(17), WEIGHT, BF16, True),
        (H200, x_of(1), WEIGHT, BF16, True),
        (H200, x_of(2000), WEIGHT, BF16, True),
        (Target("cuda", "sm_100"), x_of(17), WEIGHT, BF16, False),
        (Target("rocm", "gfx942"), x_of(17), WEIGHT, BF16, False),
        (Target("cpu", ""), x_of(17), WEIGHT, BF16, False),
        (H200, x_of(0), WEIGHT, BF16, False),
        (H200, jax.ShapeDtypeStruct((17, 256), BF16), WEIGHT, BF16, False),
        (H200, x_of(17), jax.ShapeDtypeStruct((320, 256), BF16), BF16, False),
        (H200, x_of(17), fp8(324, 256, "fp8_block128"), BF16, False),
        (H200, x_of(17), WEIGHT, F32, False),
    ],
    ids=[
        "few tokens",
        "one token",
        "many tokens",
        "Blackwell",
        "AMD",
        "CPU",
        "no token",
        "plain x",
        "plain weight",
        "rows not by 8",
        "float32",
    ],
)
def test_the_kernels_take(target, x, weight, out_dtype, takes):
    by_name = [each for each in MATMUL if each.name == "mosaic"]

    assert any(each.fits(target, x, weight, out_dtype) for each in by_name) is takes


def test_one_token_runs_triton_and_more_run_mosaic_unless_a_table_knows_better():
    faster, triton, *_ = MATMUL

    assert (faster.name, triton.name) == ("mosaic", "triton")
    assert not faster.fits(H200, x_of(1), WEIGHT, BF16)
    assert triton.fits(H200, x_of(1), WEIGHT, BF16)
    assert all(faster.fits(H200, x_of(tokens), WEIGHT, BF16) for tokens in (2, 17, 128, 1000))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3, 17, 127, 129, 1000], ids="tokens={}".format)
@pytest.mark.parametrize(("rows", "columns"), [*FLASH, *PRO, (200, 384), (72, 128)])
def test_the_product_is_that_of_the_definition(rows, columns, tokens):
    x, weight = numbers(tokens, rows, columns, scale=F32 if tokens in (17, 129) else U8)

    found = block_matmul(x, weight, out_dtype=BF16, implementation="mosaic")

    assert worst_error(found, x, weight) <= 3e-3
    if tokens == 3:
        chosen = block_matmul(x, weight, out_dtype=BF16)
        assert worst_error(chosen, x, weight) <= 3e-3
        assert bool(jnp.isfinite(chosen.astype(F32)).all())
