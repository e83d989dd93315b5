"""Routed experts: the tile layout, the definition on it, and the kernels that read it."""

import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import QuantArray, Target, dequantize, expert_mlp, prepare_experts, quantize
from pallas_kernels.expert_mlp.tiles import ExpertTiles, from_tiles, tileable, to_tiles
from pallas_kernels.formats import unpack_nibbles

H200 = Target("cuda", "sm_90")


def random_stack(experts: int, rows: int, columns: int, *, seed: int = 0, octaves: int = 12) -> QuantArray:
    """FP4 weights of every code, with group scales over so many powers of two."""
    random = np.random.default_rng(seed)
    values = random.integers(0, 256, (experts, rows, columns // 2), dtype=np.uint8)
    scale = random.integers(118 - octaves, 118, (experts, rows, columns // 32), dtype=np.uint8)
    return QuantArray(jnp.asarray(values), jnp.asarray(scale), "fp4_group32")


def test_tiles_hold_every_code_and_scale_exactly():
    weight = random_stack(3, 256, 384)

    back = from_tiles(to_tiles(weight))

    np.testing.assert_array_equal(back.values, weight.values)
    np.testing.assert_array_equal(back.scale, weight.scale)


def test_a_word_of_a_tile_holds_what_the_layout_says():
    weight = random_stack(2, 256, 256, seed=1)
    codes = np.asarray(unpack_nibbles(weight.values))

    tiles = to_tiles(weight)

    words = np.asarray(tiles.codes).reshape(2, 2, 2, -1).view("<u4").reshape(2, 2, 2, 8, 2, 8, 4, 2, 2)
    shares = np.asarray(tiles.multipliers).reshape(2, 2, 2, 8, 2, 8, 2, 2)
    for expert, row, column in np.random.default_rng(2).integers(0, (2, 256, 256), (500, 3)):
        (n, r), (k, c) = divmod(row, 128), divmod(column, 128)
        n16, h, t = r // 16, r % 16 // 8, r % 8
        k64, g, j, q, b = c // 64, c % 64 // 32, c % 32 // 16, c % 16 // 4, c % 4
        word = int(words[expert, n, k, n16, k64, t, q, g, h])
        magnitude = word >> 4 * (4 * j + b) & 7
        sign = word >> (8 * b + (7 if j == 0 else 3)) & 1
        assert magnitude | sign << 3 == codes[expert, row, column]
        exponent = int(shares[expert, n, k, n16, k64, t, g, h]) + int(tiles.row_exponent[expert, row]) - 11
        assert exponent == weight.scale[expert, row, column // 32]


def test_a_row_whose_scales_spread_too_far_keeps_the_checkpoints_layout():
    near, far = random_stack(2, 128, 256), random_stack(2, 128, 256)
    far = QuantArray(far.values, far.scale.at[1, 5, 0].set(90).at[1, 5, 1].set(117), "fp4_group32")

    assert bool(tileable(near))
    assert not bool(tileable(far))
    assert prepare_experts(far, H200) is far
    assert isinstance(prepare_experts(near, H200), ExpertTiles)


def test_a_group_of_zeros_does_not_count_for_the_spread():
    weight = random_stack(1, 128, 256)
    values = weight.values.at[0, 7, :16].set(0x80)  # zeros of either sign
    weight = QuantArray(values, weight.scale.at[0, 7, 0].set(1), "fp4_group32")

    assert bool(tileable(weight))
    np.testing.assert_array_equal(dequantize(from_tiles(to_tiles(weight))), dequantize(weight))


@pytest.mark.parametrize(
    "weight",
    [
        pytest.param(random_stack(1, 64, 256), id="rows that are no multiple of 128"),
        pytest.param(random_stack(1, 128, 192), id="columns that are no multiple of 128"),
        pytest.param(quantize(jnp.ones((1, 128, 128)), "fp8_block128"), id="FP8"),
    ],
)
def test_what_does_not_fit_tiles_is_refused_or_left_alone(weight):
    with pytest.raises(NotImplementedError, match=r"multiples of 128|fp4_group32"):
        to_tiles(weight)

    assert prepare_experts(weight, H200) is weight


def test_a_cpu_keeps_the_checkpoints_layout():
    weight = random_stack(1, 128, 128)

    assert prepare_experts(weight, Target("cpu", "")) is weight


def requests(tokens: int, experts: int, choices: int, hidden: int, seed: int = 0):
    """Activations, distinct experts for each token, and routing weights."""
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (tokens, hidden), jnp.bfloat16)
    chosen = jax.lax.top_k(jax.random.uniform(keys[1], (tokens, experts)), choices)[1]
    return x, chosen, jax.random.uniform(keys[2], chosen.shape)


@pytest.mark.parametrize("activation", [None, "fp8_token128"], ids=["W4A16", "W4A8"])
def test_the_definition_gives_the_same_on_tiles_as_on_the_checkpoints_layout(activation):
    w1, w3 = random_stack(4, 128, 256, seed=3), random_stack(4, 128, 256, seed=4)
    w2 = random_stack(4, 256, 128, seed=5)
    request = requests(5, 4, 2, 256)

    rows = expert_mlp(*request, w1, w2, w3, limit=10.0, activation=activation)
    tiles = expert_mlp(*request, *map(to_tiles, (w1, w2, w3)), limit=10.0, activation=activation)

    np.testing.assert_array_equal(rows, tiles)


def test_weights_that_do_not_belong_together_are_refused():
    w = random_stack(2, 128, 256)

    with pytest.raises(ValueError, match="do not match"):
        expert_mlp(*requests(2, 2, 1, 256), w, w, w, limit=10.0)


# --- the kernels

triton_kernels = pytest.importorskip("pallas_kernels.expert_mlp.triton")
triton_call = pytest.importorskip("pallas_kernels.triton_call")

INSTRUCTIONS = {
    "sm_80": ("mma.sync", None),
    "sm_90": ("wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3", "fp8_token128"),
    "sm_100": ("tcgen05.mma", "fp8_token128"),
    "gfx942": ("v_mfma_f32", None),  # its FP8 is another one, so it multiplies bfloat16
    "gfx950": ("f8f6f4", "fp8_token128"),
}


def shapes_of(stack: tuple[int, int, int]) -> ExpertTiles:
    experts, rows, columns = stack
    outer = (experts, rows // 128, columns // 128)
    return ExpertTiles(
        jax.ShapeDtypeStruct((*outer, 8192), jnp.uint8),
        jax.ShapeDtypeStruct((*outer, 512), jnp.uint8),
        jax.ShapeDtypeStruct((experts, rows), jnp.uint8),
    )


@pytest.mark.parametrize("arch", list(INSTRUCTIONS))
def test_the_kernels_compile_for(arch):
    instruction, activation = INSTRUCTIONS[arch]
    x = jax.ShapeDtypeStruct((8, 4096), jnp.bfloat16)
    chosen = jax.ShapeDtypeStruct((8, 6), jnp.int32)
    weights = jax.ShapeDtypeStruct((8, 6), jnp.float32)
    w1, w2 = shapes_of((256, 2048, 4096)), shapes_of((256, 4096, 2048))

    found = triton_call.launches(
        lambda *arrays: triton_kernels.expert_mlp(*arrays, 10.0, activation), x, chosen, weights, w1, w2, w1
    )
    binaries = [triton_call.compile_offline(launch, arch) for launch in found]

    assert [launch.kernel.fn.__name__ for launch in found] == ["_gate_up", "_down"]
    for binary in binaries:
        (machine,) = struct.unpack_from("<H", binary.code, 18)
        assert binary.code[:4] == b"\x7fELF"
        assert machine == (190 if arch.startswith("sm_") else 224)
        assert instruction in binary.assembly


@pytest.mark.parametrize("tokens", [1, 3, 17, 129, 1000], ids="tokens={}".format)
@pytest.mark.parametrize("tile_rows", [16, 64], ids="tile_rows={}".format)
def test_a_plan_gives_every_row_to_its_expert_once(tokens, tile_rows):
    _, chosen, _ = requests(tokens, 32, 6, 8, seed=tokens)

    plan = triton_kernels.plan(chosen, 32, tile_rows)

    order, pairs = np.asarray(plan.order), np.asarray(chosen).reshape(-1)
    np.testing.assert_array_equal(order, np.argsort(pairs, kind="stable"))
    seen = np.zeros(pairs.size, int)
    for expert, start, end in zip(plan.expert, plan.start, plan.end, strict=True):
        if expert >= 0:
            rows = np.arange(start, min(start + tile_rows, end))
            assert len(rows) > 0
            assert (pairs[order[rows]] == expert).all()
            seen[rows] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("chosen", [0, 5], ids=["the first expert", "the last expert"])
def test_a_plan_holds_when_all_tokens_choose_one_expert(chosen):
    plan = triton_kernels.plan(jnp.full((40, 1), chosen), 6, 16)

    real = np.asarray(plan.expert) >= 0
    np.testing.assert_array_equal(np.asarray(plan.expert)[real], [chosen] * 3)
    np.testing.assert_array_equal(np.asarray(plan.start)[real], [0, 16, 32])
    np.testing.assert_array_equal(np.asarray(plan.end)[real], [40] * 3)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3, 17, 127, 129, 1000], ids="tokens={}".format)
def test_the_kernels_give_what_the_definition_gives(tokens):
    w1, w3 = (to_tiles(random_stack(16, 256, 512, seed=seed, octaves=4)) for seed in (6, 7))
    w2 = to_tiles(random_stack(16, 512, 256, seed=8, octaves=4))
    request = requests(tokens, 16, 6, 512, seed=tokens)

    found = expert_mlp(*request, w1, w2, w3, limit=10.0, implementation="triton")

    # Without quantised activations all that differs is where bfloat16 rounds: once per product.
    expected = expert_mlp(*request, w1, w2, w3, limit=10.0, implementation="reference")
    error = jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)
    assert error <= 3e-3
