"""`sparse_attention`: what its arguments mean, and on a GPU each kernel against the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import BF16, CHANNELS, F32, I32, SCALE, SINKS, assert_right, expected_of, made_up

from pallas_kernels import QuantKV, attention_unrotate, current_target, decode_rows, sparse_attention
from pallas_kernels.debug import checks
from pallas_kernels.sparse_attention.mosaic_config import Config
from pallas_kernels.sparse_attention.tilings import Tiling

SMALL = {"channels": 128, "dtype": F32}
TILINGS = (
    Tiling(16, 32, 1, 4, 1),
    Tiling(16, 32, 3, 4, 2),
    Tiling(16, 16, 20, 4, 1),
    Tiling(32, 32, 2, 4, 3),
    Tiling(64, 32, 7, 8, 3),
    Tiling(64, 64, 1, 8, 3),
    Tiling(64, 64, 2, 8, 2),
)
CONFIGS = (
    Config(),
    Config(look=False, slack=0.0),
    Config(3),
    Config(5, look=False),
    Config(8, slack=0.0),
)
FORMS = {"numbers": {}, "codes": {"codes": True, "turned": True}}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


# --- anywhere


def test_turns_turn_the_result_back():
    *arguments, turns = made_up(2, 3, 4, 20, 8, 9, 5, turned=True, **SMALL)

    out = sparse_attention(*arguments, softmax_scale=SCALE, turns=turns)

    plain = sparse_attention(*arguments, softmax_scale=SCALE)
    np.testing.assert_allclose(out, attention_unrotate(plain, *turns), rtol=0, atol=2e-6)


def test_codes_are_the_numbers_they_stand_for():
    *arguments, _ = made_up(2, 3, 4, 20, 8, 9, 5, codes=True, **SMALL)
    q, window_kv, window_index, compressed_kv, *others = arguments

    out = sparse_attention(*arguments, softmax_scale=SCALE)

    for window, compressed in (
        (decode_rows(window_kv), decode_rows(compressed_kv)),
        (decode_rows(window_kv), compressed_kv),
    ):
        plain = sparse_attention(q, window, window_index, compressed, *others, softmax_scale=SCALE)
        np.testing.assert_array_equal(out, plain)


@pytest.mark.parametrize(("place", "name"), [(2, "window_index"), (4, "compressed_index")])
@pytest.mark.parametrize("index", [-2, 7])
def test_debug_checks_name_the_op_and_the_index_that_is_out_of_bounds(place, name, index):
    arguments = list(made_up(1, 2, 4, 7, 3, 7, 3, absent="none", **SMALL)[:-1])
    arguments[place] = arguments[place].at[0, 1, 2].set(index)
    run = jax.jit(functools.partial(sparse_attention, softmax_scale=SCALE))

    assert jnp.isfinite(run(*arguments)).all()
    with checks(), pytest.raises(Exception, match=rf"sparse_attention: {name} .* {index} at \[0, 1, 2\]"):  # noqa: PT012
        jax.block_until_ready(run(*arguments))
        jax.effects_barrier()


def test_debug_checks_find_nothing_where_nothing_is_wrong():
    *arguments, _ = made_up(1, 2, 4, 7, 3, 7, 3, **SMALL)

    with checks():
        out = jax.jit(functools.partial(sparse_attention, softmax_scale=SCALE))(*arguments)
        jax.effects_barrier()

    np.testing.assert_allclose(out, sparse_attention(*arguments, softmax_scale=SCALE), rtol=1e-5)


# --- on a GPU


def variants(heads: int, channels: int = CHANNELS) -> list[Tiling | Config]:
    """All ways to go about it that take so many heads."""
    mosaic = current_target().arch == "sm_90" and heads % 64 == 0 and channels == CHANNELS
    return [*TILINGS, *(CONFIGS if mosaic else ())]


def attend(variant: Tiling | Config | None, arguments, scale=SCALE):
    from pallas_kernels.sparse_attention import mosaic, triton

    kernel = triton if isinstance(variant, Tiling) else mosaic
    return kernel.sparse_attention(*arguments, scale, variant)


@pytest.mark.gpu
@forms
@pytest.mark.parametrize("absent", ["none", "model", "some", "most", "but one", "all"])
@pytest.mark.parametrize(
    "sizes",
    [(2, 5, 64, 150, 130, 700, 513), (1, 3, 128, 9, 5, 6000, 5001), (1, 140, 64, 267, 128)],
    ids=["many places", "long lists", "a window"],
)
def test_every_way_gives_what_the_definition_gives(sizes, absent, form):
    arguments = made_up(*sizes, absent=absent, **form)
    expected = expected_of(arguments)

    for variant in variants(sizes[2]):
        assert_right(attend(variant, arguments), expected, variant.splits)


@pytest.mark.gpu
@forms
@pytest.mark.parametrize("heads", [8, 16, 32, 64, 128], ids="heads={}".format)
@pytest.mark.parametrize("queries", [(1, 1), (8, 1), (3, 17), (33, 1), (128, 1), (1, 1001)], ids=str)
def test_the_op_is_right_for_any_number_of_queries_and_heads(queries, heads, form):
    for entries, chosen in ((300, 512), (0, 0)):
        *arguments, turns = made_up(*queries, heads, queries[1] + 127, 128, entries, chosen, **form)

        out = sparse_attention(*arguments, softmax_scale=SCALE, turns=turns)

        assert out.dtype == BF16
        assert_right(out, expected_of((*arguments, turns)), splits=2)


@pytest.mark.gpu
@pytest.mark.parametrize("codes", [False, True], ids=["numbers", "codes"])
def test_float32_is_exact(codes):
    for channels in (128, 64):
        form = {"channels": channels, "dtype": F32, "codes": codes, "turned": True, "pairs": 16}
        *arguments, turns = made_up(2, 7, 4, 50, 20, 30, 10, **form)

        out = sparse_attention(*arguments, softmax_scale=channels**-0.5, turns=turns, implementation="triton")

        expected = expected_of((*arguments, turns), channels**-0.5)
        assert_right(out, expected, most_error=2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [16, 64, 256], ids="channels={}".format)
def test_narrow_heads_are_attended_to(channels):
    *arguments, _ = made_up(2, 7, 4, 50, 20, 30, 10, channels=channels)

    out = sparse_attention(*arguments, softmax_scale=channels**-0.5, implementation="triton")

    assert_right(out, expected_of((*arguments, None), channels**-0.5))


def every_code() -> tuple[QuantKV, jax.Array]:
    """Rows with every code that is a number, under every scale that makes it a normal one of bfloat16."""
    code = np.delete(np.arange(256, dtype=np.uint8), (0x7F, 0xFF))
    scale = np.arange(16, 247, dtype=np.uint8)
    scales = np.resize(scale, (len(scale), 8))
    for block in range(7):
        scales[:, block] = np.roll(scale, 37 * block)
    scales[:, 7] = 0
    codes = np.resize(code, (2 * len(scale), 448))  # 254 numbers: each stands in every place of a block
    rope = jax.random.normal(jax.random.key(0), (1, 2 * len(scale), 64), BF16)
    nope = jax.lax.bitcast_convert_type(jnp.asarray(codes)[None], jnp.float8_e4m3fn)
    rows = QuantKV(nope, jnp.asarray(np.repeat(scales, 2, axis=0))[None], rope)
    return rows, jnp.arange(2 * len(scale), dtype=I32)


@pytest.mark.gpu
def test_every_code_becomes_its_number_to_the_bit():
    # Queries of zeros, each with one row and no sink: the result is that row.
    rows, index = every_code()
    q = jnp.zeros((1, len(index), 64, CHANNELS), BF16)
    nothing = jnp.full((1, len(index), 3), -1, I32)
    sink = jnp.full(64, -jnp.inf)

    for variant in (Tiling(16, 32, 1, 4, 1), Tiling(64, 64, 1, 8, 2), Config(), Config(2)):
        for arguments in (
            (q, rows, index[None, :, None], None, None, sink, None),
            (q, rows, nothing, rows, index[None, :, None], sink, None),
        ):
            found = attend(variant, arguments)

            expected = jnp.broadcast_to(decode_rows(rows)[:, :, None], found.shape)
            assert (found == expected).all(), variant


@pytest.mark.gpu
@forms
def test_a_sink_of_any_size(form):
    for sink in (-jnp.inf, 0.0, 30.0, 1e30):
        for absent in ("model", "but one", "all"):
            arguments = made_up(1, 5, 64, 300, 128, 300, 100, absent=absent, sink=(sink,), **form)
            expected = expected_of(arguments)

            for variant in (TILINGS[0], TILINGS[1], CONFIGS[0], CONFIGS[2], CONFIGS[3]):
                assert_right(attend(variant, arguments), expected, variant.splits)


def at_positions(positions: list[int], window=128, top_k=512) -> tuple[jax.Array, ...]:
    """Arguments of a decode step at these positions of sequences, with indices as the model makes them."""
    batch, position = len(positions), jnp.array(positions)[:, None, None]
    q, window_kv, _, compressed_kv, _, sink, turns = made_up(
        batch, 1, 64, window, window, 4096, top_k, codes=True, turned=True, sink=SINKS[:4]
    )
    seen = position + jnp.arange(1 - window, 1)
    window_index = jnp.where(seen >= 0, seen % window, -1)
    visible, place = (position + 1) // 4, jnp.arange(top_k)
    spread = jnp.maximum(jnp.minimum(visible, 4096) // top_k, 1)
    compressed_index = jnp.where(place < visible, place * spread, -1)
    return q, window_kv, window_index, compressed_kv, compressed_index, sink, turns


@pytest.mark.gpu
def test_every_length_is_right():
    near = [0, 1, 2, 3, 4, 5, 6, 7, 8, 126, 127, 128, 129, 130, 510, 511, 512, 2046, 2047, 2048, 2049]
    arguments = at_positions([*near, 8190, 16383, 2**20 - 2, 2**20 - 1])
    expected = expected_of(arguments)

    for variant in (TILINGS[0], TILINGS[2], *CONFIGS):
        assert_right(attend(variant, arguments), expected, variant.splits)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1e3, 1e18], ids=["large logits", "huge logits"])
def test_large_logits_do_not_overflow(size):
    q = jnp.full((1, 3, 64, CHANNELS), size, BF16)
    kv = jnp.concatenate([jnp.ones((1, 100, CHANNELS), BF16), -jnp.ones((1, 100, CHANNELS), BF16)], 1)
    index = jnp.broadcast_to(jnp.arange(0, 200, 2, dtype=I32), (1, 3, 100))

    for variant in variants(64):
        out = attend(variant, (q, kv, index, None, None, jnp.zeros(64), None), 0.3)

        assert (out == 1).all(), variant


@pytest.mark.gpu
def test_rows_that_nobody_names_are_not_read():
    arguments = list(made_up(2, 9, 64, 150, 128, 300, 77, absent="some"))
    for place in (2, 4):
        arguments[place] = jnp.where(arguments[place] == 0, -1, arguments[place])
    poisoned = list(arguments)
    poisoned[1] = arguments[1].at[:, 0].set(jnp.nan)
    poisoned[3] = arguments[3].at[:, 0].set(jnp.inf)

    for variant in variants(64):
        assert (attend(variant, poisoned) == attend(variant, arguments)).all(), variant


@pytest.mark.gpu
@forms
def test_indices_beyond_the_end_name_the_last_row(form):
    arguments = list(made_up(2, 9, 64, 150, 128, 300, 77, absent="some", **form))
    arguments[2] = arguments[2].at[:, :, ::3].set(2**31 - 1)
    arguments[4] = arguments[4].at[:, :, ::3].set(300)
    expected = expected_of(tuple(arguments))

    for variant in (TILINGS[0], TILINGS[1], *CONFIGS):
        assert_right(attend(variant, arguments), expected, variant.splits)


@pytest.mark.gpu
@forms
def test_not_a_number_is_not_lost(form):
    arguments = list(made_up(1, 5, 64, 150, 128, 300, 77, absent="some", **form))
    arguments[0] = arguments[0].at[0, 1, 3, 7].set(jnp.nan)

    for variant in variants(64):
        out = attend(variant, arguments)

        assert jnp.isnan(out[0, 1, 3]).all(), variant
        assert jnp.isfinite(out[0, 0]).all(), variant


@pytest.mark.gpu
@forms
def test_a_long_prompt_gives_the_same_bits_again(form):
    arguments = made_up(1, 4096, 64, 4223, 128, 4096, 512, absent="some", **form)

    first, *others = [attend(Config(), arguments) for _ in range(5)]

    assert_right(first, expected_of(arguments))
    assert all((other == first).all() for other in others)


@pytest.mark.gpu
@forms
def test_a_step_gives_the_same_bits_again(form):
    arguments = made_up(32, 1, 64, 128, 128, 2000, 512, absent="some", **form)

    for variant in (Config(4, look=False), TILINGS[1]):
        first, *others = [attend(variant, arguments) for _ in range(20)]

        assert_right(first, expected_of(arguments), variant.splits)
        assert all((other == first).all() for other in others)
