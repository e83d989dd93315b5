"""What stands around attention: definitions in themselves, kernels compile and are right on a GPU."""

import functools
import itertools
import struct
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import COMPILED_ARCH

from dsv4_jax.config import FLASH, PRO
from dsv4_jax.nn.rope import Rotation, rope_frequencies
from dsv4_jax.nn.rope import rotation as rotation_of
from dsv4_jax.numerics import KVQUANT, OFFICIAL, PLAIN
from pallas_kernels import (
    QuantArray,
    QuantKV,
    Target,
    attention_latents,
    attention_query,
    attention_unrotate,
    compressed_entries,
    dequantize,
    fake_quantize,
    index_query,
    quantize,
)
from pallas_kernels.attention_inputs import ENTRIES, INDEX_QUERY, LATENTS, QUERY, UNROTATE
from pallas_kernels.cached_rows import decode_rows, encode_rows
from pallas_kernels.formats import E2M1_MAX, E4M3_MAX, e8m0_ceil
from pallas_kernels.indexer.queries import TiledQueries, untile_queries

kernels = pytest.importorskip("pallas_kernels.attention_inputs.triton")
of_entries = pytest.importorskip("pallas_kernels.attention_inputs.entries_triton")
parts = pytest.importorskip("pallas_kernels.attention_inputs.parts_triton")
triton_call = pytest.importorskip("pallas_kernels.triton_call")

F32, BF16, I32 = jnp.float32, jnp.bfloat16, jnp.int32
H200, MI300, CPU = Target("cuda", "sm_90"), Target("rocm", "gfx942"), Target("cpu", "")
EPS, PAIRS = FLASH.rms_norm_eps, FLASH.qk_rope_head_dim // 2
HEAD_DIM, INDEX_DIM, LATENT = FLASH.head_dim, FLASH.index_head_dim, FLASH.q_lora_rank
NUMERICS = pytest.mark.parametrize(
    "numerics", [OFFICIAL, KVQUANT, PLAIN], ids=["official", "kvquant", "plain"]
)
FAR = 2**20  # positions, the longest text there is

query = functools.partial(attention_query, eps=EPS)
latents: Any = functools.partial(attention_latents, eps=EPS, format="fp8_block64", activation="fp8_token128")
quantised_query: Any = functools.partial(index_query, format="fp4_group32")


