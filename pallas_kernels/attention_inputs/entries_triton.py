"""`compressed_entries` in Triton: a program makes one entry, from raw rows to the bytes that the cache keeps.

Most decode steps complete no entry: their programs put the new rows into the rings and are gone.
"""

import jax
import triton
import triton.language as tl
from triton.language.extra import libdevice

from pallas_kernels.attention_inputs.parts_triton import (
    as_bytes,
    constants,
    from_bytes,
    hadamard,
    keep_index_keys,
    keep_key_values,
    normalized,
    requantized,
    rotated,
    rounded,
)
from pallas_kernels.attention_inputs.reference import raw_rows, written
from pallas_kernels.cached_rows import QuantKV
from pallas_kernels.formats import QuantArray
from pallas_kernels.triton_call import triton_call

_ROWS_AT_ONCE = 32  # of a window


@triton.jit
def _pooled(
    projected,
    ape,
    kv_ring,
    score_ring,
    batch,
    start,
    first,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COLUMN: tl.constexpr,
    SLOTS: tl.constexpr,
    RATIO: tl.constexpr,
    OVERLAP: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """[1, WIDTH]: the rows of the window that begins at `first`, averaged under the softmax of scores."""
    CHANNELS: tl.constexpr = WIDTH * (2 if OVERLAP else 1)
    COUNT: tl.constexpr = RATIO * (2 if OVERLAP else 1)
    channel = tl.arange(0, WIDTH)[None, :]
    # Lower than any score, but no infinity: the difference of two would not be a number.
    most = tl.full([LANES, WIDTH], -3e38, tl.float32)
    total = tl.zeros([LANES, WIDTH], tl.float32)
    weighted = tl.zeros([LANES, WIDTH], tl.float32)
    for begin in tl.static_range(0, COUNT, ROWS):
        place = begin + tl.arange(0, ROWS)
        if OVERLAP:  # the window before takes the first half of the channels
            row = first - RATIO + place
            half = tl.where(place >= RATIO, WIDTH, 0)[:, None]
        else:
            row = first + place
            half = tl.zeros([ROWS, 1], tl.int32)
        there, new = (row >= 0)[:, None], (row >= start)[:, None]
        new_at = (batch * TOKENS + row - start).to(tl.int64)[:, None] * COLUMNS + COLUMN + half + channel
        old_at = (batch * SLOTS + row % SLOTS).to(tl.int64)[:, None] * CHANNELS + half + channel
        from_ = tl.where(new, projected + new_at + CHANNELS, score_ring + old_at)
        scores = tl.load(from_, mask=there, other=float("-inf"))
        # Those in the ring have it already.
        ape_at = (place % RATIO)[:, None] * CHANNELS + half + channel
        scores += tl.load(ape + ape_at, mask=new, other=0.0)
        values = tl.load(tl.where(new, projected + new_at, kv_ring + old_at), mask=there, other=0.0)

        # Each thread goes through rows of its own, and meets the others at the end.
        scores = tl.reshape(scores, [ROWS // LANES, LANES, WIDTH])
        values = tl.reshape(values, [ROWS // LANES, LANES, WIDTH])
        higher = tl.maximum(most, tl.max(scores, 0))
        shares, shrink = libdevice.exp(scores - higher[None, :, :]), libdevice.exp(most - higher)
        total = total * shrink + tl.sum(shares, 0)
        weighted = weighted * shrink + tl.sum(shares * values, 0)
        most = higher
    shrink = libdevice.exp(most - tl.max(most, 0, keep_dims=True))
    total, weighted = tl.sum(total * shrink, 0, keep_dims=True), tl.sum(weighted * shrink, 0, keep_dims=True)
    return weighted / total


@triton.jit
def _remember(
    projected,
    ape,
    new_kv_ring,
    new_score_ring,
    batch,
    start,
    token,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COLUMN: tl.constexpr,
    SLOTS: tl.constexpr,
    RATIO: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Puts the row of one new token into both rings."""
    channel = tl.arange(0, CHANNELS)
    new = projected + (batch * TOKENS + token).to(tl.int64) * COLUMNS + COLUMN + channel
    score = tl.load(new + CHANNELS) + tl.load(ape + (start + token) % RATIO * CHANNELS + channel)
    at = (batch * SLOTS + (start + token) % SLOTS).to(tl.int64) * CHANNELS + channel
    tl.store(new_kv_ring + at, tl.load(new))
    tl.store(new_score_ring + at, score)


@triton.jit
def _compressed_entries(
    projected,  # [B, TOKENS, COLUMNS] float32: from COLUMN on CHANNELS values, then as many scores
    ape,  # [RATIO, CHANNELS] float32
    values,  # of the cache, [B, CAPACITY, ..]: codes; as it was, and below as it becomes
    scale,
    rope,  # with FOR_INDEX there is none
    kv_ring,  # [B, SLOTS, CHANNELS] float32, where CHANNELS is WIDTH or 2 * WIDTH
    score_ring,
    position,  # [B] int32
    length,
    weight,  # [WIDTH]
    cos,  # [B, ENTRIES, PAIRS] float32
    sin,
    new_values,
    new_scale,
    new_rope,
    new_kv_ring,
    new_score_ring,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COLUMN: tl.constexpr,
    SLOTS: tl.constexpr,
    CAPACITY: tl.constexpr,
    SCALES: tl.constexpr,
    ENTRIES: tl.constexpr,
    RATIO: tl.constexpr,
    OVERLAP: tl.constexpr,
    WIDTH: tl.constexpr,
    LOG2_WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    EPS: tl.constexpr,
    FOR_INDEX: tl.constexpr,
    REMEMBER: tl.constexpr,  # whether no new row takes the slot of one that an entry may need
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    FLOOR: tl.constexpr,
    MOST_BITS: tl.constexpr,
    LOWEST_EXPONENT: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    VENDOR: tl.constexpr,
):
    program = tl.program_id(0)
    batch = program // ENTRIES
    start = tl.load(position + batch)
    tokens = tl.load(length + batch)
    first = (start // RATIO + program % ENTRIES) * RATIO
    if REMEMBER:
        CHANNELS: tl.constexpr = WIDTH * (2 if OVERLAP else 1)
        begin = program % ENTRIES * RATIO
        for token in range(begin, tl.minimum(tokens, begin + RATIO)):
            _remember(
                *(projected, ape, new_kv_ring, new_score_ring, batch, start, token),
                *(TOKENS, COLUMNS, COLUMN, SLOTS, RATIO, CHANNELS),
            )
    if (first + RATIO <= start + tokens) & (first // RATIO < CAPACITY):
        weights = tl.load(weight + tl.arange(0, WIDTH)[None, :]).to(tl.float32)
        x = _pooled(
            *(projected, ape, kv_ring, score_ring, batch, start, first),
            *(TOKENS, COLUMNS, COLUMN, SLOTS, RATIO, OVERLAP, WIDTH, ROWS, LANES),
        )
        x = rounded(normalized(rounded(x, VENDOR), WIDTH, EPS) * weights, VENDOR)
        one = program + tl.arange(0, 1)
        x = rotated(x, cos, sin, one, one >= 0, 1, WIDTH, PAIRS, False)
        if FOR_INDEX:
            x = rounded(hadamard(rounded(x, VENDOR), 1, WIDTH, LOG2_WIDTH), VENDOR)
        QUANTISED: tl.constexpr = WIDTH if FOR_INDEX else WIDTH - 2 * PAIRS
        x, exponent = requantized(
            x, 1, WIDTH, QUANTISED, GROUP, FLOOR, MOST_BITS, LOWEST_EXPONENT, MANTISSA_BITS
        )
        to = batch.to(tl.int64) * CAPACITY + first // RATIO + tl.arange(0, 1)
        if FOR_INDEX:
            keep_index_keys(x, exponent, new_values, new_scale, to, one >= 0, 1, WIDTH, GROUP)
        else:
            keep_key_values(
                *(x, exponent, new_values, new_scale, new_rope, to, one >= 0),
                *(1, WIDTH, PAIRS, GROUP, SCALES),
            )


def compressed_entries(
    projected: jax.Array,
    column: int,
    ape: jax.Array,
    entries: QuantKV | QuantArray,
    kv_ring: jax.Array,
    score_ring: jax.Array,
    position: jax.Array,
    length: jax.Array,
    weight: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    eps: float,
    for_index: bool,
    format: str,
    dtype,
) -> tuple[QuantKV | QuantArray, jax.Array, jax.Array]:
    batch, tokens, columns = projected.shape
    (ratio, channels), (width,) = ape.shape, weight.shape
    slots, windows = kv_ring.shape[1], channels // width
    remember = tokens <= slots - (windows * ratio - 1)
    at_once = min(ratio * windows, _ROWS_AT_ONCE)
    num_warps = max(1, min(16, width * at_once // 1024))
    codes = as_bytes(entries)
    if for_index:
        codes.append(weight)  # in place of rotated columns, never read or written
    kept = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in (*codes, kv_ring, score_ring)]
    aliases = {2 + n: n for n in range(5) if not (for_index and n == 2)}
    *codes, new_kv, new_score = triton_call(
        _compressed_entries,
        projected,
        ape,
        *codes,
        kv_ring,
        score_ring,
        position,
        length,
        weight,
        cos,
        sin,
        out=kept,
        aliases=aliases,
        grid=(batch * cos.shape[1],),
        num_warps=num_warps,
        TOKENS=tokens,
        COLUMNS=columns,
        COLUMN=column,
        SLOTS=slots,
        CAPACITY=entries.shape[1],
        SCALES=codes[1].shape[-1],
        ENTRIES=cos.shape[1],
        RATIO=ratio,
        OVERLAP=windows == 2,
        WIDTH=width,
        LOG2_WIDTH=width.bit_length() - 1,
        PAIRS=cos.shape[-1],
        EPS=eps,
        FOR_INDEX=for_index,
        REMEMBER=remember,
        ROWS=at_once,
        LANES=max(1, num_warps * 128 // width),  # rows at a time, four channels a thread
        **constants(format),
    )
    rings = (new_kv, new_score)
    if not remember:
        rows = raw_rows(projected, column, ape, position)
        rings = (written(*each, position, length) for each in zip(rings, rows, strict=True))
    return from_bytes(codes[:2] if for_index else codes, entries), *rings
