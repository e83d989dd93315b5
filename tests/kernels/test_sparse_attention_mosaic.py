"""The Mosaic GPU kernel of sparse attention: it lowers for Hopper, and interpreted it is right.

The interpreter runs everything but our own PTX and sums that stay in the tensor core's registers, for which
these tests put plain JAX. What these compute is checked on a GPU alone.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from pallas_kernels import Target
from pallas_kernels.sparse_attention import IMPLEMENTATIONS, reference, sparse_attention

plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
mosaic = pytest.importorskip("pallas_kernels.sparse_attention.mosaic")
# The interpreter's barriers block threads of JAX's pool, which has one for each core: with few, all do.
os.environ.setdefault("NPROC", "32")

F32, BF16, I32 = jnp.float32, jnp.bfloat16, jnp.int32
H200 = Target("cuda", "sm_90")
CHANNELS, SCALE = 512, 512**-0.5
MOST_ERROR = 4e-3  # relative, of a whole result: weights, parts of splits and the result are rounded


def shapes(
    batch, tokens, heads, rows, places, entries=0, chosen=0, channels=CHANNELS, dtype=BF16
) -> tuple[Any, ...]:
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


def made_up(*sizes: int, absent="model", sink=(0.5, -2.0, -jnp.inf, 30.0, 1e30)) -> tuple[Any, ...]:
    """Numbers of these shapes; `absent` says where lists have -1.

    In "model" it leads a window and trails a list, as it does there; "some" is a third of all, "most" nearly
    all; "but one" leaves each query one row, "all" none.
    """
    keys = iter(jax.random.split(jax.random.key(sum(sizes)), 16))
    q, window_kv, window_index, compressed_kv, compressed_index, sink_shape = shapes(*sizes)

    def normal(like) -> Any:
        return jax.random.normal(next(keys), like.shape, BF16)

    def index(like, rows, leading):
        index, place = jax.random.randint(next(keys), like.shape, 0, rows), jnp.arange(like.shape[-1])
        if absent == "model":
            count = jax.random.randint(next(keys), (*like.shape[:2], 1), 0, like.shape[-1] + 1)
            return jnp.where(place < count if leading else place >= like.shape[-1] - count, -1, index)
        if absent == "but one":
            return jnp.where((place == 3) if leading else False, index, -1)
        share: Any = {"none": 0.0, "some": 0.3, "most": 0.98, "all": 1.1}[absent]
        return jnp.where(jax.random.uniform(next(keys), like.shape) < share, -1, index)

    compressed: tuple[Any, Any] = (None, None)
    if compressed_kv is not None:
        entries = normal(compressed_kv)
        compressed = (entries, index(compressed_index, entries.shape[1], False))
    return (
        normal(q),
        normal(window_kv),
        index(window_index, window_kv.shape[1], True),
        *compressed,
        jnp.resize(jnp.array(sink, F32), sink_shape.shape),
    )


def assert_right(found, arguments, scale=SCALE):
    """Against the definition with queries, and so a result, in float32."""
    q, *others = arguments
    expected = reference.sparse_attention(q.astype(F32), *others, softmax_scale=scale)
    found = found.astype(F32)
    assert found.shape == expected.shape
    assert jnp.isfinite(found).all()
    assert jnp.linalg.norm((found - expected).reshape(-1)) <= MOST_ERROR * jnp.linalg.norm(
        expected.reshape(-1)
    )
    assert not jnp.where(expected == 0, found, 0).any()


# --- it lowers


def lowered(arguments, config=None) -> str:
    """The program for an H200, as text; nothing of it needs a GPU."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("unused",), abstract_device=device)

    def run(*arrays):
        return mosaic.sparse_attention(*arrays, SCALE, config)

    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def plain_combine(part, weight, sink):
    """What the Triton kernel puts together."""
    share = jnp.exp2(weight - jnp.maximum(weight.max(-1, keepdims=True), mosaic.LOWEST))
    top = jnp.maximum(weight.max(-1), mosaic.LOWEST)
    whole = share.sum(-1) + jnp.exp2(sink * mosaic.LOG2_E - top)
    out = (part.astype(F32) * share[..., None]).sum(-2) / whole[..., None]
    return jnp.where((share.sum(-1) == 0)[..., None], 0.0, out).astype(part.dtype)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(shapes(1, 4096, 64, 4223, 128, 4096, 512), id="a prompt of Flash"),
        pytest.param(shapes(1, 4096, 128, 4223, 128, 4096, 1024), id="a prompt of Pro"),
        pytest.param(shapes(1, 1001, 64, 1128, 128), id="a window"),
        pytest.param(shapes(2, 129, 64, 256, 128, 8193, 8193), id="all entries of a long text"),
        pytest.param(shapes(3, 17, 64, 9, 5, 6, 4), id="lists that fill no block"),
        pytest.param(shapes(128, 1, 64, 128, 128, 4096, 512), id="128 requests"),
        pytest.param(shapes(32, 1, 64, 128, 128, 4096, 512), id="32 requests"),
    ],
)
def test_the_kernel_lowers_for(arguments, monkeypatch):
    monkeypatch.setattr(mosaic, "combine", plain_combine)

    assert lowered(arguments).count("@mosaic_gpu_v2") == 1


