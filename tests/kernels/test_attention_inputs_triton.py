"""What stands around attention: definitions are the model's, kernels compile and are right on a GPU."""

import functools
import itertools
import struct
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.cache import CompressedCache, RecentRows
from dsv4_jax.config import FLASH
from dsv4_jax.nn.attention import Attention
from dsv4_jax.nn.compressor import Compressor
from dsv4_jax.nn.indexer import Indexer
from dsv4_jax.nn.norm import RMSNorm
from dsv4_jax.nn.rope import rope_angles, rope_frequencies, rotate
from dsv4_jax.numerics import KVQUANT, OFFICIAL, PLAIN
from pallas_kernels import (
    Target,
    attention_key_value,
    attention_query,
    attention_unrotate,
    compressed_entries,
    fake_quantize,
    index_query,
)
from pallas_kernels.attention_inputs import ENTRIES, INDEX_QUERY, KEY_VALUE, QUERY, UNROTATE
from pallas_kernels.formats import E2M1_MAX, E4M3_MAX, e8m0_ceil

kernels = pytest.importorskip("pallas_kernels.attention_inputs.triton")
of_entries = pytest.importorskip("pallas_kernels.attention_inputs.entries_triton")
parts = pytest.importorskip("pallas_kernels.attention_inputs.parts_triton")
triton_call = pytest.importorskip("pallas_kernels.triton_call")

F32, BF16, I32 = jnp.float32, jnp.bfloat16, jnp.int32
H200, MI300, CPU = Target("cuda", "sm_90"), Target("rocm", "gfx942"), Target("cpu", "")
EVERY_ARCH = ["sm_80", "sm_90", "sm_100", "gfx942", "gfx950"]
EPS, PAIRS = FLASH.rms_norm_eps, FLASH.qk_rope_head_dim // 2
HEAD_DIM, INDEX_DIM = FLASH.head_dim, FLASH.index_head_dim
NUMERICS = pytest.mark.parametrize(
    "numerics", [OFFICIAL, KVQUANT, PLAIN], ids=["official", "kvquant", "plain"]
)
FAR = 2**20  # positions, the longest text there is

query = functools.partial(attention_query, eps=EPS)
key_value = functools.partial(attention_key_value, eps=EPS, format="fp8_block64")
quantised_query = functools.partial(index_query, format="fp4_group32")