def shape(*sizes: int, dtype=BF16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def normal(*sizes: int, dtype=BF16) -> jax.Array:
    """Rows of all sizes."""
    keys = jax.random.split(jax.random.key(sum(sizes)))
    size = jnp.exp2(jax.random.randint(keys[0], (*sizes[:-1], 1), -12, 12).astype(F32))
    return (size * jax.random.normal(keys[1], sizes)).astype(dtype)


def norm_weight(size: int) -> jax.Array:
    return (1 + jax.random.normal(jax.random.key(0), (size,)) / 8).astype(BF16)


def rotation(batch: int, tokens: int) -> Rotation:
    """Of sequences that stand at the start, in the middle, and before the end of the longest text."""
    start = jnp.array([0, FAR // 3, FAR - tokens], I32)[-batch:]
    return rotation_of(start[:, None] + jnp.arange(tokens), rope_frequencies(FLASH, 4))


def assert_same_bits(found: jax.Array, expected: jax.Array) -> None:
    assert found.dtype == expected.dtype
    bits = np.uint16 if found.dtype == BF16 else np.uint32
    np.testing.assert_array_equal(np.asarray(found).view(bits), np.asarray(expected).view(bits))


# --- the definitions, anywhere


@functools.partial(jax.jit, static_argnums=(0, 1, 2), static_argnames=("q_columns", "dtype"))
def latent_inputs(batch: int, tokens: int, q_columns: int = LATENT, dtype: Any = BF16) -> tuple[Any, ...]:
    """As `attention_latents` takes them; the window has written rows, and keeps codes of bfloat16 ones."""
    x = normal(batch, tokens, q_columns + HEAD_DIM, dtype=dtype)
    rows = normal(batch, SLOTS, HEAD_DIM, dtype=dtype)
    window = kept(rows) if dtype == BF16 else rows
    position, length = places(batch, tokens)
    return (
        x,
        norm_weight(q_columns),
        norm_weight(HEAD_DIM),
        window,
        position,
        length,
        *rotation(batch, tokens),
    )


SLOTS = 131  # of a window


def kept(rows: jax.Array, for_index: bool = False) -> QuantKV | QuantArray:
    """Rows as a cache keeps them."""
    if for_index:
        return quantize(rows, "fp4_group32")
    plain, scales = HEAD_DIM - 2 * PAIRS, 8
    nope = jnp.zeros((*rows.shape[:-1], plain), jnp.float8_e4m3fn)
    like = QuantKV(nope, jnp.zeros((*rows.shape[:-1], scales), jnp.uint8), rows[..., plain:])
    return encode_rows(rows, like)


def places(batch: int, tokens: int) -> tuple[jax.Array, jax.Array]:
    """Where `rotation` has each sequence's first token, and how many of its tokens are there."""
    position = jnp.array([0, FAR // 3, FAR - tokens], I32)[-batch:]
    return position, jnp.array([tokens, 0, max(1, tokens - 2)], I32)[-batch:]


@functools.partial(jax.jit, static_argnums=(0, 1, 2), static_argnames="dtype")
def index_inputs(batch: int, tokens: int, heads: int, dtype: Any = BF16) -> tuple[Any, ...]:
    """As `index_query` takes them, but for the column, which is 5."""
    projected = normal(batch, tokens, heads + 7, dtype=F32)
    return normal(batch, tokens, heads, INDEX_DIM, dtype=dtype), projected, *rotation(batch, tokens)


@NUMERICS
def test_latents_as_a_linear_takes_them_are_those_that_it_would_quantise(numerics):
    arguments = latent_inputs(2, 3, dtype=numerics.dtype)

    plain, kv, _ = latents(*arguments, format=numerics.kv, activation=None)
    quantised, same_kv, _ = latents(*arguments, format=numerics.kv)

    expected = quantize(plain, "fp8_token128")
    assert_same_bits(dequantize(quantised), dequantize(expected))
    assert_same_bits(quantised.scale, expected.scale)
    assert_same_bits(kv, same_kv)


def test_key_values_are_divided_by_their_root_mean_square_and_turned():
    x, q_weight, kv_weight, *ring, cos, sin = latent_inputs(2, 3, dtype=F32)

    _, kv, _ = latents(x, q_weight, kv_weight, *ring, cos, sin, format=None, activation=None)

    wide = np.float64(x[..., LATENT:])
    normed = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPS) * np.float64(kv_weight)
    plain, turned = np.split(normed, [HEAD_DIM - 2 * PAIRS], axis=-1)
    pairs = (turned[..., 0::2] + 1j * turned[..., 1::2]) * (np.float64(cos) + 1j * np.float64(sin))
    turned = np.stack([pairs.real, pairs.imag], -1).reshape(turned.shape)
    # The mean adds 512 numbers, in whatever order.
    np.testing.assert_allclose(kv, np.concatenate([plain, turned], -1), rtol=1e-5, atol=1e-5)


@NUMERICS
def test_the_weights_of_index_heads_are_rounded_then_scaled(numerics):
    q, projected, cos, sin = index_inputs(2, 3, 9, dtype=numerics.dtype)

    _, weights = index_query(q, projected, cos, sin, column=5, format=None)
    tiled, with_powers = quantised_query(q, projected, cos, sin, column=5, format=numerics.index)

    expected = projected[..., 5:14].astype(numerics.dtype) * (9 * INDEX_DIM) ** -0.5
    assert_same_bits(weights, expected.astype(F32))
    if numerics.index:
        assert isinstance(tiled, TiledQueries)
        mantissa, _ = np.frexp(np.abs(np.asarray(with_powers) / np.asarray(weights)))
        assert (mantissa == 0.5).all()


def test_the_window_keeps_the_key_values_of_the_last_tokens():
    for tokens in (3, SLOTS + 2):
        x, *weights, window, position, length, cos, sin = latent_inputs(3, tokens)

        _, kv, after = jax.jit(latents)(x, *weights, window, position, length, cos, sin)

        rows, before, new = (
            np.asarray(each, np.float32) for each in (decode_rows(after), decode_rows(window), kv)
        )
        for sequence in range(3):
            expected = before[sequence]
            for token in range(int(length[sequence])):
                expected[(int(position[sequence]) + token) % SLOTS] = new[sequence, token]
            np.testing.assert_array_equal(rows[sequence], expected)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), static_argnames="slots_more")
def compression(
    batch: int, tokens: int, ratio: int, head_dim: int, *, slots_more: int = 3
) -> tuple[Any, ...]:
    """Product, bias, rings, positions, lengths, weight, rotation, as `compressed_entries` takes them."""
    overlap = ratio == 4
    channels, slots = head_dim * (1 + overlap), ratio * (1 + overlap) + slots_more
    keys = jax.random.split(jax.random.key(tokens + ratio + head_dim), 4)
    kv, score = (jax.random.normal(key, (batch, tokens, channels)) for key in keys[:2])
    rings = [jax.random.normal(key, (batch, slots, channels)) for key in keys[2:]]
    # Of all scores some stand out. Other columns stand before and after.
    projected = jnp.concatenate([jnp.full((batch, tokens, COLUMN), jnp.nan), kv, 3 * score, kv[..., :5]], -1)
    ape = jax.random.normal(keys[0], (ratio, channels))
    position = jnp.array([0, 2 * ratio - 1, 5 * ratio + 2], I32)[-batch:]
    length = jnp.array([tokens, tokens, max(1, tokens - 2)], I32)[-batch:]
    turns = entries_rotation(position + FAR - 2**13, tokens, ratio)
    # A cache with rows in it, and too small for the last entry of the last sequence.
    rows = normal(batch, max(1, (5 * ratio + tokens - 1) // ratio - 1), head_dim)
    entries = kept(rows, head_dim == INDEX_DIM)
    return projected, ape, entries, rings[0], 3 * rings[1], position, length, norm_weight(head_dim), *turns


COLUMN = 3  # of the product, where the values begin


def entries_rotation(position: jax.Array, tokens: int, ratio: int) -> Rotation:
    """Of each entry that may be completed."""
    entry = (position // ratio)[:, None] + jnp.arange(-(-tokens // ratio))
    return rotation_of(entry * ratio, rope_frequencies(FLASH, ratio))


def entries_settings(for_index: bool) -> dict[str, Any]:
    format = "fp4_group32" if for_index else "fp8_block64"
    return {"column": COLUMN, "eps": EPS, "for_index": for_index, "format": format}


ENTRY_KINDS = pytest.mark.parametrize(
    ("ratio", "head_dim", "for_index"),
    [(4, HEAD_DIM, False), (4, INDEX_DIM, True), (128, HEAD_DIM, False)],
    ids=["CSA", "CSA index", "HCA"],
)


@ENTRY_KINDS
def test_entries_and_rings_do_not_depend_on_how_a_text_is_cut(ratio, head_dim, for_index):
    projected, ape, _, *rings, position, _, weight, _, _ = compression(3, 2 * ratio + 5, ratio, head_dim)
    # A format would turn a difference in the last bit into a step.
    settings, tokens = entries_settings(for_index) | {"dtype": F32, "format": None}, projected.shape[1]
    before = normal(3, 9, head_dim, dtype=F32)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def run(caches, begin: int, end: int):
        start, count = position + begin, jnp.full(3, end - begin)
        turns = entries_rotation(start, end - begin, ratio)
        arguments = (projected[:, begin:end], ape, *caches, start, count, weight, *turns)
        return compressed_entries(*arguments, **settings)

    whole, *whole_rings = run((before, *rings), 0, tokens)
    found, *rings = run((before, *rings), 0, 1)
    for begin, end in itertools.pairwise([1, ratio + 2, ratio + 3, tokens]):
        found, *rings = run((found, *rings), begin, end)

    for row in range(3):
        first, last = (int(end) // ratio for end in (position[row], position[row] + tokens))
        assert last > first
        written = (np.arange(9) >= first) & (np.arange(9) < last)
        assert_same_bits(whole[row][~written], before[row][~written])
        assert_same_bits(found[row][~written], before[row][~written])
        expected = np.asarray(whole[row][written])
        # Sums of at most 512 numbers of size 1, in an order that depends on the shape.
        most = 512 * 2.0**-24 * np.abs(expected).max()
        np.testing.assert_allclose(found[row][written], expected, rtol=0, atol=most)
        assert not np.array_equal(expected, before[row][written])
    jax.tree.map(assert_same_bits, rings, whole_rings)
    position_of_last = int(position[1]) + tokens - 1
    slot, last = position_of_last % rings[0].shape[1], projected[1, -1, COLUMN:-5]
    kv, score = jnp.split(last, 2)
    assert_same_bits(rings[0][1, slot], kv)
    assert_same_bits(rings[1][1, slot], score + ape[position_of_last % ratio])


def test_what_an_entry_cannot_be_made_of_is_refused():
    def refuses(says: str, op, *arguments, **settings) -> None:
        with pytest.raises(ValueError, match=says):
            jax.eval_shape(functools.partial(op, **settings), *arguments)

    projected, ape, *others = jax.eval_shape(lambda: compression(1, 3, 4, HEAD_DIM, slots_more=-2))
    narrow = shape(4, 700, dtype=F32)
    of_entries = functools.partial(compressed_entries, **entries_settings(False))
    x, q_weight, _, *more = jax.eval_shape(lambda: latent_inputs(1, 1))
    odd = (shape(1, 1, *rest, dtype=F32) for rest in ((1, 96), (1,), (PAIRS,), (PAIRS,)))

    refuses("6 slots do not hold the 7 tokens", of_entries, projected, ape, *others)
    refuses("neither head_dim 512 nor twice that", of_entries, projected, narrow, *others)
    refuses("of 2056 columns has no 2048 from 9 on", of_entries, projected, ape, *others, column=9)
    refuses("power of two", index_query, *odd, column=0, format=None)
    refuses("x has 1536 columns, the norms 1024 and 1024", latents, x, q_weight, q_weight, *more)


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
    q, small = (shape(2, tokens, *rest, dtype=dtype) for rest in ((5, 512), (5, 128)))
    latents_of = jax.eval_shape(lambda: latent_inputs(2, tokens, dtype=dtype))
    entries = jax.eval_shape(lambda: compression(2, tokens, 4, HEAD_DIM))
    entries = (entries[0], COLUMN, *entries[1:])

    assert LATENTS[0].fits(target, *latents_of, EPS, "fp8_block64", "fp8_token128") is fits
    assert QUERY[0].fits(target, q, cos, sin, EPS) is fits
    assert UNROTATE[0].fits(target, q, cos, sin) is fits
    assert (
        INDEX_QUERY[0].fits(target, small, shape(2, tokens, 9, dtype=F32), 4, cos, sin, "fp4_group32") is fits
    )
    assert ENTRIES[0].fits(target, *entries, EPS, False, "fp8_block64", dtype) is fits


def test_the_kernels_do_not_take_other_formats_and_widths():
    cos = sin = shape(2, 3, PAIRS, dtype=F32)
    entries = jax.eval_shape(lambda: compression(2, 4, 4, HEAD_DIM))
    entries, projected = (entries[0], COLUMN, *entries[1:]), shape(2, 3, 9, dtype=F32)
    latents_of, narrow = (jax.eval_shape(lambda n=n: latent_inputs(2, 3, n)) for n in (LATENT, 100))
    plain = (*latents_of[:3], shape(2, SLOTS, HEAD_DIM), *latents_of[4:])

    assert not QUERY[0].fits(H200, shape(2, 3, 5, 384), cos, sin, EPS)
    assert not LATENTS[0].fits(H200, *latents_of, EPS, None, None)
    assert not LATENTS[0].fits(H200, *narrow, EPS, "fp8_block64", None)
    assert not LATENTS[0].fits(H200, *plain, EPS, "fp8_block64", None)
    assert not INDEX_QUERY[0].fits(H200, shape(2, 3, 5, 128), projected, 0, cos, sin, "fp8_block64")
    assert not ENTRIES[0].fits(H200, *entries, EPS, True, "fp8_block64", BF16)


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


def launches_of(tokens: int) -> list[Any]:
    """One of every op, of latents for Pro too, whose width is no power of two."""
    cos = sin = shape(1, tokens, PAIRS, dtype=F32)
    q, projected = shape(1, tokens, 64, HEAD_DIM), shape(1, tokens, 2624, dtype=F32)
    runs = [
        (lambda *of: kernels.query(*of, EPS), (q, cos, sin)),
        (kernels.unrotate, (q, cos, sin)),
        (
            lambda q, projected, *of: kernels.index_query(q, projected, 2560, *of, "fp4_group32"),
            (shape(1, tokens, 64, INDEX_DIM), projected, cos, sin),
        ),
    ]
    for q_columns in (LATENT, PRO.q_lora_rank):
        arrays = jax.eval_shape(lambda n=q_columns: latent_inputs(1, tokens, n))
        runs.append((lambda *of: kernels.latents(*of, EPS, "fp8_block64", "fp8_token128"), arrays))
    for ratio, head_dim, for_index in ((4, HEAD_DIM, False), (4, INDEX_DIM, True), (128, HEAD_DIM, False)):
        arrays = jax.eval_shape(functools.partial(compression, 1, tokens, ratio, head_dim))
        settings = (*tuple(entries_settings(for_index).values())[1:], BF16)

        def run(projected, *others, settings=settings):
            return of_entries.compressed_entries(projected, COLUMN, *others, *settings)

        runs.append((run, arrays))
    return list(itertools.chain(*(triton_call.launches(run, *of) for run, of in runs)))


@pytest.fixture
def compiled_for(monkeypatch, arch) -> str:
    """The chip that kernels choose for, which is that they are compiled for."""
    vendor = "cuda" if arch.startswith("sm_") else "rocm"
    monkeypatch.setattr(kernels, "current_target", lambda: Target(vendor, arch))
    return arch


@COMPILED_ARCH
@pytest.mark.parametrize("tokens", [1, 4096], ids="tokens={}".format)
def test_the_kernels_compile_for(tokens, compiled_for):
    launches, arch = launches_of(tokens), compiled_for
    latent_outputs = [launch.dtypes[10] for launch in launches if launch.kernel is kernels._latents]
    fp8 = Target("cuda" if arch.startswith("sm_") else "rocm", arch).has_e4m3
    assert latent_outputs == ["float8_e4m3fn" if fp8 else "bfloat16"] * 2
    assert len([launch for launch in launches if launch.kernel is not kernels._latents]) == 6

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


def both_as_they_are(op, *arguments, **settings) -> tuple:
    """What the kernel gives and what the definition gives."""
    found = op(*arguments, **settings, implementation="triton")
    expected = _definition(op, tuple(settings.items()))(*arguments)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), found) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), expected
    )
    return found, expected


def both(op, *arguments, **settings) -> tuple:
    """The same in float32."""

    def numbers(tree):
        if isinstance(tree, tuple | list):
            return [numbers(each) for each in tree]
        if isinstance(tree, TiledQueries):
            return np.asarray(untile_queries(tree))
        return np.float32(decode_rows(tree, F32))

    found, expected = both_as_they_are(op, *arguments, **settings)
    return numbers(found), numbers(expected)


def assert_rounded_alike(found: np.ndarray, expected: np.ndarray) -> None:
    """Now and then, where sums run in another order, a number is the other neighbour in bfloat16.

    A pair of numbers that is turned then is off by as much of its length.
    """
    pairs = expected.reshape(*expected.shape[:-1], -1, 2)
    length = np.broadcast_to(np.hypot(*np.moveaxis(pairs, -1, 0))[..., None], pairs.shape)
    assert (np.abs(found - expected) <= 2**-7 * length.reshape(expected.shape)).all()
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
    plain = slice(HEAD_DIM - 2 * PAIRS)
    np.testing.assert_array_equal(found[..., plain], np.asarray(out, np.float32)[..., plain])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "q_columns"), [(1, LATENT), (17, LATENT), (129, PRO.q_lora_rank), (1000, LATENT)]
)
def test_latents_are_what_the_definition_gives(tokens, q_columns):
    found, expected = both(latents, *latent_inputs(3, tokens, q_columns))

    assert_quantised_alike(found[0], expected[0], 128)
    assert_key_values_alike(found[1], expected[1])
    assert_key_values_alike(found[2], expected[2])


