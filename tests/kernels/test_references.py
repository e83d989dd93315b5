"""Every op's reference against loops in float64, one number at a time."""

import functools
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import QuantArray, Target, dispatch
from pallas_kernels.dispatch import Implementation, select
from pallas_kernels.hyper_connection.reference import sinkhorn
from pallas_kernels.indexer.reference import QUERIES_AT_ONCE, index_top_k
from pallas_kernels.routing import reference as routing

F32 = jnp.float32
ULP = 2.0**-24  # half a unit in the last place of float32, relative
HC = {"sinkhorn_iters": 20, "eps": 1e-6, "norm_eps": 1e-6}

block_matmul = jax.jit(pk.block_matmul, static_argnames=("out_dtype", "activation"))
block_diagonal_matmul = jax.jit(pk.block_diagonal_matmul, static_argnames="out_dtype")
grouped_matmul = jax.jit(pk.grouped_matmul, static_argnames="out_dtype")
swiglu = jax.jit(pk.swiglu, static_argnames=("limit", "out_dtype"))
hc_pre = jax.jit(pk.hc_pre, static_argnames=tuple(HC))
hc_head = jax.jit(pk.hc_head, static_argnames=("eps", "norm_eps"))
hc_post = jax.jit(pk.hc_post)
compress = jax.jit(pk.compress, static_argnames=("ratio", "head_dim"))
hadamard = jax.jit(pk.hadamard)
index_scores = jax.jit(pk.index_scores)
index_select = jax.jit(pk.index_select, static_argnames="top_k")
sparse_attention = jax.jit(pk.sparse_attention, static_argnames="softmax_scale")
quantize = jax.jit(pk.quantize, static_argnums=1)
dequantize = jax.jit(pk.dequantize)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def numbers(array) -> np.ndarray:
    """What an operand stands for, in float64."""
    return np.float64(dequantize(array) if isinstance(array, QuantArray) else array)


def assert_sums_agree(found, terms: np.ndarray) -> None:
    """`found` is the sum of the last axis of `terms`, as float32 arithmetic in any order may give it."""
    # Products and partial sums each round once: at most as many half-ulps as terms, of the sum of magnitudes.
    bound = 2 * terms.shape[-1] * ULP * np.abs(terms).sum(-1)
    assert found.shape == terms.shape[:-1]
    assert (np.abs(np.float64(found) - terms.sum(-1)) <= bound).all()


# Products.

OPERANDS = {
    "plain": lambda x: jnp.asarray(x),
    "bfloat16": lambda x: jnp.asarray(x, jnp.bfloat16),
    "fp8 blocks": lambda x: quantize(x, "fp8_block128"),
    "fp4 groups": lambda x: quantize(x, "fp4_group32"),
}


@pytest.mark.parametrize("weight", OPERANDS)
@pytest.mark.parametrize("quantised", [False, True], ids=["plain activations", "fp8 activations"])
def test_block_matmul_is_the_product_with_the_transposed_weight(weight, quantised):
    x, matrix = normal(2, 3, 160), OPERANDS[weight](normal(130, 160, seed=1))
    x = quantize(x, "fp8_token128") if quantised else x

    out = block_matmul(x, matrix, out_dtype=F32)

    assert_sums_agree(out, numbers(x)[..., None, :] * numbers(matrix))


def test_block_matmul_quantises_what_is_plain_if_it_is_told_to():
    x, weight, plain = (
        normal(3, 256),
        quantize(normal(64, 256, seed=1), "fp8_block128"),
        normal(64, 256, seed=1),
    )
    before = quantize(x, "fp8_token128")

    found = [block_matmul(each, weight, activation="fp8_token128", out_dtype=F32) for each in (x, before)]

    np.testing.assert_array_equal(found[0], block_matmul(before, weight, out_dtype=F32))
    np.testing.assert_array_equal(found[1], found[0])
    unquantised = block_matmul(x, plain, activation="fp8_token128", out_dtype=F32)
    np.testing.assert_array_equal(unquantised, block_matmul(x, plain, out_dtype=F32))


def test_block_matmul_keeps_a_float32_scale_exact():
    matrix = quantize(normal(64, 128), "fp8_block128")
    matrix = QuantArray(matrix.values, jnp.full((1, 1), 1 + 2**-20, F32), matrix.format)
    x = quantize(normal(3, 128, seed=1), "fp8_token128")

    out = block_matmul(x, matrix, out_dtype=F32)

    assert_sums_agree(out, numbers(x)[:, None] * numbers(matrix))


