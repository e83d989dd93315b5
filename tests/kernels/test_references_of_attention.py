"""The reference of sparse attention against a loop in float64."""

import jax
import numpy as np
import pytest
from references import ULP, normal

import pallas_kernels as pk

sparse_attention = jax.jit(pk.sparse_attention, static_argnames="softmax_scale")


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

    # The whole weight is on the one key: an exponential of 0, a sum of one term, a product and a quotient.
    np.testing.assert_allclose(out[0, 0, 0], key[0, 0], rtol=4 * ULP)


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
