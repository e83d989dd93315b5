"""The Mosaic GPU kernel of sparse attention: it lowers for Hopper, and interpreted it is right.

The interpreter runs everything but our own PTX and sums that stay in the tensor core's registers, for which
these tests put plain JAX. What these compute is checked on a GPU alone, in `test_sparse_attention.py`.
"""

import os

import jax
import jax.numpy as jnp
import pytest
from attention_cases import BF16, F32, I32, SCALE, assert_right, expected_of, made_up, shapes
from jax import lax

from pallas_kernels import QuantKV, Target, read_rows
from pallas_kernels.attention_inputs.reference import rotate
from pallas_kernels.sparse_attention import IMPLEMENTATIONS
from pallas_kernels.sparse_attention.mosaic_config import KEYS, LOG2_E, LOWEST, Config, Sizes, config_for

plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
mosaic = pytest.importorskip("pallas_kernels.sparse_attention.mosaic")
mosaic_kernel = pytest.importorskip("pallas_kernels.sparse_attention.mosaic_kernel")
ptx = pytest.importorskip("pallas_kernels.sparse_attention.mosaic_ptx")
# The interpreter's barriers block threads of JAX's pool, which has one for each core: with few, all do.
os.environ.setdefault("NPROC", "32")

H200 = Target("cuda", "sm_90")


# --- it lowers


