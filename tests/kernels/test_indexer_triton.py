"""The Triton kernels of the indexer: they compile for every chip, and are right on one."""

import functools
import re
import struct
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import COMPILED_ARCH

from pallas_kernels import Target
from pallas_kernels.formats import QuantArray, fake_quantize, quantize
from pallas_kernels.indexer import SCORES, SELECT, index_scores, index_select, reference
from pallas_kernels.indexer.queries import TiledQueries, channel_order, tile_queries, untile_queries

kernels = pytest.importorskip("pallas_kernels.indexer.triton")
top_k = pytest.importorskip("pallas_kernels.indexer.top_k")
blocks = pytest.importorskip("pallas_kernels.indexer.blocks")
triton_call = pytest.importorskip("pallas_kernels.triton_call")

F32, BF16, I32, FP8 = jnp.float32, jnp.bfloat16, jnp.int32, jnp.float8_e4m3fn
H200, CPU = Target("cuda", "sm_90"), Target("cpu", "")
# What a block of the chip can have of shared memory, KiB.
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64, "gfx950": 160}
MATRIX = {
    "sm_80": r"mma\.sync",
    "sm_90": r"wgmma\.mma_async",
    "sm_100": r"tcgen05\.mma",
    "gfx942": "v_mfma",
    "gfx950": "v_mfma",
}
HEADS, CHANNELS = 64, 128


def target_of(arch):
    return Target("cuda" if arch.startswith("sm_") else "rocm", arch)


def shape(*sizes: int, dtype: Any = BF16) -> Any:
    return jax.ShapeDtypeStruct(sizes, dtype)