# --- it is right


def put_plain_jax(monkeypatch, programs: int) -> None:
    """In place of PTX: blocks arrive at once, and a counter in place of a barrier says so."""

    def prepare(arrived):
        for n in range(arrived.shape[0]):
            arrived[n] = 0

    def at(sizes, query):
        return lax.div(query, jnp.int32(sizes.tokens)), lax.rem(query, jnp.int32(sizes.tokens))

    def places(sizes, lists, query):
        batch, token = at(sizes, query)

        def padded(index, length):
            return jnp.pad(index[batch, token], (0, -length % mosaic.KEYS), constant_values=-1)

        found = [padded(lists[0], sizes.window)]
        found += [padded(lists[1], sizes.chosen)] if sizes.chosen else []
        return jnp.concatenate(found)

    def look(sizes, lists, seen, query):
        present = (places(sizes, lists, query) >= 0).reshape(-1, mosaic.KEYS).any(1)
        block = jnp.arange(sizes.blocks, dtype=I32)
        end = jnp.where(present, block + 1, 0).max()
        return jnp.minimum(jnp.where(present, block, sizes.blocks).min(), end), end

    def rows(sizes, lists, query, block):
        padded = jnp.pad(places(sizes, lists, query), (0, 2 * mosaic.KEYS), constant_values=-1)
        return (lax.dynamic_slice(padded, (block * mosaic.KEYS,), (mosaic.KEYS,)),)

    def fetch(sizes, kvs, tile, starts, arrived, batch, block, rows, slot):
        (index,) = rows
        window = kvs[0][batch][jnp.clip(index, 0, sizes.rows - 1)]
        found = window
        if sizes.chosen:
            compressed = kvs[1][batch][jnp.clip(index, 0, sizes.entries - 1)]
            found = jnp.where(block < sizes.window_blocks, window, compressed)
        tile[slot] = jnp.where(index[:, None] >= 0, found, 0)
        starts[slot] = jnp.where(index >= 0, 0.0, -jnp.inf)
        arrived[2 * slot] = arrived[2 * slot] + 1

    def wait(arrived, slot, phase):
        lax.while_loop(lambda count: count % 2 == phase, lambda _: arrived[2 * slot], arrived[2 * slot])

    def logits(queries, keys, start, zero):
        q = jnp.concatenate([queries[0], queries[1]], -1)
        return q.astype(F32) @ keys[...].astype(F32).T + start

    def add(sums, weights, values, meanwhile=None, carry=None):
        sums = sums + weights[...].astype(F32) @ values[...].astype(F32)
        return sums if meanwhile is None else (sums, meanwhile(carry))

    plain = {"_prepare": prepare, "_look": look, "_rows": rows, "_fetch": fetch, "_await": wait}
    plain |= {"_logits": logits, "_add": add, "_zero": lambda: jnp.int32(0), "combine": plain_combine}
    plain |= {"_moved": lambda factor: (factor != 1).any().astype(I32), "MULTIPROCESSORS": programs}
    for name, function in plain.items():
        monkeypatch.setattr(mosaic, name, function)