@pytest.mark.gpu
@TOKENS
def test_index_query_gives_what_the_definition_gives(tokens):
    found, expected = both(quantised_query, *index_inputs(3, tokens, 9), column=5)

    # A number that is another code may give its head another power of two, and its weight too.
    assert_quantised_alike(found[0] * found[1][..., None], expected[0] * expected[1][..., None], 32)
    assert (found[1] == expected[1]).mean() >= 0.99


@pytest.mark.gpu
@ENTRY_KINDS
@pytest.mark.parametrize("tokens", [1, 3, 130, 1000], ids="tokens={}".format)
def test_entries_and_rings_are_what_the_definition_gives(tokens, ratio, head_dim, for_index):
    arguments = compression(3, tokens, ratio, head_dim)

    found, expected = both(compressed_entries, *arguments, **entries_settings(for_index))

    if for_index:
        assert_quantised_alike(found[0], expected[0], 32)
    else:
        assert_key_values_alike(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[2], expected[2])


def whole_numbers(*sizes: int, dtype=BF16) -> jax.Array:
    """Small ones, with which sums are exact in any order; some large, so that scales differ."""
    keys = jax.random.split(jax.random.key(sum(sizes)))
    size = jnp.where(jax.random.uniform(keys[0], (*sizes[:-1], 1)) < 0.5, 1, 8)
    return (size * jax.random.randint(keys[1], sizes, -16, 17)).astype(dtype)


