"""The reference of the compressor against a loop over windows."""

import math

import jax
import numpy as np
import pytest
from references import ULP, normal

import pallas_kernels as pk

compress = jax.jit(pk.compress, static_argnames=("ratio", "head_dim"))


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
    # Half of what two averages may differ by that are each as near to the exact one as above.
    np.testing.assert_allclose(out, alone, rtol=0, atol=4 * 32 * ULP)
