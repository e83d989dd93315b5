"""Attention to a window and to chosen compressed entries, with a sink."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.dispatch import Implementation, select
from pallas_kernels.sparse_attention import reference
from pallas_kernels.target import Target


def _run_mosaic(*args):
    from pallas_kernels.sparse_attention import mosaic  # an import that only a Hopper GPU needs

    return mosaic.sparse_attention(*args)


def _mosaic_fits(target: Target, *args) -> bool:
    if target.vendor != "cuda" or target.arch != "sm_90":
        return False
    from pallas_kernels.sparse_attention import mosaic

    return mosaic.fits(target, *args)


def _run_triton(*args):
    from pallas_kernels.sparse_attention import triton  # Triton is an extra that a CPU does without

    return triton.sparse_attention(*args)


def _triton_fits(
    target: Target, q, window_kv, window_index, compressed_kv, compressed_index, attn_sink, softmax_scale
) -> bool:
    kvs = (window_kv,) if compressed_kv is None else (window_kv, compressed_kv)
    return (
        target.vendor != "cpu"
        and all(array.dtype == jnp.bfloat16 for array in (q, *kvs))
        and q.shape[-1] in (16, 32, 64, 128, 256, 512)
        and window_kv.size > 0
        and window_index.size > 0
        and all(kv.shape[1] * kv.shape[2] < 2**31 for kv in kvs)  # rows are addressed by int32
        and isinstance(softmax_scale, float | int)  # it becomes part of the kernel
        and softmax_scale > 0
    )


IMPLEMENTATIONS = (
    Implementation("mosaic", _run_mosaic, fits=_mosaic_fits, proven=False),
    Implementation("triton", _run_triton, fits=_triton_fits),
    Implementation("reference", reference.sparse_attention),
)


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
    if q.size == 0:
        return jnp.zeros(q.shape, q.dtype)
    arguments = (q, window_kv, window_index, compressed_kv, compressed_index, attn_sink, softmax_scale)
    return select(IMPLEMENTATIONS, implementation, *arguments)