@pytest.mark.parametrize(
    ("sizes", "absent", "config", "programs"),
    [
        ((1, 3, 64, 100, 70, 90, 130), "none", mosaic.Config(), 2),
        ((2, 2, 64, 150, 130), "model", mosaic.Config(slack=0.0), 1),
        ((1, 2, 128, 40, 30, 50, 65), "some", mosaic.Config(), 3),
        ((1, 3, 64, 40, 30, 50, 300), "but one", mosaic.Config(look=False), 2),
        ((1, 3, 64, 40, 30, 50, 100), "all", mosaic.Config(), 2),
        ((2, 1, 64, 200, 128, 200, 200), "model", mosaic.Config(3), 4),
    ],
    ids=[
        "full lists, of which none fills its blocks",
        "a window, and every maximum moves",
        "128 heads, absent rows anywhere",
        "one row",
        "no row",
        "splits, some without a block",
    ],
)
def test_the_interpreter_agrees_with_the_reference(sizes, absent, config, programs, monkeypatch):
    put_plain_jax(monkeypatch, programs)
    arguments = made_up(*sizes, absent=absent)

    out = mosaic.sparse_attention(*arguments, SCALE, config, interpret=plgpu.InterpretGPUParams())

    assert_right(out, arguments)


# --- which calls it takes

FLASH = shapes(1, 4096, 64, 4223, 128, 4096, 512)


@pytest.mark.parametrize(
    ("target", "arguments", "scale", "fits"),
    [
        (H200, FLASH, SCALE, True),
        (H200, shapes(1, 1000, 128, 1127, 128), SCALE, True),
        (H200, shapes(32, 1, 64, 128, 128, 4096, 512), SCALE, True),
        (Target("cuda", "sm_100"), FLASH, SCALE, False),
        (Target("rocm", "gfx942"), FLASH, SCALE, False),
        (Target("cpu", ""), FLASH, SCALE, False),
        (H200, shapes(8, 1, 64, 128, 128, 4096, 512), SCALE, False),
        (H200, shapes(1, 4096, 32, 4223, 128), SCALE, False),
        (H200, shapes(1, 4096, 64, 4223, 128, channels=256), SCALE, False),
        (H200, shapes(1, 4096, 64, 4223, 128, dtype=F32), SCALE, False),
        (H200, shapes(1, 4096, 64, 4223, 0), SCALE, False),
        (H200, FLASH, -1.0, False),
    ],
    ids=[
        "a prompt",
        "128 heads, a window",
        "32 requests",
        "Blackwell",
        "AMD",
        "a CPU",
        "few queries",
        "32 heads",
        "narrow heads",
        "float32",
        "no window",
        "a scale that turns the order round",
    ],
)
def test_the_kernel_takes(target, arguments, scale, fits):
    (implementation,) = [each for each in IMPLEMENTATIONS if each.name == "mosaic"]

    assert implementation.fits(target, *arguments, scale) is fits


