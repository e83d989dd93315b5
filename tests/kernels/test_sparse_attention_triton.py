"""The Triton kernels of `sparse_attention`: they compile for every chip, and are right on one."""

import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Target
from pallas_kernels.sparse_attention import IMPLEMENTATIONS, reference, sparse_attention
from pallas_kernels.sparse_attention.tilings import Tiling, tiling_for

kernels = pytest.importorskip("pallas_kernels.sparse_attention.triton")
triton_call = pytest.importorskip("pallas_kernels.triton_call")

F32, BF16, I32 = jnp.float32, jnp.bfloat16, jnp.int32
H200, CPU = Target("cuda", "sm_90"), Target("cpu", "")
EVERY_ARCH = ["sm_80", "sm_90", "sm_100", "gfx942", "gfx950"]
# What a block of the chip can have of shared memory, KiB.
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64, "gfx950": 160}
CHANNELS, SCALE = 512, 512**-0.5
# Relative, of a whole result: weights, the parts of splits and the result itself are rounded to bfloat16.
MOST_ERROR = 4e-3


def shapes(batch, tokens, heads, rows, places, entries=0, chosen=0, channels=CHANNELS, dtype=BF16):
    """Arguments of `sparse_attention` without its scale, as shapes."""

    def shape(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype)

    compressed = (None, None)
    if entries:
        compressed = (shape(batch, entries, channels), shape(batch, tokens, chosen, dtype=I32))
    return (
        shape(batch, tokens, heads, channels),
        shape(batch, rows, channels),
        shape(batch, tokens, places, dtype=I32),
        *compressed,
        shape(heads, dtype=F32),
    )


def made_up(batch, tokens, heads, rows, places, entries=0, chosen=0, channels=CHANNELS, pattern="model"):
    """Arguments of `sparse_attention` without its scale.

    In "model" absent places lead a window and trail a list, as they do there; in "scattered" they are a third
    of all, in "sparse" most; in "none" all are.
    """
    keys = iter(jax.random.split(jax.random.key(tokens * heads), 16))

    def normal(*sizes):
        return jax.random.normal(next(keys), sizes, BF16)

    def index(of, count, leading):
        index = jax.random.randint(next(keys), (batch, tokens, count), 0, of)
        place = jnp.arange(count)
        if pattern == "model":
            absent = jax.random.randint(next(keys), (batch, tokens, 1), 0, count + 1)
            return jnp.where(place < absent if leading else place >= count - absent, -1, index)
        share = {"scattered": 0.3, "sparse": 0.98, "none": 1.1}[pattern]
        return jnp.where(jax.random.uniform(next(keys), index.shape) < share, -1, index)

    compressed = (None, None)
    if entries:
        compressed = (normal(batch, entries, channels), index(entries, chosen, False))
    sink = jnp.resize(jnp.array([0.5, -2.0, -jnp.inf, 6.0, 1e30]), heads)
    return (
        normal(batch, tokens, heads, channels),
        normal(batch, rows, channels),
        index(rows, places, True),
        *compressed,
        sink,
    )


def assert_right(found, arguments, scale=SCALE):
    """Against the definition with queries, and so a result, in float32."""
    q, *others = arguments
    expected = reference.sparse_attention(q.astype(F32), *others, scale)
    found = found.astype(F32)  # compared on the device: results have up to 131 million numbers
    assert jnp.isfinite(found).all()
    assert jnp.linalg.norm((found - expected).reshape(-1)) <= MOST_ERROR * jnp.linalg.norm(
        expected.reshape(-1)
    )
    assert not jnp.where(expected == 0, found, 0).any()


# --- anywhere


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
        (H200, shapes(1, 1, 64, 2**22, 128), SCALE, False),
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
        "rows beyond int32",
        "a scale that turns the order round",
        "a CPU",
    ],
)
def test_the_kernels_take(target, arguments, scale, fits):
    (triton,) = [each for each in IMPLEMENTATIONS if each.name == "triton"]

    assert triton.fits(target, *arguments, scale) is fits