@pytest.mark.parametrize("op", ["block_matmul", "block_diagonal_matmul", "grouped_matmul"])
def test_products_round_once_to_the_dtype_asked_for(op):
    x, matrix = normal(4, 1, 64), normal(8, 64, seed=1)
    arguments = {
        "block_matmul": (block_matmul, x, matrix),
        "block_diagonal_matmul": (block_diagonal_matmul, x, matrix),
        "grouped_matmul": (grouped_matmul, x[:, 0], matrix[None], jnp.asarray([4], jnp.int32)),
    }
    run, *operands = arguments[op]

    narrow = run(*operands, out_dtype=jnp.bfloat16)

    assert narrow.dtype == jnp.bfloat16
    wide = run(*operands, out_dtype=F32)
    np.testing.assert_array_equal(np.float32(narrow), np.float32(wide.astype(jnp.bfloat16)))


@pytest.mark.parametrize("weight", ["plain", "fp8 blocks"])
def test_block_diagonal_matmul_gives_each_group_its_own_rows(weight):
    groups, rows = 2, 128
    x, matrix = normal(2, 3, groups, 64), OPERANDS[weight](normal(groups * rows, 64, seed=1))

    out = block_diagonal_matmul(x, matrix, out_dtype=F32)

    slabs = numbers(matrix).reshape(groups, rows, 64)
    assert_sums_agree(out, np.float64(x)[..., None, :] * slabs)


@pytest.mark.parametrize("weight", ["plain", "fp8 blocks", "fp4 groups"])
@pytest.mark.parametrize("quantised", [False, True], ids=["plain activations", "fp8 activations"])
@pytest.mark.parametrize(
    "sizes",
    [(3, 4, 2, 2), (0, 11, 0, 0), (0, 0, 0, 11), (2, 0, 5, 0), (0, 0, 0, 0)],
    ids=["every expert", "all on one", "all on the last", "rows past the end", "no rows at all"],
)
def test_grouped_matmul_takes_each_row_through_its_own_expert(sizes, quantised, weight):
    rows, experts, columns = 11, len(sizes), 64
    x, stack = normal(rows, columns), OPERANDS[weight](normal(experts, 40, columns, seed=1))
    x = quantize(x, "fp8_token128") if quantised else x

    out = grouped_matmul(x, stack, jnp.asarray(sizes, jnp.int32), out_dtype=F32)

    owner = np.repeat(np.arange(experts), sizes)
    terms = np.zeros((rows, 40, columns))
    terms[: len(owner)] = numbers(x)[: len(owner), None] * numbers(stack)[owner]
    assert_sums_agree(out, terms)