@pytest.mark.parametrize(
    ("queries", "places", "splits"),
    [(1, 640, 5), (8, 640, 5), (32, 640, 4), (33, 128, 1), (44, 640, 3), (67, 640, 1), (4096, 8320, 1)],
)
def test_splits_leave_no_multiprocessor_idle_and_no_program_without_keys(queries, places, splits):
    sizes = mosaic.Sizes(1, queries, 1, 200, 128, 9000, places - 128)

    assert mosaic.config_for(sizes).splits == splits


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "heads"),
    [(1, 64), (3, 64), (17, 64), (127, 64), (129, 64), (1000, 64), (1, 128), (129, 128)],
)
def test_the_kernel_gives_what_the_definition_gives(tokens, heads):
    for entries, chosen in ((300, 512), (0, 0)):
        arguments = made_up(2, tokens, heads, tokens + 127, 128, entries, chosen)

        assert_right(mosaic.sparse_attention(*arguments, SCALE), arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("absent", ["none", "model", "some", "most", "but one", "all"])
@pytest.mark.parametrize("sizes", [(2, 140, 64, 300, 130, 700, 513), (1, 133, 64, 9, 5, 6000, 5001)], ids=str)
def test_any_place_may_be_absent(sizes, absent):
    arguments = made_up(*sizes, absent=absent)

    for config in (mosaic.Config(), mosaic.Config(look=False, slack=0.0), mosaic.Config(3)):
        assert_right(mosaic.sparse_attention(*arguments, SCALE, config), arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("sink", [-jnp.inf, 0.0, 30.0, 1e30])
def test_a_sink_of_any_size(sink):
    for absent in ("model", "but one", "all"):
        arguments = made_up(1, 135, 64, 300, 128, 300, 100, absent=absent, sink=(sink,))

        found = mosaic.sparse_attention(*arguments, SCALE, mosaic.Config())

        assert_right(found, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1e3, 1e18], ids=["large logits", "huge logits"])
def test_large_logits_do_not_overflow(size):
    q = jnp.full((1, 3, 64, CHANNELS), size, BF16)
    kv = jnp.concatenate([jnp.ones((1, 100, CHANNELS), BF16), -jnp.ones((1, 100, CHANNELS), BF16)], 1)
    index = jnp.broadcast_to(jnp.arange(0, 200, 2, dtype=I32), (1, 3, 100))

    for config in (mosaic.Config(), mosaic.Config(2, slack=0.0)):
        out = mosaic.sparse_attention(q, kv, index, None, None, jnp.zeros(64), 0.3, config)

        assert (out == 1).all()


@pytest.mark.gpu
def test_rows_that_nobody_names_are_not_read():
    q, window_kv, window_index, compressed_kv, compressed_index, sink = made_up(
        2, 140, 64, 150, 128, 300, 77, absent="some"
    )
    window_index = jnp.where(window_index == 0, -1, window_index)
    compressed_index = jnp.where(compressed_index == 0, -1, compressed_index)

    def run(window_kv, compressed_kv):
        arguments = (q, window_kv, window_index, compressed_kv, compressed_index, sink, SCALE)
        return mosaic.sparse_attention(*arguments)

    poisoned = run(window_kv.at[:, 0].set(jnp.nan), compressed_kv.at[:, 0].set(jnp.inf))
    assert (poisoned == run(window_kv, compressed_kv)).all()


@pytest.mark.gpu
def test_indices_beyond_the_end_name_the_last_row():
    arguments = list(made_up(2, 140, 64, 150, 128, 300, 77, absent="some"))
    arguments[2] = arguments[2].at[:, :, ::3].set(2**31 - 1)
    arguments[4] = arguments[4].at[:, :, ::3].set(300)

    assert_right(mosaic.sparse_attention(*arguments, SCALE), arguments)


@pytest.mark.gpu
def test_not_a_number_is_not_lost():
    q, *others = made_up(1, 140, 64, 150, 128, 300, 77, absent="some")

    out = mosaic.sparse_attention(q.at[0, 1, 3, 7].set(jnp.nan), *others, softmax_scale=SCALE)

    assert jnp.isnan(out[0, 1, 3]).all()
    assert jnp.isfinite(out[0, 0]).all()


@pytest.mark.gpu
def test_a_long_prompt_gives_the_same_bits_again():
    arguments = made_up(1, 4096, 64, 4223, 128, 4096, 512, absent="some")

    first, *others = [mosaic.sparse_attention(*arguments, SCALE) for _ in range(5)]

    assert_right(first, arguments)
    assert all((other == first).all() for other in others)


@pytest.mark.gpu
def test_the_op_runs_it_when_asked_to():
    arguments = made_up(32, 1, 64, 128, 128, 300, 512)

    out = sparse_attention(*arguments, softmax_scale=SCALE, implementation="mosaic")

    assert_right(out, arguments)