def lowered(arguments, config=None) -> str:
    """The program for an H200, as text; nothing of it needs a GPU."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("unused",), abstract_device=device)

    def run(*arrays):
        return mosaic.sparse_attention(*arrays, SCALE, config)

    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def plain_combine(part, weight, sink, turns):
    """What the Triton kernel puts together."""
    share = jnp.exp2(weight - jnp.maximum(weight.max(-1, keepdims=True), LOWEST))
    top = jnp.maximum(weight.max(-1), LOWEST)
    whole = share.sum(-1) + jnp.exp2(sink * LOG2_E - top)
    out = (part.astype(F32) * share[..., None]).sum(-2) / whole[..., None]
    out = jnp.where((share.sum(-1) == 0)[..., None], 0.0, out)
    if turns is not None:
        out = rotate(out, *(sign * each[:, :, None] for sign, each in zip((1, -1), turns, strict=True)))
    return out.astype(part.dtype)


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
        pytest.param(shapes(1, 1, 64, 128, 128, 8192, 8192), id="one request and many entries"),
    ],
)
@pytest.mark.parametrize("form", ["numbers", "codes, turned back"])
def test_the_kernel_lowers_for(arguments, form, monkeypatch):
    monkeypatch.setattr(mosaic, "combine", plain_combine)
    if form != "numbers":
        q, window_kv, window_index, compressed_kv, compressed_index, *_ = arguments
        sizes = [*q.shape[:3], window_kv.shape[1], window_index.shape[2]]
        sizes += [compressed_kv.shape[1], compressed_index.shape[2]] if compressed_kv else []
        arguments = shapes(*sizes, codes=True, turned=True)

    assert lowered(arguments).count("@mosaic_gpu_v2") == 1


# --- it is right


def put_plain_jax(monkeypatch, programs: int) -> None:
    """In place of PTX: blocks arrive at once, and a counter in place of a barrier says so."""

    def prepare(sizes, arrived):
        for n in range(arrived.shape[0]):
            arrived[n] = 0

    def at(sizes, query):
        return lax.div(query, jnp.int32(sizes.tokens)), lax.rem(query, jnp.int32(sizes.tokens))

    def places(sizes, lists, query):
        batch, token = at(sizes, query)

        def padded(index, length):
            return jnp.pad(index[batch, token], (0, -length % KEYS), constant_values=-1)

        found = [padded(lists[0], sizes.window)]
        found += [padded(lists[1], sizes.chosen)] if sizes.chosen else []
        return jnp.concatenate(found)

    def look(sizes, lists, seen, query):
        present = (places(sizes, lists, query) >= 0).reshape(-1, KEYS).any(1)
        block = jnp.arange(sizes.blocks, dtype=I32)
        end = jnp.where(present, block + 1, 0).max()
        return jnp.minimum(jnp.where(present, block, sizes.blocks).min(), end), end

    def rows(sizes, lists, query, block):
        padded = jnp.pad(places(sizes, lists, query), (0, 3 * KEYS), constant_values=-1)
        return (lax.dynamic_slice(padded, (block * KEYS,), (KEYS,)),)

    def of_batch(kv, batch, index):
        one = (
            QuantKV(*(leaf[batch][None] for leaf in jax.tree.leaves(kv))) if isinstance(kv, QuantKV) else None
        )
        return read_rows(kv[batch][None] if one is None else one, index[None])[0]

    def store(sizes, kvs, tile, starts, arrived, batch, block, rows, held, slot):
        (index,) = rows
        window = of_batch(kvs[0], batch, index)
        found = window
        if sizes.chosen:
            found = jnp.where(block < sizes.window_blocks, window, of_batch(kvs[1], batch, index))
        tile[slot] = jnp.where(index[:, None] >= 0, found, 0)
        starts[slot] = jnp.where(index >= 0, 0.0, -jnp.inf)
        arrived[2 * slot] = arrived[2 * slot] + 1

    def wait_for(arrived, slot, phase):
        lax.while_loop(lambda count: count % 2 == phase, lambda _: arrived[2 * slot], arrived[2 * slot])

    def turned_back(columns, cos, sin, query):
        return rotate(columns, cos[query], -sin[query])

    def logits(queries, keys, start, zero):
        q = jnp.concatenate([queries[0], queries[1]], -1)
        return q.astype(F32) @ keys[...].astype(F32).T + start

    def add(sums, weights, values, meanwhile=None, carry=None):
        sums = sums + weights[...].astype(F32) @ values[...].astype(F32)
        return sums if meanwhile is None else (sums, meanwhile(carry))

    plain = {"prepare": prepare, "look": look, "rows": rows, "store": store, "wait_for": wait_for}
    plain |= {"load": lambda *_: (), "ahead": lambda *_: None, "zero": lambda: jnp.int32(0)}
    plain |= {"turned_back": turned_back, "moved": lambda factor: (factor != 1).any().astype(I32)}
    for name, function in plain.items():
        monkeypatch.setattr(ptx, name, function)
    monkeypatch.setattr(mosaic, "combine", plain_combine)
    for name, function in {"_logits": logits, "_add": add, "MULTIPROCESSORS": programs}.items():
        monkeypatch.setattr(mosaic_kernel, name, function)


@pytest.mark.parametrize(
    ("sizes", "absent", "config", "programs", "form"),
    [
        ((1, 3, 64, 100, 70, 90, 130), "none", Config(), 2, {}),
        ((2, 2, 64, 150, 130), "model", Config(slack=0.0), 1, {"turned": True}),
        ((1, 2, 128, 40, 30, 50, 65), "some", Config(), 3, {"codes": True}),
        ((1, 3, 64, 40, 30, 50, 300), "but one", Config(look=False), 2, {}),
        ((1, 3, 64, 40, 30, 50, 100), "all", Config(), 2, {}),
        ((2, 1, 64, 200, 128, 200, 200), "model", Config(3), 4, {"codes": True, "turned": True}),
    ],
    ids=[
        "full lists, of which none fills its blocks",
        "a window, and every maximum moves; turned back",
        "128 heads, absent rows anywhere, in codes",
        "one row",
        "no row",
        "splits, some without a block, turned back",
    ],
)
def test_the_interpreter_agrees_with_the_reference(sizes, absent, config, programs, form, monkeypatch):
    put_plain_jax(monkeypatch, programs)
    arguments = made_up(*sizes, absent=absent, **form)

    out = mosaic.sparse_attention(*arguments, SCALE, config, interpret=plgpu.InterpretGPUParams())

    assert out.dtype == BF16
    assert_right(out, expected_of(arguments), splits=config.splits)


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
    sizes = Sizes(1, queries, 1, 200, 128, 9000, places - 128)

    assert config_for(sizes).splits == splits