@pytest.mark.gpu
def test_latents_of_exact_sums_are_exact():
    _, *others = latent_inputs(3, 99)

    found, expected = both_as_they_are(latents, whole_numbers(3, 99, LATENT + HEAD_DIM), *others)

    np.testing.assert_array_equal(dequantize(found[0]), dequantize(expected[0]))
    plain = slice(HEAD_DIM - 2 * PAIRS)
    np.testing.assert_array_equal(np.float32(found[1][..., plain]), np.float32(expected[1][..., plain]))
    for name in ("nope", "scale"):
        mine, theirs = (np.asarray(getattr(each[2], name)).view(np.uint8) for each in (found, expected))
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.gpu
def test_index_queries_of_exact_sums_are_exact():
    q, still, projected = whole_numbers(3, 99, 9, INDEX_DIM), jnp.ones((3, 99, PAIRS)), jnp.ones((3, 99, 9))

    found, expected = both_as_they_are(quantised_query, q, projected, still, 0 * still, column=0)

    mine, theirs = (np.asarray(each[0].values).view(np.uint8) for each in (found, expected))
    np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.gpu
@ENTRY_KINDS
def test_entries_of_one_row_are_exact(ratio, head_dim, for_index):
    tokens, channels = 300, head_dim * (2 if ratio == 4 else 1)
    projected, ape, entries, kv_ring, score_ring, *others, cos, _ = compression(3, tokens, ratio, head_dim)
    kv, kv_ring = (whole_numbers(3, size, channels, dtype=F32) for size in (tokens, kv_ring.shape[1]))
    # Of each window only the last token counts.
    positions = others[0][:, None] + jnp.arange(tokens)
    score = jnp.where(((positions + 1) % ratio == 0)[..., None], jnp.ones_like(kv), -jnp.inf)
    score_ring = jnp.full_like(score_ring, -jnp.inf)
    if ratio == 4:
        score = score.at[..., :head_dim].set(-jnp.inf)
    projected = jnp.concatenate([projected[..., :COLUMN], kv, score], -1)
    rows = (projected, 0 * ape, entries, kv_ring, score_ring)
    still, settings = (jnp.ones_like(cos), jnp.zeros_like(cos)), entries_settings(for_index)

    found, expected = both_as_they_are(compressed_entries, *rows, *others, *still, **settings)

    if for_index:  # the sums of the transform are not exact
        mine, theirs = (np.asarray(dequantize(each[0])) for each in (found, expected))
        assert_quantised_alike(mine, theirs, 32)
    else:
        for mine, theirs in zip(*(jax.tree.leaves(each[0]) for each in (found, expected)), strict=True):
            bytes = np.uint16 if mine.dtype == BF16 else np.uint8
            np.testing.assert_array_equal(np.asarray(mine).view(bytes), np.asarray(theirs).view(bytes))
    assert np.isfinite(np.float32(decode_rows(found[0], F32))).all()


