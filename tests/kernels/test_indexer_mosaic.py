"""The Mosaic kernel of index scores: it lowers for Hopper, its PTX and its rings compute what they should.

The PTX runs in a small emulator of a warpgroup. All the rest, the rings and who works on what, runs in
Mosaic's interpreter, with plain functions in place of the PTX.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from warpgroup import Warpgroup, swizzled

from pallas_kernels import Target, current_target
from pallas_kernels.formats import QuantArray, dequantize, fake_quantize, quantize
from pallas_kernels.indexer import SCORES, SELECT, blocks, index_scores, index_select, reference
from pallas_kernels.indexer.queries import TiledQueries, tile_queries

plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
mosaic = pytest.importorskip("pallas_kernels.indexer.mosaic")
ptx = pytest.importorskip("pallas_kernels.indexer.mosaic_ptx")

Config = mosaic.Config
H200 = Target("cuda", "sm_90")
HEADS, CHANNELS = 64, 128


def shapes(batch: int, tokens: int, entries: int) -> tuple[Any, ...]:
    """Tiled queries, keys, weights and visible."""

    def shape(*sizes: int, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype)

    q = shape(batch, tokens, HEADS, CHANNELS, dtype=jnp.float8_e4m3fn)
    codes, scale = (
        shape(batch, entries, width, dtype=jnp.uint8) for width in (CHANNELS // 2, CHANNELS // 32)
    )
    weights = shape(batch, tokens, HEADS, dtype=jnp.float32)
    visible = shape(batch, tokens, dtype=jnp.int32)
    return TiledQueries(q), QuantArray(codes, scale, "fp4_group32"), weights, visible


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def made_up(batch: int, tokens: int, entries: int, spread: int = 3) -> tuple[Any, ...]:
    """The same; scales of a key lie within 2^spread."""
    keys = jax.random.split(jax.random.key(batch + tokens + entries), 5)
    q = fake_quantize(
        jax.random.normal(keys[0], (batch, tokens, HEADS, CHANNELS), jnp.bfloat16), "fp4_group32"
    )
    codes = jax.random.bits(keys[1], (batch, entries, CHANNELS // 2), jnp.uint8)
    scale = jax.random.randint(keys[2], (batch, entries, CHANNELS // 32), 120 - spread, 121).astype(jnp.uint8)
    visible = jax.random.randint(keys[3], (batch, tokens), 0, entries + 1)
    q, weights = tile_queries(q, jax.random.normal(keys[4], (batch, tokens, HEADS)))
    return q, QuantArray(codes, scale, "fp4_group32"), weights, visible


expected_of = jax.jit(reference.index_scores)


# --- it lowers


def lowered(arguments: tuple[Any, ...], config: Any = None) -> str:
    """The program for an H200, as text; nothing of it needs a GPU."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("unused",), abstract_device=device)
    run = functools.partial(mosaic.index_scores, config=config)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "sizes", [(1, 1, 32768), (3, 4, 1000), (1, 4096, 4096)], ids=["one query", "drafts", "a prompt"]
)
def test_the_kernel_lowers_for(sizes):
    assert lowered(shapes(*sizes)).count("@mosaic_gpu_v2") == 1


@pytest.mark.parametrize("keys", [4, 2**20])
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 4096])
def test_every_config_fits_a_multiprocessor(rows, keys):
    config = mosaic.config_for(rows, keys)

    assert config.shared_bytes <= mosaic.SHARED_BYTES
    assert config.queries * HEADS <= mosaic.MOST_COPIED
    assert config.keys % mosaic.MOST_COPIED == 0


# --- its PTX


CODES, SCALES, QUERIES, WEIGHTS = 0, 1 << 16, 1 << 17, 3 << 16  # where they are put in shared memory


