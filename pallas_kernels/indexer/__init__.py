"""The lightning indexer: which compressed entries a query attends to."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.dispatch import Implementation, select
from pallas_kernels.formats import QuantArray
from pallas_kernels.indexer import reference
from pallas_kernels.indexer.queries import TiledQueries
from pallas_kernels.target import Target

_MOST_CHOSEN = 2048  # by the kernel, whose programs hold as many places


def _scores_triton(*args):
    from pallas_kernels.indexer import triton  # Triton is an extra that a CPU does without

    return triton.index_scores(*args)


def _select_triton(*args):
    from pallas_kernels.indexer import blocks, triton

    return blocks.index_select(triton.index_scores, *args)


def _scores_mosaic(*args):
    from pallas_kernels.indexer import mosaic

    return mosaic.index_scores(*args)


def _select_mosaic(*args):
    from pallas_kernels.indexer import blocks, mosaic

    return blocks.index_select(mosaic.index_scores, *args)


def _scores_fit(target: Target, q, keys, weights) -> bool:
    *_, heads, channels = q.shape
    if isinstance(q, TiledQueries):
        known = isinstance(keys, QuantArray) and keys.format == "fp4_group32"
        known = known and keys.scale.dtype == jnp.uint8
    else:
        known = not isinstance(keys, QuantArray) and q.dtype == keys.dtype == jnp.bfloat16
    return (
        target.vendor != "cpu"
        and known
        and weights.dtype == jnp.float32
        and heads in (16, 32, 64)
        and channels in (32, 64, 128)
        and keys.shape[1] * channels < 2**31  # keys are addressed by int32
    )


def _scores_fit_mosaic(target: Target, q, keys, weights) -> bool:
    known = target.arch == "sm_90" and isinstance(q, TiledQueries) and _scores_fit(target, q, keys, weights)
    # The copy engine wants keys' scales to begin at multiples of 16 bytes.
    return known and q.shape[-2:] == (64, 128) and keys.shape[1] % 4 == 0


def _selection_fits(scores_fit, target: Target, q, keys, weights, visible, top_k) -> bool:
    return scores_fit(target, q, keys, weights) and 0 < top_k <= _MOST_CHOSEN and visible.dtype == jnp.int32


HADAMARD = (Implementation("reference", reference.hadamard),)
SCORES = (
    Implementation("mosaic", _scores_mosaic, fits=_scores_fit_mosaic),
    Implementation("triton", _scores_triton, fits=_scores_fit),
    Implementation("reference", reference.index_scores),
)
SELECT = (
    Implementation("mosaic", _select_mosaic, fits=functools.partial(_selection_fits, _scores_fit_mosaic)),
    Implementation("triton", _select_triton, fits=functools.partial(_selection_fits, _scores_fit)),
    Implementation("reference", reference.index_select),
)


def hadamard(x: Float[Array, "*rows J"], *, implementation: str | None = None) -> Float[Array, "*rows J"]:
    """Walsh-Hadamard transform of the last axis, Sylvester order, scaled to be orthogonal.

    Spreads outliers before `fp4_group32`. Source: `rotate_activation` of the released inference/model.py.

    Raises:
      ValueError: J is not a power of two.
    """
    if (size := x.shape[-1]) & (size - 1):
        raise ValueError(f"the transform needs a power of two, got {size} columns")
    return select(HADAMARD, implementation, x)


def index_scores(
    q: Float[Array, "B T I J"] | TiledQueries,
    keys: Float[Array, "B S J"] | QuantArray,
    weights: Float32[Array, "B T I"],
    *,
    implementation: str | None = None,
) -> Float32[Array, "B T S"]:
    """sum_i weights[i] * relu(q[i] . key): how much each query wants each entry.

    Keys may be as a cache keeps them, in `fp4_group32`, for queries that `index_query` has tiled.

    Source: report, 2.3; `Indexer.forward` of the released inference/model.py.
    """
    if 0 in (q.size, keys.size):
        return jnp.zeros((*q.shape[:2], keys.shape[1]), jnp.float32)
    return select(SCORES, implementation, q, keys, weights)


def index_select(
    q: Float[Array, "B T I J"] | TiledQueries,
    keys: Float[Array, "B S J"] | QuantArray,
    weights: Float32[Array, "B T I"],
    visible: Int32[Array, "B T"],
    top_k: int,
    *,
    implementation: str | None = None,
) -> Int32[Array, "B T K"]:
    """The min(top_k, S) best-scored among the first `visible` entries of each query, in the entries' order.

    Ties go to the smaller index; places at the end that no visible entry fills hold -1. Never holds the
    scores of all queries at once. Operands are those of `index_scores`.
    """
    if 0 in (q.size, keys.size):
        return jnp.full((*q.shape[:2], min(top_k, keys.shape[1])), -1, jnp.int32)
    return select(SELECT, implementation, q, keys, weights, visible, top_k)
