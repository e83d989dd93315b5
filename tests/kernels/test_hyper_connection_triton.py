"""The Triton kernels of hyper-connections: they compile for every chip, and are right on one."""

import functools
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import COMPILED_ARCH

from pallas_kernels import Target, hc_head, hc_post, hc_pre
from pallas_kernels.hyper_connection import HEAD, POST, POST_PRE, PRE, hc_post_pre, reference

kernels = pytest.importorskip("pallas_kernels.hyper_connection.triton")
triton_call = pytest.importorskip("pallas_kernels.triton_call")

F32, BF16 = jnp.float32, jnp.bfloat16
FLASH, PRO = 4096, 7168  # channels
ITERATIONS, EPS = 20, 1e-6
SETTINGS = {"eps": EPS, "norm_eps": EPS}
H200, CPU = Target("cuda", "sm_90"), Target("cpu", "")
TOKENS = [1, 3, 17, 127, 129, 1000]

pre = functools.partial(hc_pre, sinkhorn_iters=ITERATIONS, **SETTINGS)
post_pre = functools.partial(hc_post_pre, sinkhorn_iters=ITERATIONS, **SETTINGS)
head = functools.partial(hc_head, **SETTINGS)


def shape(*sizes: int, dtype=F32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def arguments(tokens: int, channels: int):
    """Shapes of what `hc_post` takes and of what `hc_pre` takes besides the streams."""
    before = (
        shape(tokens, channels, dtype=BF16),
        shape(tokens, 4, channels, dtype=BF16),
        shape(tokens, 4),
        shape(tokens, 4, 4),
    )
    return before, (shape(24, 4 * channels), shape(3), shape(24))


def made_up(tokens: int, channels: int):
    """Like `arguments`, numbers: streams of all sizes, mixes of some units."""
    keys = iter(jax.random.split(jax.random.key(tokens + channels), 8))

    def normal(*sizes: int) -> jax.Array:
        return jax.random.normal(next(keys), sizes)

    size = jnp.exp2(jnp.arange(tokens) % 9 - 4)[:, None, None]
    before = (
        normal(tokens, channels).astype(BF16),
        (size * normal(tokens, 4, channels)).astype(BF16),
        2 * jax.nn.sigmoid(normal(tokens, 4)),
        reference.sinkhorn(normal(tokens, 4, 4), ITERATIONS, EPS),
    )
    fn = normal(24, 4 * channels) / channels**0.5
    return before, (fn, jnp.array([0.7, 1.2, 0.9]), normal(24))


def norm_weight(channels: int) -> jax.Array:
    return (1 + jax.random.normal(jax.random.key(0), (channels,)) / 8).astype(BF16)


def launches_of(tokens: int, channels: int):
    """Those of hc_post_pre, hc_pre, hc_post and hc_head."""
    before, after = arguments(tokens, channels)
    streams, weight = before[1], shape(channels, dtype=BF16)
    of_head = (shape(4, 4 * channels), shape(1), shape(4))
    settings = (ITERATIONS, EPS, EPS)
    return (
        triton_call.launches(
            lambda *of: kernels.hc_post_pre(*of[:-1], *settings, of[-1]), *before, *after, weight
        ),
        triton_call.launches(lambda *of: kernels.hc_pre(*of, *settings, None), streams, *after),
        triton_call.launches(kernels.hc_post, *before),
        triton_call.launches(lambda *of: kernels.hc_head(*of, EPS, EPS, None), streams, *of_head),
    )


# --- anywhere


def test_post_pre_is_post_and_then_pre():
    before, after = made_up(5, 128)

    streams, *found = post_pre(*before, *after)

    np.testing.assert_array_equal(np.float32(streams), np.float32(hc_post(*before)))
    jax.tree.map(np.testing.assert_array_equal, tuple(found), pre(streams, *after))


def test_a_norm_weight_normalises_the_rounded_input_and_nothing_else():
    (_, streams, _, _), after = made_up(5, 128)
    weight = norm_weight(128)

    x, *others = pre(streams, *after)
    normalised, *same = pre(streams, *after, norm_weight=weight)

    wide = np.float64(x)
    expected = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + EPS) * np.float64(weight)
    np.testing.assert_allclose(np.float64(normalised), expected, rtol=2**-8)
    jax.tree.map(np.testing.assert_array_equal, same, others)