@pytest.mark.parametrize(
    ("waves", "queries", "group", "count", "entries"),
    [
        (1, 1, 1, 1, 500),
        (2, 4, 0, 4, 500),
        (2, 3, 1, 2, 200),
        (4, 2, 1, 2, 300),
        (1, 1, 1, 1, 90),
        (2, 1, 1, 1, 9),
    ],
    ids=["one wave", "two", "fewer queries than loaded", "four waves", "few keys", "none of its keys"],
)
def test_the_ptx_computes_the_scores(waves, queries, group, count, entries):
    keys, first, stride, row = 2 * waves * 64, group * waves * 64, 1024, 3
    q, packed, weights, _ = made_up(1, queries, keys)
    shared, memory = np.full(1 << 18, 0xFF, np.uint8), np.full(1 << 16, 0xFF, np.uint8)
    for place, array in (
        (CODES, packed.values),
        (SCALES, packed.scale),
        (QUERIES, swizzled(np.asarray(q.values).reshape(-1, CHANNELS).view(np.uint8))),
        (WEIGHTS, weights),
    ):
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        shared[place : place + data.size] = data

    def same(value: int, kind: Any = np.uint32) -> np.ndarray:
        return np.full(128, value).astype(kind)

    thread = np.arange(128, dtype=np.uint32)
    decoding, scoring = Warpgroup(shared, memory), Warpgroup(shared, memory)
    decoding.run(
        ptx.keys_ptx(waves),
        {"thread": thread, "codes": same(CODES + first * 64), "scales": same(SCALES + first * 4)},
    )
    operands = {f"operand{n}": decoding.registers[f"$operand{n}"] for n in range(ptx.operands(waves))}
    places = {"q": same(QUERIES), "weights": same(WEIGHTS), "count": same(count)}
    places |= {"room": same(entries - first), "out": same(4 * (row * stride + first), np.uint64)}
    parts = min(2, waves * queries)
    scoring.run(ptx.scores_ptx(queries, waves, parts, 4 * stride), {"thread": thread, **places, **operands})

    found = memory.view(np.float32).reshape(-1, stride)
    expected = np.full_like(found, np.nan)
    mine = slice(first, max(first, min(first + waves * 64, entries)))
    scores = np.asarray(expected_of(q, packed, weights))[0]
    expected[row : row + count, mine] = scores[:count, mine]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(scores).max())


@pytest.mark.parametrize(("spread", "most"), [(11, 1e-6), (40, 2.0**-10)], ids=["within 2^11", "beyond"])
def test_groups_of_a_key_are_exact_within_2_to_11_and_beyond_become_zero(spread, most):
    _, packed, _, _ = made_up(1, 1, 64, spread)
    shared = np.full(1 << 17, 0xFF, np.uint8)
    for place, array in ((CODES, packed.values), (SCALES, packed.scale)):
        shared[place : place + array.size] = np.asarray(array).reshape(-1)
    warpgroup, thread = Warpgroup(shared, shared), np.arange(128, dtype=np.uint32)

    places = {"codes": thread * 0 + CODES, "scales": thread * 0 + SCALES}
    warpgroup.run(ptx.keys_ptx(1), {"thread": thread, **places})

    rows = np.asarray(dequantize(packed))[0]
    lane, warp = thread % 32, thread // 32
    for register in range(ptx.OPERAND):
        word, later, half = register // 4, register // 2 % 2, register % 2
        bytes = warpgroup.registers[f"$operand{register}"].copy().view(np.uint8).reshape(128, 4)
        row, channel = 16 * warp + lane // 4 + 8 * half, 32 * (lane % 4) + 8 * word + 4 * later
        highest = np.asarray(packed.scale)[0, row].max(-1).astype(np.float32)
        found = bytes.view(jnp.float8_e4m3fn).astype(np.float32) * np.exp2(highest - 133)[:, None]
        expected = rows[row[:, None], channel[:, None] + np.arange(4)]
        assert (np.abs(found - expected) <= most * 6 * np.exp2(highest - 127)[:, None]).all()


# --- its rings, in the interpreter


