"""The lightning indexer: which compressed entries a query attends to."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.dispatch import Implementation, select
from pallas_kernels.formats import QuantArray
from pallas_kernels.indexer import reference
from pallas_kernels.target import Target

_MOST_CHOSEN = 2048  # by the kernel, whose programs sort twice as many in registers


def _scores_triton(*args):
    from pallas_kernels.indexer import scores  # Triton is an extra that a CPU does without

    return scores.index_scores(*args)


def _select_triton(*args):
    from pallas_kernels.indexer import triton

    return triton.index_select(*args)


def _scores_fit(target: Target, q, keys, weights) -> bool:
    heads, channels = q.shape[-2:]
    if isinstance(q, QuantArray):
        dtypes = (
            isinstance(keys, QuantArray)
            and q.format == keys.format == "fp8_token128"
            and q.values.dtype == keys.values.dtype == jnp.float8_e4m3fn
            and q.scale.dtype == keys.scale.dtype == jnp.uint8
            and channels == 128
            and target.has_e4m3
        )
    else:
        dtypes = not isinstance(keys, QuantArray) and q.dtype == keys.dtype == jnp.bfloat16
    return (
        target.vendor != "cpu"
        and dtypes
        and weights.dtype == jnp.float32
        and heads in (16, 32, 64)
        and channels in (32, 64, 128)
        and keys.shape[1] * channels < 2**31  # keys are addressed by int32
    )


def _selection_fits(target: Target, q, keys, weights, visible, top_k) -> bool:
    return _scores_fit(target, q, keys, weights) and 0 < top_k <= _MOST_CHOSEN and visible.dtype == jnp.int32


HADAMARD = (Implementation("reference", reference.hadamard),)
SCORES = (
    Implementation("triton", _scores_triton, fits=_scores_fit, proven=False),
    Implementation("reference", reference.index_scores),
)
SELECT = (
    Implementation("triton", _select_triton, fits=_selection_fits, proven=False),
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
    q: Float[Array, "B T I J"] | QuantArray,
    keys: Float[Array, "B S J"] | QuantArray,
    weights: Float32[Array, "B T I"],
    *,
    implementation: str | None = None,
) -> Float32[Array, "B T S"]:
    """sum_i weights[i] * relu(q[i] . key): how much each query wants each entry.

    Queries and keys may both be `fp8_token128`. It holds FP4 values exactly whose scales lie within 2^14 of
    each other, but Hopper's FP8 products are summed with about 14 bits, those of bfloat16 with float32's.

    Source: report, 2.3; `Indexer.forward` of the released inference/model.py.
    """
    if 0 in (q.size, keys.size):
        return jnp.zeros((*q.shape[:2], keys.shape[1]), jnp.float32)
    return select(SCORES, implementation, q, keys, weights)


def index_select(
    q: Float[Array, "B T I J"] | QuantArray,
    keys: Float[Array, "B S J"] | QuantArray,
    weights: Float32[Array, "B T I"],
    visible: Int32[Array, "B T"],
    top_k: int,
    *,
    implementation: str | None = None,
) -> Int32[Array, "B T K"]:
    """The min(top_k, S) best-scored among the first `visible` entries of each query, in the entries' order.

    Ties go to the smaller index; places at the end that no visible entry fills hold -1. Never holds the scores of all
    queries at once. Operands are those of `index_scores`.
    """
    if 0 in (q.size, keys.size):
        return jnp.full((*q.shape[:2], min(top_k, keys.shape[1])), -1, jnp.int32)
    return select(SELECT, implementation, q, keys, weights, visible, top_k)
