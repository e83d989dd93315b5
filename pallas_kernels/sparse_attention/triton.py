"""`sparse_attention` with an online softmax: a program takes some heads of one query.

The keys of a query are its window's places, then those of compressed entries, in blocks that never hold both
kinds. With few queries the blocks are dealt out to several programs, and a second kernel puts their results
together. Which blocks have any row is looked up first: the others are not walked.

The channels of keys, queries and sums are in pieces, tuples of tiles: one of them where rows are plain, or
the half, the quarter and so on of codes in FP8 and then the rotated columns, for a tile's sides are powers of
two.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.attention_inputs.parts_triton import rotated
from pallas_kernels.cached_rows import KeyValues, QuantKV
from pallas_kernels.sparse_attention.tilings import Tiling, tiling_for
from pallas_kernels.target import current_target
from pallas_kernels.triton_call import triton_call

_LOWEST = tl.constexpr(-3.4028234663852886e38)  # float32; finite, so that its difference to itself is 0
_LOG2_E = tl.constexpr(math.log2(math.e))
_LOOKED_UP = tl.constexpr(4096)  # places at once
_TO_NUMBERS = tl.constexpr(2.0**120)  # see `_piece`


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
def _channel(piece: tl.constexpr, PIECES: tl.constexpr, D: tl.constexpr):
    """The channels of a piece; the last two are as wide as each other."""
    WIDTH: tl.constexpr = D >> (piece + 1 if piece + 1 < PIECES else PIECES - 1)
    return D - (D >> piece) + tl.arange(0, WIDTH)


@triton.jit
def _piece(
    kv,
    scale,
    rope,
    row,  # [BLOCK_KEYS] int64
    present,
    piece: tl.constexpr,
    PIECES: tl.constexpr,
    D: tl.constexpr,
    SCALES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """[BLOCK_KEYS, width] numbers of these rows; zeros where none is present.

    The bits of a code, moved to those of a float32, are its number times 2^-120, whether normal or not. Codes
    that are no numbers become 480.
    """
    ROTATED: tl.constexpr = D >> (PIECES - 1)
    channel, there = _channel(piece, PIECES, D)[None, :], present[:, None]
    if PIECES == 1:
        return (tl.load(kv + row[:, None] * D + channel, mask=there, other=0.0)).to(DTYPE)
    elif piece == PIECES - 1:
        at = row[:, None] * ROTATED + channel - (D - ROTATED)
        return tl.load(rope + at, mask=there, other=0.0).to(DTYPE)
    else:
        WIDTH: tl.constexpr = D >> (piece + 1)
        ROWS: tl.constexpr = row.shape[0]
        BLOCKS: tl.constexpr = (WIDTH + 63) // 64
        code = tl.load(kv + row[:, None] * (D - ROTATED) + channel, mask=there, other=0).to(tl.int32)
        block = (D - (D >> piece)) // 64 + tl.arange(0, BLOCKS)[None, :]
        exponent = tl.load(scale + row[:, None] * SCALES + block, mask=there, other=0).to(tl.int32)
        bits = ((code & 0x80) << 24) | ((code & 0x7F) << 20)
        number = bits.to(tl.float32, bitcast=True) * _TO_NUMBERS
        # 2^-127, the smallest scale, is no normal number.
        power = tl.maximum(exponent << 23, 0x400000).to(tl.float32, bitcast=True)
        number = tl.reshape(number, [ROWS, BLOCKS, WIDTH // BLOCKS]) * power[:, :, None]
        return tl.reshape(number, [ROWS, WIDTH]).to(DTYPE)


@triton.jit
def _walk(
    q,  # [B, T, H, D] bfloat16 or float32
    window_kv,  # [B, R, D] as q, or codes of a QuantKV as uint8
    window_scale,  # its scales; never read if PIECES is 1
    window_rope,  # the same
    window_index,  # [B, T, W] int32
    compressed_kv,  # [B, S, D]; never read if K is 0, and so on
    compressed_scale,
    compressed_rope,
    compressed_index,  # [B, T, K] int32
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
    PIECES: tl.constexpr,
    SCALES: tl.constexpr,
    SCALE: tl.constexpr,  # of logits, times log2(e)
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Over blocks `split`, `split + SPLITS`, ...: sum of weight * key, largest logit, sum of weights."""
    WINDOW_BLOCKS: tl.constexpr = (W + BLOCK_KEYS - 1) // BLOCK_KEYS
    BLOCKS: tl.constexpr = WINDOW_BLOCKS + (K + BLOCK_KEYS - 1) // BLOCK_KEYS
    TURNS: tl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS
    DTYPE: tl.constexpr = q.dtype.element_ty
    queries, sums = (), ()
    for piece in tl.static_range(PIECES):
        channel = _channel(piece, PIECES, D)
        q_at = (query * H + head)[:, None] * D + channel[None, :]
        if H % BLOCK_HEADS == 0:
            queries += (tl.load(q + q_at),)
        else:
            queries += (tl.load(q + q_at, mask=(head < H)[:, None], other=0.0),)
        sums += (tl.zeros((BLOCK_HEADS, channel.shape[0]), tl.float32),)
    batch = query // T

    top = tl.full((BLOCK_HEADS,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK_HEADS,), tl.float32)
    first, end = _turns(window_index, compressed_index, query, split, W, K, BLOCK_KEYS, SPLITS, TURNS)
    for turn in range(first, end):
        block = turn * SPLITS + split
        index = _indices(
            window_index, compressed_index, query, block, tl.arange(0, BLOCK_KEYS), W, K, BLOCK_KEYS
        )
        present = index >= 0
        kv, scale, rope, rows = window_kv, window_scale, window_rope, R
        if K > 0:
            # A choice between pointers, not a branch: loads in a branch are not fetched ahead.
            in_window = block < WINDOW_BLOCKS
            kv, rows = tl.where(in_window, window_kv, compressed_kv), tl.where(in_window, R, S)
            if PIECES > 1:
                scale = tl.where(in_window, window_scale, compressed_scale)
                rope = tl.where(in_window, window_rope, compressed_rope)
        row = batch * rows + tl.minimum(tl.maximum(index, 0), rows - 1)
        keys = ()
        logit_HK = tl.zeros((BLOCK_HEADS, BLOCK_KEYS), tl.float32)
        for piece in tl.static_range(PIECES):
            key = _piece(kv, scale, rope, row, present, piece, PIECES, D, SCALES, DTYPE)
            logit_HK = tl.dot(queries[piece], key.T, logit_HK, input_precision="ieee")
            keys += (key,)
        logit_HK = tl.where(present[None, :], logit_HK, float("-inf"))
        higher = tl.maximum(top, tl.max(logit_HK, 1))
        # Subtracted before scaled: a fused multiply-add would leave huge logits a difference to themselves.
        weight_HK = tl.exp2((logit_HK - higher[:, None]) * SCALE)
        shrunk = tl.exp2((top - higher) * SCALE)
        total = total * shrunk + tl.sum(weight_HK, 1)
        new = ()
        for piece in tl.static_range(PIECES):
            sum_HD = sums[piece] * shrunk[:, None]
            new += (tl.dot(weight_HK.to(DTYPE), keys[piece], sum_HD, input_precision="ieee"),)
        sums, top = new, higher
    return sums, top, total


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
    window_scale,
    window_rope,
    window_index,
    compressed_kv,
    compressed_scale,
    compressed_rope,
    compressed_index,
    attn_sink,  # [H] float32
    cos,  # [B, T, PAIRS] float32; never read if PAIRS is 0
    sin,
    out,  # [B, T, H, D]
    T: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    PIECES: tl.constexpr,
    SCALES: tl.constexpr,
    SCALE: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """A program takes all keys: this is the result."""
    GROUPS: tl.constexpr = (H + BLOCK_HEADS - 1) // BLOCK_HEADS
    query = (tl.program_id(0) // GROUPS).to(tl.int64)
    head = tl.program_id(0) % GROUPS * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    real = head < H
    sums, top, total = _walk(
        *(q, window_kv, window_scale, window_rope, window_index),
        *(compressed_kv, compressed_scale, compressed_rope, compressed_index, query, head, 0),
        *(T, H, D, R, W, S, K, PIECES, SCALES, SCALE, BLOCK_HEADS, BLOCK_KEYS, 1),
    )
    sink = tl.load(attn_sink + head, mask=real, other=0.0)
    share = _share(total, sink, top * SCALE)
    for piece in tl.static_range(PIECES):
        channel, out_HD = _channel(piece, PIECES, D), sums[piece] * share[:, None]
        if piece == PIECES - 1 and PAIRS > 0:
            token = query + tl.zeros_like(head)
            out_HD = rotated(out_HD, cos, sin, token, real, BLOCK_HEADS, channel.shape[0], PAIRS, True)
        at = (query * H + head)[:, None] * D + channel[None, :]
        tl.store(out + at, out_HD.to(out.dtype.element_ty), mask=real[:, None])


@triton.jit
def _split(
    q,
    window_kv,
    window_scale,
    window_rope,
    window_index,
    compressed_kv,
    compressed_scale,
    compressed_rope,
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
    PIECES: tl.constexpr,
    SCALES: tl.constexpr,
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
    sums, top, total = _walk(
        *(q, window_kv, window_scale, window_rope, window_index),
        *(compressed_kv, compressed_scale, compressed_rope, compressed_index, query, head, split),
        *(T, H, D, R, W, S, K, PIECES, SCALES, SCALE, BLOCK_HEADS, BLOCK_KEYS, SPLITS),
    )
    row = (query * H + head) * SPLITS + split
    # Written as "none" and not as "some": what is not a number must come through.
    none = total == 0
    total = tl.where(none, 1.0, total)
    tl.store(weight + row, tl.where(none, float("-inf"), top * SCALE + tl.log2(total)), mask=real)
    for piece in tl.static_range(PIECES):
        at = row[:, None] * D + _channel(piece, PIECES, D)[None, :]
        tl.store(part + at, (sums[piece] / total[:, None]).to(part.dtype.element_ty), mask=real[:, None])


@triton.jit
def _combine(
    part,  # [B, T, H, SPLITS, D]
    weight,  # [B, T, H, SPLITS] float32
    attn_sink,  # [H] float32
    cos,  # [B, T, PAIRS] float32; never read if PAIRS is 0
    sin,
    out,  # [B, T, H, D]
    H: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """A program takes one head of one query: its splits, and the sink."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, triton.next_power_of_2(SPLITS))
    channel = tl.arange(0, D)
    log2_weight = tl.load(weight + row * SPLITS + split, mask=split < SPLITS, other=float("-inf"))
    sink = tl.load(attn_sink + row % H)
    top = tl.maximum(tl.max(log2_weight, 0), _LOWEST)
    share = _share(tl.sum(tl.exp2(log2_weight - top), 0), sink, top)
    # One split after the other: a thread has the same channels of all, and nothing is exchanged.
    out_D = tl.zeros([D], tl.float32)
    for number in tl.static_range(SPLITS):
        part_D = tl.load(part + (row * SPLITS + number) * D + channel).to(tl.float32)
        out_D += part_D * tl.exp2(tl.load(weight + row * SPLITS + number) - top)
    out_1D = (out_D * share)[None, :]
    if PAIRS > 0:
        token = row // H + tl.arange(0, 1)
        out_1D = rotated(out_1D, cos, sin, token, token >= 0, 1, D, PAIRS, True)
    tl.store(out + row * D + channel[None, :], out_1D.to(out.dtype.element_ty))


Turns = tuple[jax.Array, jax.Array] | None


def sparse_attention(
    q: jax.Array,
    window_kv: KeyValues,
    window_index: jax.Array,
    compressed_kv: KeyValues | None,
    compressed_index: jax.Array | None,
    attn_sink: jax.Array,
    turns: Turns,
    softmax_scale: float,
    tiling: Tiling | None = None,
) -> jax.Array:
    """Rows all plain and of the dtype of q, or all QuantKV; `tiling` in place of the table's."""
    batch, tokens, heads, channels = q.shape
    queries = batch * tokens
    if compressed_kv is None or compressed_index is None or 0 in (compressed_kv.size, compressed_index.size):
        compressed_kv, compressed_index, entries, chosen = window_kv, window_index, 0, 0  # never read
    else:
        entries, chosen = compressed_kv.shape[1], compressed_index.shape[2]
    window = window_index.shape[2]
    tiling = tiling or tiling_for(current_target().arch, queries, heads, window + chosen)
    pieces, scales = 1, 0
    if isinstance(window_kv, QuantKV):
        pieces, scales = (channels // window_kv.rope.shape[-1]).bit_length(), window_kv.scale.shape[-1]
    constants: dict[str, Any] = {
        **{"T": tokens, "H": heads, "D": channels, "R": window_kv.shape[1], "W": window},
        **{"S": entries, "K": chosen, "PIECES": pieces, "SCALES": scales},
        **{"SCALE": softmax_scale * _LOG2_E.value, "BLOCK_HEADS": tiling.heads, "BLOCK_KEYS": tiling.keys},
        **{"num_warps": tiling.num_warps, "num_stages": tiling.num_stages},
    }
    arrays = (q, *_arrays(window_kv), window_index, *_arrays(compressed_kv), compressed_index)
    groups = queries * -(-heads // tiling.heads)
    if tiling.splits == 1:
        cos, sin, pairs = _turns_of(turns, attn_sink)
        out = jax.ShapeDtypeStruct(q.shape, q.dtype)
        arrays = (*arrays, attn_sink, cos, sin)
        return triton_call(_whole, *arrays, out=out, grid=(groups,), PAIRS=pairs, **constants)
    parts = (
        jax.ShapeDtypeStruct((*q.shape[:3], tiling.splits, channels), q.dtype),
        jax.ShapeDtypeStruct((*q.shape[:3], tiling.splits), jnp.float32),
    )
    grid = (groups * tiling.splits,)
    part, weight = triton_call(_split, *arrays, out=parts, grid=grid, SPLITS=tiling.splits, **constants)
    return combine(part, weight, attn_sink, turns)


def combine(part: jax.Array, weight: jax.Array, attn_sink: jax.Array, turns: Turns) -> jax.Array:
    """[B, T, H, D] of splits [B, T, H, splits, D] and of the log2 of each one's sum of weights."""
    *outer, heads, splits, channels = part.shape
    out = jax.ShapeDtypeStruct((*outer, heads, channels), part.dtype)
    cos, sin, pairs = _turns_of(turns, attn_sink)
    sizes: dict[str, Any] = {"H": heads, "D": channels, "PAIRS": pairs, "SPLITS": splits}
    grid = (math.prod(outer) * heads,)
    return triton_call(_combine, part, weight, attn_sink, cos, sin, out=out, grid=grid, num_warps=1, **sizes)


def _turns_of(turns: Turns, unused: jax.Array) -> tuple[jax.Array, jax.Array, int]:
    return (unused, unused, 0) if turns is None else (*turns, turns[0].shape[-1])


def _arrays(kv: KeyValues) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the kernels take of it; sm_80 knows bytes, but no FP8."""
    if isinstance(kv, QuantKV):
        return jax.lax.bitcast_convert_type(kv.nope, jnp.uint8), kv.scale, kv.rope
    assert isinstance(kv, jax.Array)
    return kv, kv, kv