@pytest.mark.parametrize("arch", EVERY_ARCH)
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(shapes(1, 1, 64, 128, 128, 4096, 512), id="one query"),
        pytest.param(shapes(32, 1, 64, 128, 128, 4096, 512), id="decoding"),
        pytest.param(shapes(1, 4096, 128, 4223, 128, 1024, 1024), id="a prompt"),
        pytest.param(shapes(1, 4096, 64, 4223, 128), id="a window"),
        pytest.param(shapes(1, 129, 8, 256, 128, 8192, 8192), id="eight heads, all entries"),
        pytest.param(shapes(1, 1000, 32, 1127, 128, 33, 33), id="32 heads, a list that fills no block"),
        pytest.param(shapes(2, 3, 4, 9, 5, 6, 4, channels=32), id="a small model"),
    ],
)
def test_the_kernels_compile_for(arguments, arch):
    q, _, window_index, _, compressed_index, _ = arguments
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


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [8, 16, 32, 64, 128], ids="heads={}".format)
@pytest.mark.parametrize("tokens", [1, 3, 17, 127, 129, 1000], ids="tokens={}".format)
def test_the_kernels_give_what_the_definition_gives(tokens, heads):
    for entries, chosen in ((300, 512), (40, 40), (0, 0)):
        arguments = made_up(2, tokens, heads, tokens + 127, 128, entries, chosen)

        out = sparse_attention(*arguments, softmax_scale=SCALE, implementation="triton")

        assert_right(out, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["scattered", "sparse", "none"])
@pytest.mark.parametrize(
    "tiling",
    [
        Tiling(16, 32, 1, 4, 1),
        Tiling(16, 32, 3, 4, 2),
        Tiling(16, 16, 20, 4, 1),
        Tiling(32, 32, 2, 4, 3),
        Tiling(64, 32, 7, 8, 3),
        Tiling(64, 64, 1, 8, 3),
        Tiling(64, 64, 2, 8, 2),
    ],
    ids=lambda tiling: " ".join(map(str, tiling)),
)
def test_every_way_to_cut_the_work_gives_it(tiling, pattern):
    for heads, places, entries, chosen in ((64, 128, 700, 512), (20, 33, 6000, 5001), (3, 1, 1, 1)):
        arguments = made_up(2, 5, heads, 150, places, entries, chosen, pattern=pattern)

        assert_right(kernels.sparse_attention(*arguments, SCALE, tiling), arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [16, 64, 256], ids="channels={}".format)
def test_narrow_heads_are_attended_to(channels):
    arguments = made_up(2, 7, 4, 50, 20, 30, 10, channels=channels)

    out = sparse_attention(*arguments, softmax_scale=channels**-0.5, implementation="triton")

    assert_right(out, arguments, channels**-0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, 4], ids="splits={}".format)
@pytest.mark.parametrize("size", [1e3, 1e18], ids=["large logits", "huge logits"])
def test_large_logits_do_not_overflow(size, splits):
    q = jnp.full((1, 1, 16, 64), size, BF16)
    kv = jnp.concatenate([jnp.ones((1, 100, 64), BF16), -jnp.ones((1, 100, 64), BF16)], 1)
    index = jnp.arange(0, 200, 2, dtype=I32).reshape(1, 1, 100)
    arguments = (q, kv, index, None, None, jnp.zeros(16), 0.3)

    out = kernels.sparse_attention(*arguments, Tiling(16, 32, splits, 4, 2))

    np.testing.assert_array_equal(np.float32(out), 1)


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, 5], ids="splits={}".format)
def test_rows_that_nobody_names_are_not_read(splits):
    q, window_kv, window_index, compressed_kv, compressed_index, sink = made_up(
        2, 5, 64, 150, 128, 300, 77, pattern="scattered"
    )
    window_index = jnp.where(window_index == 0, -1, window_index)
    compressed_index = jnp.where(compressed_index == 0, -1, compressed_index)
    tiling = Tiling(16, 32, splits, 4, 3)

    def run(window_kv, compressed_kv):
        arguments = (q, window_kv, window_index, compressed_kv, compressed_index, sink, SCALE)
        return np.float32(kernels.sparse_attention(*arguments, tiling))

    poisoned = run(window_kv.at[:, 0].set(jnp.nan), compressed_kv.at[:, 0].set(jnp.inf))
    np.testing.assert_array_equal(poisoned, run(window_kv, compressed_kv))


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, 5], ids="splits={}".format)
def test_not_a_number_is_not_lost(splits):
    *arguments, sink = made_up(1, 2, 16, 50, 40, 30, 30, pattern="scattered")
    arguments[0] = arguments[0].at[0, 1, 3, 7].set(jnp.nan)

    out = kernels.sparse_attention(*arguments, sink, SCALE, Tiling(16, 16, splits, 4, 1))

    assert np.isnan(np.float32(out[0, 1, 3])).all()
    assert np.isfinite(np.float32(out[0, 0])).all()