def test_a_nan_in_one_expert_stays_in_the_rows_of_that_expert():
    x, stack = normal(6, 32), normal(3, 8, 32, seed=1)
    stack[1] = np.nan

    out = np.asarray(grouped_matmul(x, stack, jnp.asarray([2, 1, 3], jnp.int32), out_dtype=F32))

    assert np.isnan(out[2]).all()
    assert np.isfinite(out[[0, 1, 3, 4, 5]]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pk.block_matmul(jnp.ones((2, 32)), jnp.ones((8, 64))), "x has 32 columns, weight has 64"),
        (
            lambda: pk.block_diagonal_matmul(jnp.ones((2, 3, 32)), jnp.ones((8, 32))),
            r"\(8, 32\) does not split into 3 slabs of 32",
        ),
        (
            lambda: pk.block_diagonal_matmul(jnp.ones((2, 2, 32)), jnp.ones((8, 64))),
            r"\(8, 64\) does not split into 2 slabs of 32",
        ),
        (
            lambda: pk.grouped_matmul(jnp.ones((2, 32)), jnp.ones((4, 8, 64)), jnp.zeros(4, jnp.int32)),
            "do not match",
        ),
        (
            lambda: pk.grouped_matmul(jnp.ones((2, 32)), jnp.ones((4, 8, 32)), jnp.zeros(3, jnp.int32)),
            "do not match",
        ),
        (lambda: pk.hadamard(jnp.ones((2, 96))), "power of two, got 96"),
        (
            lambda: pk.compress(
                jnp.ones((1, 8, 24)), jnp.ones((1, 8, 24)), jnp.zeros((1, 1), jnp.int32), ratio=4, head_dim=16
            ),
            "24 channels, neither head_dim 16 nor twice",
        ),
    ],
    ids=[
        "columns of a product",
        "rows of slabs",
        "columns of slabs",
        "columns of experts",
        "number of experts",
        "size of a transform",
        "channels of a window",
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Experts.


@pytest.mark.parametrize("weighted", [False, True], ids=["shared expert", "routed expert"])
@pytest.mark.parametrize("limit", [10.0, 0.5], ids=["rarely clamped", "often clamped"])
def test_swiglu_clamps_both_halves_and_weighs_before_the_down_projection(limit, weighted):
    gate, up = 4 * normal(5, 33), 4 * normal(5, 33, seed=1)
    weight = np.abs(normal(5, seed=2)) if weighted else None

    out = swiglu(gate, up, weight, limit=limit, out_dtype=F32)

    expected = np.empty(gate.shape)
    for place in np.ndindex(gate.shape):
        g = min(float(gate[place]), limit)
        u = min(max(float(up[place]), -limit), limit)
        expected[place] = g / (1 + math.exp(-g)) * u * (1 if weight is None else float(weight[place[0]]))
    # A handful of roundings and one exponential of an argument below 16: 8 half-ulps and their slack.
    np.testing.assert_allclose(out, expected, rtol=32 * ULP, atol=1e-30)


def test_swiglu_does_not_clamp_the_gate_from_below():
    out = swiglu(jnp.asarray([-2.0]), jnp.asarray([1.0]), limit=1.0, out_dtype=F32)

    np.testing.assert_allclose(out, [-2 / (1 + math.exp(2))], rtol=32 * ULP)


def test_gate_scores_are_the_root_of_softplus_at_every_magnitude():
    logits = np.array([[-80.0, -20.0, -1.0, 0.0, 1.0, 20.0, 80.0, 1e4]], np.float32)

    scores = jax.jit(routing.gate_scores)(logits)

    expected = [math.sqrt(each if each > 50 else math.log1p(math.exp(each))) for each in logits[0].tolist()]
    np.testing.assert_allclose(scores[0], expected, rtol=32 * ULP)


def test_choosing_experts_goes_by_score_plus_bias_and_ties_to_the_smaller_index():
    scores = np.array([[1.0, 3.0, 1.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]], np.float32)
    bias = np.array([0.0, -1.0, 0.0, -1.0, 0.0], np.float32)

    chosen = jax.jit(routing.choose_experts, static_argnums=2)(scores, bias, 3)

    assert chosen.dtype == jnp.int32
    assert chosen.tolist() == [[1, 3, 4], [0, 2, 4]]


def test_routing_weights_leave_the_bias_out_and_sum_to_the_scaling_factor():
    scores, bias = np.abs(normal(50, 16)) + 0.1, 10 * normal(16, seed=1)
    experts = routing.choose_experts(scores, bias, 6)

    weights = np.asarray(jax.jit(routing.routing_weights, static_argnums=2)(scores, experts, 2.5))

    for row, chosen, found in zip(np.float64(scores), np.asarray(experts), weights, strict=True):
        assert set(chosen) == set(np.argsort(-(row + bias))[:6])
        np.testing.assert_allclose(found, 2.5 * row[chosen] / row[chosen].sum(), rtol=16 * ULP)
    np.testing.assert_allclose(weights.sum(-1), 2.5, rtol=16 * ULP)


def test_sorting_by_expert_is_stable_and_counts_every_pair():
    experts = np.random.default_rng(0).integers(0, 5, (9, 3)).astype(np.int32)
    experts[experts == 2] = 3  # an expert nobody chose

    order, group_sizes = jax.jit(routing.sort_by_expert, static_argnums=1)(experts, 6)

    pairs = sorted(range(experts.size), key=lambda pair: (experts.reshape(-1)[pair], pair))
    assert order.tolist() == pairs
    assert group_sizes.tolist() == [int((experts == each).sum()) for each in range(6)]


@pytest.mark.parametrize("weight", ["plain", "fp4 groups", "fp8 blocks"])
def test_expert_mlp_is_the_weighted_sum_of_each_tokens_experts(weight):
    tokens, n_experts, hidden, inner = 7, 5, 32, 64
    x, share = normal(tokens, hidden), np.abs(normal(tokens, 2, seed=1))
    experts = (
        np.random.default_rng(2).integers(0, n_experts - 1, (tokens, 2)).astype(np.int32)
    )  # not the last
    w1, w3 = (OPERANDS[weight](normal(n_experts, inner, hidden, seed=seed)) for seed in (3, 4))
    w2 = OPERANDS[weight](normal(n_experts, hidden, inner, seed=5))

    out = jax.jit(functools.partial(pk.expert_mlp, limit=2.0))(x, experts, share, w1, w2, w3)

    expected, magnitude = np.zeros((tokens, hidden)), 0.0
    for token, choice in np.ndindex(experts.shape):
        e = experts[token, choice]
        gate = np.minimum(numbers(w1)[e] @ np.float64(x[token]), 2.0)
        up = np.clip(numbers(w3)[e] @ np.float64(x[token]), -2.0, 2.0)
        activated = np.float64(share[token, choice]) * gate / (1 + np.exp(-gate)) * up
        expected[token] += numbers(w2)[e] @ activated
        magnitude = max(magnitude, (np.abs(numbers(w2)[e]) @ np.abs(activated)).max())
    # Sums of 32 and then 64 terms, with errors of at most as many half-ulps of the magnitudes summed.
    np.testing.assert_allclose(out, expected, rtol=0, atol=2 * (32 + 64) * ULP * magnitude)


# Hyper-connections.


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


# Compressor.


def pooled(kv, score, rows, ratio, head_dim, overlap):
    """One entry, channel by channel: `rows` are those of its own window."""
    entry = np.empty(head_dim)
    for channel in range(head_dim):
        own = channel + (head_dim if overlap else 0)
        slots = [(float(score[row, own]), float(kv[row, own])) for row in rows]
        if overlap:
            slots += [(float(score[row - ratio, channel]), float(kv[row - ratio, channel])) for row in rows]
        top = max(each for each, _ in slots)
        weights = [math.exp(each - top) for each, _ in slots]
        entry[channel] = sum(w * value for w, (_, value) in zip(weights, slots, strict=True)) / sum(weights)
    return entry


@pytest.mark.parametrize(
    ("ratio", "overlap"), [(4, True), (4, False), (16, False)], ids=["overlapping", "plain", "wide"]
)
def test_an_entry_is_the_softmax_average_of_its_window_per_channel(ratio, overlap):
    head_dim, rows = 6, 3 * ratio + 5
    channels = 2 * head_dim if overlap else head_dim
    kv, score = normal(2, rows, channels), 3 * normal(2, rows, channels, seed=1)
    first_row = np.array([[ratio, ratio + 3], [2 * ratio, ratio + 1]], np.int32)

    out = compress(kv, score, first_row, ratio=ratio, head_dim=head_dim)

    for sequence, entry in np.ndindex(2, 2):
        start = first_row[sequence, entry]
        expected = pooled(
            kv[sequence], score[sequence], range(start, start + ratio), ratio, head_dim, overlap
        )
        # Averages of numbers up to 4 with up to 16 weights of relative error 4 half-ulps each.
        np.testing.assert_allclose(out[sequence, entry], expected, rtol=0, atol=4 * 32 * ULP)


def test_the_first_entry_leaves_the_absent_window_before_it_out():
    ratio, head_dim = 4, 6
    kv, score = normal(1, 2 * ratio, 2 * head_dim), normal(1, 2 * ratio, 2 * head_dim, seed=1)
    score[:, :ratio] = -np.inf
    kv[:, :ratio] = 1e30  # whatever stands there

    out = compress(kv, score, np.array([[ratio]], np.int32), ratio=ratio, head_dim=head_dim)

    alone = compress(
        kv[..., head_dim:],
        score[..., head_dim:],
        np.array([[ratio]], np.int32),
        ratio=ratio,
        head_dim=head_dim,
    )
    np.testing.assert_allclose(out, alone, rtol=0, atol=4 * 32 * ULP)


# Indexer.


@pytest.mark.parametrize("size", [1, 2, 8, 128], ids="size {}".format)
def test_the_hadamard_matrix_is_sylvesters_scaled_to_be_orthogonal(size):
    matrix = np.float64(hadamard(np.eye(size, dtype=np.float32)))

    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    np.testing.assert_allclose(matrix, np.array(signs) / math.sqrt(size), rtol=4 * ULP)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), rtol=0, atol=size * 4 * ULP)