def plain_keys(config: Any, refs: Any, slot: Any, group: Any) -> jax.Array:
    """The numbers of a consumer's keys, [keys, 128]."""
    share = pl.ds(group * config.waves * 64, config.waves * 64)
    packed, words = refs[0][slot, share].astype(jnp.int32), refs[1][slot, share]
    codes = jnp.stack([packed & 15, packed >> 4], -1).reshape(-1, 4, 32)
    magnitude = codes & 7
    exponent = jnp.exp2((magnitude >> 1).astype(jnp.float32) - 1)
    values = jnp.where(magnitude < 2, magnitude * 0.5, (1 + (magnitude & 1) * 0.5) * exponent)
    scales = jnp.stack([(words >> (8 * n)) & 255 for n in range(4)], -1)
    scaled = jnp.where(codes > 7, -values, values) * jnp.exp2(scales.astype(jnp.float32) - 127)[..., None]
    return scaled.reshape(-1, CHANNELS)


def plain_score(
    config: Any, sizes: Any, refs: Any, keys: jax.Array, slot: Any, count: Any, at: tuple[Any, Any]
) -> None:
    q, weights, out = refs
    row, column = at
    for n in range(config.queries):
        tiled = q[slot, pl.ds(n * HEADS, HEADS)].astype(jnp.float32).reshape(HEADS, 4, 2, 4, 4)
        heads = tiled.transpose(0, 3, 1, 2, 4).reshape(HEADS, CHANNELS)
        scores = (jax.nn.relu(keys @ heads.T) * weights[slot, n]).sum(-1)

        @pl.when(n < count)
        def _(n: int = n, scores: jax.Array = scores) -> None:
            def one(key: jax.Array, _: Any) -> None:
                out[row + n, column + key] = scores[key]

            lax.fori_loop(0, jnp.clip(sizes.entries - column, 0, len(scores)), one, None)


@pytest.mark.parametrize(
    ("sizes", "config", "first", "rows"),
    [
        ((3, 1, 1000), Config(1, 1, 2, 1, 3, 2), 0, 1),
        ((2, 9, 300), Config(4, 2, 2, 2, 2, 2), 0, 9),
        ((1, 9, 300), Config(4, 2, 2, 1, 1, 2), 2, 5),
    ],
    ids=["a step", "two prompts", "a block of a prompt"],
)
def test_every_item_is_worked_on(sizes, config, first, rows, monkeypatch):
    monkeypatch.setattr(mosaic, "_keys", plain_keys)
    monkeypatch.setattr(mosaic, "_score", plain_score)
    monkeypatch.setattr(mosaic, "MULTIPROCESSORS", 3)
    q, packed, weights, visible = made_up(*sizes)
    visible = visible.at[0, 0].set(0)
    block = {"first": jnp.array([first]), "rows": rows, "stride": 1024}

    found = mosaic.index_scores(
        q, packed, weights, visible, **block, config=config, interpret=plgpu.InterpretGPUParams()
    )

    expected = expected_of(q, packed, weights)[:, first : first + rows]
    shown = jnp.arange(sizes[2]) < visible[:, first : first + rows, None]
    error = jnp.where(shown, found[..., : sizes[2]] - expected, 0)
    assert found.shape == (sizes[0], rows, 1024)
    assert jnp.abs(error).max() <= 1e-6 * jnp.abs(expected).max()


# --- what it takes


@pytest.mark.parametrize(
    ("target", "arguments", "takes"),
    [
        (H200, shapes(2, 3, 1000), True),
        (Target("cuda", "sm_100"), shapes(2, 3, 1000), False),
        (Target("rocm", "gfx942"), shapes(2, 3, 1000), False),
        (H200, shapes(2, 3, 1001), False),
    ],
    ids=["Hopper", "Blackwell", "AMD", "scales that begin anywhere"],
)
def test_the_kernel_takes(target, arguments, takes):
    assert (SCORES[0].name, SELECT[0].name) == ("mosaic", "mosaic")
    assert SCORES[0].fits(target, *arguments[:3]) is takes
    assert SELECT[0].fits(target, *arguments, 512) is takes


