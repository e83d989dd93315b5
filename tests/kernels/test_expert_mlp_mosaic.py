"""The Mosaic GPU kernel of the experts: it lowers for Hopper, and its PTX computes what it should.

The PTX is run by a small emulator of a warpgroup, written after the PTX manual: fragments of `wgmma` and
`stmatrix`, the 128-byte swizzle, and that nobody may touch a product before it was waited for.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels import QuantArray, Target, dequantize, expert_mlp, prepare_experts, quantize
from pallas_kernels.expert_mlp.interleave import interleave
from pallas_kernels.expert_mlp.plan import Plan, plan, tile_count
from pallas_kernels.expert_mlp.tiles import ExpertTiles, to_tiles
from pallas_kernels.swiglu.reference import swiglu

pytest.importorskip("triton")
plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
mosaic = pytest.importorskip("pallas_kernels.expert_mlp.mosaic")
triton_call = pytest.importorskip("pallas_kernels.triton_call")

Config = mosaic.Config
H200 = Target("cuda", "sm_90")
LIMIT = 10.0


# --- a warpgroup


class Warpgroup:
    """128 threads in step. Registers are arrays of 128 numbers, uint32, uint64 or bool by their use.

    Both memories start with bytes that stand for not-a-number in every format.
    """

    def __init__(self, shared: np.ndarray, memory: np.ndarray):
        self.shared, self.memory = shared, memory
        self.registers: dict[str, np.ndarray] = {}
        self.pending: list[dict[str, np.ndarray]] = []  # groups of products under way
        self.issued: dict[str, np.ndarray] = {}
        self.lane = np.arange(128)

    def run(self, text: str, operands: dict[str, np.ndarray]) -> None:
        self.registers |= {f"${name}": value for name, value in operands.items()}
        for line in re.sub(r"//.*", "", text).split(";"):
            if line.strip():
                self.step(line.strip())
        assert not self.pending
        assert not self.issued

    def step(self, line: str) -> None:
        real = np.ones(128, bool)
        if match := re.match(r"@(\w+) (.*)", line):
            real, line = self.registers[match[1]], match[2]
        name, _, rest = line.partition(" ")
        vectors = re.findall(r"\{([^}]*)\}|\[([^]]*)\]|([^,\s{}\[\]]+)", rest)
        arguments = ["{" + a if a else "[" + b if b else c for a, b, c in vectors]
        if name == ".reg":
            return
        if name.startswith("wgmma"):
            self.tensor(name, arguments)
        elif name.startswith(("ld.", "st.")):
            self.move(name, arguments, real)
        elif name.startswith("stmatrix"):
            self.stmatrix(name, arguments)
        else:
            assert real.all()
            self.compute(name.split("."), arguments)

    def read(self, name: str, kind: Any = np.uint32) -> np.ndarray:
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)", name):
            return np.full(128, int(name, 0) % (1 << 8 * np.dtype(kind).itemsize), kind)
        if name.startswith("0f"):
            return np.full(128, int(name[2:], 16), np.uint32).view(np.float32)
        assert not any(name in group for group in (*self.pending, self.issued)), f"{name} is under way"
        value = self.registers[name]
        return value.view(kind) if value.dtype.itemsize == np.dtype(kind).itemsize else value.astype(kind)

    def write(self, name: str, value: np.ndarray) -> None:
        assert not any(name in group for group in (*self.pending, self.issued)), f"{name} is under way"
        self.registers[name] = value

    def compute(self, name: list[str], arguments: list[str]) -> None:
        target, *sources = arguments
        operation, kind = name[0], name[-1]
        if operation == "mov" and kind == "b64":
            low, high = (self.read(each, np.uint64) for each in sources[0][1:].replace(" ", "").split(","))
            return self.write(target, low | high << np.uint64(32))
        if operation == "cvt":
            assert name[1:] == ["rn", "bf16x2", "f32"]
            high, low = (bf16_bits(self.read(each, np.float32)) for each in sources)
            return self.write(target, high << 16 | low)
        if operation == "mul" and name[1] == "wide":
            first, second = (self.read(each).astype(np.uint64) for each in sources)
            return self.write(target, first * second)
        types = {"f32": np.float32, "u64": np.uint64, "s64": np.uint64}
        values = [self.read(each, types.get(kind, np.uint32)) for each in sources]
        with np.errstate(over="ignore"):
            self.write(target, OPERATIONS[".".join(name[:2]) if operation == "setp" else operation](*values))

    def addresses(self, text: str) -> np.ndarray:
        base, _, offset = text[1:].partition("+")
        return self.read(base, np.uint64).astype(np.int64) + int(offset or 0)

    def move(self, name: str, arguments: list[str], real: np.ndarray) -> None:
        space = self.shared if ".shared" in name else self.memory
        load = name.startswith("ld")
        registers, place = arguments if load else arguments[::-1]
        names = registers[1:].replace(" ", "").split(",") if registers.startswith("{") else [registers]
        width = 1 if name.endswith("u8") else 4
        at = self.addresses(place)
        assert (at[real] % (width * len(names)) == 0).all()
        for n, register in enumerate(names):
            where = (at + n * width)[real, None] + np.arange(width)
            if not load:
                space[where] = self.read(register)[real, None].copy().view(np.uint8)
                continue
            value = np.zeros((128, 4), np.uint8)
            value[real, :width] = space[where]
            self.write(register, value.view(np.uint32)[:, 0])

    def stmatrix(self, name: str, arguments: list[str]) -> None:
        assert ".trans." in name
        at, registers = self.addresses(arguments[0]), arguments[1][1:].replace(" ", "").split(",")
        for warp in range(4):
            for n, register in enumerate(registers):
                # Thread i has row i // 4, columns i % 4 * 2 and the next; thread 8n + i where row i goes.
                matrix = self.read(register)[32 * warp :][:32].copy().view(np.uint16).reshape(8, 8)
                for row in range(8):
                    place = at[32 * warp + 8 * n + row]
                    assert place % 16 == 0
                    self.shared[place : place + 16] = matrix.T[row].copy().view(np.uint8)

    def tensor(self, name: str, arguments: list[str]) -> None:
        if name.startswith("wgmma.commit_group"):
            self.pending.append(self.issued)
            self.issued = {}
        elif name.startswith("wgmma.wait_group"):
            while len(self.pending) > int(arguments[0]):
                self.registers |= self.pending.pop(0)
        elif name.startswith("wgmma.mma_async"):
            self.product(int(re.findall(r"n(\d+)k32\.f32\.e4m3\.e4m3", name)[0]), arguments)

    def product(self, width: int, arguments: list[str]) -> None:
        sums, operand = (each[1:].replace(" ", "").split(",") for each in arguments[:2])
        assert len(sums) == width // 2
        (descriptor,) = set(self.read(arguments[2], np.uint64).tolist())
        assert descriptor >> 62 == 1  # 128-byte swizzle
        assert descriptor >> 32 & 0x3FFF == 1024 // 16
        linear = (descriptor & 0x3FFF) * 16 + np.arange(width)[:, None] * 128 + np.arange(32)
        tokens = e4m3(self.shared[linear ^ (linear >> 7 & 7) << 4])
        weights = np.zeros((64, 32), np.float32)
        for n, register in enumerate(operand):
            values = e4m3(self.read(register).copy().view(np.uint8).reshape(128, 4))
            rows = self.lane // 32 * 16 + self.lane % 32 // 4 + 8 * (n % 2)
            columns = self.lane % 4 * 4 + 16 * (n // 2)
            weights[rows[:, None], columns[:, None] + np.arange(4)] = values
        result = weights @ tokens.T
        for n, register in enumerate(sums):
            rows = self.lane // 32 * 16 + self.lane % 32 // 4 + 8 * (n // 2 % 2)
            old = self.issued.get(register, self.registers.get(register))
            value = result[rows, n // 4 * 8 + self.lane % 4 * 2 + n % 2]
            add = self.read(arguments[3], bool).all()
            self.issued[register] = old.view(np.float32) + value if add and old is not None else value


def e4m3(values: np.ndarray) -> np.ndarray:
    return values.view(jnp.float8_e4m3fn).astype(np.float32)


def bf16_bits(values: np.ndarray) -> np.ndarray:
    return values.astype(jnp.bfloat16).view(np.uint16).astype(np.uint32)


def permuted(low: np.ndarray, high: np.ndarray, which: np.ndarray) -> np.ndarray:
    both, found = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32), np.zeros(128, np.uint64)
    for n in range(4):
        nibble = which.astype(np.uint64) >> np.uint64(4 * n) & np.uint64(15)
        assert (nibble < 8).all()
        found |= (both >> nibble * np.uint64(8) & np.uint64(255)) << np.uint64(8 * n)
    return found.astype(np.uint32)


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    assert (table == 0xF8).all()
    return a | (b & c)


OPERATIONS = {
    "setp.gt": np.greater,
    "setp.ne": np.not_equal,
    "setp.lt": np.less,
    "mad": lambda a, b, c: a * b + c,
    "fma": lambda a, b, c: a * b + c,
    "mul": np.multiply,
    "add": np.add,
    "rcp": np.reciprocal,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "xor": np.bitwise_xor,
    "shl": np.left_shift,
    "shr": np.right_shift,
    "bfe": lambda a, first, width: a >> first & ((1 << width) - 1),
    "prmt": permuted,
    "lop3": lop3,
    "mov": lambda a: a,
    "ex2": np.exp2,
}


# --- a whole tile of tokens on warpgroups


def random_stack(experts: int, rows: int, columns: int, seed: int) -> QuantArray:
    random = np.random.default_rng(seed)
    values = random.integers(0, 256, (experts, rows, columns // 2), dtype=np.uint8)
    scale = random.integers(106, 118, (experts, rows, columns // 32), dtype=np.uint8)
    return QuantArray(jnp.asarray(values), jnp.asarray(scale), "fp4_group32")


def total(*terms: Any) -> Any:
    return sum(term[0] * term[1] if isinstance(term, tuple) else term for term in terms)


class Space:
    """A memory with arrays in it, each at a multiple of 1024 bytes."""

    def __init__(self) -> None:
        self.bytes = np.full(1 << 23, 0xFF, np.uint8)
        self.end = 1024

    def place(self, array: Any) -> int:
        """Its address."""
        data, start = np.ascontiguousarray(array).reshape(-1).view(np.uint8), self.end
        self.bytes[start : start + data.size] = data
        self.end = -(-(start + data.size) // 1024) * 1024
        return start


def swizzled(rows: np.ndarray) -> np.ndarray:
    """[tokens, 128] bytes as the copy engine puts them into shared memory."""
    at = np.arange(rows.size)
    stored = np.empty(rows.size, np.uint8)
    stored[at ^ (at >> 7 & 7) << 4] = rows.reshape(-1)
    return stored


def run_tile(
    config, shape, weight: ExpertTiles, planned: Plan, tile: int, values, scales, places
) -> np.ndarray:
    """What the consumers make of a tile of tokens, for all rows of its expert's weight."""
    expert, start = int(planned.expert[tile]), int(planned.start[tile])
    count = min(int(planned.end[tile]) - start, config.tokens)
    out = np.full((values.shape[0], shape.stride // 2), 0xFFFF, np.uint16)
    memory = Space()
    arrays = {"exponents": weight.row_exponent, "out": out}
    arrays["shares" if shape.gated else "order"] = places
    at = {name: memory.place(array) for name, array in arrays.items()}
    tokens = np.full((config.tokens, shape.columns), 0x7F, np.uint8)  # past the end: not a number
    there = np.asarray(values[start : start + config.tokens]).view(np.uint8)
    tokens[: len(there)] = there
    threads = np.arange(128)
    lane = mosaic.Lane(threads, threads // 32, threads % 32 // 4, threads % 4)
    for row in range(0, shape.rows, config.rows):
        item = mosaic.Item(tile, expert, row, start, count)
        blocks = slice(row // 128, (row + config.rows) // 128)
        for group in range(config.consumers):
            shared = Space()
            warpgroup = Warpgroup(shared.bytes, memory.bytes)
            sums = [f"sum{n}" for n in range(config.waves * config.tokens // 2)]
            operands = {name: np.zeros(128, np.float32) for name in sums}
            for step in range(shape.columns // 128):
                stages = {  # the third stage; the others hold no numbers
                    "codes": np.asarray(weight.codes[expert, blocks, step]),
                    "multipliers": np.asarray(weight.multipliers[expert, blocks, step]),
                    "x": swizzled(tokens[:, 128 * step :][:, :128]),
                    "scales": np.asarray(scales[tile, step]).view(np.uint8),
                }
                shared.end = 1024
                first = {
                    name: shared.place(np.pad(data.reshape(1, -1), ((2, 0), (0, 0)), constant_values=0xFF))
                    for name, data in stages.items()
                }
                offsets = mosaic.step_places(config, total, 2, group, lane)
                more = {name: np.uint32(first[name] + offsets[name] + 0 * threads) for name in first}
                warpgroup.run(mosaic.step_ptx(config), operands | more)
                operands = {name: warpgroup.registers[f"${name}"] for name in sums}
            offsets = mosaic.write_places(config, shape, total, item, group, lane)
            staged = np.uint32(shared.end + offsets.pop("stage") + 0 * threads)
            more = {name: np.uint64(at[name] + offset + 0 * threads) for name, offset in offsets.items()}
            more |= {"thread": np.uint32(threads), "stage": staged, "count": np.full(128, count, np.uint32)}
            warpgroup.run(mosaic.stage_ptx(config, shape.limit), operands | more)
            warpgroup.run(mosaic.write_ptx(config, shape.stride, shape.gated), more)
    found = memory.bytes[at["out"] :][: out.nbytes].view(np.uint16).reshape(out.shape)
    return found.view(jnp.bfloat16).astype(np.float32)


CASES = [
    pytest.param(Config((32,)), id="one product"),
    pytest.param(Config((16, 32)), id="two products"),
    pytest.param(Config((64, 48, 16)), id="three products"),
    pytest.param(Config((32,), waves=2), id="two waves"),
    pytest.param(Config((32, 16), waves=2), id="two waves of two products"),
    pytest.param(Config((32, 16), consumers=4), id="two products by each of four warpgroups"),
]


def of_many_sizes(rows: int) -> jax.Array:
    """[rows, 256] in bfloat16, where neighbours of either axis are quantised with other scales."""
    x = jax.random.normal(jax.random.key(1), (rows, 2, 128), jnp.bfloat16)
    power = jnp.arange(rows)[:, None, None] * 3 % 7 - jnp.arange(2)[:, None]
    return (x * 2.0**power).astype(jnp.bfloat16).reshape(rows, 256)


def planned_request(config, choices: int):
    """Activations, a plan and routing weights: the tile under test, the second of expert 1, is not full."""
    tokens, experts = config.tokens, 3
    count = -(-(2 * tokens + 5) // choices)
    chosen = np.stack([np.full(count, 1), np.arange(count) % 2 * 2], 1)[:, :choices]
    if choices == 1:
        chosen[: tokens // 2 + 3] = 0
    planned = plan(jnp.asarray(chosen, jnp.int32), experts, tokens, implementation="reference")
    tile = int(np.flatnonzero(np.asarray(planned.expert) == 1)[-1])
    return of_many_sizes(count), planned, tile, jax.random.uniform(jax.random.key(2), chosen.shape)


@pytest.mark.parametrize("choices", [1, 2], ids="choices={}".format)
@pytest.mark.parametrize("config", CASES)
def test_gate_and_up_are_what_their_definition_says(config, choices):
    w1, w3 = (random_stack(3, 128, 256, seed) for seed in (1, 3))
    weight, (x, planned, tile, shares) = to_tiles(interleave(w1, w3)), planned_request(config, choices)
    quant, order = quantize(x, "fp8_token128"), planned.order
    scales = mosaic._scales(planned, config, quant.scale, choices)
    places = mosaic._by_tile(planned, config, shares.reshape(-1)[order][:, None], 1)[..., 0]
    values = quant.values[order // choices]

    found = run_tile(config, mosaic.Shape(256, 256, LIMIT), weight, planned, tile, values, scales, places)

    rows = np.arange(
        int(planned.start[tile]), min(int(planned.end[tile]), int(planned.start[tile]) + config.tokens)
    )
    assert 0 < len(rows) <= config.tokens
    numbers = dequantize(quant)[order[rows] // choices]
    gate, up = (
        jnp.einsum("rk,nk->rn", numbers, dequantize(w[1]), precision="highest").astype(jnp.bfloat16)
        for w in (w1, w3)
    )
    expected = swiglu(gate, up, shares.reshape(-1)[order[rows]], LIMIT, jnp.float32)
    assert np.linalg.norm(found[rows] - expected) <= 3e-3 * np.linalg.norm(expected)
    # One by one, so that no element is another's: gate and up round to bfloat16 on their way; another order
    # of a sum may round them otherwise, which SiLU and the product make a few steps of.
    np.testing.assert_allclose(found[rows], expected, rtol=3e-2, atol=1e-2 * float(jnp.abs(expected).max()))
    others = np.delete(np.arange(len(found)), rows)
    assert np.isnan(found[others]).all()  # nobody else's row is written


@pytest.mark.parametrize("config", CASES)
def test_down_is_what_its_definition_says(config):
    w2, (inner, planned, tile, _) = random_stack(3, 256, 256, 2), planned_request(config, 1)
    quant = quantize(inner, "fp8_token128")
    scales = mosaic._scales(planned, config, quant.scale, 1)
    shape, order = mosaic.Shape(256, 256, None), planned.order

    found = run_tile(config, shape, to_tiles(w2), planned, tile, quant.values, scales, order)

    rows = np.arange(
        int(planned.start[tile]), min(int(planned.end[tile]), int(planned.start[tile]) + config.tokens)
    )
    numbers = dequantize(quant)[rows]
    expected = jnp.einsum("rk,nk->rn", numbers, dequantize(w2[1]), precision="highest")
    got = found[np.asarray(order)[rows]]
    assert np.linalg.norm(got - expected) <= 3e-3 * np.linalg.norm(expected)
    # One rounding to bfloat16, 2^-9; where terms cancel, float32 sums in another order.
    np.testing.assert_allclose(got, expected, rtol=2**-8, atol=1e-4 * float(jnp.abs(expected).max()))
    others = np.delete(np.arange(len(found)), np.asarray(order)[rows])
    assert np.isnan(found[others]).all()


# --- what runs on the CPU: the copies, the barriers and the order of the tiles


def plain_weight(codes: jax.Array, multipliers: jax.Array) -> jax.Array:
    """[rows, 128] numbers from tiles of bytes: any that depend on all of them will do."""
    half = codes.reshape(-1, 4, 16).astype(jnp.float32) + multipliers.reshape(-1, 4, 1).astype(jnp.float32)
    return jnp.concatenate([half.reshape(-1, 64), -2 * half.reshape(-1, 64)], axis=1)


def plain_multiply(config, refs: Any, slot: jax.Array, group: jax.Array, sums: Any) -> tuple[jax.Array, ...]:
    """In place of the PTX."""
    codes, multipliers, x, scales = (ref[slot] for ref in refs)
    in_order = scales[: config.tokens].reshape(-1, 4, 2, 2).swapaxes(1, 2).reshape(-1, 1)
    product = (x.astype(jnp.float32) * in_order) @ plain_weight(codes, multipliers).T
    own = jax.lax.dynamic_slice_in_dim(product.T, group * config.waves * 64, config.waves * 64)
    return tuple(total + own[64 * wave :][:64] for wave, total in enumerate(sums))


def plain_write(config, shape, refs: Any, item, group: jax.Array, sums: Any) -> None:
    exponents, order, _, out = refs
    first = item.row + group * config.waves * 64
    rows = exponents[pl.ds(item.expert * shape.rows + first, config.waves * 64)].astype(jnp.float32)
    numbers = (jnp.concatenate(sums) * rows[:, None]).T.astype(jnp.bfloat16)
    for token in range(config.tokens):

        @pl.when(token < item.real)
        def _(token: int = token) -> None:
            out[order[item.start + token], pl.ds(first, config.waves * 64)] = numbers[token]


@pytest.mark.parametrize(
    "config",
    [Config((32,)), Config((32,), waves=2, stages=3), Config((32,), consumers=4)],
    ids=["one wave", "two", "four warpgroups"],
)
def test_every_tile_is_computed_once_from_its_own_operands(config, monkeypatch):
    monkeypatch.setattr(mosaic, "_multiply", plain_multiply)
    monkeypatch.setattr(mosaic, "_write", plain_write)
    monkeypatch.setattr(mosaic, "MULTIPROCESSORS", 2)  # fewer than tiles: each program works on several
    w2 = to_tiles(random_stack(3, 256, 256, 2))
    inner = of_many_sizes(75)
    chosen = jnp.asarray([1] * 40 + [0] * 5 + [1] * 30, jnp.int32)[:, None]
    planned = plan(chosen, 3, config.tokens, implementation="reference")
    quant = quantize(inner, "fp8_token128")
    scales = mosaic._scales(planned, config, quant.scale, 1)
    arguments = (w2, quant.values, scales, planned.order, planned)

    out = mosaic._launch(*arguments, config=config, limit=None, interpret=plgpu.InterpretGPUParams())

    def expected_of(expert: jax.Array) -> jax.Array:
        tiles = [
            [plain_weight(w2.codes[expert, n, k], w2.multipliers[expert, n, k]) for k in range(2)]
            for n in range(2)
        ]
        return jnp.block(tiles) * w2.row_exponent[expert].astype(jnp.float32)[:, None]

    weights = jnp.stack([expected_of(expert) for expert in range(3)])[chosen[planned.order, 0]]
    expected = jnp.einsum("rk,rnk->rn", dequantize(quant), weights, precision="highest")
    found = np.asarray(out, np.float32)[planned.order]
    # As above.
    np.testing.assert_allclose(found, expected, rtol=2**-8, atol=1e-4 * float(jnp.abs(expected).max()))


# --- it lowers


def tiles_of(experts: int, rows: int, columns: int) -> ExpertTiles:
    outer = (experts, rows // 128, columns // 128)
    shapes = ((*outer, 8192), (*outer, 512), (experts, rows))
    return ExpertTiles(*(jax.ShapeDtypeStruct(shape, jnp.uint8) for shape in shapes))


def lowered(tokens: int, configs, experts: int, hidden: int, inner: int, choices: int = 6) -> str:
    """The kernels of both products for an H200, as text; nothing of it needs a GPU."""
    rows = tokens * choices
    tiles = tile_count(rows, experts, configs.gate_up.tokens)

    def numbers(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    planned = Plan(*(numbers(jnp.int32, size) for size in (rows, rows, tiles, tiles, tiles)))

    def both(w13, w2, x, x_scales, shares, inner, inner_scales, planned):
        return (
            mosaic._launch(w13, x, x_scales, shares, planned, config=configs.gate_up, limit=LIMIT),
            mosaic._launch(w2, inner, inner_scales, planned.order, planned, config=configs.down, limit=None),
        )

    width = configs.gate_up.scales
    arguments = (
        tiles_of(experts, 2 * inner, hidden),
        tiles_of(experts, hidden, inner),
        numbers(jnp.float8_e4m3fn, rows, hidden),
        numbers(jnp.float32, tiles, hidden // 128, width),
        numbers(jnp.float32, tiles, width),
        numbers(jnp.float8_e4m3fn, rows, inner),
        numbers(jnp.float32, tiles, inner // 128, width),
        planned,
    )
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("unused",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(both).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("tokens", [86, 512, 2048, 8192])
@pytest.mark.parametrize(("experts", "hidden", "inner"), [(256, 4096, 2048), (384, 7168, 3072)])
def test_the_kernels_lower_for_the_experts_of_flash_and_pro(experts, hidden, inner, tokens):
    configs = mosaic.configs_for(tokens * 6, experts)

    assert lowered(tokens, configs, experts, hidden, inner).count("@mosaic_gpu_v2") == 2


@pytest.mark.parametrize("configs", [configs for _, configs in mosaic.CONFIGS], ids=str)
def test_a_config_fits_the_chip(configs):
    assert configs.gate_up.tokens == configs.down.tokens <= 256
    for gated, config in zip((True, False), configs, strict=True):
        assert config.stages >= 3
        assert config.shared_bytes(gated) <= mosaic.SHARED_BYTES
        assert all(width % 16 == 0 for width in config.widths)


# --- what stands around it


@pytest.mark.parametrize("blocks", [2, 32, 56])
def test_the_kernel_that_sorts_compiles(blocks):
    x = jax.ShapeDtypeStruct((300, 128 * blocks), jnp.bfloat16)
    planned = Plan(*(jax.ShapeDtypeStruct((1800,), jnp.int32),) * 5)

    (launch,) = triton_call.launches(lambda *arrays: mosaic._quant_sorted(*arrays, 6), x, planned)

    assert triton_call.compile_offline(launch, "sm_90").code[:4] == b"\x7fELF"


# --- on a device


@pytest.mark.gpu
@pytest.mark.parametrize("skewed", [False, True], ids=["even", "skewed"])
@pytest.mark.parametrize(
    ("tokens", "experts"),
    [(400, 128), (1000, 128), (1000, 64), (1000, 16), (2047, 8)],
    ids=lambda number: str(number),
)
def test_the_kernels_give_what_the_definition_gives(tokens, experts, skewed):
    """Of every configuration; skewed: half of the experts have no token."""
    stacks = [random_stack(experts, *shape, seed) for seed, shape in enumerate([(256, 512), (512, 256)] * 2)]
    w1, w2, w3 = prepare_experts(*stacks[:3], H200)
    keys = jax.random.split(jax.random.key(tokens), 3)
    x = jax.random.normal(keys[0], (tokens, 512), jnp.bfloat16)
    likely = jax.random.uniform(keys[1], (tokens, experts)) - skewed * (jnp.arange(experts) % 2)
    chosen = jax.lax.top_k(likely, 4)[1]
    request = x, chosen, jax.random.uniform(keys[2], chosen.shape), w1, w2, w3

    found, expected = (
        expert_mlp(*request, limit=LIMIT, activation="fp8_token128", implementation=name)
        for name in ("mosaic", "reference")
    )

    error = jnp.linalg.norm(found - expected, axis=-1) / jnp.linalg.norm(expected, axis=-1)
    # Sums in another order round to another bfloat16 now and then, and those to another E4M3, up to 2^-3
    # away. In the worst row that one inner value is most of the sum. Over all rows such steps are few.
    assert float(error.max()) <= 2**-3
    assert float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)) <= 1e-2


# --- which experts it takes

X = jax.ShapeDtypeStruct((300, 256), jnp.bfloat16)
CHOSEN = jax.ShapeDtypeStruct((300, 6), jnp.int32)
FP4 = tiles_of(8, 256, 256)


@pytest.mark.parametrize(
    ("target", "chosen", "w2", "activation", "takes"),
    [
        (H200, CHOSEN, FP4, "fp8_token128", True),
        (Target("cuda", "sm_100"), CHOSEN, FP4, "fp8_token128", False),
        (Target("cpu", ""), CHOSEN, FP4, "fp8_token128", False),
        (H200, jax.ShapeDtypeStruct((85, 6), jnp.int32), FP4, "fp8_token128", False),
        (H200, CHOSEN, tiles_of(8, 384, 256), "fp8_token128", False),
        (H200, CHOSEN, random_stack(8, 256, 256, 1), "fp8_token128", False),
        (H200, CHOSEN, FP4, None, False),
    ],
    ids=["FP4", "Blackwell", "CPU", "few tokens", "rows not by 256", "as stored", "bfloat16 activations"],
)
def test_the_kernel_takes(target, chosen, w2, activation, takes):
    assert mosaic.fits(target, X, chosen, None, FP4, w2, None, LIMIT, activation) is takes