def test_the_hadamard_transform_is_its_own_inverse_and_keeps_products():
    q, keys = normal(5, 128), normal(7, 128, seed=1)

    turned_q, turned_keys = hadamard(q), hadamard(keys)

    # Sums of 128 terms of size 1 / sqrt(128) * 4; twice for the way back.
    np.testing.assert_allclose(hadamard(turned_q), q, rtol=0, atol=4 * 2 * 128 * ULP)
    np.testing.assert_allclose(
        np.float64(turned_q) @ np.float64(turned_keys).T, np.float64(q) @ np.float64(keys).T, atol=1e-4
    )


def scores_by_loop(q, keys, weights):
    """sum over heads of weight * relu(q . key), and the terms of that sum."""
    B, T, heads, _ = q.shape
    terms = np.empty((B, T, keys.shape[1], heads))
    for b, t, s, i in np.ndindex(terms.shape):
        terms[b, t, s, i] = weights[b, t, i] * max(np.float64(q[b, t, i]) @ np.float64(keys[b, s]), 0.0)
    return terms


def test_index_scores_add_up_the_positive_products_of_all_heads():
    q, keys, weights = normal(2, 3, 4, 16), normal(2, 9, 16, seed=1), normal(2, 3, 4, seed=2)

    scores = index_scores(q, keys, weights)

    # Inner products of 16 terms of size 1: an error of 16 half-ulps of their magnitudes, times the weights.
    np.testing.assert_allclose(scores, scores_by_loop(q, keys, weights).sum(-1), rtol=0, atol=1e-4)


