"""The Mosaic GPU kernel of the FP8 products: it lowers for Hopper, and interpreted it is right.

The interpreter runs everything but our own PTX, the tensor core's instructions, for which these tests put a
plain product. What the instructions compute is checked on a GPU alone.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fp8_products import BF16, F32, FLASH, U8, fp8, lowered, numbers, worst_error

from pallas_kernels.block_matmul import reference

plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
from pallas_kernels.block_matmul import mosaic  # noqa: E402
from pallas_kernels.block_matmul.mosaic import Plan  # noqa: E402
from pallas_kernels.block_matmul.mosaic_config import TILES, Many, Shape  # noqa: E402

# --- it lowers


@pytest.mark.parametrize("tokens", [1001, 8192])
@pytest.mark.parametrize(("rows", "columns"), FLASH)
def test_the_kernel_lowers_for_the_weights_of_flash(rows, columns, tokens):
    assert lowered(mosaic, tokens, rows, columns).count("@mosaic_gpu_v2") == 1


@pytest.mark.parametrize("config", [*TILES, Many(192, 128, stages=4, consumers=3)], ids=str)
def test_the_kernel_lowers_with(config):
    assert "@mosaic_gpu_v2" in lowered(mosaic, 1024, 768, 512, config)


@pytest.mark.parametrize(("rows", "scale"), [(72, U8), (4104, U8), (1536, F32)])
def test_the_kernel_lowers_for_other_weights(rows, scale):
    assert "@mosaic_gpu_v2" in lowered(mosaic, 300, rows, 384, scale=scale)


# --- it is right


@pytest.mark.parametrize(
    ("shape", "config", "programs", "scale"),
    [
        ((301, 328, 384), Many(128, 192, stages=2, band=2), 2, U8),
        ((129, 200, 512), Many(128, 64, stages=3, slots=1), 3, U8),
        ((300, 256, 256), Many(256, 128, stages=2, slots=4), 1, F32),
        ((257, 256, 128), Many(128, 256, stages=2), 2, U8),
        ((400, 200, 384), Many(192, 128, stages=2, consumers=3), 2, U8),
        ((140, 400, 1024), Many(128, 192, stages=3, slots=6, ahead=True), 2, U8),
        ((140, 264, 640), Many(128, 128, stages=2, ahead=True), 1, F32),
    ],
    ids=[
        "tiles across blocks of scales",
        "narrow tiles, and the last is short",
        "float32 scales",
        "wide tiles",
        "three warpgroups",
        "two products on their way",
        "two of one width, an odd number of steps",
    ],
)
def test_the_interpreter_agrees_with_the_reference(shape, config, programs, scale, without_ptx, monkeypatch):
    without_ptx()
    # Fewer programs than tiles: each works on several.
    monkeypatch.setattr(mosaic, "MULTIPROCESSORS", programs)
    x, weight = numbers(*shape, scale=scale)

    out = mosaic.block_matmul(x, weight, BF16, config=config, interpret=plgpu.InterpretGPUParams())

    expected = reference.block_matmul(x, weight, F32)
    # One rounding to bfloat16, 2^-9; where terms cancel, float32 sums in another order.
    np.testing.assert_allclose(out, expected, rtol=2**-8, atol=1e-3 * float(jnp.abs(expected).max()))


@pytest.mark.gpu
@pytest.mark.parametrize("config", [*TILES, Many(192, 128, stages=4, consumers=3)], ids=str)
def test_each_way_to_cut_gives_the_same_bits_every_time(config):
    x, weight = numbers(1001, 712, 4096)
    run = jax.jit(functools.partial(mosaic.block_matmul, out_dtype=BF16, config=config))

    first = run(x, weight)

    assert worst_error(first, x, weight) <= 3e-3
    for _ in range(5):
        np.testing.assert_array_equal(run(x, weight), first)


# --- the tiles


@pytest.mark.parametrize("rows", [128, 192])
@pytest.mark.parametrize("tokens", [256, 257, 1000, 2048])
def test_the_tiles_cover_the_result_and_reach_past_no_token(tokens, rows):
    plan = Plan(Shape(tokens, 1100, 512), Many(128, rows, band=3))
    starts = [tuple(map(int, plan.start(jnp.int32(tile)))) for tile in range(plan.down * plan.across)]

    covered = np.zeros((tokens, 1100), bool)
    for token, row in starts:
        assert 0 <= token <= tokens - 128
        covered[token : token + 128, row : row + rows] = True
    assert covered.all()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (Many(256, 128), "does not take 250 tokens"),
        (Many(128, 128, stages=9), "bytes of shared memory"),
        (Many(128, 128, stages=1), "at least 2 stages"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(config, says):
    with pytest.raises(ValueError, match=says):
        lowered(mosaic, 250, 256, 256, config)


def test_tokens_in_several_axes_keep_them():
    x, weight = fp8(512, 256, "fp8_token128"), fp8(320, 256, "fp8_block128")
    batched = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, 256, leaf.shape[-1]), leaf.dtype), x)

    out = jax.eval_shape(functools.partial(mosaic.block_matmul, out_dtype=BF16), batched, weight)

    assert out.shape == (2, 256, 320)
    assert math.prod(out.shape[:-1]) == 512