def test_the_three_parts_of_a_number_are_that_number():
    fn = jax.random.normal(jax.random.key(0), (24, 64)) * jnp.exp2(jnp.arange(64) % 33 - 16)

    parts = jax.jit(kernels._cut)(fn)

    assert parts.dtype == BF16
    np.testing.assert_array_equal(np.float64(parts).sum(0), np.float64(fn))


@pytest.mark.parametrize(
    ("target", "tokens", "channels", "fits"),
    [
        (H200, 3, FLASH, True),
        (Target("rocm", "gfx942"), 3, PRO, True),
        (CPU, 3, FLASH, False),
        (H200, 0, FLASH, False),
        (H200, 3, 192, False),
        (H200, 3, 32768, False),
    ],
    ids=["Flash", "Pro on CDNA3", "a CPU", "no tokens", "channels that no tile divides", "too many channels"],
)
def test_the_kernels_take(target, tokens, channels, fits):
    before, after = arguments(tokens, channels)

    assert PRE[0].fits(target, before[1], *after, ITERATIONS, EPS, EPS, None) is fits
    assert POST[0].fits(target, *before) is fits
    assert POST_PRE[0].fits(target, *before, *after, ITERATIONS, EPS, EPS, None) is fits
    assert HEAD[0].fits(target, before[1], *after, EPS, EPS, shape(channels, dtype=BF16)) is fits


def test_the_kernels_do_not_take_other_streams():
    (y, streams, post, comb), after = arguments(3, FLASH)
    wide, two = shape(3, 4, FLASH), shape(3, 2, FLASH, dtype=BF16)

    for each in (wide, two):
        assert not PRE[0].fits(H200, each, *after, ITERATIONS, EPS, EPS, None)
        assert not POST[0].fits(H200, y, each, post, comb)
    assert not POST[0].fits(H200, shape(3, FLASH), streams, post, comb)


@pytest.mark.parametrize("tokens", [1, 64, 512, 8192], ids="tokens={}".format)
def test_launches_are_few(tokens):
    post_pre, pre, post, head = launches_of(tokens, FLASH)

    assert [len(each) for each in (post_pre, pre, post, head)] == [2, 2, 1, 2]


@COMPILED_ARCH
@pytest.mark.parametrize(
    ("tokens", "channels"),
    [
        pytest.param(1, FLASH, id="one token"),
        pytest.param(64, PRO, id="Pro, 64 tokens", marks=pytest.mark.slow),
        pytest.param(512, FLASH, id="512 tokens", marks=pytest.mark.slow),
        pytest.param(8192, PRO, id="Pro, 8192 tokens"),
    ],
)
def test_the_kernels_compile_for(tokens, channels, arch):
    for launch in {launch for each in launches_of(tokens, channels) for launch in each}:
        binary = triton_call.compile_offline(launch, arch)

        (machine,) = struct.unpack_from("<H", binary.code, 18)
        assert binary.code[:4] == b"\x7fELF"
        assert machine == (190 if arch.startswith("sm_") else 224)
        assert binary.shared_bytes <= (64 if arch.startswith("gfx") else 160) * 1024


# --- on a GPU


def assert_close(found: jax.Array, expected: jax.Array) -> None:
    """Numbers made of mixes, each a sum of 512 products or more.

    Summed up in float32 in another order, a mix differs by up to 512 roundings of 2^-24, 3e-5, of its size,
    in practice by a fraction of it. A small sigmoid, or Sinkhorn's quotient, is as far off relatively.
    """
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=0)


def assert_rounded_alike(found: jax.Array, expected: jax.Array, terms: float) -> None:
    """Both round the same number, give or take errors in float32 of sums whose terms are up to `terms`.

    Such an error, 2^-20 of the terms at most, is no more than itself and one step of bfloat16, 2^-7 of the
    result; it takes a number across a rounding boundary in about one case of 2^11.
    """
    mine, theirs = np.float32(found), np.float32(expected)
    np.testing.assert_allclose(mine, theirs, rtol=2**-7, atol=2**-20 * terms)
    assert (mine != theirs).mean() <= max(2**-8, 4 / found.size)