def test_index_select_takes_the_best_of_what_each_query_sees():
    B, T, S, top_k = 2, QUERIES_AT_ONCE + 9, 12, 5  # more queries than are scored at once
    q, keys, weights = normal(B, T, 2, 8), normal(B, S, 8, seed=1), np.abs(normal(B, T, 2, seed=2)) + 0.1
    visible = np.random.default_rng(3).integers(0, S + 1, (B, T)).astype(np.int32)
    visible[0, :2] = 0, S

    chosen = np.asarray(index_select(q, keys, weights, visible, top_k=top_k))

    scores = scores_by_loop(q, keys, weights).sum(-1)
    assert chosen.shape == (B, T, top_k)
    assert chosen.dtype == np.int32
    for b, t in np.ndindex(B, T):
        seen = range(visible[b, t])
        best = sorted(sorted(seen, key=lambda s: (-scores[b, t, s], s))[:top_k])
        assert chosen[b, t].tolist() == best + [-1] * (top_k - len(best))


def test_index_ties_go_to_the_smaller_index():
    scores = np.zeros((1, 3, 6), np.float32)
    scores[0, 1] = [1, 2, 2, 1, 2, 1]
    visible = np.array([[6, 6, 4]], np.int32)

    chosen = jax.jit(index_top_k, static_argnums=2)(scores, visible, 4)

    assert chosen.tolist() == [[[0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 2, 3]]]


def test_entries_no_head_responds_to_are_chosen_in_order():
    q, keys = -np.ones((1, 2, 3, 4), np.float32), np.ones((1, 6, 4), np.float32)
    weights = np.array([[[1, -1, 1], [-1, -1, -1]]], np.float32)

    chosen = index_select(q, keys, weights, np.full((1, 2), 5, np.int32), top_k=3)

    assert chosen.tolist() == [[[0, 1, 2], [0, 1, 2]]]


def test_index_select_gives_as_many_places_as_there_are_entries():
    q, keys, weights = normal(1, 2, 2, 8), normal(1, 3, 8, seed=1), np.ones((1, 2, 2), np.float32)

    chosen = index_select(q, keys, weights, np.array([[1, 3]], np.int32), top_k=8)

    assert chosen.shape == (1, 2, 3)
    assert chosen[0, 0].tolist() == [0, -1, -1]
    assert sorted(chosen[0, 1].tolist()) == [0, 1, 2]


# Sparse attention.

SCALE = 0.3


