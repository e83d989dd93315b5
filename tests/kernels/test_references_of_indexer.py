"""The references of the indexer against loops: Hadamard, scores, and the choice of the best."""

import math

import jax
import numpy as np
import pytest
from references import ULP, normal

import pallas_kernels as pk
from pallas_kernels.indexer.reference import QUERIES_AT_ONCE, index_top_k

hadamard = jax.jit(pk.hadamard)
index_scores = jax.jit(pk.index_scores)
index_select = jax.jit(pk.index_select, static_argnames="top_k")


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
