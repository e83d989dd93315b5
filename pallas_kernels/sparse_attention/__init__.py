"""Attention to a window and to chosen compressed entries, with a sink."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.cached_rows import KeyValues, QuantKV, decode_rows
from pallas_kernels.debug import check
from pallas_kernels.dispatch import Implementation, select
from pallas_kernels.sparse_attention import reference
from pallas_kernels.target import Target


def _run_mosaic(q, window_kv, window_index, compressed_kv, *others):
    from pallas_kernels.sparse_attention import mosaic  # an import that only a Hopper GPU needs

    window_kv, compressed_kv = _alike(window_kv, compressed_kv)
    return mosaic.sparse_attention(q, window_kv, window_index, compressed_kv, *others)


def _mosaic_fits(target: Target, *args) -> bool:
    if target.vendor != "cuda" or target.arch != "sm_90":
        return False
    from pallas_kernels.sparse_attention import mosaic

    return mosaic.fits(target, *args)


def _run_triton(q, window_kv, window_index, compressed_kv, *others):
    from pallas_kernels.sparse_attention import triton  # Triton is an extra that a CPU does without

    window_kv, compressed_kv = _alike(window_kv, compressed_kv)
    return triton.sparse_attention(q, window_kv, window_index, compressed_kv, *others)


def _alike(window_kv: KeyValues, compressed_kv: KeyValues | None) -> tuple[KeyValues, KeyValues | None]:
    """Both in one form, as kernels take them: where one is plain, as for a prompt's own window, both are."""
    if compressed_kv is None or isinstance(window_kv, QuantKV) == isinstance(compressed_kv, QuantKV):
        return window_kv, compressed_kv
    return decode_rows(window_kv), decode_rows(compressed_kv)


def _triton_fits(
    target: Target,
    q,
    window_kv,
    window_index,
    compressed_kv,
    compressed_index,
    attn_sink,
    turns,
    softmax_scale,
) -> bool:
    kvs = (window_kv,) if compressed_kv is None else (window_kv, compressed_kv)
    # Float32 is to be exact, not to be fast: tiles are twice as large, products slow.
    most_channels = {jnp.dtype(jnp.bfloat16): 512, jnp.dtype(jnp.float32): 128}.get(q.dtype, 0)
    return (
        target.vendor != "cpu"
        and q.shape[-1] <= most_channels
        and q.shape[-1] in (16, 32, 64, 128, 256, 512)
        and all(kv.dtype == q.dtype and _pieces_fit(kv) for kv in kvs)
        and window_kv.size > 0
        and window_index.size > 0
        and all(kv.shape[0] * kv.shape[1] < 2**31 for kv in kvs)
        and (turns is None or turns[0].shape[-1] in (8, 16, 32, 64))
        and isinstance(softmax_scale, float | int)  # it becomes part of the kernel
        and softmax_scale > 0
    )


def _pieces_fit(kv: KeyValues) -> bool:
    """Whether channels are the half, the quarter and so on of a power of two, down to the rotated ones."""
    if not isinstance(kv, QuantKV):
        return True
    rotated, channels = kv.rope.shape[-1], kv.shape[-1]
    return rotated in (16, 32, 64, 128) and channels > rotated and channels & (channels - 1) == 0


IMPLEMENTATIONS = (
    Implementation("mosaic", _run_mosaic, fits=_mosaic_fits),
    Implementation("triton", _run_triton, fits=_triton_fits),
    Implementation("reference", reference.sparse_attention),
)


def sparse_attention(
    q: Float[Array, "B T H D"],
    window_kv: Float[Array, "B R D"] | QuantKV,
    window_index: Int32[Array, "B T W"],
    compressed_kv: Float[Array, "B S D"] | QuantKV | None,
    compressed_index: Int32[Array, "B T K"] | None,
    attn_sink: Float32[Array, " H"],
    *,
    softmax_scale: float,
    turns: tuple[Float32[Array, "B T pairs"], Float32[Array, "B T pairs"]] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H D"]:
    """Attends from each query to the rows of `window_kv` and `compressed_kv` that the indices name.

    Keys and values are one array, shared by all heads; both kinds of row share one softmax, which runs in
    float32 with one extra logit per head, the sink, that returns nothing. A query without a valid row
    gives zeros. Source: report, 2.3; `sparse_attn` of the released inference/kernel.py.

    An index past the last row names the last row: nothing is read outside. `debug.checks` tells of such.

    Args:
      q: queries, normalised, RoPE applied to their last dimensions.
      window_kv: key-values of recent tokens, in whatever order `window_index` speaks of.
      window_index: rows of `window_kv`; -1 marks an unused place.
      compressed_kv, compressed_index: the same for compressed entries; None in layers without them.
      attn_sink: one logit per head, in nats.
      softmax_scale: multiplies q.k; head_dim ** -0.5 in V4.
      turns: cosine and sine of each query's angles, by which the last 2 * pairs channels of its result are
        turned back, two neighbours at a time, before it is rounded; None leaves them.

    Raises:
      ValueError: only one of `compressed_kv` and `compressed_index` is given.
    """
    if (compressed_kv is None) != (compressed_index is None):
        raise ValueError("compressed_kv and compressed_index go together: give both or neither")
    if q.size == 0:
        return jnp.zeros(q.shape, q.dtype)
    _check("window_index", window_index, window_kv)
    if compressed_kv is not None and compressed_index is not None:
        _check("compressed_index", compressed_index, compressed_kv)
    arrays = (q, window_kv, window_index, compressed_kv, compressed_index, attn_sink, turns)
    arguments = (*arrays, softmax_scale)
    return select(IMPLEMENTATIONS, implementation, *arguments)


def _check(name: str, index: jax.Array, kv: KeyValues) -> None:
    rows = kv.shape[1]
    check(
        "sparse_attention",
        (index >= -1) & (index < rows),
        f"{name} names rows that are not there: they go from 0 to {rows - 1}, -1 is for none; it has",
        index,
    )
