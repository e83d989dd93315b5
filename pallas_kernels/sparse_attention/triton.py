"""`sparse_attention` with an online softmax: a program takes some heads of one query.

The keys of a query are its window's places, then those of compressed entries, in blocks that never hold both
kinds. With few queries the blocks are dealt out to several programs, and a second kernel puts their results
together. Which blocks have any row is looked up first: the others are not walked.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.sparse_attention.tilings import Tiling, tiling_for
from pallas_kernels.target import current_target
from pallas_kernels.triton_call import triton_call

_LOWEST = tl.constexpr(-3.4028234663852886e38)  # float32; finite, so that its difference to itself is 0
_LOG2_E = tl.constexpr(math.log2(math.e))
_LOOKED_UP = tl.constexpr(4096)  # places at once


@triton.jit
def _indices(
    window_index,
    compressed_index,
    query,  # int64
    block,  # a number, or one for each place
    place,  # in the block
    W: tl.constexpr,
    K: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """What stands at these places of a query's blocks; -1 beyond their ends."""
    WINDOW_BLOCKS: tl.constexpr = (W + BLOCK_KEYS - 1) // BLOCK_KEYS
    at = block * BLOCK_KEYS + place
    index = tl.load(window_index + query * W + at, mask=at < W, other=-1)
    if K > 0:
        at -= WINDOW_BLOCKS * BLOCK_KEYS
        in_list = (at >= 0) & (at < K)
        index = tl.maximum(index, tl.load(compressed_index + query * K + at, mask=in_list, other=-1))
    return index


@triton.jit
def _turns(
    window_index,
    compressed_index,
    query,
    split,
    W: tl.constexpr,
    K: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    TURNS: tl.constexpr,
):
    """The first of a program's blocks that has a row, and the one after the last that has."""
    PLACES: tl.constexpr = TURNS * BLOCK_KEYS
    AT_ONCE: tl.constexpr = min(triton.next_power_of_2(PLACES), _LOOKED_UP)
    first, end = TURNS, 0
    for start in range(0, PLACES, AT_ONCE):
        place = start + tl.arange(0, AT_ONCE)
        turn = place // BLOCK_KEYS
        block = turn * SPLITS + split
        index = _indices(window_index, compressed_index, query, block, place % BLOCK_KEYS, W, K, BLOCK_KEYS)
        present = (index >= 0) & (turn < TURNS)
        first = tl.minimum(first, tl.min(tl.where(present, turn, TURNS), 0))
        end = tl.maximum(end, tl.max(tl.where(present, turn + 1, 0), 0))
    return first, end


