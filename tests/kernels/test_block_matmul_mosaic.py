"""The Mosaic GPU kernel of the FP8 products: it lowers for Hopper, and interpreted it is right.

The interpreter runs everything but our own PTX, the tensor core's instructions, for which these tests put a
plain product. What the instructions compute is checked on a GPU alone.
"""

import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels import QuantArray, Target
from pallas_kernels.block_matmul import MATMUL, block_matmul, mosaic, reference, wgmma
from pallas_kernels.block_matmul.mosaic import CONFIGS, Config, Plan, Shape, config_for

plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
# The interpreter's barriers block threads of JAX's pool, which has one for each core: with few, all do.
os.environ.setdefault("NPROC", "32")

BF16, F32, FP8, U8 = jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn, jnp.uint8
# (rows, columns) of the weights of V4-Flash: wq_b, wo_b, wq_a with wkv, w1 with w3 of the shared expert.
FLASH = [(32768, 1024), (4096, 8192), (1536, 4096), (4096, 4096)]
H200 = Target("cuda", "sm_90")


def fp8(rows: int, columns: int, format: str, scale: Any = U8) -> QuantArray:
    """The shapes of a quantised matrix."""
    scale_rows = rows if format == "fp8_token128" else -(-rows // 128)
    values: Any = jax.ShapeDtypeStruct((rows, columns), FP8)
    scales: Any = jax.ShapeDtypeStruct((scale_rows, columns // 128), scale)
    return QuantArray(values, scales, format)


def lowered(tokens: int, rows: int, columns: int, config: Config | None = None, scale: Any = U8) -> str:
    """The program for an H200, as text; nothing of it needs a GPU."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("unused",), abstract_device=device)
    run = functools.partial(mosaic.block_matmul, out_dtype=BF16, config=config)
    arguments = fp8(tokens, columns, "fp8_token128"), fp8(rows, columns, "fp8_block128", scale)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


# --- it lowers


@pytest.mark.parametrize("tokens", [1001, 8192])
@pytest.mark.parametrize(("rows", "columns"), FLASH)
def test_the_kernel_lowers_for_the_weights_of_flash(rows, columns, tokens):
    assert lowered(tokens, rows, columns).count("@mosaic_gpu_v2") == 1


@pytest.mark.parametrize("config", [*CONFIGS, Config(128, 256, stages=4)], ids=str)
def test_the_kernel_lowers_with(config):
    assert "@mosaic_gpu_v2" in lowered(1024, 768, 512, config)


@pytest.mark.parametrize(("rows", "scale"), [(72, U8), (4104, U8), (1536, F32)])
def test_the_kernel_lowers_for_other_weights(rows, scale):
    assert "@mosaic_gpu_v2" in lowered(300, rows, 384, scale=scale)


# --- it is right


def numbers(tokens: int, rows: int, columns: int, scale: Any = U8) -> tuple[QuantArray, QuantArray]:
    random = np.random.default_rng(tokens + rows + columns)

    def leaf(like: jax.ShapeDtypeStruct) -> jax.Array:
        if like.dtype == U8:
            return jnp.asarray(random.integers(117, 122, like.shape), U8)
        drawn = random.standard_normal(like.shape) if like.dtype == FP8 else random.random(like.shape)
        return jnp.asarray(4 * drawn, like.dtype)

    shapes = fp8(tokens, columns, "fp8_token128"), fp8(rows, columns, "fp8_block128", scale)
    return jax.tree.map(leaf, shapes)


def plain_product(a: Any, b: Any, slot: Any, a_row: Any, b_row: Any, spent: jax.Array) -> jax.Array:
    height, width = spent.shape
    a_rows, b_rows = a[slot, pl.ds(a_row, height)], b[slot, pl.ds(b_row, width)]
    return a_rows.astype(F32) @ b_rows.astype(F32).T


@pytest.mark.parametrize(
    ("shape", "config", "programs", "scale"),
    [
        ((301, 328, 384), Config(128, 192, stages=2, band=2), 2, U8),
        ((129, 200, 512), Config(128, 64, stages=3, slots=1), 3, U8),
        ((300, 256, 256), Config(256, 128, stages=2, slots=4), 1, F32),
        ((257, 256, 128), Config(128, 256, stages=2), 2, U8),
        ((400, 200, 384), Config(192, 128, stages=2, consumers=3), 2, U8),
        ((140, 400, 1024), Config(128, 192, stages=3, slots=6, ahead=True), 2, U8),
        ((140, 264, 640), Config(128, 128, stages=2, ahead=True), 1, F32),
        ((300, 520, 256), Config(256, 128, stages=2, sharers=2), 2, U8),
    ],
    ids=[
        "tiles across blocks of scales",
        "narrow tiles, and the last is short",
        "float32 scales",
        "wide tiles",
        "three warpgroups",
        "two products on their way",
        "two of one width, an odd number of steps",
        "tiles that share tokens",
    ],
)
def test_the_interpreter_agrees_with_the_reference(shape, config, programs, scale, monkeypatch):
    monkeypatch.setattr(wgmma, "start", plain_product)
    monkeypatch.setattr(wgmma, "finish", lambda sums, later=0: sums)
    # Fewer programs than tiles: each works on several.
    monkeypatch.setattr(mosaic, "MULTIPROCESSORS", programs)
    x, weight = numbers(*shape, scale=scale)

    out = mosaic.block_matmul(x, weight, BF16, config=config, interpret=plgpu.InterpretGPUParams())

    expected = reference.block_matmul(x, weight, F32)
    # One rounding to bfloat16, 2^-9; where terms cancel, float32 sums in another order.
    np.testing.assert_allclose(out, expected, rtol=2**-8, atol=1e-3 * float(jnp.abs(expected).max()))


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [U8, F32], ids=["E8M0", "float32"])
@pytest.mark.parametrize("tokens", [512, 1000, 2049], ids="tokens={}".format)
@pytest.mark.parametrize(("rows", "columns"), [*FLASH, (200, 384), (72, 128)])
def test_the_kernel_gives_what_the_definition_gives(rows, columns, tokens, scale):
    x, weight = numbers(tokens, rows, columns, scale=scale)

    found = block_matmul(x, weight, out_dtype=BF16, implementation="mosaic")

    expected = block_matmul(x, weight, out_dtype=F32, implementation="reference")
    error = jnp.linalg.norm(found.astype(F32) - expected, axis=-1) / jnp.linalg.norm(expected, axis=-1)
    assert float(error.max()) <= 3e-3  # of any token: rounding to bfloat16 makes 1.7e-3


# --- the tiles


@pytest.mark.parametrize("rows", [128, 192])
@pytest.mark.parametrize("tokens", [256, 257, 1000, 2048])
def test_the_tiles_cover_the_result_and_reach_past_no_token(tokens, rows):
    plan = Plan(Shape(tokens, 1100, 512), Config(128, rows, band=3))
    starts = [tuple(map(int, plan.start(jnp.int32(tile)))) for tile in range(plan.down * plan.across)]

    covered = np.zeros((tokens, 1100), bool)
    for token, row in starts:
        assert 0 <= token <= tokens - 128
        covered[token : token + 128, row : row + rows] = True
    assert covered.all()


@pytest.mark.parametrize("tokens", [256, 300, 512, 2048, 8192])
@pytest.mark.parametrize(("rows", "columns"), [*FLASH, (72, 128), (200, 7168)])
def test_every_shape_has_a_config_that_takes_it(rows, columns, tokens):
    config = config_for(Shape(tokens, rows, columns))

    assert config.tokens <= tokens
    assert config.shared_bytes <= mosaic.SHARED_BYTES


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (Config(256, 128), "does not take 250 tokens"),
        (Config(128, 128, stages=9), "bytes of shared memory"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(config, says):
    with pytest.raises(ValueError, match=says):
        lowered(250, 256, 256, config)


# --- which products it takes

X, WEIGHT = fp8(512, 256, "fp8_token128"), fp8(40 * 8, 256, "fp8_block128")


@pytest.mark.parametrize(
    ("target", "x", "weight", "out_dtype", "takes"),
    [
        (H200, X, WEIGHT, BF16, True),
        (Target("cuda", "sm_100"), X, WEIGHT, BF16, False),
        (Target("rocm", "gfx942"), X, WEIGHT, BF16, False),
        (Target("cpu", ""), X, WEIGHT, BF16, False),
        (H200, fp8(511, 256, "fp8_token128"), WEIGHT, BF16, False),
        (H200, jax.ShapeDtypeStruct((512, 256), BF16), WEIGHT, BF16, False),
        (H200, X, jax.ShapeDtypeStruct((320, 256), BF16), BF16, False),
        (H200, X, fp8(324, 256, "fp8_block128"), BF16, False),
        (H200, X, WEIGHT, F32, False),
    ],
    ids=[
        "FP8",
        "Blackwell",
        "AMD",
        "CPU",
        "few tokens",
        "plain x",
        "plain weight",
        "rows not by 8",
        "float32",
    ],
)
def test_the_kernel_takes(target, x, weight, out_dtype, takes):
    assert mosaic.fits(target, x, weight, out_dtype) is takes


def test_tokens_in_several_axes_keep_them():
    x, weight = fp8(512, 256, "fp8_token128"), WEIGHT
    batched = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, 256, leaf.shape[-1]), leaf.dtype), x)

    out = jax.eval_shape(functools.partial(mosaic.block_matmul, out_dtype=BF16), batched, weight)

    assert out.shape == (2, 256, 320)
    assert math.prod(out.shape[:-1]) == 512


def test_many_tokens_on_hopper_run_it_and_few_do_not():
    proven_mosaic, triton, _ = (each for each in MATMUL if each.proven)
    few = fp8(64, 256, "fp8_token128")

    assert proven_mosaic.name == "mosaic"
    assert proven_mosaic.fits(H200, X, WEIGHT, BF16)
    assert not proven_mosaic.fits(H200, few, WEIGHT, BF16)
    assert triton.fits(H200, few, WEIGHT, BF16)


@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((512, 32768, 1024), (192, 128)),
        ((512, 4096, 8192), (128, 128)),
        ((512, 1536, 4096), (128, 64)),
        ((512, 4096, 4096), (128, 128)),
        ((2048, 32768, 1024), (256, 128)),
        ((2048, 4096, 8192), (256, 128)),
        ((2048, 1536, 4096), (192, 128)),
        ((2048, 4096, 4096), (256, 128)),
        ((8192, 32768, 1024), (256, 128)),
        ((8192, 4096, 8192), (256, 128)),
        ((8192, 1536, 4096), (192, 128)),
        ((8192, 4096, 4096), (256, 128)),
    ],
)
def test_the_tiles_are_those_measured_to_be_fastest(shape, tile):
    assert config_for(Shape(*shape))[:2] == tile
