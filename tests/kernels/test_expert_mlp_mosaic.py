"""The Mosaic kernel of the experts for many tokens: it lowers for Hopper, and computes what it should.

Its PTX runs in an emulator of a warpgroup, its copies, barriers and order of tiles in Pallas' interpreter.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from warpgroup import Space, Warpgroup, swizzled

from pallas_kernels import QuantArray, Target, dequantize, expert_mlp, prepare_experts, quantize
from pallas_kernels.expert_mlp import IMPLEMENTATIONS
from pallas_kernels.expert_mlp.interleave import interleave
from pallas_kernels.expert_mlp.mosaic_config import CONFIGS, SHARED_BYTES, Config, configs_for
from pallas_kernels.expert_mlp.plan import Plan, plan, tile_count
from pallas_kernels.expert_mlp.tiles import ExpertTiles, tile_order, to_tiles

pytest.importorskip("triton")
plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
kernel = pytest.importorskip("pallas_kernels.expert_mlp.mosaic_many")
mosaic = pytest.importorskip("pallas_kernels.expert_mlp.mosaic")
sorting = pytest.importorskip("pallas_kernels.expert_mlp.quant")
triton_call = pytest.importorskip("pallas_kernels.triton_call")

H200 = Target("cuda", "sm_90")
LIMIT = 10.0
THREADS = np.arange(128)


def random_stack(experts: int, rows: int, columns: int, seed: int) -> QuantArray:
    random = np.random.default_rng(seed)
    values = random.integers(0, 256, (experts, rows, columns // 2), dtype=np.uint8)
    scale = random.integers(106, 118, (experts, rows, columns // 32), dtype=np.uint8)
    return QuantArray(jnp.asarray(values), jnp.asarray(scale), "fp4_group32")


def of_many_sizes(rows: int) -> np.ndarray:
    """[rows, 256] in bfloat16, where neighbours of either axis are quantised with other scales."""
    x = np.random.default_rng(1).normal(size=(rows, 2, 128)).astype(np.float32)
    power = np.arange(rows)[:, None, None] * 3 % 7 - np.arange(2)[:, None]
    return (x * 2.0**power).astype(jnp.bfloat16).reshape(rows, 256)


@functools.cache
def stack(experts: int, rows: int, columns: int, seed: int) -> tuple[QuantArray, np.ndarray]:
    """`random_stack` and its numbers."""
    weight = random_stack(experts, rows, columns, seed)
    return weight, np.asarray(dequantize(weight))


@functools.cache
def quantised(rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`of_many_sizes` in `fp8_token128`: values in the order of the tiles, scales, and the numbers."""
    quant = quantize(jnp.asarray(of_many_sizes(rows)), "fp8_token128")
    scales = np.exp2(np.asarray(quant.scale).astype(np.float32) - 127)
    return np.asarray(tile_order(quant.values)), scales, np.asarray(dequantize(quant))