@pytest.mark.gpu
@pytest.mark.parametrize(("format", "width"), [("fp8_block64", 64), ("fp4_group32", 32)], ids=["fp8", "fp4"])
def test_what_went_through_a_format_stays_as_it_is(format, width):
    cos, sin = jnp.ones((1, 9, PAIRS)), jnp.zeros((1, 9, PAIRS))
    if format == "fp8_block64":
        *arguments, _, _ = latent_inputs(1, 9)
        _, once, _ = latents(*arguments, cos, sin, implementation="triton")
        once = once[..., : HEAD_DIM - 2 * PAIRS]
    else:
        arguments = normal(1, 9, 5, 128), jnp.zeros((1, 9, 5)), cos, sin
        once = untile_queries(quantised_query(*arguments, column=0, implementation="triton")[0])

    assert width == parts.constants(format)["GROUP"]
    np.testing.assert_array_equal(np.float32(fake_quantize(once, format)), np.float32(once))


@pytest.mark.gpu
def test_no_tokens_give_nothing():
    cos, sin = jnp.zeros((2, 0, PAIRS)), jnp.zeros((2, 0, PAIRS))
    *arguments, _, _ = latent_inputs(2, 0)

    q_latent, kv, window = latents(*arguments, cos, sin)
    q, head_weights = quantised_query(
        jnp.zeros((2, 0, 7, 128), BF16), jnp.zeros((2, 0, 9)), cos, sin, column=0
    )

    assert query(jnp.zeros((2, 0, 7, 512), BF16), cos, sin).shape == (2, 0, 7, 512)
    assert q_latent.shape == (2, 0, LATENT)
    assert kv.shape == (2, 0, 512)
    assert window.shape == (2, SLOTS, 512)
    assert (q.shape, head_weights.shape) == ((2, 0, 7, 128), (2, 0, 7))