def shape(*sizes: int, dtype=BF16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def normal(*sizes: int, dtype=BF16) -> jax.Array:
    """Rows of all sizes."""
    keys = jax.random.split(jax.random.key(sum(sizes)))
    size = jnp.exp2(jax.random.randint(keys[0], (*sizes[:-1], 1), -12, 12).astype(F32))
    return (size * jax.random.normal(keys[1], sizes)).astype(dtype)


def norm_weight(size: int) -> jax.Array:
    return (1 + jax.random.normal(jax.random.key(0), (size,)) / 8).astype(BF16)


def angles_of(batch: int, tokens: int, ratio: int = 4, every: int = 1) -> jax.Array:
    """Of sequences that stand at the start, in the middle, and before the end of the longest text."""
    start = jnp.array([0, FAR // 3, FAR - tokens * every], I32)[-batch:]
    positions = start[:, None] + every * jnp.arange(tokens)
    return rope_angles(positions, rope_frequencies(FLASH, ratio))


def rotation(batch: int, tokens: int, every: int = 1) -> tuple[jax.Array, jax.Array]:
    angles = angles_of(batch, tokens, every=every)
    return jnp.cos(angles), jnp.sin(angles)


def assert_same_bits(found: jax.Array, expected: jax.Array) -> None:
    assert found.dtype == expected.dtype
    bits = np.uint16 if found.dtype == BF16 else np.uint32
    np.testing.assert_array_equal(np.asarray(found).view(bits), np.asarray(expected).view(bits))


# --- the definitions, anywhere


def kv_norm(size: int) -> RMSNorm:
    norm = RMSNorm(size, None, EPS)
    norm.weight.set_value(norm_weight(size))
    return norm


@NUMERICS
def test_queries_are_those_of_the_model(numerics):
    q, angles = normal(2, 3, 5, HEAD_DIM, dtype=numerics.dtype), angles_of(2, 3)
    config = SimpleNamespace(num_attention_heads=5, head_dim=HEAD_DIM, rms_norm_eps=EPS)
    attention = SimpleNamespace(config=config, wq_b=lambda _: q)

    found = query(q, jnp.cos(angles), jnp.sin(angles))

    assert_same_bits(found, Attention.queries(attention, q, angles))


@NUMERICS
def test_the_output_is_turned_back_as_by_the_model(numerics):
    out, angles = normal(2, 3, 5, HEAD_DIM, dtype=numerics.dtype), angles_of(2, 3)

    found = attention_unrotate(out, jnp.cos(angles), jnp.sin(angles))

    assert_same_bits(found, rotate(out, angles[:, :, None], inverse=True))


@NUMERICS
def test_key_values_are_those_of_the_model(numerics):
    kv, angles = normal(2, 3, HEAD_DIM, dtype=numerics.dtype), angles_of(2, 3)
    attention = SimpleNamespace(config=FLASH, kv_norm=kv_norm(HEAD_DIM), numerics=numerics)

    found = key_value(kv, norm_weight(HEAD_DIM), jnp.cos(angles), jnp.sin(angles), format=numerics.kv)

    assert_same_bits(found, Attention.key_values(attention, kv, angles))


@NUMERICS
def test_index_queries_are_those_of_the_model(numerics):
    heads = FLASH.index_n_heads
    q, angles = normal(2, 3, heads, INDEX_DIM, dtype=numerics.dtype), angles_of(2, 3)
    indexer = SimpleNamespace(
        config=FLASH, wq_b=lambda _: q, weights_proj=lambda _: jnp.zeros((2, 3, heads)), numerics=numerics
    )

    found = index_query(q, jnp.cos(angles), jnp.sin(angles), format=numerics.index)

    assert_same_bits(found, Indexer.queries(indexer, q, q, angles[:, :, None])[0])


def compression(batch: int, tokens: int, ratio: int, head_dim: int, *, slots_more: int = 3):
    """Raw rows, rings, positions, lengths and weight, as `compressed_entries` takes them."""
    overlap = ratio == 4
    channels, slots = head_dim * (1 + overlap), ratio * (1 + overlap) + slots_more
    keys = jax.random.split(jax.random.key(tokens + ratio + head_dim), 4)
    sizes = [(batch, tokens, channels)] * 2 + [(batch, slots, channels)] * 2
    rows = [jax.random.normal(key, size) for key, size in zip(keys, sizes, strict=True)]
    rows[1], rows[3] = 3 * rows[1], 3 * rows[3]  # of all scores some stand out
    position = jnp.array([0, 2 * ratio - 1, FAR - tokens], I32)[-batch:]
    length = jnp.array([tokens, tokens, max(1, tokens - 2)], I32)[-batch:]
    return *rows, position, length, norm_weight(head_dim)


def entries_rotation(position: jax.Array, tokens: int, ratio: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which entries may be completed, and the rotation of each."""
    entry = (position // ratio)[:, None] + jnp.arange(-(-tokens // ratio))
    angles = rope_angles(entry * ratio, rope_frequencies(FLASH, ratio))
    return entry, jnp.cos(angles), jnp.sin(angles)


def entries_settings(ratio: int, for_index: bool) -> dict:
    format = "fp4_group32" if for_index else "fp8_block64"
    return {"ratio": ratio, "eps": EPS, "for_index": for_index, "format": format}


ENTRY_KINDS = pytest.mark.parametrize(
    ("ratio", "head_dim", "for_index"),
    [(4, HEAD_DIM, False), (4, INDEX_DIM, True), (128, HEAD_DIM, False)],
    ids=["CSA", "CSA index", "HCA"],
)


@NUMERICS
@ENTRY_KINDS
@pytest.mark.parametrize("tokens", [1, 6, 130], ids="tokens={}".format)
def test_the_entries_in_the_cache_are_those_of_the_model(tokens, ratio, head_dim, for_index, numerics):
    kv, score, kv_ring, score_ring, position, length, weight = compression(3, tokens, ratio, head_dim)
    position = position.at[2].set(5 * ratio + 1)  # whose entries a small cache holds
    cache = CompressedCache(
        jnp.zeros((3, 200, head_dim), numerics.dtype), RecentRows(kv_ring), RecentRows(score_ring)
    )
    compressor = SimpleNamespace(
        wkv=lambda _: kv,
        wgate=lambda _: score,
        ape=SimpleNamespace(get_value=lambda: jnp.zeros((ratio, kv.shape[-1]))),
        norm=kv_norm(head_dim),
        config=FLASH,
        numerics=numerics,
        ratio=ratio,
        head_dim=head_dim,
        for_index=for_index,
    )
    compressor._finish = functools.partial(Compressor._finish, compressor)
    entry, cos, sin = entries_rotation(position, tokens, ratio)
    settings = entries_settings(ratio, for_index) | {"dtype": jnp.dtype(numerics.dtype)}
    settings["format"] = numerics.index if for_index else numerics.kv

    entries = compressed_entries(
        kv, score, kv_ring, score_ring, position, length, weight, cos, sin, **settings
    )

    complete = (entry + 1) * ratio <= (position + length)[:, None]
    expected = Compressor.__call__(compressor, kv, position, length, cache).entries
    assert_same_bits(cache.write(entries, entry, complete).entries, expected)
    assert not np.float32(entries)[~np.asarray(complete)].any()
    assert complete.any() or tokens == 1


def test_what_an_entry_cannot_be_made_of_is_refused():
    kv, score, kv_ring, score_ring, *others = compression(1, 3, 4, HEAD_DIM, slots_more=-2)
    _, cos, sin = entries_rotation(others[0], 3, 4)
    settings = entries_settings(4, False)

    with pytest.raises(ValueError, match="6 slots do not hold the 7 tokens"):
        compressed_entries(kv, score, kv_ring, score_ring, *others, cos, sin, **settings)
    rows = (kv[..., :700], score[..., :700], kv_ring, score_ring)
    with pytest.raises(ValueError, match="neither head_dim 512 nor twice that"):
        compressed_entries(*rows, *others, cos, sin, **settings)
    with pytest.raises(ValueError, match="power of two"):
        index_query(normal(1, 1, 1, 96), *rotation(1, 1), format=None)


# --- the kernels, anywhere


@pytest.mark.parametrize(
    ("target", "tokens", "dtype", "fits"),
    [
        (H200, 3, BF16, True),
        (MI300, 3, BF16, True),
        (CPU, 3, BF16, False),
        (H200, 0, BF16, False),
        (H200, 3, F32, False),
    ],
    ids=["H200", "CDNA3", "a CPU", "no tokens", "float32"],
)
def test_the_kernels_take(target, tokens, dtype, fits):
    cos = sin = shape(2, tokens, PAIRS, dtype=F32)
    q, kv, small = (shape(2, tokens, *rest, dtype=dtype) for rest in ((5, 512), (512,), (5, 128)))
    entries = jax.eval_shape(lambda: compression(2, 4, 4, HEAD_DIM))
    settings = (4, EPS, False, "fp8_block64", dtype)

    assert QUERY[0].fits(target, q, cos, sin, EPS) is fits
    assert UNROTATE[0].fits(target, q, cos, sin) is fits
    assert KEY_VALUE[0].fits(target, kv, shape(512), cos, sin, EPS, "fp8_block64") is fits
    assert INDEX_QUERY[0].fits(target, small, cos, sin, "fp4_group32") is fits
    assert ENTRIES[0].fits(target, *entries, cos, sin, *settings) is fits


def test_the_kernels_do_not_take_other_formats_and_widths():
    cos = sin = shape(2, 3, PAIRS, dtype=F32)
    entries = jax.eval_shape(lambda: compression(2, 4, 4, HEAD_DIM))

    assert not QUERY[0].fits(H200, shape(2, 3, 5, 384), cos, sin, EPS)
    assert not KEY_VALUE[0].fits(H200, shape(2, 3, 512), shape(512), cos, sin, EPS, None)
    assert not KEY_VALUE[0].fits(H200, shape(2, 3, 96), shape(96), cos, sin, EPS, "fp8_block64")
    assert not INDEX_QUERY[0].fits(H200, shape(2, 3, 5, 128), cos, sin, "fp8_block64")
    for settings in ((4, EPS, True, "fp8_block64", BF16), (3, EPS, False, "fp8_block64", BF16)):
        assert not ENTRIES[0].fits(H200, *entries, cos, sin, *settings)


@pytest.mark.parametrize(
    ("format", "most"), [("fp8_block64", E4M3_MAX), ("fp4_group32", E2M1_MAX)], ids=["fp8", "fp4"]
)
def test_the_scale_follows_from_exponent_and_mantissa(format, most):
    bits = np.arange(0x0100, 0x7F80, dtype=np.uint32) << 16  # every normal bfloat16 from 2^-125 up
    largest = np.maximum(bits.view(np.float32), np.float32(parts.constants(format)["FLOOR"]))
    most_bits = parts.constants(format)["MOST_BITS"]

    carry, shift = 0x7FFFFF - (most_bits & 0x7FFFFF), (most_bits >> 23) - 127
    found = ((largest.view(np.uint32) + carry) >> 23) - shift

    np.testing.assert_array_equal(found, e8m0_ceil(jnp.asarray(largest) / most))


def launches_of(tokens: int) -> list[triton_call.Launch]:
    """One of every op."""
    cos = sin = shape(1, tokens, PAIRS, dtype=F32)
    q, kv = shape(1, tokens, 64, HEAD_DIM), shape(1, tokens, HEAD_DIM)
    runs = [
        (lambda *of: kernels.query(*of, EPS), (q, cos, sin)),
        (kernels.unrotate, (q, cos, sin)),
        (lambda *of: kernels.key_value(*of, EPS, "fp8_block64"), (kv, shape(HEAD_DIM), cos, sin)),
        (lambda *of: kernels.index_query(*of, "fp4_group32"), (shape(1, tokens, 64, INDEX_DIM), cos, sin)),
    ]
    for ratio, head_dim, for_index in ((4, HEAD_DIM, False), (4, INDEX_DIM, True), (128, HEAD_DIM, False)):
        arrays = jax.eval_shape(functools.partial(compression, 1, tokens, ratio, head_dim))
        turns = [shape(1, -(-tokens // ratio), PAIRS, dtype=F32)] * 2
        settings = (*entries_settings(ratio, for_index).values(), BF16)
        run = functools.partial(lambda settings, *of: of_entries.compressed_entries(*of, *settings), settings)
        runs.append((run, (*arrays, *turns)))
    return list(itertools.chain(*(triton_call.launches(run, *of) for run, of in runs)))


@pytest.mark.parametrize("arch", EVERY_ARCH)
@pytest.mark.parametrize("tokens", [1, 4096], ids="tokens={}".format)
def test_the_kernels_compile_for(tokens, arch):
    launches = launches_of(tokens)
    assert len(launches) == 7

    for launch in launches:
        binary = triton_call.compile_offline(launch, arch)

        (machine,) = struct.unpack_from("<H", binary.code, 18)
        assert binary.code[:4] == b"\x7fELF"
        assert machine == (190 if arch.startswith("sm_") else 224)
        assert binary.shared_bytes <= 32 * 1024


# --- on a GPU


@functools.cache
def _definition(op, settings: tuple):
    # Left alone, XLA leaves out roundings to bfloat16 between two operations.
    run = functools.partial(op, implementation="reference", **dict(settings))
    return jax.jit(run, compiler_options={"xla_allow_excess_precision": False})


def both(op, *arguments, **settings) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel gives and what the definition gives, in float32."""
    found = op(*arguments, **settings, implementation="triton")
    expected = _definition(op, tuple(settings.items()))(*arguments)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype == BF16
    return np.float32(found), np.float32(expected)


def assert_rounded_alike(found: np.ndarray, expected: np.ndarray) -> None:
    """Now and then, where sums run in another order, a number is the other neighbour in bfloat16."""
    largest = np.abs(expected).max(-1, keepdims=True)
    assert (np.abs(found - expected) <= 2**-7 * np.abs(expected) + 2**-21 * largest).all()
    assert (found != expected).mean() <= max(1e-3, 2 / found.size)


def assert_quantised_alike(found: np.ndarray, expected: np.ndarray, group: int) -> None:
    """One number that was the other neighbour may be another code now, or give its group another scale."""
    off = (found != expected).reshape(-1, group)
    assert off.any(-1).mean() <= max(0.01, 2 / len(off))
    largest = np.abs(expected).reshape(-1, group).max(-1, keepdims=True)
    assert (np.abs(found - expected).reshape(-1, group) <= largest / 3).all()


def assert_key_values_alike(found: np.ndarray, expected: np.ndarray) -> None:
    plain = found.shape[-1] - 2 * PAIRS
    assert_quantised_alike(found[..., :plain], expected[..., :plain], 64)
    assert_rounded_alike(found[..., plain:], expected[..., plain:])


TOKENS = pytest.mark.parametrize("tokens", [1, 17, 129, 1000], ids="tokens={}".format)


@pytest.mark.gpu
@TOKENS
def test_query_gives_what_the_definition_gives(tokens):
    assert_rounded_alike(*both(query, normal(3, tokens, 7, HEAD_DIM), *rotation(3, tokens)))


@pytest.mark.gpu
@TOKENS
def test_unrotate_gives_what_the_definition_gives(tokens):
    out = normal(3, tokens, 7, HEAD_DIM)

    found, expected = both(attention_unrotate, out, *rotation(3, tokens))

    assert_rounded_alike(found, expected)
    np.testing.assert_array_equal(found[..., : -2 * PAIRS], np.float32(out)[..., : -2 * PAIRS])


@pytest.mark.gpu
@TOKENS
def test_key_value_gives_what_the_definition_gives(tokens):
    kv = normal(3, tokens, HEAD_DIM)

    assert_key_values_alike(*both(key_value, kv, norm_weight(HEAD_DIM), *rotation(3, tokens)))


@pytest.mark.gpu
@TOKENS
def test_index_query_gives_what_the_definition_gives(tokens):
    q = normal(3, tokens, 9, INDEX_DIM)

    assert_quantised_alike(*both(quantised_query, q, *rotation(3, tokens)), 32)


@pytest.mark.gpu
@ENTRY_KINDS
@pytest.mark.parametrize("tokens", [1, 3, 130, 1000], ids="tokens={}".format)
def test_entries_are_what_the_definition_gives(tokens, ratio, head_dim, for_index):
    arrays = compression(3, tokens, ratio, head_dim)
    _, *turns = entries_rotation(arrays[4], tokens, ratio)

    found, expected = both(compressed_entries, *arrays, *turns, **entries_settings(ratio, for_index))

    if for_index:
        assert_quantised_alike(found, expected, 32)
    else:
        assert_key_values_alike(found, expected)


def whole_numbers(*sizes: int, dtype=BF16) -> jax.Array:
    """Small ones, with which sums are exact in any order; some large, so that scales differ."""
    keys = jax.random.split(jax.random.key(sum(sizes)))
    size = jnp.where(jax.random.uniform(keys[0], (*sizes[:-1], 1)) < 0.5, 1, 8)
    return (size * jax.random.randint(keys[1], sizes, -16, 17)).astype(dtype)


@pytest.mark.gpu
def test_key_values_of_exact_sums_are_exact():
    found, expected = both(key_value, whole_numbers(3, 99, HEAD_DIM), norm_weight(HEAD_DIM), *rotation(3, 99))

    np.testing.assert_array_equal(found[..., : -2 * PAIRS], expected[..., : -2 * PAIRS])


@pytest.mark.gpu
def test_index_queries_of_exact_sums_are_exact():
    q, still = whole_numbers(3, 99, 9, INDEX_DIM), jnp.ones((3, 99, PAIRS))

    np.testing.assert_array_equal(*both(quantised_query, q, still, 0 * still))


@pytest.mark.gpu
@ENTRY_KINDS
def test_entries_of_one_row_are_exact(ratio, head_dim, for_index):
    kv, score, kv_ring, score_ring, *others = compression(3, 300, ratio, head_dim)
    kv, kv_ring = (whole_numbers(*each.shape, dtype=F32) for each in (kv, kv_ring))
    # Of each window only the last token counts.
    positions = others[0][:, None] + jnp.arange(300)
    score = jnp.where(((positions + 1) % ratio == 0)[..., None], score, -jnp.inf)
    score_ring = jnp.full_like(score_ring, -jnp.inf)
    if ratio == 4:
        score = score.at[..., :head_dim].set(-jnp.inf)
    _, cos, _ = entries_rotation(others[0], 300, ratio)
    settings = entries_settings(ratio, for_index)

    found, expected = both(
        compressed_entries,
        *(kv, score, kv_ring, score_ring),
        *others,
        jnp.ones_like(cos),
        jnp.zeros_like(cos),
        **settings,
    )

    if not for_index:  # the sums of the transform are not exact
        np.testing.assert_array_equal(found, expected)
    else:
        assert_quantised_alike(found, expected, 32)
    assert np.isfinite(found).all()


@pytest.mark.gpu
@pytest.mark.parametrize(("format", "width"), [("fp8_block64", 64), ("fp4_group32", 32)], ids=["fp8", "fp4"])
def test_what_went_through_a_format_stays_as_it_is(format, width):
    cos, sin = jnp.ones((1, 9, PAIRS)), jnp.zeros((1, 9, PAIRS))
    if format == "fp8_block64":
        once = key_value(normal(1, 9, 512), norm_weight(512), cos, sin, implementation="triton")
        once = once[..., : 512 - 2 * PAIRS]
    else:
        once = quantised_query(normal(1, 9, 5, 128), cos, sin, implementation="triton")

    assert width == parts.constants(format)["GROUP"]
    np.testing.assert_array_equal(np.float32(fake_quantize(once, format)), np.float32(once))


@pytest.mark.gpu
def test_no_tokens_give_nothing():
    cos, sin = jnp.zeros((2, 0, PAIRS)), jnp.zeros((2, 0, PAIRS))

    assert query(jnp.zeros((2, 0, 7, 512), BF16), cos, sin).shape == (2, 0, 7, 512)
    assert key_value(jnp.zeros((2, 0, 512), BF16), norm_weight(512), cos, sin).shape == (2, 0, 512)
    assert quantised_query(jnp.zeros((2, 0, 7, 128), BF16), cos, sin).shape == (2, 0, 7, 128)