@triton.jit
def _walk(
    q,  # [B, T, H, D] bfloat16
    window_kv,  # [B, R, D] bfloat16
    window_index,  # [B, T, W] int32
    compressed_kv,  # [B, S, D] bfloat16; never read if K is 0
    compressed_index,  # [B, T, K] int32; the same
    query,  # int64: batch * T + token
    head,  # [BLOCK_HEADS]
    split,
    T: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    SCALE: tl.constexpr,  # of logits, times log2(e)
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Over blocks `split`, `split + SPLITS`, ...: sum of weight * key, largest logit, sum of weights."""
    WINDOW_BLOCKS: tl.constexpr = (W + BLOCK_KEYS - 1) // BLOCK_KEYS
    BLOCKS: tl.constexpr = WINDOW_BLOCKS + (K + BLOCK_KEYS - 1) // BLOCK_KEYS
    TURNS: tl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS
    channel = tl.arange(0, D)
    q_at = (query * H + head)[:, None] * D + channel[None, :]
    if H % BLOCK_HEADS == 0:
        q_HD = tl.load(q + q_at)
    else:
        q_HD = tl.load(q + q_at, mask=(head < H)[:, None], other=0.0)
    window_kv += query // T * (R * D)
    compressed_kv += query // T * (S * D)

    top = tl.full((BLOCK_HEADS,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK_HEADS,), tl.float32)
    out_HD = tl.zeros((BLOCK_HEADS, D), tl.float32)
    first, end = _turns(window_index, compressed_index, query, split, W, K, BLOCK_KEYS, SPLITS, TURNS)
    for turn in range(first, end):
        block = turn * SPLITS + split
        index = _indices(
            window_index, compressed_index, query, block, tl.arange(0, BLOCK_KEYS), W, K, BLOCK_KEYS
        )
        present = index >= 0
        kv, rows = window_kv, R
        if K > 0:
            # A choice between pointers, not a branch: loads in a branch are not fetched ahead.
            in_window = block < WINDOW_BLOCKS
            kv, rows = tl.where(in_window, window_kv, compressed_kv), tl.where(in_window, R, S)
        kv_at = tl.minimum(index, rows - 1)[:, None] * D + channel[None, :]
        kv_KD = tl.load(kv + kv_at, mask=present[:, None], other=0.0)
        logit_HK = tl.dot(q_HD, kv_KD.T)
        logit_HK = tl.where(present[None, :], logit_HK, float("-inf"))
        higher = tl.maximum(top, tl.max(logit_HK, 1))
        # Subtracted before scaled: a fused multiply-add would leave huge logits a difference to themselves.
        weight_HK = tl.exp2((logit_HK - higher[:, None]) * SCALE)
        shrunk = tl.exp2((top - higher) * SCALE)
        total = total * shrunk + tl.sum(weight_HK, 1)
        out_HD = tl.dot(weight_HK.to(tl.bfloat16), kv_KD, out_HD * shrunk[:, None])
        top = higher
    return out_HD, top, total


@triton.jit
def _share(total, sink, top):
    """What a key of weight 1 has of the whole, sink included; 0 if the keys' total is 0, as there is none.

    `sink` is in nats, `top` in bits: a weight of 1 is 2^top.
    """
    whole = total + tl.exp2(sink * _LOG2_E - top)
    return tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, whole))


@triton.jit
def _whole(
    q,
    window_kv,
    window_index,
    compressed_kv,
    compressed_index,
    attn_sink,  # [H] float32
    out,  # [B, T, H, D]
    T: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """A program takes all keys: this is the result."""
    GROUPS: tl.constexpr = (H + BLOCK_HEADS - 1) // BLOCK_HEADS
    query = (tl.program_id(0) // GROUPS).to(tl.int64)
    head = tl.program_id(0) % GROUPS * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    real = head < H
    out_HD, top, total = _walk(
        *(q, window_kv, window_index, compressed_kv, compressed_index, query, head, 0),
        *(T, H, D, R, W, S, K, SCALE, BLOCK_HEADS, BLOCK_KEYS, 1),
    )
    sink = tl.load(attn_sink + head, mask=real, other=0.0)
    share = _share(total, sink, top * SCALE)
    at = (query * H + head)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(out + at, (out_HD * share[:, None]).to(out.dtype.element_ty), mask=real[:, None])


@triton.jit
def _split(
    q,
    window_kv,
    window_index,
    compressed_kv,
    compressed_index,
    part,  # [B, T, H, SPLITS, D]: the result of each split, were it alone and without a sink
    weight,  # [B, T, H, SPLITS] float32: log2 of its sum of weights; -inf if it has no row
    T: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """A program takes the blocks of one split."""
    GROUPS: tl.constexpr = (H + BLOCK_HEADS - 1) // BLOCK_HEADS
    query = (tl.program_id(0) // (GROUPS * SPLITS)).to(tl.int64)
    split = tl.program_id(0) // GROUPS % SPLITS
    head = tl.program_id(0) % GROUPS * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    real = head < H
    out_HD, top, total = _walk(
        *(q, window_kv, window_index, compressed_kv, compressed_index, query, head, split),
        *(T, H, D, R, W, S, K, SCALE, BLOCK_HEADS, BLOCK_KEYS, SPLITS),
    )
    row = (query * H + head) * SPLITS + split
    # Written as "none" and not as "some": what is not a number must come through.
    none = total == 0
    total = tl.where(none, 1.0, total)
    tl.store(weight + row, tl.where(none, float("-inf"), top * SCALE + tl.log2(total)), mask=real)
    at = row[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(part + at, (out_HD / total[:, None]).to(part.dtype.element_ty), mask=real[:, None])


@triton.jit
def _combine(
    part,  # [B, T, H, SPLITS, D]
    weight,  # [B, T, H, SPLITS] float32
    attn_sink,  # [H] float32
    out,  # [B, T, H, D]
    H: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """A program takes one head of one query: its splits, and the sink."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, triton.next_power_of_2(SPLITS))
    channel = tl.arange(0, D)
    real = split < SPLITS
    at = (row * SPLITS + split)[:, None] * D + channel[None, :]
    part_SD = tl.load(part + at, mask=real[:, None], other=0.0)
    log2_weight = tl.load(weight + row * SPLITS + split, mask=real, other=float("-inf"))
    sink = tl.load(attn_sink + row % H)
    top = tl.maximum(tl.max(log2_weight, 0), _LOWEST)
    weight_S = tl.exp2(log2_weight - top)
    share = _share(tl.sum(weight_S, 0), sink, top)
    out_D = tl.sum(part_SD.to(tl.float32) * weight_S[:, None], 0) * share
    tl.store(out + row * D + channel, out_D.to(out.dtype.element_ty))


def sparse_attention(
    q: jax.Array,
    window_kv: jax.Array,
    window_index: jax.Array,
    compressed_kv: jax.Array | None,
    compressed_index: jax.Array | None,
    attn_sink: jax.Array,
    softmax_scale: float,
    tiling: Tiling | None = None,
) -> jax.Array:
    """All bfloat16; `tiling` in place of the table's."""
    batch, tokens, heads, channels = q.shape
    queries = batch * tokens
    if compressed_kv is None or compressed_index is None or 0 in (compressed_kv.size, compressed_index.size):
        compressed_kv, compressed_index, entries, chosen = window_kv, window_index, 0, 0  # never read
    else:
        entries, chosen = compressed_kv.shape[1], compressed_index.shape[2]
    window = window_index.shape[2]
    tiling = tiling or tiling_for(current_target().arch, queries, heads, window + chosen)
    constants: dict[str, Any] = {
        **{"T": tokens, "H": heads, "D": channels, "R": window_kv.shape[1], "W": window},
        **{"S": entries, "K": chosen, "SCALE": softmax_scale * _LOG2_E.value},
        **{"BLOCK_HEADS": tiling.heads, "BLOCK_KEYS": tiling.keys},
        **{"num_warps": tiling.num_warps, "num_stages": tiling.num_stages},
    }
    arrays = (q, window_kv, window_index, compressed_kv, compressed_index)
    groups = queries * -(-heads // tiling.heads)
    out = jax.ShapeDtypeStruct(q.shape, q.dtype)
    if tiling.splits == 1:
        return triton_call(_whole, *arrays, attn_sink, out=out, grid=(groups,), **constants)
    parts = (
        jax.ShapeDtypeStruct((*q.shape[:3], tiling.splits, channels), q.dtype),
        jax.ShapeDtypeStruct((*q.shape[:3], tiling.splits), jnp.float32),
    )
    grid = (groups * tiling.splits,)
    part, weight = triton_call(_split, *arrays, out=parts, grid=grid, SPLITS=tiling.splits, **constants)
    return combine(part, weight, attn_sink)


def combine(part: jax.Array, weight: jax.Array, attn_sink: jax.Array, turns=None) -> jax.Array:
    """[B, T, H, D] of splits [B, T, H, splits, D] and of the log2 of each one's sum of weights."""
    *outer, heads, splits, channels = part.shape
    out = jax.ShapeDtypeStruct((*outer, heads, channels), part.dtype)
    sizes: dict[str, Any] = {"H": heads, "D": channels, "SPLITS": splits}
    grid = (math.prod(outer) * heads,)
    return triton_call(_combine, part, weight, attn_sink, out=out, grid=grid, **sizes)