def attend_by_loop(q, window_kv, window_index, compressed_kv, compressed_index, sink):
    B, T, H, D = q.shape
    out = np.zeros((B, T, H, D))
    for b, t, h in np.ndindex(B, T, H):
        keys = [window_kv[b, row] for row in window_index[b, t] if row >= 0]
        if compressed_kv is not None:
            keys += [compressed_kv[b, row] for row in compressed_index[b, t] if row >= 0]
        if not keys:
            continue
        keys = np.float64(keys)
        logits = keys @ np.float64(q[b, t, h]) * SCALE
        top = max(logits.max(), sink[h])
        weights = np.exp(logits - top)
        out[b, t, h] = weights @ keys / (weights.sum() + np.exp(np.float64(sink[h]) - top))
    return out


def attention_case(B, T, H, D, rows, places, entries, chosen, seed=0):
    """Arguments with unused places scattered among the indices, no row named twice."""
    rng = np.random.default_rng(seed)

    def some(count, of):
        index = np.stack([rng.permutation(of)[:count] for _ in range(B * T)])
        return np.where(rng.random(index.shape) < 0.3, -1, index).reshape(B, T, count).astype(np.int32)

    compressed = (normal(B, entries, D, seed=seed + 2), some(chosen, entries)) if entries else (None, None)
    sink = np.resize(np.float32([0.5, -2.0, -np.inf, 6.0]), H)
    return (
        normal(B, T, H, D, seed=seed),
        normal(B, rows, D, seed=seed + 1),
        some(places, rows),
        *compressed,
        sink,
    )