def shapes(
    batch: int, tokens: int, entries: int, fp4=False, heads=HEADS, channels=CHANNELS, dtype: Any = BF16
) -> tuple[Any, ...]:
    """q, keys, weights and visible, as shapes."""
    q, keys = shape(batch, tokens, heads, channels, dtype=dtype), shape(batch, entries, channels, dtype=dtype)
    if fp4:
        codes = shape(batch, entries, channels // 2, dtype=jnp.uint8)
        scale = shape(batch, entries, channels // 32, dtype=jnp.uint8)
        q, keys = TiledQueries(shape(*q.shape, dtype=FP8)), QuantArray(codes, scale, "fp4_group32")
    return q, keys, shape(batch, tokens, heads, dtype=F32), shape(batch, tokens, dtype=I32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), static_argnames=("heads", "channels"))
def made_up(
    batch: int, tokens: int, entries: int, fp4=False, heads=HEADS, channels=CHANNELS
) -> tuple[Any, ...]:
    """q, keys, weights and visible; operands hold FP4 values, as the model's do."""
    random = jax.random.split(jax.random.key(tokens * entries), 4)
    q, keys = (
        fake_quantize(jax.random.normal(key, sizes, BF16), "fp4_group32")
        for key, sizes in zip(
            random, ((batch, tokens, heads, channels), (batch, entries, channels)), strict=False
        )
    )
    weights = jax.random.normal(random[2], (batch, tokens, heads))
    visible = jax.random.randint(random[3], (batch, tokens), 0, entries + 1)
    if fp4:
        (q, weights), keys = tile_queries(q, weights), quantize(keys, "fp4_group32")
    return q, keys, weights, visible


def best(row, visible, count):
    """The best by the bits of the scores, which tell -0.0 from 0.0: NaN first, -infinity never; in order."""
    bits = np.int64(np.float32(row).view(np.int32))
    rank = np.where(bits < 0, -(bits & 0x7FFFFFFF) - 1, bits)[:visible]
    order = np.argsort(-rank, kind="stable")[:count]
    order = np.sort(order[row[order] != -np.inf])
    return [*order, *[-1] * (count - len(order))]


def hard_rows(columns, rng):
    """Rows that a choice by bisection may trip over."""
    normal = rng.normal(size=columns).astype(np.float32)
    zeros = np.where(np.arange(columns) % 3 == 0, normal, np.where(rng.random(columns) < 0.5, -0.0, 0.0))
    spread = normal * np.exp2(rng.integers(-120, 121, columns))
    odd = normal.copy()
    odd[::7], odd[2::9], odd[3::9] = np.inf, np.nan, -np.inf
    clusters = np.float32(1) + np.float32(2**-23) * rng.integers(0, 3, columns)
    constants = [np.full(columns, value) for value in (0.0, -0.0, np.inf, -np.inf, np.nan, 3e38)]
    rows = [normal, np.round(2 * normal), zeros, spread, odd, clusters, np.sort(normal), *constants]
    return np.stack(rows).astype(np.float32)


def assert_top_k(rows, visible, count, **choices):
    found = top_k.index_top_k(
        jnp.asarray(rows)[:, None], jnp.asarray(visible, I32)[:, None], count, **choices
    )

    columns = choices.get("columns") or rows.shape[1]
    assert found.shape == (len(rows), 1, min(count, columns))
    for row, seen, chosen in zip(rows, visible, np.asarray(found)[:, 0], strict=True):
        assert chosen.tolist() == best(row, min(seen, columns), len(chosen))


def compiled(found, arch):
    for launch in found:
        binary = triton_call.compile_offline(launch, arch)
        (machine,) = struct.unpack_from("<H", binary.code, 18)
        assert binary.code[:4] == b"\x7fELF"
        assert machine == (190 if arch.startswith("sm_") else 224)
        assert binary.shared_bytes <= 1024 * SHARED[arch]
        yield binary


# --- anywhere


def test_expected_orders_are_those_of_the_definition():
    rows = hard_rows(100, np.random.default_rng(0))
    visible = np.full(len(rows), 90, np.int32)

    found = np.asarray(reference.index_top_k(jnp.asarray(rows), jnp.asarray(visible), 40))

    assert found.tolist() == [best(row, 90, 40) for row in rows]


@pytest.mark.parametrize(
    "shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)], ids=["no sequence", "no token", "no entry"]
)
@pytest.mark.parametrize("fp4", [False, True], ids=["bfloat16", "FP4"])
def test_nothing_gives_nothing(shape, fp4):
    batch, tokens, entries = shape
    q, keys = jnp.zeros((batch, tokens, 16, 128), BF16), jnp.zeros((batch, entries, 128), BF16)
    if fp4:
        q, keys = TiledQueries(q.astype(FP8)), quantize(keys, "fp4_group32")
    weights, visible = jnp.zeros((batch, tokens, 16)), jnp.zeros((batch, tokens), I32)

    chosen = index_select(q, keys, weights, visible, 4, implementation="triton")

    assert index_scores(q, keys, weights, implementation="triton").shape == shape
    assert chosen.shape == (batch, tokens, min(4, entries))


@pytest.mark.parametrize("channels", [32, 64, 128])
def test_a_thread_of_the_tensor_core_finds_its_channels_in_words_of_packed_keys(channels):
    order, words = channel_order(channels), channels // 32

    assert sorted(order) == list(range(channels))
    for word, thread in np.ndindex(words, 4):
        places = [32 * word + 16 * half + 4 * thread + n for half in range(2) for n in range(4)]
        assert order[places].tolist() == list(
            range(8 * (words * thread + word), 8 * (words * thread + word + 1))
        )


@pytest.mark.parametrize("channels", [32, pytest.param(64, marks=pytest.mark.slow), 128])
def test_tiled_queries_give_the_scores_of_the_queries(channels):
    q, keys, weights, visible = made_up(2, 3, 40, channels=channels)
    scale = jnp.ldexp(1.0, jax.random.randint(jax.random.key(0), (2, 3, HEADS, 1), -60, 60))
    tiled, tiled_weights = tile_queries(q * scale, weights)
    fp4 = quantize(keys, "fp4_group32")

    np.testing.assert_array_equal(
        index_scores(tiled, fp4, tiled_weights), index_scores(q * scale, keys, weights)
    )
    np.testing.assert_array_equal(
        index_select(tiled, fp4, tiled_weights, visible, 9),
        index_select(q * scale, keys, weights, visible, 9),
    )


@pytest.mark.parametrize("spread", [13, 16], ids="2^{}".format)
def test_tiled_queries_hold_scales_that_lie_within_2_to_13_of_each_other(spread):
    codes = np.array([0.5, 1, 1.5, 2, 3, 4, 6, -6] * 4, np.float32)
    q = jnp.asarray(np.concatenate([codes, codes * 2.0**-spread, codes, codes]))[None, None, None]

    tiled, weight = tile_queries(q, jnp.ones((1, 1, 1)))

    found = np.asarray(untile_queries(tiled) * weight[..., None])[0, 0, 0]
    assert (found == np.asarray(q)[0, 0, 0]).all() == (spread == 13)
    np.testing.assert_allclose(found, np.asarray(q)[0, 0, 0], rtol=0, atol=6 * 2.0**-16)


def test_queries_of_no_whole_groups_are_refused():
    with pytest.raises(ValueError, match="queries of 48 channels"):
        tile_queries(jnp.ones((1, 1, 1, 48)), jnp.ones((1, 1, 1)))


@pytest.mark.parametrize(
    ("target", "arguments", "count", "fits"),
    [
        (H200, shapes(1, 1, 8192), 512, True),
        (H200, shapes(1, 4096, 2**18), 1024, True),
        (H200, shapes(1, 1, 8192, True), 512, True),
        (Target("rocm", "gfx942"), shapes(1, 1, 8192), 512, True),
        (Target("rocm", "gfx942"), shapes(1, 1, 8192, True), 512, True),
        (Target("cuda", "sm_80"), shapes(1, 1, 8192, True), 512, True),
        (H200, shapes(1, 1, 8192, dtype=F32), 512, False),
        (H200, (*shapes(1, 1, 8192, True)[:1], *shapes(1, 1, 8192)[1:]), 512, False),
        (H200, shapes(1, 1, 8192, heads=4), 512, False),
        (H200, shapes(1, 1, 8192, channels=80), 512, False),
        (H200, shapes(1, 1, 2**24), 512, False),
        (H200, shapes(1, 1, 8192), 4096, False),
        (CPU, shapes(1, 1, 8192), 512, False),
    ],
    ids=[
        "one query",
        "a prompt",
        "FP4",
        "CDNA3",
        "FP4 on CDNA3, whose FP8 is another",
        "FP4 on Ampere",
        "float32",
        "tiled queries only",
        "few heads",
        "channels that are no power of two",
        "keys beyond int32",
        "too many chosen",
        "a CPU",
    ],
)
def test_the_kernels_take(target, arguments, count, fits):
    (of_scores,), (of_selection,) = (
        [each for each in group if each.name == "triton"] for group in (SCORES, SELECT)
    )
    assert of_selection.fits(target, *arguments, count) is fits
    assert of_scores.fits(target, *arguments[:3]) is (fits or count == 4096)


@COMPILED_ARCH
@pytest.mark.parametrize(
    ("batch", "tokens", "entries"),
    [(1, 1, 32768), (128, 1, 8192), (3, 4, 1000), (1, 4096, 4096), (2, 129, 1001)],
    ids=["one query", "decoding", "drafts", "a prompt", "odd sizes"],
)
@pytest.mark.parametrize("fp4", [False, True], ids=["bfloat16", "FP4"])
def test_scores_compile_to_matrix_instructions_for(batch, tokens, entries, fp4, arch, monkeypatch):
    monkeypatch.setattr(kernels, "current_target", lambda: target_of(arch))

    found = triton_call.launches(kernels.index_scores, *shapes(batch, tokens, entries, fp4))

    (binary,) = compiled(found, arch)
    assert re.search(MATRIX[arch], binary.assembly)


@COMPILED_ARCH
@pytest.mark.parametrize(
    ("rows", "columns", "count", "launches"),
    [(1, 8192, 512, 1), (128, 32768, 512, 1), (1, 2**18, 1024, 2), (7, 100, 512, 1), (2, 2**21, 2048, 3)],
    ids=["one row", "long rows", "a very long row", "short rows", "three rounds"],
)
def test_top_k_compiles_for(rows, columns, count, launches, arch, monkeypatch):
    monkeypatch.setattr(top_k, "current_target", lambda: target_of(arch))
    arguments = shape(rows, 1, columns, dtype=F32), shape(rows, 1, dtype=I32)

    found = triton_call.launches(lambda *arrays: top_k.index_top_k(*arrays, count), *arguments)

    assert len(found) == launches
    assert len(list(compiled(found, arch))) == launches


def test_scores_of_a_prompt_are_held_a_block_at_a_time():
    arguments = shapes(1, 4096, 32768)

    chosen = functools.partial(blocks.index_select, kernels.index_scores)
    program = jax.make_jaxpr(lambda *arrays: chosen(*arrays, 512))(*arguments)

    largest = max(
        var.aval.size
        for eqn in triton_call._equations(program.jaxpr)
        for var in eqn.outvars
        if var.aval.dtype == F32
    )
    assert 4 * largest <= blocks.SCORE_BYTES


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("fp4", [False, True], ids=["bfloat16", "FP4"])
@pytest.mark.parametrize(
    ("batch", "tokens", "entries"),
    [(1, 1, 1), (2, 1, 1000), (3, 2, 129), (2, 4, 8192), (2, 17, 127), (1, 129, 1001), (1, 1000, 700)],
)
def test_scores_are_those_of_the_definition(batch, tokens, entries, fp4):
    q, keys, weights, _ = made_up(batch, tokens, entries, fp4)

    found = index_scores(q, keys, weights, implementation="triton")

    expected = reference.index_scores(q, keys, weights)
    assert jnp.abs(found - expected).max() <= 2e-6 * jnp.abs(expected).max()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "tiling",
    [
        kernels.Tiling(64, 1, 3, False, 4, 2),
        kernels.Tiling(128, 2, 5, True, 4, 3),
        kernels.Tiling(256, 1, 64, True, 8, 3),
        kernels.Tiling(256, 4, 7, False, 8, 2),
    ],
    ids=lambda tiling: " ".join(map(str, tiling)),
)
@pytest.mark.parametrize("heads", [16, 64], ids="heads={}".format)
def test_every_way_to_cut_the_work_gives_the_visible_scores(tiling, heads):
    q, keys, weights, visible = made_up(2, 23, 900, heads=heads, channels=64)

    found = kernels.index_scores(
        q, keys, weights, visible, first=jnp.array([3]), rows=19, stride=1024, tiling=tiling
    )

    expected = reference.index_scores(q, keys, weights)[:, 3:22]
    shown = jnp.arange(900) < visible[:, 3:22, None]
    error = jnp.where(shown, found[..., :900] - expected, 0)
    assert found.shape == (2, 19, 1024)
    assert jnp.abs(error).max() <= 2e-6 * jnp.abs(expected).max()


