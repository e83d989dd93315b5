"""Pooling of a window of tokens into one compressed entry."""

from jaxtyping import Array, Float32, Int32

from pallas_kernels.compressor import reference
from pallas_kernels.dispatch import Implementation, select

IMPLEMENTATIONS = (Implementation("reference", reference.compress),)


def compress(
    kv: Float32[Array, "B R C"],
    score: Float32[Array, "B R C"],
    first_row: Int32[Array, "B N"],
    *,
    ratio: int,
    head_dim: int,
    implementation: str | None = None,
) -> Float32[Array, "B N head_dim"]:
    """Per channel, the average of a window's `kv` under the softmax of its `score`.

    With C = 2 * head_dim windows overlap: an entry pools the `ratio` rows before its window through the
    first half of the channels and the rows of its window through the second half. Source: report, 2.2;
    `Compressor.forward` of the released inference/model.py.

    Args:
      kv, score: raw rows in text order, the positional bias `ape` already added to `score`. A score of
        -inf leaves a row out; each window needs one row that is not.
      first_row: row at which each entry's own window begins. With overlap the `ratio` rows before it must
        be there too. Rows out of range are clamped: such an entry is meaningless and the caller's to drop.
      ratio: tokens in a window.

    Raises:
      ValueError: C is neither head_dim nor 2 * head_dim.
    """
    if kv.shape[-1] not in (head_dim, 2 * head_dim):
        raise ValueError(f"kv has {kv.shape[-1]} channels, neither head_dim {head_dim} nor twice that")
    return select(IMPLEMENTATIONS, implementation, kv, score, first_row, ratio, head_dim)