@pytest.mark.parametrize(
    "case",
    [
        pytest.param((2, 3, 4, 16, 9, 5, 6, 4), id="window and entries"),
        pytest.param((2, 3, 4, 16, 9, 5, 0, 0), id="window alone"),
        pytest.param((1, 70, 4, 8, 12, 6, 7, 5), id="more queries than run at once"),
        pytest.param((3, 65, 1, 8, 12, 6, 7, 5), id="a batch of them"),
        pytest.param((1, 2, 4, 8, 3, 1, 3, 1), id="hardly any keys"),
    ],
)
def test_window_and_entries_share_one_softmax_with_the_sink(case):
    arguments = attention_case(*case)

    out = sparse_attention(*arguments, softmax_scale=SCALE)

    # Logits of 16 terms reach 5: errors of 1e-6 in them, as large in the average of numbers up to 4.
    np.testing.assert_allclose(out, attend_by_loop(*arguments), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sink", [-np.inf, 0.0, 1e30], ids=["no sink", "a sink", "an overwhelming sink"])
def test_a_query_without_a_valid_row_gives_zeros(sink):
    *arguments, _ = attention_case(1, 3, 2, 8, 5, 4, 3, 2)
    window_index, compressed_index = arguments[2], arguments[4]
    window_index[0, 1], compressed_index[0, 1] = -1, -1

    out = np.asarray(sparse_attention(*arguments, np.float32([sink] * 2), softmax_scale=SCALE))

    assert not out[0, 1].any()
    assert np.isfinite(out).all()


def test_a_sink_of_minus_infinity_takes_nothing():
    key = normal(1, 1, 8)
    index = np.zeros((1, 1, 1), np.int32)

    out = sparse_attention(
        normal(1, 1, 1, 8, seed=1), key, index, None, None, np.float32([-np.inf]), softmax_scale=SCALE
    )

    np.testing.assert_allclose(out[0, 0, 0], key[0, 0], rtol=4 * ULP)  # the whole weight is on the one key


@pytest.mark.parametrize("size", [1e3, 1e18], ids=["large logits", "huge logits"])
def test_large_logits_do_not_overflow(size):
    q, kv = (
        np.full((1, 1, 1, 8), size, np.float32),
        np.stack([np.full((1, 8), 1.0), np.full((1, 8), -1.0)], 1),
    )
    index = np.arange(2, dtype=np.int32).reshape(1, 1, 2)

    out = sparse_attention(q, np.float32(kv), index, None, None, np.float32([0.0]), softmax_scale=SCALE)

    np.testing.assert_array_equal(out, np.ones((1, 1, 1, 8)))


def test_what_unused_places_could_name_does_not_matter():
    q, window_kv, window_index, compressed_kv, compressed_index, sink = attention_case(1, 4, 2, 8, 5, 4, 3, 2)
    window_index[window_index == 0] = -1  # nobody names row 0, which a place marked -1 is read from
    compressed_index[compressed_index == 0] = -1
    arguments = (window_index, compressed_kv, compressed_index, sink)
    poisoned_window, poisoned_entries = window_kv.copy(), compressed_kv.copy()
    poisoned_window[:, 0], poisoned_entries[:, 0] = 1e30, -1e30

    out = sparse_attention(q, window_kv, *arguments, softmax_scale=SCALE)

    poisoned = sparse_attention(
        q, poisoned_window, window_index, poisoned_entries, compressed_index, sink, softmax_scale=SCALE
    )
    np.testing.assert_array_equal(poisoned, out)


@pytest.mark.parametrize("given", ["entries", "indices"])
def test_compressed_entries_and_their_indices_go_together(given):
    q, window_kv, window_index, entries, indices, sink = attention_case(1, 1, 1, 8, 3, 2, 3, 2)
    pair = (entries, None) if given == "entries" else (None, indices)

    with pytest.raises(ValueError, match="give both or neither"):
        pk.sparse_attention(q, window_kv, window_index, *pair, sink, softmax_scale=SCALE)


# Dispatch.

CPU, GPU = Target("cpu", ""), Target("cuda", "sm_90")


def on_gpu(target, *_, **__) -> bool:
    return target.vendor != "cpu"


def fast(x, *, times=1):
    return "fast", x, times


def slow(x, *, times=1):
    return "slow", x, times


slow.__module__ = "pallas_kernels.some_op.reference"  # by which the op is named in the log
KINDS = (Implementation("fast", fast, on_gpu), Implementation("reference", slow))


@pytest.fixture
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Target:
    """Makes `select` believe in a device."""
    monkeypatch.setattr(dispatch, "current_target", lambda: request.param)
    return request.param


@pytest.mark.parametrize(
    ("target", "chosen"), [(GPU, "fast"), (CPU, "slow")], indirect=["target"], ids=["gpu", "cpu"]
)
def test_the_first_implementation_that_fits_runs(target, chosen):
    assert select(KINDS, None, "x", times=3) == (chosen, "x", 3)


@pytest.mark.parametrize("target", [GPU], indirect=True, ids=["gpu"])
def test_a_named_implementation_runs_though_a_faster_one_fits(target):
    assert select(KINDS, "reference", "x") == ("slow", "x", 1)


@pytest.mark.parametrize("target", [CPU], indirect=True, ids=["cpu"])
def test_a_named_implementation_never_falls_back(target):
    with pytest.raises(NotImplementedError, match="implementation='fast' does not take these arguments"):
        select(KINDS, "fast", "x")


@pytest.mark.parametrize("op", ["swiglu", "hc_post", "hadamard"])
def test_an_unknown_implementation_is_refused_with_the_known_ones(op):
    calls = {
        "swiglu": functools.partial(pk.swiglu, jnp.ones((1, 2)), jnp.ones((1, 2)), limit=1.0),
        "hc_post": functools.partial(
            pk.hc_post, *(jnp.ones(shape) for shape in ((2,), (4, 2), (4,), (4, 4)))
        ),
        "hadamard": functools.partial(pk.hadamard, jnp.ones((1, 2))),
    }

    with pytest.raises(ValueError, match=r"implementation='cutlass' is unknown here, have .*reference"):
        calls[op](implementation="cutlass")


def test_what_fits_is_asked_with_the_arguments_of_the_call(monkeypatch):
    monkeypatch.setattr(dispatch, "current_target", lambda: GPU)
    asked = []
    picky = Implementation("fast", fast, lambda *args, **kwargs: asked.append((args, kwargs)) or False)

    chosen = select((picky, KINDS[1]), None, "x", times=2)

    assert chosen == ("slow", "x", 2)
    assert asked == [((GPU, "x"), {"times": 2})]


def test_a_gpu_left_with_its_reference_says_so_once_per_op(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "current_target", lambda: Target("rocm", "gfx0"))

    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            select(KINDS[1:], None, "x")

    (record,) = [each for each in caplog.records if "gfx0" in each.getMessage()]
    assert record.getMessage().startswith("some_op runs its reference on gfx0")
