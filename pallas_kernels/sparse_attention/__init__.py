"""Attention to a window and to chosen compressed entries, with a sink."""

from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.dispatch import Implementation, select
from pallas_kernels.sparse_attention import reference

IMPLEMENTATIONS = (Implementation("reference", reference.sparse_attention),)


def sparse_attention(
    q: Float[Array, "B T H D"],
    window_kv: Float[Array, "B R D"],
    window_index: Int32[Array, "B T W"],
    compressed_kv: Float[Array, "B S D"] | None,
    compressed_index: Int32[Array, "B T K"] | None,
    attn_sink: Float32[Array, " H"],
    *,
    softmax_scale: float,
    implementation: str | None = None,
) -> Float[Array, "B T H D"]:
    """Attends from each query to the rows of `window_kv` and `compressed_kv` that the indices name.

    Keys and values are one array, shared by all heads; both kinds of row share one softmax, which runs in
    float32 with one extra logit per head, the sink, that returns nothing. A query without a valid row
    gives zeros. Source: report, 2.3; `sparse_attn` of the released inference/kernel.py.

    Args:
      q: queries, normalised, RoPE applied to their last dimensions.
      window_kv: key-values of recent tokens, in whatever order `window_index` speaks of.
      window_index: rows of `window_kv`; -1 marks an unused place.
      compressed_kv, compressed_index: the same for compressed entries; None in layers without them.
      attn_sink: one logit per head, in nats.
      softmax_scale: multiplies q.k; head_dim ** -0.5 in V4.

    Raises:
      ValueError: only one of `compressed_kv` and `compressed_index` is given.
    """
    if (compressed_kv is None) != (compressed_index is None):
        raise ValueError("compressed_kv and compressed_index go together: give both or neither")
    arguments = (q, window_kv, window_index, compressed_kv, compressed_index, attn_sink, softmax_scale)
    return select(IMPLEMENTATIONS, implementation, *arguments)