def in_places(rows: int, order: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of `quantised`: values and scales as `sorted_tile_quant` leaves them, and the numbers in order."""
    values, scales, numbers = (each[order] for each in quantised(rows))
    count = -(-int(place.max() + 257) // 4) * 4
    stored = np.full((count, values.shape[1]), 0xFF, np.uint8)
    stored[place] = values.view(np.uint8)
    stored_scales = np.full((count, scales.shape[1]), np.nan, np.float32)
    stored_scales[place] = scales
    blocks = stored.reshape(count, -1, 128).swapaxes(0, 1).view(jnp.float8_e4m3fn)
    return blocks, np.ascontiguousarray(stored_scales.T), numbers


# --- a whole tile of tokens on warpgroups


def total(*terms: Any) -> Any:
    return sum(term[0] * term[1] if isinstance(term, tuple) else term for term in terms)


def addresses(places: dict[str, Any], at: dict[str, int], kind: Any) -> dict[str, np.ndarray]:
    """Of operands, where `at` has the starts of their arrays."""
    return {name: kind(at[name] + place + 0 * THREADS) for name, place in places.items()}


def operand(number: Any) -> np.ndarray:
    return np.uint32(number + 0 * THREADS)


def run_tile(config, shape, weight: ExpertTiles, planned: Plan, tile: int, values, scales, places) -> Any:
    """What the consumers make of a tile of tokens, for all rows of its expert's weight. Places are rows.

    The result, as the kernel returns it; what nobody wrote is not a number.
    """
    expert, start = int(planned.expert[tile]), int(planned.start[tile])
    count = min(int(planned.end[tile]) - start, config.tokens)
    memory, gated = Space(), shape.gated
    inner = (np.zeros((shape.rows // 256, shape.tokens, 128), np.uint8), np.zeros(scales.shape, np.float32))
    out = np.zeros((planned.order.size, shape.rows), np.uint16)
    empty = {"out": 0xFF + inner[0], "scales": np.nan + inner[1]} if gated else {"out": 0xFFFF + out}
    at = {name: memory.place(array) for name, array in empty.items()}
    at |= {"exponents": memory.place(weight.row_exponent), "shares": memory.place(places)}
    at["order"] = at["shares"]
    tokens = np.asarray(values).view(np.uint8)[:, start : start + config.tokens]
    lane = kernel.Lane(THREADS, THREADS // 32, THREADS % 32 // 4, THREADS % 4)
    cut = config.cut(next(widths for widths in config.all_widths if count <= sum(widths)))
    turns = config.passes(gated)
    for row in range(0, shape.rows, config.rows * turns):
        item = kernel.Item(tile, expert, row, start, start, count)
        shared = Space()
        groups = [Warpgroup(shared.bytes, memory.bytes) for _ in range(config.consumers)]
        staged = shared.place(np.zeros(1 << 16, np.uint8))
        for turn in range(turns):
            first_row = (row + turn * config.rows) // 64
            for group, warpgroup in enumerate(groups):
                sums = [f"sum{n}" for n in range(cut.waves * cut.tokens // 2)]
                operands = {name: np.zeros(128, np.float32) for name in sums}
                for step in range(shape.columns // 128 // config.blocks):
                    blocks = slice(step * config.blocks, (step + 1) * config.blocks)
                    rows = slice(first_row, first_row + config.rows // 64)
                    stages = {  # the third stage; the others hold no numbers
                        "codes": np.asarray(weight.tiles[expert, rows, blocks]),
                        "x": np.stack([swizzled(block) for block in tokens[blocks]]),
                        "scales": np.asarray(scales[blocks, start : start + config.scales]),
                    }
                    shared.end = staged + (1 << 16)
                    first = {}
                    for name, data in stages.items():
                        data = np.ascontiguousarray(data).view(np.uint8).reshape(1, -1)
                        first[name] = shared.place(np.pad(data, ((2, 0), (0, 0)), constant_values=0xFF))
                    first["multipliers"] = first["codes"]
                    found = kernel.step_places(config, total, 2, group, lane)
                    text = kernel.ptx.step_ptx(cut, cut.widths)
                    warpgroup.run(text, operands | addresses(found, first, np.uint32))
                    operands = {name: warpgroup.registers[f"${name}"] for name in sums}
                found = kernel.stage_places(config, shape, total, item, turn, group, lane)
                more = {"thread": operand(THREADS), "first": operand(found.pop("first"))}
                more["stage"] = operand(staged + found.pop("stage"))
                more |= addresses(found, at, np.uint64)
                warpgroup.run(kernel.ptx.stage_ptx(cut, shape.limit), operands | more)
        for group, warpgroup in enumerate(groups):
            more = {"thread": operand(THREADS), "count": operand(count)}
            if gated:
                found = kernel.quant_places(shape, total, item, row // 256)
                more |= {"stage": operand(staged), "number": operand(group)}
                text = kernel.ptx.quant_ptx(config)
            else:
                found = kernel.write_places(config, total, item, group)
                more["stage"] = operand(staged + found.pop("stage"))
                text = kernel.ptx.write_ptx(config, shape.rows * 2)
            warpgroup.run(text, more | addresses(found, at, np.uint64))
    if gated:
        return memory.read(at["out"], inner[0]).view(jnp.float8_e4m3fn), memory.read(at["scales"], inner[1])
    return memory.read(at["out"], out).view(jnp.bfloat16).astype(np.float32)


CASES = [
    pytest.param(Config((32,), consumers=4), id="four warpgroups"),
    pytest.param(Config((64,), ((32,), (48,)), consumers=4, blocks=2), id="four, two blocks, narrower"),
    pytest.param(Config((64, 48, 16), ((32,), (64, 16))), id="two warpgroups, three products, narrower"),
    pytest.param(Config((32, 16), waves=2), id="two waves of two products"),
    pytest.param(Config((64, 64)), id="two warpgroups, 128 tokens"),
]


ROWS = 157  # of expert 1, which fill no last tile


def planned_request(config, choices: int) -> tuple[Plan, int]:
    """A plan, and a tile of it: the last of expert 1, which is not full. Tokens are `ROWS`."""
    experts = np.stack([np.ones(ROWS, int), np.arange(ROWS) % 2 * 2], 1)[:, :choices]
    if choices == 1:
        experts[: config.tokens // 2 + 3] = 0
    order = np.argsort(experts.reshape(-1), kind="stable")
    first, last = np.searchsorted(experts.reshape(-1)[order], [1, 2])
    start = first + (last - first) // config.tokens * config.tokens
    one = [np.asarray([number]) for number in (1, start, last)]
    row = np.argsort(order)
    return Plan(order, row, *one, np.asarray([1]), np.zeros(1, int)), 0


def rows_of(planned: Plan, tile: int, config) -> np.ndarray:
    rows = np.arange(planned.start[tile], planned.end[tile])
    assert 0 < len(rows) < config.tokens
    return rows


def in_checkpoint_order(values: np.ndarray) -> np.ndarray:
    """The inverse of `tile_order`, of [..., 128]."""
    return values.reshape(*values.shape[:-1], 8, 4, 4).swapaxes(-3, -2).reshape(values.shape)


@functools.cache
def gate_and_up() -> tuple[ExpertTiles, np.ndarray, np.ndarray]:
    (w1, gate), (w3, up) = (stack(3, 128, 256, seed) for seed in (1, 3))
    return to_tiles(interleave(w1, w3)), gate, up


@functools.cache
def down() -> tuple[ExpertTiles, np.ndarray]:
    w2, numbers = stack(3, 256, 256, 2)
    return to_tiles(w2), numbers


def gated(numbers: np.ndarray, gate: np.ndarray, up: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """The first product and what follows it, float32: gate and up round to bfloat16 on their way."""
    gates, ups = ((numbers @ each.T).astype(jnp.bfloat16).astype(np.float32) for each in (gate, up))
    gates, ups = np.minimum(gates, LIMIT), np.clip(ups, -LIMIT, LIMIT)
    return gates / (1 + np.exp(-gates)) * ups * shares[:, None]


@pytest.mark.parametrize(
    ("config", "choices"), [*((case.values[0], 1) for case in CASES), (CASES[0].values[0], 2)], ids=str
)
def test_gate_and_up_are_what_their_definition_says(config, choices):
    (weight, gate, up), (planned, tile) = gate_and_up(), planned_request(config, choices)
    shares = np.random.default_rng(2).uniform(size=planned.order.size + 256).astype(np.float32)
    values, scales, numbers = in_places(ROWS, planned.order // choices, np.arange(planned.order.size))
    shape = kernel.Shape(values.shape[1], 256, 256, LIMIT)

    found, found_scales = run_tile(config, shape, weight, planned, tile, values, scales, shares)

    rows = rows_of(planned, tile, config)
    exact = np.full((ROWS, 128), 1, np.float32)
    exact[: len(rows)] = gated(numbers[rows], gate[1], up[1], shares[rows])
    expected = quantize(jnp.asarray(exact.astype(jnp.bfloat16)), "fp8_token128")
    wanted_scale = np.exp2(np.asarray(expected.scale, np.float32)[: len(rows), 0] - 127)
    np.testing.assert_array_equal(found_scales[0, rows], wanted_scale)
    got = in_checkpoint_order(found[0, rows]).astype(np.float32)
    wanted = np.asarray(expected.values)[: len(rows)].astype(np.float32)
    # Another order of a sum may round gate and up to another bfloat16, which SiLU and the product make a few
    # steps of, and E4M3 at most one of its own, 2^-3.
    np.testing.assert_allclose(got, wanted, rtol=2**-3, atol=2**-9)
    assert (got != wanted).mean() < 0.02
    others = np.delete(np.arange(planned.order.size), rows)
    assert np.isnan(found[0, others].astype(np.float32)).all()  # nobody else's row is written
    assert np.isnan(found_scales[0, others]).all()


@pytest.mark.parametrize("config", CASES)
def test_down_is_what_its_definition_says(config):
    (weight, weights), (planned, tile) = down(), planned_request(config, 1)
    values, scales, numbers = in_places(ROWS, np.arange(ROWS), np.arange(ROWS))
    shape, order = kernel.Shape(values.shape[1], 256, 256, None), planned.order

    found = run_tile(config, shape, weight, planned, tile, values, scales, order.astype(np.int32))

    rows = rows_of(planned, tile, config)
    expected, got = numbers[rows] @ weights[1].T, found[order[rows]]
    assert np.linalg.norm(got - expected) <= 3e-3 * np.linalg.norm(expected)
    # One rounding to bfloat16, 2^-9; where terms cancel, float32 sums in another order.
    np.testing.assert_allclose(got, expected, rtol=2**-8, atol=1e-4 * np.abs(expected).max())
    others = np.delete(np.arange(len(found)), order[rows])
    assert np.isnan(found[others]).all()


def test_a_block_that_is_no_number_gets_a_scale_that_is_none():
    config = Config((16,), consumers=4)
    shared, memory = Space(), Space()
    numbers = of_many_sizes(16)[:, :128].copy()
    numbers[3, 5], numbers[4, 7] = np.nan, np.inf
    chunks = numbers.view(np.uint8).reshape(16, 16, 16)
    chunks = np.stack([row[np.arange(16) ^ n % 8] for n, row in enumerate(chunks)])
    stage, out = shared.place(chunks), memory.place(np.zeros((16, 128), np.uint8))
    scales = memory.place(np.zeros(16, np.float32))
    operands = {"thread": THREADS, "stage": stage, "number": 0, "count": 16}
    operands = {name: operand(value) for name, value in operands.items()}
    places = {"out": np.full(128, out, np.uint64), "scales": np.full(128, scales, np.uint64)}

    with np.errstate(invalid="ignore"):
        Warpgroup(shared.bytes, memory.bytes).run(kernel.ptx.quant_ptx(config), operands | places)

    found = memory.read(scales, np.zeros(16, np.float32))
    expected = np.asarray(quantize(jnp.asarray(numbers), "fp8_token128").scale)[:, 0]
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(found)), [3, 4])
    kept = np.delete(np.arange(16), [3, 4])
    np.testing.assert_array_equal(found[kept], np.exp2(expected[kept].astype(np.float32) - 127))


# --- what runs on the CPU: the copies, the barriers and the order of the tiles


def plain_weight(tiles: jax.Array) -> jax.Array:
    """[64, 128] numbers from a tile of bytes: any that depend on all of them will do."""
    numbers = tiles.reshape(64, 68).astype(jnp.float32)
    return jnp.concatenate([numbers[:, :64] + numbers[:, 64:65], numbers[:, :64] - numbers[:, 65:66]], axis=1)


def plain_multiply(config, cut, refs: Any, slot: jax.Array, group: jax.Array, sums: Any) -> Any:
    """In place of the PTX."""
    tiles, x, scales = (ref[slot] for ref in refs)
    for block in range(config.blocks):
        rows = [plain_weight(tiles[row, block]) for row in range(config.rows // 64)]
        factor = scales[block, : config.tokens][:, None]
        product = jnp.concatenate(rows) @ (x[block].astype(jnp.float32) * factor).T
        own = jax.lax.dynamic_slice_in_dim(
            product[:, : cut.tokens], group * config.waves * 64, config.waves * 64
        )
        sums = tuple(total + own[64 * wave :][:64] for wave, total in enumerate(sums))
    return sums


def plain_stage(config, cut, shape, refs: Any, item, turn, group: jax.Array, sums: Any) -> None:
    """The sums to shared memory, as they are: bytes of float32."""
    exponents, _, staged = refs
    first = item.row + group * config.waves * 64
    rows = exponents[pl.ds(item.expert * shape.rows + first, config.waves * 64)].astype(jnp.float32)
    numbers = (jnp.concatenate(sums) * rows[:, None]).T.astype(jnp.bfloat16)
    size = config.tokens * config.out_bytes(False)
    staged[pl.ds(group * size, cut.tokens * config.out_bytes(False))] = jax.lax.bitcast_convert_type(
        numbers, jnp.uint8
    ).reshape(-1)


def plain_write(config, shape, refs: Any, item, group: jax.Array) -> None:
    staged, order, out = refs
    size, columns = config.tokens * config.out_bytes(False), config.waves * 64
    numbers = staged[pl.ds(group * size, size)].reshape(config.tokens, columns, 2)
    numbers = jax.lax.bitcast_convert_type(numbers, jnp.bfloat16)
    for token in range(config.tokens):

        @pl.when(token < item.real)
        def _(token: int = token) -> None:
            out[order[item.start + token], pl.ds(item.row + group * columns, columns)] = numbers[token]


@pytest.mark.parametrize(
    "config",
    [Config((32,), ((16,),), stages=3, consumers=4), Config((32,), blocks=2, waves=2)],
    ids=["four warpgroups, narrower", "two waves, two blocks"],
)
def test_every_tile_is_computed_once_from_its_own_operands(config, monkeypatch):
    monkeypatch.setattr(kernel, "_multiply", plain_multiply)
    monkeypatch.setattr(kernel, "_stage", plain_stage)
    monkeypatch.setattr(kernel, "_write", plain_write)
    monkeypatch.setattr(
        kernel, "multiprocessors", lambda: 2
    )  # fewer than tiles: each program works on several
    w2 = down()[0]
    chosen = jnp.asarray([1] * 40 + [0] * 5 + [1] * 30, jnp.int32)[:, None]
    planned = plan(chosen, 3, config.tokens, implementation="reference")
    place, firsts = sorting.places_of(planned)
    place = np.asarray(place)[planned.order]
    values, scales, _ = (jnp.asarray(each) for each in in_places(ROWS, np.arange(75), place))
    arguments = (w2, values, scales, planned.order, planned, firsts)

    out = kernel.launch(*arguments, config=config, limit=None, interpret=plgpu.InterpretGPUParams())

    numbers = (values.astype(jnp.float32) * scales[..., None])[:, place]
    weights = jax.vmap(jax.vmap(jax.vmap(plain_weight)))(w2.tiles) * w2.row_exponent.reshape(3, 4, 1, 64, 1)
    of_row = weights[chosen[planned.order, 0]]  # [R, 4, 2, 64, 128]
    expected = jnp.einsum("krc,rnkmc->rnm", numbers, of_row, precision="highest").reshape(75, 256)
    found = np.asarray(out, np.float32)[planned.order]
    # As above.
    np.testing.assert_allclose(found, expected, rtol=2**-8, atol=1e-4 * float(jnp.abs(expected).max()))


# --- it lowers


def tiles_of(experts: int, rows: int, columns: int) -> ExpertTiles:
    shapes = ((experts, rows // 64, columns // 128, 4352), (experts, rows))
    return ExpertTiles(*(jax.ShapeDtypeStruct(shape, jnp.uint8) for shape in shapes))


def planned_shapes(rows: int, experts: int, tokens: int) -> Plan:
    tiles = tile_count(rows, experts, tokens)
    sizes = (rows, rows, tiles, tiles, tiles, 1, tiles)
    return Plan(*(jax.ShapeDtypeStruct((size,), jnp.int32) for size in sizes))


def lowered(function: Any, *arguments: Any) -> str:
    """For an H200, as text; nothing of it needs a GPU."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("unused",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("tokens", [512, 2048, 8192])
@pytest.mark.parametrize(("experts", "hidden", "inner"), [(256, 4096, 2048), (384, 7168, 3072)])
def test_the_kernels_lower_for_the_experts_of_flash_and_pro(experts, hidden, inner, tokens):
    rows, configs = tokens * 6, configs_for(tokens * 6, experts)
    planned = planned_shapes(rows, experts, configs.gate_up.tokens)
    places = sorting.place_count(planned, experts, configs.gate_up.tokens)

    def both(w13, w2, x, scales, shares, planned, firsts):
        first, second = configs
        inner = kernel.launch(w13, x, scales, shares, planned, firsts, config=first, limit=LIMIT)
        return kernel.launch(w2, *inner, planned.order, planned, firsts, config=second, limit=None)

    text = lowered(
        both,
        tiles_of(experts, 2 * inner, hidden),
        tiles_of(experts, hidden, inner),
        jax.ShapeDtypeStruct((hidden // 128, places, 128), jnp.float8_e4m3fn),
        jax.ShapeDtypeStruct((hidden // 128, places), jnp.float32),
        jax.ShapeDtypeStruct((places,), jnp.float32),
        planned,
        planned.start,
    )

    assert text.count("@mosaic_gpu_v2") == 2


@pytest.mark.parametrize("configs", [configs for _, configs in CONFIGS], ids=str)
def test_a_config_fits_the_chip(configs):
    assert configs.gate_up.tokens == configs.down.tokens <= 256
    for gated, config in zip((True, False), configs, strict=True):
        assert config.stages * config.blocks >= 3
        assert config.shared_bytes(gated) <= SHARED_BYTES
        assert config.passes(gated) * config.rows % 256 == 0 or not gated
        assert all(width % 16 == 0 for width in config.widths)


# --- what stands around it


@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "gfx950"])
@pytest.mark.parametrize("blocks", [2, 32, 56])
def test_the_kernel_that_sorts_compiles(blocks, arch):
    x = jax.ShapeDtypeStruct((300, 128 * blocks), jnp.bfloat16)
    weights = jax.ShapeDtypeStruct((300, 6), jnp.float32)

    run = functools.partial(sorting.sorted_tile_quant, places=2000)
    (launch,) = triton_call.launches(run, x, weights, jax.ShapeDtypeStruct((1800,), jnp.int32))

    assert triton_call.compile_offline(launch, arch).code[:4] == b"\x7fELF"


@pytest.mark.parametrize("tokens", [1, 3, 17, 129, 1000], ids="tokens={}".format)
def test_every_expert_begins_at_an_aligned_place_and_no_two_rows_share_one(tokens):
    chosen = jax.lax.top_k(jax.random.uniform(jax.random.key(tokens), (tokens, 32)), 6)[1]
    planned = plan(chosen, 32, 16, implementation="reference")

    place, firsts = (np.asarray(each) for each in sorting.places_of(planned))

    place = place[np.asarray(planned.order)]
    assert (np.diff(place) > 0).all()
    assert place.max() < sorting.place_count(planned, 32, 16) - 16
    for expert, start, end, first in zip(planned.expert, planned.start, planned.end, firsts, strict=True):
        if expert >= 0:
            rows = np.arange(start, min(start + 16, end))
            assert first % sorting.ALIGNED == 0
            np.testing.assert_array_equal(place[rows], first + np.arange(len(rows)))


# --- on a device


@pytest.mark.gpu
def test_sorting_quantises_as_the_definition_does_at_the_edges():
    x, weights = jnp.asarray(of_many_sizes(129)), jax.random.uniform(jax.random.key(0), (129, 3))
    chosen = jax.lax.top_k(jax.random.uniform(jax.random.key(1), (129, 8)), 3)[1]
    planned = plan(chosen, 8, 16, implementation="reference")

    place, _ = sorting.places_of(planned)
    places = sorting.place_count(planned, 8, 16)
    values, scales, shares = sorting.sorted_tile_quant(x, weights, place, places)

    order = np.asarray(planned.order)
    place = np.asarray(place)[order]
    expected_values, expected_scales, _ = in_places(129, order // 3, place)
    np.testing.assert_array_equal(np.float32(values[:, place]), np.float32(expected_values[:, place]))
    np.testing.assert_array_equal(scales[:, place], expected_scales[:, place])
    np.testing.assert_array_equal(shares[place], weights.reshape(-1)[order])


def assert_right(found: jax.Array, expected: jax.Array) -> None:
    """Sums in another order round to another bfloat16 now and then, and those to another E4M3, up to 2^-3
    away. In the worst row that one inner value is most of the sum. Over all rows such steps are few.
    """
    error = jnp.linalg.norm(found - expected, axis=-1) / jnp.linalg.norm(expected, axis=-1)
    assert float(error.max()) <= 2**-3
    assert float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)) <= 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("skewed", [False, True], ids=["even", "skewed"])
@pytest.mark.parametrize(
    ("tokens", "experts"),
    [(400, 128), (1000, 128), (1000, 64), (1000, 37), (1000, 32), (1000, 16), (2047, 8), (129, 4)],
    ids=["odd, 13 each", "31", "62", "108", "125", "250", "1023", "tokens=129, 65"],
)
def test_the_kernels_give_what_the_definition_gives(tokens, experts, skewed):
    """Of every configuration; skewed: half of the experts have no token."""
    stacks = [random_stack(experts, *shape, seed) for seed, shape in enumerate([(256, 512), (512, 256)] * 2)]
    w13, w2, _ = prepare_experts(*stacks[:3], H200)
    keys = jax.random.split(jax.random.key(tokens), 3)
    x = jax.random.normal(keys[0], (tokens, 512), jnp.bfloat16)
    likely = jax.random.uniform(keys[1], (tokens, experts)) - skewed * (jnp.arange(experts) % 2)
    chosen = jax.lax.top_k(likely, min(4, experts // 2))[1]
    weights = jax.random.uniform(keys[2], chosen.shape)
    configs = configs_for(chosen.size, experts)
    planned = plan(chosen, experts, configs.gate_up.tokens)

    found, again = (kernel.planned_mlp(x, planned, weights, w13, w2, LIMIT, configs) for _ in range(2))

    expected = expert_mlp(
        x, chosen, weights, w13, w2, None, limit=LIMIT, activation="fp8_token128", implementation="reference"
    )
    assert_right(found, expected)
    np.testing.assert_array_equal(found, again)  # the same bits in every run


# --- which experts it takes

X = jax.ShapeDtypeStruct((300, 512), jnp.bfloat16)
CHOSEN = jax.ShapeDtypeStruct((300, 6), jnp.int32)
FEW = jax.ShapeDtypeStruct((18, 6), jnp.int32)
FP4, DOWN = tiles_of(8, 1024, 512), tiles_of(8, 512, 512)


@pytest.mark.parametrize(
    ("target", "chosen", "w2", "activation", "few", "many"),
    [
        (H200, FEW, DOWN, "fp8_token128", True, False),
        (H200, FEW, DOWN, None, True, False),
        (H200, CHOSEN, DOWN, "fp8_token128", False, True),
        (H200, CHOSEN, DOWN, None, False, False),
        (Target("cuda", "sm_100"), FEW, DOWN, "fp8_token128", False, False),
        (Target("cpu", ""), FEW, DOWN, "fp8_token128", False, False),
        (H200, CHOSEN, tiles_of(8, 320, 512), "fp8_token128", False, False),
        (H200, FEW, random_stack(8, 512, 512, 1), "fp8_token128", False, False),
    ],
    ids=[
        "few rows",
        "few rows, bfloat16 activations",
        "many rows",
        "many rows, bfloat16 activations",
        "Blackwell",
        "CPU",
        "rows not by 256",
        "as stored",
    ],
)
def test_the_kernels_take(target, chosen, w2, activation, few, many):
    arguments = (target, X, chosen, None, FP4, w2, None, LIMIT, activation)

    assert mosaic.few_fits(*arguments) is few
    assert mosaic.many_fits(*arguments) is many
    fitting = [each for each in IMPLEMENTATIONS if each.name == "mosaic" and each.fits(*arguments)]
    assert len(fitting) == few + many
