"""The Mosaic GPU kernel of sparse attention: it lowers for Hopper, and interpreted it is right.

The interpreter runs everything but our own PTX and sums that stay in the tensor core's registers, for which
these tests put plain JAX. What these compute is checked on a GPU alone, in `test_sparse_attention.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import BF16, F32, I32, SCALE, assert_right, expected_of, made_up, shapes
from jax import lax
from warpgroup import Warpgroup

from pallas_kernels import QuantKV, Target, decode_rows, read_rows
from pallas_kernels.attention_inputs.reference import rotate
from pallas_kernels.sparse_attention import IMPLEMENTATIONS
from pallas_kernels.sparse_attention.mosaic_config import KEYS, LOG2_E, LOWEST, Config, Sizes, config_for

plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
mosaic = pytest.importorskip("pallas_kernels.sparse_attention.mosaic")
mosaic_kernel = pytest.importorskip("pallas_kernels.sparse_attention.mosaic_kernel")
ptx = pytest.importorskip("pallas_kernels.sparse_attention.mosaic_ptx")
texts = pytest.importorskip("pallas_kernels.sparse_attention.mosaic_texts")

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


LOWERED = {
    "a prompt of Flash": (1, 4096, 64, 4223, 128, 4096, 512),
    "a prompt of Pro": (1, 4096, 128, 4223, 128, 4096, 1024),
    "a window": (1, 1001, 64, 1128, 128),
    "all entries of a long text": (2, 129, 64, 256, 128, 8193, 8193),
    "lists that fill no block": (3, 17, 64, 9, 5, 6, 4),
    "128 requests": (128, 1, 64, 128, 128, 4096, 512),
    "32 requests": (32, 1, 64, 128, 128, 4096, 512),
    "one request and many entries": (1, 1, 64, 128, 128, 8192, 8192),
}
NUMBERS = ("a window", "32 requests")  # of which each run lowers the form that no released model has, too


@pytest.mark.parametrize("sizes", LOWERED.values(), ids=LOWERED)
def test_the_kernel_lowers_for(sizes, monkeypatch):
    monkeypatch.setattr(mosaic, "combine", plain_combine)

    assert lowered(shapes(*sizes, codes=True, turned=True)).count("@mosaic_gpu_v2") == 1


@pytest.mark.parametrize(
    "name", [name if name in NUMBERS else pytest.param(name, marks=pytest.mark.slow) for name in LOWERED]
)
def test_the_kernel_lowers_for_numbers(name, monkeypatch):
    monkeypatch.setattr(mosaic, "combine", plain_combine)

    assert lowered(shapes(*LOWERED[name])).count("@mosaic_gpu_v2") == 1


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


# --- codes become numbers


class Threads(Warpgroup):
    """With what the PTX of codes needs beside: scopes, wide addresses, products of pairs of bfloat16."""

    def _step(self, line: str) -> None:
        if line := line.lstrip("{} \n"):
            super()._step(line)

    def _compute(self, name: str, arguments: list[str]) -> None:
        if name == "cvt.u64.u32":
            return self._write(arguments[0], self.read(arguments[1]).astype(np.uint64))
        if name in ("selp.b64", "mov.b64", "add.u64", "and.b64"):
            kind = np.uint64
            values = [self.read(each, kind) for each in arguments[1:3]]
            if name == "selp.b64":
                values = [np.where(self.registers[arguments[3]], *values)]
            elif name != "mov.b64":
                values = [(np.add if name == "add.u64" else np.bitwise_and)(*values)]
            return self._write(arguments[0], values[0])
        if name == "lop3.b32":
            a, b, c, table = map(self.read, arguments[1:])
            assert (table == 0xEA).all()
            return self._write(arguments[0], a & b | c)
        if name == "mul.bf16x2":
            first, second = ([word << 16, word & 0xFFFF0000] for word in map(self.read, arguments[1:]))
            low, high = (
                (a.view(F32) * b.view(F32)).view(np.uint32) >> 16 for a, b in zip(first, second, strict=True)
            )
            return self._write(arguments[0], high << 16 | low)
        return super()._compute(name, arguments)


def test_codes_become_numbers_where_the_tensor_core_looks_for_them():
    rng, slots, block = np.random.default_rng(0), (40, 90), 3
    sizes = Sizes(2, 1, 1, slots[0], 128, slots[1], 100, codes=True)
    kvs, memory, place, addresses = [], np.zeros(1 << 18, np.uint8), 0, {}
    for whose, rows in zip(("window", "compressed"), slots, strict=True):
        codes = np.delete(np.arange(256, dtype=np.uint8), (0x7F, 0xFF))[rng.integers(0, 254, (2, rows, 448))]
        scale = rng.integers(16, 247, (2, rows, 8), np.uint8)  # XLA makes zeros of what is below 2^-126
        kvs.append((codes, scale))
        for name, array in (("nope", codes), ("scale", scale)):
            memory[place : place + array.size] = array.reshape(-1)
            addresses[f"{whose}_{name}"] = np.full(128, place, np.uint64)
            place += -(-array.size // 256) * 256
    index = rng.integers(0, slots[1], KEYS).astype(np.int32)
    index[[5, 40]], index[7], index[41] = -1, slots[1], 2**31 - 1  # past the end they name the last row

    shared, thread = np.full(KEYS * 1024 + 256, 0xEE, np.uint8), np.arange(128, dtype=np.uint32)
    warpgroup, more = Threads(shared, memory), {"thread": thread, "batch": np.full(128, 1, np.uint32)}
    for half in range(2):
        row = index[thread // 4 + 32 * half].view(np.uint32)
        more |= {"row": row, "block": np.full(128, block, np.uint32)}
        warpgroup.run(texts.raw_text(sizes), addresses | more)
        held = {f"raw{n}": warpgroup.registers[f"$result{n}"] for n in range(texts.RAW)}
        at = {"tile": np.zeros(128, np.uint64), "starts": np.full(128, KEYS * 1024, np.uint64)}
        warpgroup.run(texts.decode_text(half), held | at | more)

    codes, scale = (each[1][np.clip(index, 0, slots[1] - 1)] for each in kvs[1])
    numbers = decode_rows(QuantKV(codes.view(jnp.float8_e4m3fn), scale, np.zeros((KEYS, 64), jnp.bfloat16)))
    expected = np.where(index[:, None] >= 0, np.asarray(numbers)[:, :448], 0)
    key, column = np.indices((KEYS, 448))
    piece = (key // 8 * 8 + column // 64) * 1024 + key % 8 * 128
    at = piece + (column % 64 // 8 ^ key % 8) * 16 + column % 8 * 2
    found = shared[: KEYS * 1024].view(jnp.bfloat16)[at // 2]
    np.testing.assert_array_equal(found, expected)
    starts = shared[KEYS * 1024 :].view(F32)
    np.testing.assert_array_equal(starts, np.where(index >= 0, 0, -np.inf))


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
        (H200, shapes(7, 1, 64, 128, 128, 4096, 512), SCALE, False),
        (H200, shapes(1, 1, 64, 128, 128, 4096, 512, codes=True, turned=True), SCALE, True),
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
        "one query, codes",
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
    [
        (1, 640, 5),
        (8, 640, 5),
        (32, 640, 4),
        (33, 128, 1),
        (44, 640, 3),
        (67, 640, 1),
        (4096, 8320, 1),
        (1, 2048, 16),
        (1, 8320, 32),
        (8, 8320, 16),
    ],
)
def test_splits_leave_no_multiprocessor_idle_and_no_program_without_keys(queries, places, splits):
    sizes = Sizes(1, queries, 1, 200, 128, 9000, places - 128)

    assert config_for(sizes).splits == splits
