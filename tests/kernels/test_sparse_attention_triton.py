"""The Triton kernels of `sparse_attention` compile for every chip; which calls they take."""

import struct

import jax.numpy as jnp
import pytest
from architectures import COMPILED_ARCH, EVERY_ARCH
from attention_cases import BF16, F32, I32, SCALE, shapes

from pallas_kernels import Target
from pallas_kernels.sparse_attention import IMPLEMENTATIONS, sparse_attention
from pallas_kernels.sparse_attention.tilings import tiling_for

kernels = pytest.importorskip("pallas_kernels.sparse_attention.triton")
triton_call = pytest.importorskip("pallas_kernels.triton_call")

H200, CPU = Target("cuda", "sm_90"), Target("cpu", "")
# What a block of the chip can have of shared memory, KiB.
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64, "gfx950": 160}


@pytest.mark.parametrize("arch", EVERY_ARCH)
@pytest.mark.parametrize("heads", [8, 16, 32, 64, 128], ids="heads={}".format)
@pytest.mark.parametrize("queries", [1, 8, 33, 128, 4096], ids="queries={}".format)
def test_a_tiling_fills_the_chip_and_leaves_no_program_without_keys(queries, heads, arch):
    for places in (1, 128, 640, 8320):
        tiling = tiling_for(arch, queries, heads, places)

        assert tiling.heads < 2 * max(heads, 16)
        assert 1 <= tiling.splits <= -(-places // tiling.keys)
        if queries == 4096:
            assert tiling.splits == 1


@pytest.mark.parametrize("shape", [(0, 3, 4, 16), (2, 0, 4, 16)], ids=["no sequence", "no token"])
def test_no_queries_give_nothing(shape):
    batch, tokens, *_ = shape
    kv, index = jnp.zeros((batch, 5, 16), BF16), jnp.zeros((batch, tokens, 3), I32)

    out = sparse_attention(jnp.zeros(shape, BF16), kv, index, kv, index, jnp.zeros(4), softmax_scale=1.0)

    assert out.shape == shape
    assert out.dtype == BF16


@pytest.mark.parametrize(
    ("target", "arguments", "scale", "fits"),
    [
        (H200, shapes(1, 1, 64, 128, 128, 4096, 512), SCALE, True),
        (H200, shapes(1, 1, 64, 128, 128), SCALE, True),
        (Target("rocm", "gfx942"), shapes(1, 1, 64, 128, 128), SCALE, True),
        (H200, shapes(1, 1, 4, 128, 128, channels=64), SCALE, True),
        (H200, shapes(1, 1, 4, 128, 128, channels=80), SCALE, False),
        (H200, shapes(1, 1, 64, 128, 128, dtype=F32), SCALE, False),
        (H200, shapes(1, 1, 4, 16, 16, 8, 8, channels=128, dtype=F32, codes=True, turned=True), SCALE, True),
        (H200, shapes(8, 1, 64, 128, 128, 4096, 512, codes=True, turned=True), SCALE, True),
        (Target("rocm", "gfx950"), shapes(8, 1, 16, 128, 128, codes=True), SCALE, True),
        (H200, shapes(1, 1, 4, 16, 16, channels=64, pairs=4, codes=True), SCALE, False),
        (H200, shapes(1024, 1, 64, 2**21, 128), SCALE, False),
        (H200, shapes(1, 1, 64, 128, 128), -1.0, False),
        (CPU, shapes(1, 1, 64, 128, 128), SCALE, False),
    ],
    ids=[
        "window and entries",
        "a window",
        "CDNA3",
        "narrow heads",
        "channels that are no power of two",
        "float32",
        "narrow heads in float32 and codes",
        "codes",
        "codes on CDNA4",
        "eight rotated channels",
        "rows beyond int32",
        "a scale that turns the order round",
        "a CPU",
    ],
)
def test_the_kernels_take(target, arguments, scale, fits):
    taken = [each.fits(target, *arguments, scale) for each in IMPLEMENTATIONS if each.name == "triton"]

    assert any(taken) is fits


@COMPILED_ARCH
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(shapes(1, 1, 64, 128, 128, 4096, 512, codes=True, turned=True), id="one query, codes"),
        pytest.param(shapes(32, 1, 64, 128, 128, 4096, 512), id="decoding"),
        pytest.param(shapes(1, 4096, 128, 4223, 128, 1024, 1024, turned=True), id="a prompt"),
        pytest.param(shapes(1, 4096, 64, 4223, 128, codes=True), id="a window, codes"),
        pytest.param(
            shapes(1, 129, 8, 256, 128, 8192, 8192, codes=True, turned=True),
            id="eight heads, all entries, codes",
        ),
        pytest.param(shapes(1, 1000, 32, 1127, 128, 33, 33), id="32 heads, a list that fills no block"),
        pytest.param(
            shapes(2, 3, 4, 9, 5, 6, 4, channels=128, dtype=F32, codes=True, turned=True),
            id="a small model in float32 and codes",
        ),
    ],
)
def test_the_kernels_compile_for(arguments, arch):
    q, _, window_index, _, compressed_index, *_ = arguments
    places = window_index.shape[2] + (compressed_index.shape[2] if compressed_index is not None else 0)
    tiling = tiling_for(arch, q.shape[0] * q.shape[1], q.shape[2], places)

    found = triton_call.launches(lambda *arrays: kernels.sparse_attention(*arrays, SCALE, tiling), *arguments)

    assert len(found) == (1 if tiling.splits == 1 else 2)
    for launch in found:
        binary = triton_call.compile_offline(launch, arch)
        (machine,) = struct.unpack_from("<H", binary.code, 18)
        assert binary.code[:4] == b"\x7fELF"
        assert machine == (190 if arch.startswith("sm_") else 224)
        assert binary.shared_bytes <= 1024 * SHARED[arch]