@pytest.mark.gpu
def test_not_a_number_is_not_lost_and_no_response_is_zero():
    q, keys = jnp.ones((1, 1, 16, 64), BF16), -jnp.ones((1, 130, 64), BF16).at[0, 7, 3].set(jnp.nan)

    found = np.asarray(kernels.index_scores(q, keys, -jnp.ones((1, 1, 16))))[0, 0]

    assert np.isnan(found).nonzero()[0].tolist() == [7]
    assert not np.signbit(np.delete(found, 7)).any()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("columns", "count"),
    [
        (1, 1),
        (5, 9),
        (5, 2),
        (60, 7),
        (127, 100),
        (1000, 512),
        (4096, 512),
        (8192, 512),
        (5000, 1024),
        (32768, 512),
    ],
)
def test_top_k_is_exact(columns, count):
    rows = hard_rows(columns, np.random.default_rng(columns))

    assert_top_k(rows, np.full(len(rows), columns), count)
    assert_top_k(rows, np.full(len(rows), (2 * columns + 1) // 3), count)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("columns", "count", "part"),
    [(3001, 64, 256), (40000, 512, None), (2**18, 1024, None), (70000, 700, 8192)],
)
def test_rows_in_parts_give_the_same(columns, count, part):
    rows = hard_rows(columns, np.random.default_rng(columns))

    assert_top_k(rows, np.full(len(rows), columns), count, part=part)
    assert_top_k(rows, np.full(len(rows), columns), count, part=part, columns=columns - 100)


@pytest.mark.gpu
@pytest.mark.parametrize("digit", [1, 7, 9, 11])
@pytest.mark.parametrize("num_warps", [4, 8, 32])
def test_digits_of_any_width_give_the_same(digit, num_warps):
    rows = hard_rows(3001, np.random.default_rng(digit))

    assert_top_k(rows, np.full(len(rows), 2999), 300, digit=digit, num_warps=num_warps)


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [600, 8192, 40000])
def test_fewer_visible_leave_places_empty(columns):
    visible = np.array([0, 1, 2, 63, 511, 512, 513, 600])
    rows = np.random.default_rng(0).normal(size=(len(visible), columns)).astype(np.float32)
    rows[:, 600:] = np.nan  # read by nobody

    assert_top_k(rows, visible, 512)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("batch", "tokens", "entries", "count"),
    [(2, 1, 9000, 512), (3, 4, 1000, 64), (2, 129, 1001, 100), (1, 1000, 700, 1024)],
)
def test_select_is_the_best_of_the_scores_in_any_blocks(batch, tokens, entries, count):
    q, keys, weights, visible = made_up(batch, tokens, entries)
    visible = visible.at[0, 0].set(0)

    whole = index_select(q, keys, weights, visible, count, implementation="triton")
    arguments = (kernels.index_scores, q, keys, weights, visible, count)
    by_block = blocks.index_select(*arguments, score_bytes=4 * 1024 * batch * 37)

    found = np.asarray(kernels.index_scores(q, keys, weights))
    for b, t in np.ndindex(batch, tokens):
        assert whole[b, t].tolist() == best(found[b, t], visible[b, t], whole.shape[2])
    np.testing.assert_array_equal(by_block, whole)
    expected = np.asarray(reference.index_select(q, keys, weights, visible, count))
    # Scores that are equal but for rounding may take each other's place, and move all that follow.
    assert np.mean((expected == whole).all(-1)) > 0.9
