"""The references of SwiGLU, routing and the experts against their definitions in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import OPERANDS, ULP, normal, numbers

import pallas_kernels as pk
from pallas_kernels.routing import reference as routing

F32 = jnp.float32

swiglu = jax.jit(pk.swiglu, static_argnames=("limit", "out_dtype"))


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

    # As above.
    np.testing.assert_allclose(out, [-2 / (1 + math.exp(2))], rtol=32 * ULP)


def test_gate_scores_are_the_root_of_softplus_at_every_magnitude():
    logits = np.array([[-80.0, -20.0, -1.0, 0.0, 1.0, 20.0, 80.0, 1e4]], np.float32)

    scores = jax.jit(routing.gate_scores)(logits)

    expected = [math.sqrt(each if each > 50 else math.log1p(math.exp(each))) for each in logits[0].tolist()]
    # An exponential, a logarithm and a root: a few half-ulps each, and the root halves those before it.
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
        # A sum of six positive numbers, a quotient and a product: 8 half-ulps, twice that allowed.
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
