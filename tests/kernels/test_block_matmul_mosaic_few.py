"""The Mosaic GPU kernel of FP8 products of few tokens: it lowers for Hopper, and interpreted it is right.

The interpreter runs all but our own PTX, for which these tests put plain functions: the product of the tensor
core, the table of scales, and what the programs of a cluster send each other. The PTX is checked on a GPU.
"""

import collections
import functools
import os
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback
from jax.experimental import pallas as pl

from pallas_kernels import QuantArray, Target
from pallas_kernels.block_matmul import MATMUL, block_matmul, mosaic_few, reference, wgmma
from pallas_kernels.block_matmul.mosaic_few import Config, Shape, config_for

plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
# The interpreter's barriers block threads of JAX's pool, which has one for each core: with few, all do.
os.environ.setdefault("NPROC", "32")

BF16, F32, FP8, U8 = jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn, jnp.uint8
# (rows, columns) of the weights of V4-Flash: wq_b, wo_b, wq_a with wkv, w1 with w3 of the shared expert.
FLASH = [(32768, 1024), (4096, 8192), (1536, 4096), (4096, 4096)]
PRO = [(65536, 1536), (7168, 16384), (2048, 7168), (6144, 7168)]
H200 = Target("cuda", "sm_90")


def fp8(rows: int, columns: int, format: str, scale: Any = U8) -> QuantArray:
    """The shapes of a quantised matrix."""
    scale_rows = rows if format == "fp8_token128" else -(-rows // 128)
    values: Any = jax.ShapeDtypeStruct((rows, columns), FP8)
    scales: Any = jax.ShapeDtypeStruct((scale_rows, columns // 128), scale)
    return QuantArray(values, scales, format)


def numbers(tokens: int, rows: int, columns: int, scale: Any = U8) -> tuple[QuantArray, QuantArray]:
    random = np.random.default_rng(tokens + rows + columns)

    def leaf(like: jax.ShapeDtypeStruct) -> jax.Array:
        if like.dtype == U8:
            return jnp.asarray(random.integers(117, 122, like.shape), U8)
        drawn = random.standard_normal(like.shape) if like.dtype == FP8 else random.random(like.shape)
        return jnp.asarray(4 * drawn, like.dtype)

    shapes = fp8(tokens, columns, "fp8_token128"), fp8(rows, columns, "fp8_block128", scale)
    return jax.tree.map(leaf, shapes)


# --- it lowers


def lowered(tokens: int, rows: int, columns: int, config: Config | None = None, scale: Any = U8) -> str:
    """The program for an H200, as text; nothing of it needs a GPU."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("unused",), abstract_device=device)
    run = functools.partial(mosaic_few.block_matmul, out_dtype=BF16, config=config)
    arguments = fp8(tokens, columns, "fp8_token128"), fp8(rows, columns, "fp8_block128", scale)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("tokens", [3, 8, 17, 64, 129])
@pytest.mark.parametrize(("rows", "columns"), FLASH)
def test_the_kernel_lowers_for_the_weights_of_flash(rows, columns, tokens):
    assert lowered(tokens, rows, columns).count("@mosaic_gpu_v2") == 1


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        (Config(16, 64, splits=2, sharers=2), F32),
        (Config(128, 128, splits=4, sharers=2, stages=4, beside=2), U8),
        (Config(32, 128, splits=8, stages=1, blocks=2), U8),
    ],
    ids=str,
)
def test_the_kernel_lowers_with(config, scale):
    assert "@mosaic_gpu_v2" in lowered(100, 328, 2048, config, scale)


# --- it is right


def plain_product(a: Any, b: Any, slot: Any, a_row: Any, b_row: Any, spent: jax.Array) -> jax.Array:
    height, width = spent.shape
    a_rows, b_rows = a[slot, pl.ds(a_row, height)], b[slot, pl.ds(b_row, width)]
    return a_rows.astype(F32) @ b_rows.astype(F32).T


def plain_factors(
    table: Any, x_scale: Any, w_scale: Any, place: Any, token: Any, row: Any, step: Any
) -> None:
    def number(scales: Any, row: Any, column: Any) -> jax.Array:
        stored = scales[jnp.minimum(row, scales.shape[0] - 1), column]
        return lax.bitcast_convert_type(stored.astype(jnp.int32) << 23, F32) if stored.dtype == U8 else stored

    _, steps, padded = table.shape
    for n in range(padded - mosaic_few.PADDING):
        for other in range(steps):
            factor = number(x_scale, token + n, step + other) * number(w_scale, row // 128, step + other)
            table[place, other, n] = factor


class Mail:
    """What the programs of a cluster send each other, through the host."""

    def __init__(self, config: Config):
        self.config, self.pieces, self.news = config, collections.defaultdict(dict), threading.Condition()

    def _to(self, owner: Any, group: Any) -> tuple[Any, ...]:
        return *map(lax.axis_index, ("tile", "tokens", "sharer")), owner, group

    def send(self, _: Config, piece: Any, owner: Any, received: Any, arrived: Any, group: Any) -> None:
        def put(piece: Any, sender: Any, *to: Any) -> None:
            with self.news:
                self.pieces[tuple(map(int, to))][int(sender)] = np.asarray(piece)
                self.news.notify_all()

        io_callback(put, None, piece, lax.axis_index("split"), *self._to(owner, group))

    def receive(self, _: Config, total: Any, received: Any, arrived: Any, group: Any) -> jax.Array:
        def take(total: Any, *to: Any) -> np.ndarray:
            inbox = self.pieces[tuple(map(int, to))]
            with self.news:
                assert self.news.wait_for(lambda: len(inbox) == self.config.splits - 1, timeout=60)
            return np.asarray(total) + sum(inbox.values())

        me = self._to(lax.axis_index("split"), group)
        return io_callback(take, jax.ShapeDtypeStruct(total.shape, F32), total, *me)


@pytest.mark.parametrize(
    ("shape", "config", "scale"),
    [
        ((3, 200, 384), Config(8, 128, stages=2), F32),
        ((17, 328, 256), Config(32, 64, stages=2, sharers=2), U8),
        ((130, 320, 256), Config(128, 256, stages=1), U8),
        ((100, 64, 512), Config(128, 64, splits=2, stages=2), U8),
        ((5, 200, 1024), Config(8, 128, splits=4, stages=1, blocks=2), U8),
        ((70, 72, 1024), Config(64, 64, splits=4, stages=1, beside=2, sharers=2), F32),
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
def test_the_interpreter_agrees_with_the_reference(shape, config, scale, monkeypatch):
    mail = Mail(config)
    monkeypatch.setattr(wgmma, "start", plain_product)
    monkeypatch.setattr(wgmma, "finish", lambda sums, later=0: sums)
    monkeypatch.setattr(mosaic_few, "_load_factors", plain_factors)
    monkeypatch.setattr(mosaic_few, "_open", lambda *_: None)
    monkeypatch.setattr(mosaic_few, "_meet", lambda: None)
    monkeypatch.setattr(mosaic_few, "_send", mail.send)
    monkeypatch.setattr(mosaic_few, "_receive", mail.receive)
    x, weight = numbers(*shape, scale=scale)

    out = mosaic_few.block_matmul(x, weight, BF16, config=config, interpret=plgpu.InterpretGPUParams())

    expected = reference.block_matmul(x, weight, F32)
    # One rounding to bfloat16, 2^-9; where terms cancel, float32 sums in another order.
    np.testing.assert_allclose(out, expected, rtol=2**-8, atol=1e-3 * float(jnp.abs(expected).max()))


def worst_error(found: jax.Array, x: QuantArray, weight: QuantArray) -> float:
    """Of any token, relative."""
    expected = block_matmul(x, weight, out_dtype=F32, implementation="reference")
    error = jnp.linalg.norm(found.astype(F32) - expected, axis=-1) / jnp.linalg.norm(expected, axis=-1)
    return float(error.max())


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [2, 8, 17, 127, 129], ids="tokens={}".format)
@pytest.mark.parametrize(("rows", "columns"), [*FLASH[1:], (200, 384)])
def test_the_kernel_gives_what_the_definition_gives(rows, columns, tokens):
    x, weight = numbers(tokens, rows, columns, scale=F32 if tokens == 17 else U8)

    found = block_matmul(x, weight, out_dtype=BF16, implementation="mosaic")

    assert worst_error(found, x, weight) <= 3e-3  # rounding to bfloat16 makes 1.7e-3


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config",
    [
        Config(8, 64, splits=2),
        Config(16, 256, stages=4, sharers=2),
        Config(32, 128, splits=8, stages=2),
        Config(32, 128, splits=4, stages=2, blocks=2),
        Config(64, 128, splits=2, sharers=4, stages=4),
        Config(128, 128, splits=4, sharers=2, stages=2, beside=2),
        Config(128, 256, stages=3),
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


# --- which products it takes, and how it cuts them


@pytest.mark.parametrize("tokens", [2, 3, 17, 100, 129, 256])
@pytest.mark.parametrize(("rows", "columns"), [*FLASH, *PRO, (72, 128), (200, 384)])
def test_every_shape_has_a_config_that_takes_it(rows, columns, tokens):
    config, steps = config_for(Shape(tokens, rows, columns)), columns // 128

    assert steps % config.splits == 0
    assert 0 < config.stages <= steps // config.splits
    assert config.shared_bytes(steps // config.splits) <= mosaic_few.SHARED_BYTES
    assert config.tokens % 8 == config.piece % 8 == 0


@pytest.mark.parametrize(
    ("config", "says"),
    [(Config(8, splits=8), "does not split 512 columns"), (Config(128, stages=9), "bytes of shared memory")],
)
def test_a_config_that_does_not_fit_is_refused(config, says):
    with pytest.raises(ValueError, match=says):
        lowered(100, 256, 512, config)


WEIGHT = fp8(320, 256, "fp8_block128")


@pytest.mark.parametrize(
    ("target", "x", "weight", "out_dtype", "takes"),
    [
        (H200, fp8(17, 256, "fp8_token128"), WEIGHT, BF16, True),
        (Target("cuda", "sm_100"), fp8(17, 256, "fp8_token128"), WEIGHT, BF16, False),
        (Target("rocm", "gfx942"), fp8(17, 256, "fp8_token128"), WEIGHT, BF16, False),
        (H200, fp8(1, 256, "fp8_token128"), WEIGHT, BF16, False),
        (H200, fp8(257, 256, "fp8_token128"), WEIGHT, BF16, False),
        (H200, jax.ShapeDtypeStruct((17, 256), BF16), WEIGHT, BF16, False),
        (H200, fp8(17, 256, "fp8_token128"), fp8(324, 256, "fp8_block128"), BF16, False),
        (H200, fp8(17, 256, "fp8_token128"), WEIGHT, F32, False),
    ],
    ids=["FP8", "Blackwell", "AMD", "one token", "many tokens", "plain x", "rows not by 8", "float32"],
)
def test_the_kernel_takes(target, x, weight, out_dtype, takes):
    assert mosaic_few.fits(target, x, weight, out_dtype) is takes


def test_it_runs_by_name_alone_until_it_is_proven():
    few, many, *_ = MATMUL
    x = fp8(17, 256, "fp8_token128")

    assert (few.name, many.name) == ("mosaic", "mosaic")
    assert not few.proven
    assert few.fits(H200, x, WEIGHT, BF16)
    assert not many.fits(H200, x, WEIGHT, BF16)


def test_no_tokens_give_an_empty_result_without_a_launch():
    x = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), fp8(0, 256, "fp8_token128"))
    weight = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), WEIGHT)

    assert mosaic_few.block_matmul(x, weight, BF16, config=Config(8)).shape == (0, 320)


def test_tokens_in_several_axes_keep_them():
    x = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((2, 3, leaf.shape[-1]), leaf.dtype), fp8(6, 256, "fp8_token128")
    )

    out = jax.eval_shape(functools.partial(mosaic_few.block_matmul, out_dtype=BF16), x, WEIGHT)

    assert out.shape == (2, 3, 320)
