"""The references of hyper-connections against their definition, one number at a time."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import ULP, assert_sums_agree, normal

import pallas_kernels as pk
from pallas_kernels.hyper_connection.reference import sinkhorn

HC = {"sinkhorn_iters": 20, "eps": 1e-6, "norm_eps": 1e-6}

hc_pre = jax.jit(pk.hc_pre, static_argnames=tuple(HC))
hc_head = jax.jit(pk.hc_head, static_argnames=("eps", "norm_eps"))
hc_post = jax.jit(pk.hc_post)


def hc_split(u, scale, base, n, iterations, eps):
    """pre, post and comb of one token from its 2n + n*n mixes, step by step."""

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    pre = np.array([sigmoid(u[i] * scale[0] + base[i]) + eps for i in range(n)])
    post = np.array([2 * sigmoid(u[n + i] * scale[1] + base[n + i]) for i in range(n)])
    comb = np.empty((n, n))
    for i in range(n):
        logits = [u[2 * n + i * n + j] * scale[2] + base[2 * n + i * n + j] for j in range(n)]
        exps = [math.exp(each - max(logits)) for each in logits]
        comb[i] = [each / sum(exps) + eps for each in exps]
    for step in range(2 * iterations - 1):  # columns, then rows and columns in turn
        comb = comb / (comb.sum(step % 2, keepdims=True) + eps)
    return pre, post, comb


def hc_mixes(streams, fn, norm_eps):
    flat = np.float64(streams).reshape(-1)
    return (fn @ flat) / math.sqrt((flat * flat).mean() + norm_eps)


def test_hyper_connections_split_the_worked_example():
    u = 0.1 * np.arange(24, dtype=np.float32) - 1.2
    base = 0.05 * (np.arange(24, dtype=np.float32) % 5)
    # One-hot streams: their collapse is pre itself. Their root mean square is 1/2, so the mixes are u.
    streams = np.eye(4, dtype=np.float32)[None]
    fn = np.zeros((24, 16), np.float32)
    fn[:, 0] = u / 2

    pre, post, comb = hc_pre(streams, fn, np.float32([0.5, 1, 2]), base, **(HC | {"norm_eps": 0.0}))

    expected_comb = [
        [0.2696203, 0.2696204, 0.2232981, 0.2374602],
        [0.2535403, 0.2535403, 0.2696203, 0.2232981],
        [0.2384192, 0.2384192, 0.2535403, 0.2696204],
        [0.2384192, 0.2384192, 0.2535402, 0.2696204],
    ]
    seven_decimals = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-7)
    seven_decimals(pre[0], [0.3543447, 0.3775417, 0.4013134, 0.4255585])
    seven_decimals(post[0], [0.7086874, 0.6636245, 0.7317289, 0.8026247])
    seven_decimals(comb[0], expected_comb)


@pytest.mark.parametrize("magnitude", [1.0, 30.0], ids=["usual streams", "large streams"])
def test_hc_pre_follows_the_steps_of_the_definition(magnitude):
    n, channels = 4, 24
    streams = magnitude * normal(2, 3, n, channels)
    fn, scale, base = normal(24, n * channels, seed=1), np.float32([0.4, 0.7, 1.1]), normal(24, seed=2)

    x, post, comb = hc_pre(streams, fn, scale, base, **HC)

    for token in np.ndindex(2, 3):
        u = hc_mixes(streams[token], np.float64(fn), HC["norm_eps"])
        pre, expected_post, expected_comb = hc_split(u, scale, base, n, 20, HC["eps"])
        # The mixes sum 96 terms of size 1 and reach about 30: an error of 1e-5 before the sigmoids.
        np.testing.assert_allclose(post[token], expected_post, rtol=0, atol=2e-5)
        np.testing.assert_allclose(comb[token], expected_comb, rtol=0, atol=2e-5)
        expected_x = sum(pre[i] * np.float64(streams[token][i]) for i in range(n))
        np.testing.assert_allclose(x[token], expected_x, rtol=0, atol=1e-4 * magnitude)


def test_comb_is_doubly_stochastic():
    logits = np.random.default_rng(0).uniform(-0.5, 0.5, (200, 4, 4)).astype(np.float32)

    comb = np.float64(jax.jit(sinkhorn, static_argnums=(1, 2))(logits, 20, 1e-6))

    # Sinkhorn steps contract by tanh(spread / 4), the spread of cross ratios here at most 2: after 39 of them
    # what is left of the error is below 1e-12. Each sum misses 1 by eps, and by a few roundings.
    assert (comb > 0).all()
    np.testing.assert_allclose(comb.sum(-2), 1 - 1e-6, rtol=0, atol=16 * ULP)
    np.testing.assert_allclose(comb.sum(-1), 1 - 1e-6, rtol=0, atol=16 * ULP)


def test_hc_post_sums_over_the_first_index_of_comb():
    y, streams = normal(2, 3, 8), normal(2, 3, 4, 8, seed=1)
    post, comb = normal(2, 3, 4, seed=2), normal(2, 3, 4, 4, seed=3)

    out = hc_post(y, streams, post, comb)

    terms = np.empty((2, 3, 4, 8, 5))
    for b, t, j, m in np.ndindex(2, 3, 4, 8):
        kept = [float(comb[b, t, i, j]) * float(streams[b, t, i, m]) for i in range(4)]
        terms[b, t, j, m] = [float(post[b, t, j]) * float(y[b, t, m]), *kept]
    assert_sums_agree(out, terms)


def test_hc_head_is_the_collapse_alone():
    streams, fn, base = normal(5, 4, 16), normal(4, 64, seed=1), normal(4, seed=2)

    out = hc_head(streams, fn, np.float32([0.3]), base, eps=1e-6, norm_eps=1e-6)

    for token in range(5):
        u = hc_mixes(streams[token], np.float64(fn), 1e-6)
        pre = 1 / (1 + np.exp(-(u * np.float64(np.float32(0.3)) + base))) + 1e-6
        # 64 terms of size 1 in a mix of about 8: 1e-5 before the sigmoid, less after it.
        np.testing.assert_allclose(out[token], pre @ np.float64(streams[token]), rtol=0, atol=2e-5)


def test_hyper_connections_return_streams_in_their_own_dtype():
    streams = jnp.asarray(normal(2, 4, 16), jnp.bfloat16)
    fn, scale, base = normal(24, 64), np.float32([1, 1, 1]), normal(24)

    x, post, comb = hc_pre(streams, fn, scale, base, **HC)
    after = hc_post(x, streams, post, comb)
    head = hc_head(streams, fn[:4], scale[:1], base[:4], eps=1e-6, norm_eps=1e-6)

    assert x.dtype == after.dtype == head.dtype == jnp.bfloat16
    assert post.dtype == comb.dtype == jnp.float32