# --- on a GPU


@pytest.fixture
def hopper():
    if current_target().arch != "sm_90":
        pytest.skip("no Hopper GPU")


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("batch", "tokens", "entries"),
    [(1, 1, 4), (2, 1, 1000), (3, 2, 132), (2, 4, 8192), (2, 17, 128), (1, 129, 1000), (5, 300, 700)],
)
def test_scores_are_those_of_the_definition(batch, tokens, entries):
    q, packed, weights, _ = made_up(batch, tokens, entries)

    found = index_scores(q, packed, weights, implementation="mosaic")

    expected = reference.index_scores(q, packed, weights)
    assert jnp.abs(found - expected).max() <= 2e-6 * jnp.abs(expected).max()


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    "config", [Config(1, 1, 4, 1, 2, 2), Config(40, 4, 2, 2, 2, 3), Config(64, 2, 2, 4, 1, 2)], ids=str
)
def test_every_way_to_cut_the_work_gives_the_same_bits_every_time(config):
    q, packed, weights, visible = made_up(3, 133, 3000)
    run = jax.jit(functools.partial(mosaic.index_scores, rows=101, stride=3072, config=config))
    block = {"first": jnp.array([17])}

    found = run(q, packed, weights, visible, **block)

    expected = reference.index_scores(q, packed, weights)[:, 17:118]
    shown = jnp.arange(3000) < visible[:, 17:118, None]
    error = jnp.where(shown, found[..., :3000] - expected, 0)
    assert jnp.abs(error).max() <= 2e-6 * jnp.abs(expected).max()
    for _ in range(3):
        again = run(q, packed, weights, visible, **block)
        assert (jnp.where(shown, again[..., :3000] == found[..., :3000], True)).all()


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
def test_not_a_number_is_not_lost_and_no_response_is_zero():
    q, weights = tile_queries(jnp.ones((1, 1, HEADS, CHANNELS)), -jnp.ones((1, 1, HEADS)))
    packed = quantize(-jnp.ones((1, 132, CHANNELS)), "fp4_group32")
    packed = QuantArray(packed.values, packed.scale.at[0, 7, 3].set(255), "fp4_group32")

    found = np.asarray(index_scores(q, packed, weights, implementation="mosaic"))[0, 0]

    assert np.isnan(found).nonzero()[0].tolist() == [7]
    assert not np.signbit(np.delete(found, 7)).any()


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("batch", "tokens", "entries", "count"),
    [(2, 1, 9000, 512), (3, 4, 1000, 64), (2, 129, 1000, 100), (1, 1000, 700, 1024), (1, 1, 2**18, 1024)],
)
def test_the_chosen_are_those_of_exact_scores(batch, tokens, entries, count):
    """The same set, wherever scores differ by more than float32 sums in two orders do."""
    q, packed, weights, visible = made_up(batch, tokens, entries)
    visible = visible.at[0, 0].set(0 if tokens > 1 else entries)

    found = np.asarray(index_select(q, packed, weights, visible, count, implementation="mosaic"))
    in_blocks = blocks.index_select(
        mosaic.index_scores, q, packed, weights, visible, count, score_bytes=4 * 1024 * batch * 37
    )

    expected = np.asarray(reference.index_select(q, packed, weights, visible, count))
    np.testing.assert_array_equal(in_blocks, found)
    scores = np.asarray(reference.index_scores(q, packed, weights))
    most = 2e-6 * np.abs(scores).max()
    for b, t in np.ndindex(batch, tokens):
        mine, theirs = set(found[b, t]), set(expected[b, t])
        assert len(mine) == len(theirs)
        traded = [scores[b, t, list(each)] for each in (theirs - mine, mine - theirs)]
        assert not len(traded[0]) or traded[0].max() - traded[1].min() <= most