def largest(*arrays: jax.Array) -> float:
    return max(float(jnp.abs(each.astype(F32)).max()) for each in arrays)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", TOKENS, ids="tokens={}".format)
@pytest.mark.parametrize("channels", [128, FLASH, PRO], ids="channels={}".format)
def test_pre_gives_what_the_definition_gives(channels, tokens):
    (_, streams, _, _), after = made_up(tokens, channels)

    x, post, comb = pre(streams, *after, implementation="triton")

    expected_x, expected_post, expected_comb = pre(streams, *after, implementation="reference")
    assert_close(post, expected_post)
    assert_close(comb, expected_comb)
    assert_rounded_alike(x, expected_x, 4 * largest(streams))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", TOKENS, ids="tokens={}".format)
@pytest.mark.parametrize("channels", [128, FLASH, PRO], ids="channels={}".format)
def test_post_gives_what_the_definition_gives(channels, tokens):
    before, _ = made_up(tokens, channels)

    found = hc_post(*before, implementation="triton")

    expected = hc_post(*before, implementation="reference")
    assert_rounded_alike(found, expected, 6 * largest(*before[:2]))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [*TOKENS, 1024, 4097], ids="tokens={}".format)
@pytest.mark.parametrize("channels", [128, FLASH, PRO], ids="channels={}".format)
def test_post_pre_gives_what_the_definition_gives(channels, tokens):
    before, after = made_up(tokens, channels)

    streams, x, post, comb = post_pre(*before, *after, implementation="triton")

    expected = hc_post(*before, implementation="reference")
    assert_rounded_alike(streams, expected, 6 * largest(*before[:2]))
    # A stream that rounds to the other neighbour changes what follows: that is held against its own streams.
    expected_x, expected_post, expected_comb = pre(streams, *after, implementation="reference")
    assert_close(post, expected_post)
    assert_close(comb, expected_comb)
    assert_rounded_alike(x, expected_x, 4 * largest(streams))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 129], ids="tokens={}".format)
def test_the_norm_is_that_of_the_kernels_own_input(tokens):
    before, after = made_up(tokens, PRO)
    weight = norm_weight(PRO)

    for run, of in ((pre, (before[1], *after)), (post_pre, (*before, *after))):
        *_, x, post, comb = run(*of, implementation="triton")
        *_, normalised, same_post, same_comb = run(*of, norm_weight=weight, implementation="triton")

        wide = x.astype(F32)
        inverse = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + EPS)
        expected = (wide * inverse * weight.astype(F32)).astype(BF16)
        assert_rounded_alike(normalised, expected, largest(expected))
        jax.tree.map(np.testing.assert_array_equal, (same_post, same_comb), (post, comb))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", TOKENS, ids="tokens={}".format)
def test_head_gives_what_the_definition_gives(tokens):
    (_, streams, _, _), (fn, scale, base) = made_up(tokens, FLASH)
    of = (streams, fn[:4], scale[:1], base[:4])

    found = head(*of, implementation="triton")

    assert_rounded_alike(found, head(*of, implementation="reference"), 4 * largest(streams))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 512, 4096], ids="tokens={}".format)
def test_a_run_gives_the_bits_of_the_run_before(tokens):
    before, after = made_up(tokens, FLASH)

    first, second = (post_pre(*before, *after, implementation="triton") for _ in range(2))

    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.gpu
def test_axes_before_the_streams_are_kept():
    before, after = made_up(6, 256)
    apart = [each.reshape(2, 3, *each.shape[1:]) for each in before]

    found = post_pre(*apart, *after, implementation="triton")

    expected = post_pre(*before, *after, implementation="triton")
    jax.tree.map(lambda got, one: np.testing.assert_array_equal(got.reshape(one.shape), one), found, expected)


@pytest.mark.gpu
def test_no_tokens_give_nothing():
    before, after = made_up(0, 256)

    shapes = [each.shape for each in post_pre(*before, *after)]

    assert shapes == [(0, 4, 256), (0, 256), (0, 4), (0, 4, 4)]
    assert hc_post(*before).shape == (0, 4, 256)
