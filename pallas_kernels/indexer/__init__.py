"""The lightning indexer: which compressed entries a query attends to."""

from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.dispatch import Implementation, select
from pallas_kernels.indexer import reference

HADAMARD = (Implementation("reference", reference.hadamard),)
SCORES = (Implementation("reference", reference.index_scores),)
SELECT = (Implementation("reference", reference.index_select),)


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
    q: Float[Array, "B T I J"],
    keys: Float[Array, "B S J"],
    weights: Float32[Array, "B T I"],
    *,
    implementation: str | None = None,
) -> Float32[Array, "B T S"]:
    """sum_i weights[i] * relu(q[i] . key): how much each query wants each entry.

    Source: report, 2.3; `Indexer.forward` of the released inference/model.py.
    """
    return select(SCORES, implementation, q, keys, weights)


def index_select(
    q: Float[Array, "B T I J"],
    keys: Float[Array, "B S J"],
    weights: Float32[Array, "B T I"],
    visible: Int32[Array, "B T"],
    top_k: int,
    *,
    implementation: str | None = None,
) -> Int32[Array, "B T K"]:
    """The min(top_k, S) best-scored among the first `visible` entries of each query, best first.

    Ties go to the smaller index; places that no visible entry fills hold -1. Never holds the scores of all
    queries at once.
    """
    return select(SELECT, implementation, q, keys, weights, visible, top_k)
