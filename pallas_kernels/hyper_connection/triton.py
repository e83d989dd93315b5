"""Hyper-connections of four streams in Triton, two launches around every sub-layer.

`_project` multiplies the streams by `fn` and sums their squares; programs share out tokens and channels, so
that a single token keeps the whole chip busy. `_post_project` writes the new streams on the way and projects
what it has just written. What each of them leaves in `partial` is a sum over some channels.

`_finish` adds these sums up, in the same order for every run. Some of its programs take whole tokens through
the Sinkhorn steps, 16 numbers in registers; the others collapse the streams of one token each.

The projection runs on tensor cores and is that of float32: streams are bfloat16, and every number of `fn` is
cut into three bfloat16 numbers whose sum it is.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from triton.language.extra import libdevice

from pallas_kernels.triton_call import triton_call

STREAMS = 4
_COLUMNS = 32  # of a row of `partial`: a product with every row of fn, then the sum of squares


class Tiling(NamedTuple):
    """How `_project` and `_post_project` are shared out.

    Attributes:
      tokens, channels: of a tile; a program has this tile of all streams.
      most_blocks: tiles that a program goes through at most, along the channels.
      cuts_first: whether `fn` is cut up once, in a launch of its own, and not by every program.
    """

    tokens: int
    channels: int
    most_blocks: int
    num_warps: int
    num_stages: int
    cuts_first: bool = False


def tiling(tokens: int) -> Tiling:
    """A few tokens are spread over many programs; many tokens share what a program reads of `fn`."""
    if tokens <= 16:
        return Tiling(16, 32, 1, 4, 1)
    blocks = 1 << max(0, (tokens // 128).bit_length() - 1)  # which leaves some 256 programs
    if tokens < 1024:
        return Tiling(64, 32, blocks, 8, 1 if blocks == 1 else 2)
    return Tiling(64, 32, blocks, 4, 2, cuts_first=True)


# --- the projection


@triton.jit
def _column(numbers, INDEX: tl.constexpr):
    """[rows] of [rows, columns]."""
    return tl.sum(tl.where(tl.arange(0, numbers.shape[1])[None, :] == INDEX, numbers, 0.0), 1)


@triton.jit
def _accumulated(sums, squares, stream, weight):
    """`sums` [tokens, 32] and `squares` [tokens, channels] with a tile of a stream and of fn in them."""
    high = weight.to(tl.bfloat16)
    rest = weight - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    # Tensor cores cut sums off instead of rounding them: they add up few terms, the smallest first.
    product = tl.dot(stream, tl.trans(low))
    product = tl.dot(stream, tl.trans(middle), product)
    wide = stream.to(tl.float32)
    return sums + tl.dot(stream, tl.trans(high), product), squares + wide * wide


@triton.jit
def _accumulated_cut(sums, squares, stream, weight, real, PART: tl.constexpr):
    """`_accumulated` with fn cut up before; `weight` points into the highest part."""
    high = tl.load(weight, mask=real, other=0.0)
    middle = tl.load(weight + PART, mask=real, other=0.0)
    low = tl.load(weight + 2 * PART, mask=real, other=0.0)
    product = tl.dot(stream, tl.trans(low))
    product = tl.dot(stream, tl.trans(middle), product)
    wide = stream.to(tl.float32)
    return sums + tl.dot(stream, tl.trans(high), product), squares + wide * wide


@triton.jit
def _store_partial(
    partial,
    sums,
    squares,
    split,
    token,
    real,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)
    sums = tl.where(column[None, :] == ROWS, tl.sum(squares, 1)[:, None], sums)
    at = (split.to(tl.int64) * TOKENS + token)[:, None] * COLUMNS + column[None, :]
    tl.store(partial + at, sums, mask=real[:, None])


@triton.jit
def _project(
    streams,  # [TOKENS, 4, WIDTH] bfloat16
    fn,  # [ROWS, 4*WIDTH] float32; with CUT, [3, ROWS, 4*WIDTH] bfloat16
    partial,  # [SPLITS, TOKENS, COLUMNS] float32
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    CUT: tl.constexpr,
):
    PART: tl.constexpr = ROWS * 4 * WIDTH
    split = tl.program_id(0) % SPLITS
    token = tl.program_id(0) // SPLITS * TILE + tl.arange(0, TILE)
    real = token < TOKENS
    row = tl.arange(0, COLUMNS)
    sums = tl.zeros((TILE, COLUMNS), tl.float32)
    squares = tl.zeros((TILE, CHANNELS), tl.float32)
    for block in tl.range(BLOCKS, num_stages=STAGES):
        channel = (split * BLOCKS + block) * CHANNELS + tl.arange(0, CHANNELS)
        stream = streams + token[:, None].to(tl.int64) * (4 * WIDTH) + channel[None, :]
        weight = fn + row[:, None] * (4 * WIDTH) + channel[None, :]
        # All are asked for before any is waited for.
        x0 = tl.load(stream, mask=real[:, None], other=0.0)
        x1 = tl.load(stream + WIDTH, mask=real[:, None], other=0.0)
        x2 = tl.load(stream + 2 * WIDTH, mask=real[:, None], other=0.0)
        x3 = tl.load(stream + 3 * WIDTH, mask=real[:, None], other=0.0)
        if not CUT:
            w0 = tl.load(weight, mask=row[:, None] < ROWS, other=0.0)
            w1 = tl.load(weight + WIDTH, mask=row[:, None] < ROWS, other=0.0)
            w2 = tl.load(weight + 2 * WIDTH, mask=row[:, None] < ROWS, other=0.0)
            w3 = tl.load(weight + 3 * WIDTH, mask=row[:, None] < ROWS, other=0.0)
        if CUT:
            sums, squares = _accumulated_cut(sums, squares, x0, weight, row[:, None] < ROWS, PART)
            sums, squares = _accumulated_cut(sums, squares, x1, weight + WIDTH, row[:, None] < ROWS, PART)
            sums, squares = _accumulated_cut(sums, squares, x2, weight + 2 * WIDTH, row[:, None] < ROWS, PART)
            sums, squares = _accumulated_cut(sums, squares, x3, weight + 3 * WIDTH, row[:, None] < ROWS, PART)
        else:
            sums, squares = _accumulated(sums, squares, x0, w0)
            sums, squares = _accumulated(sums, squares, x1, w1)
            sums, squares = _accumulated(sums, squares, x2, w2)
            sums, squares = _accumulated(sums, squares, x3, w3)
    _store_partial(partial, sums, squares, split, token, real, ROWS, TOKENS, COLUMNS)


@triton.jit
def _mixed_in(y, x0, x1, x2, x3, post, comb, STREAM: tl.constexpr):
    """[tokens, channels] of new stream number STREAM, of `post` and `comb` as rows of a tile."""
    c0 = _column(comb, STREAM)[:, None]
    c1 = _column(comb, 4 + STREAM)[:, None]
    c2 = _column(comb, 8 + STREAM)[:, None]
    c3 = _column(comb, 12 + STREAM)[:, None]
    return (_column(post, STREAM)[:, None] * y + (c0 * x0 + c1 * x1 + c2 * x2 + c3 * x3)).to(tl.bfloat16)


@triton.jit
def _post_project(
    y,  # [TOKENS, WIDTH] bfloat16
    streams,  # [TOKENS, 4, WIDTH] bfloat16
    post,  # [TOKENS, 4] float32
    comb,  # [TOKENS, 4, 4] float32
    fn,  # [ROWS, 4*WIDTH] float32; with CUT, [3, ROWS, 4*WIDTH] bfloat16
    new,  # like streams
    partial,  # [SPLITS, TOKENS, COLUMNS] float32
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    CUT: tl.constexpr,
):
    PART: tl.constexpr = ROWS * 4 * WIDTH
    split = tl.program_id(0) % SPLITS
    token = tl.program_id(0) // SPLITS * TILE + tl.arange(0, TILE)
    real = token < TOKENS
    # Half as many float32 columns as bfloat16 channels: the threads that have a token's coefficients in these
    # tiles have its channels in the other ones, and nothing goes through shared memory.
    wide = tl.arange(0, CHANNELS // 2)[None, :]
    taken = tl.load(post + token[:, None] * 4 + wide, mask=real[:, None] & (wide < 4), other=0.0)
    mixing = tl.load(comb + token[:, None] * 16 + wide, mask=real[:, None] & (wide < 16), other=0.0)
    row = tl.arange(0, COLUMNS)
    sums = tl.zeros((TILE, COLUMNS), tl.float32)
    squares = tl.zeros((TILE, CHANNELS), tl.float32)
    for block in tl.range(BLOCKS, num_stages=STAGES):
        channel = (split * BLOCKS + block) * CHANNELS + tl.arange(0, CHANNELS)
        at = token[:, None].to(tl.int64) * (4 * WIDTH) + channel[None, :]
        weight = fn + row[:, None] * (4 * WIDTH) + channel[None, :]
        written = tl.load(
            y + token[:, None].to(tl.int64) * WIDTH + channel[None, :], mask=real[:, None], other=0.0
        ).to(tl.float32)
        x0 = tl.load(streams + at, mask=real[:, None], other=0.0).to(tl.float32)
        x1 = tl.load(streams + at + WIDTH, mask=real[:, None], other=0.0).to(tl.float32)
        x2 = tl.load(streams + at + 2 * WIDTH, mask=real[:, None], other=0.0).to(tl.float32)
        x3 = tl.load(streams + at + 3 * WIDTH, mask=real[:, None], other=0.0).to(tl.float32)
        if not CUT:
            w0 = tl.load(weight, mask=row[:, None] < ROWS, other=0.0)
            w1 = tl.load(weight + WIDTH, mask=row[:, None] < ROWS, other=0.0)
            w2 = tl.load(weight + 2 * WIDTH, mask=row[:, None] < ROWS, other=0.0)
            w3 = tl.load(weight + 3 * WIDTH, mask=row[:, None] < ROWS, other=0.0)
        n0 = _mixed_in(written, x0, x1, x2, x3, taken, mixing, 0)
        n1 = _mixed_in(written, x0, x1, x2, x3, taken, mixing, 1)
        n2 = _mixed_in(written, x0, x1, x2, x3, taken, mixing, 2)
        n3 = _mixed_in(written, x0, x1, x2, x3, taken, mixing, 3)
        tl.store(new + at, n0, mask=real[:, None])
        tl.store(new + at + WIDTH, n1, mask=real[:, None])
        tl.store(new + at + 2 * WIDTH, n2, mask=real[:, None])
        tl.store(new + at + 3 * WIDTH, n3, mask=real[:, None])
        if CUT:
            sums, squares = _accumulated_cut(sums, squares, n0, weight, row[:, None] < ROWS, PART)
            sums, squares = _accumulated_cut(sums, squares, n1, weight + WIDTH, row[:, None] < ROWS, PART)
            sums, squares = _accumulated_cut(sums, squares, n2, weight + 2 * WIDTH, row[:, None] < ROWS, PART)
            sums, squares = _accumulated_cut(sums, squares, n3, weight + 3 * WIDTH, row[:, None] < ROWS, PART)
        else:
            sums, squares = _accumulated(sums, squares, n0, w0)
            sums, squares = _accumulated(sums, squares, n1, w1)
            sums, squares = _accumulated(sums, squares, n2, w2)
            sums, squares = _accumulated(sums, squares, n3, w3)
    _store_partial(partial, sums, squares, split, token, real, ROWS, TOKENS, COLUMNS)


@triton.jit
def _post(
    y,  # [TOKENS, WIDTH] bfloat16
    streams,  # [TOKENS, 4, WIDTH] bfloat16
    post,  # [TOKENS, 4] float32
    comb,  # [TOKENS, 4, 4] float32
    new,  # like streams
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    token = (tl.program_id(0) // SPLITS).to(tl.int64)
    channel = tl.program_id(0) % SPLITS * CHANNELS + tl.arange(0, CHANNELS)
    real = channel < WIDTH
    at = token * (4 * WIDTH) + channel
    written = tl.load(y + token * WIDTH + channel, mask=real, other=0.0).to(tl.float32)
    x0 = tl.load(streams + at, mask=real, other=0.0).to(tl.float32)
    x1 = tl.load(streams + at + WIDTH, mask=real, other=0.0).to(tl.float32)
    x2 = tl.load(streams + at + 2 * WIDTH, mask=real, other=0.0).to(tl.float32)
    x3 = tl.load(streams + at + 3 * WIDTH, mask=real, other=0.0).to(tl.float32)
    for stream in tl.static_range(4):
        mixing = comb + token * 16 + stream
        kept = tl.load(mixing) * x0 + tl.load(mixing + 4) * x1
        kept += tl.load(mixing + 8) * x2 + tl.load(mixing + 12) * x3
        mixed = tl.load(post + token * 4 + stream) * written + kept
        tl.store(new + at + stream * WIDTH, mixed.to(tl.bfloat16), mask=real)


# --- what follows from the projection


@triton.jit
def _logits(
    partial,
    scale,
    base,
    token,
    real,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    COLUMNS: tl.constexpr,
    NORM_EPS: tl.constexpr,
):
    """[tokens, COLUMNS]: for every row of fn what goes into a sigmoid or the Sinkhorn steps."""
    split, column = tl.arange(0, SPLITS_PADDED), tl.arange(0, COLUMNS)
    at = (split[:, None].to(tl.int64) * TOKENS + token[None, :])[:, :, None] * COLUMNS + column[None, None, :]
    there = ((split[:, None] < SPLITS) & real[None, :])[:, :, None] & (column[None, None, :] <= ROWS)
    sums = tl.sum(tl.load(partial + at, mask=there, other=0.0), 0)
    squares = _column(sums, ROWS)
    inverse_rms = tl.rsqrt(squares / (4 * WIDTH) + NORM_EPS)
    # One scale each for pre and post, which have a row for a stream, and for comb.
    scales = tl.load(scale + tl.minimum(column // 4, 2), mask=column < ROWS, other=0.0)
    return sums * inverse_rms[:, None] * scales[None, :] + tl.load(
        base + column, mask=column < ROWS, other=0.0
    )


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + libdevice.exp(-x))  # pyright: ignore[reportOperatorIssue]  (a stub says None)


@triton.jit
def _softmax(a, b, c, d, EPS: tl.constexpr):
    """Of four numbers, plus EPS."""
    most = tl.maximum(tl.maximum(a, b), tl.maximum(c, d))
    a, b = libdevice.exp(a - most), libdevice.exp(b - most)
    c, d = libdevice.exp(c - most), libdevice.exp(d - most)
    inverse = 1.0 / ((a + b) + (c + d))  # pyright: ignore[reportOperatorIssue]  (a stub says None)
    return a * inverse + EPS, b * inverse + EPS, c * inverse + EPS, d * inverse + EPS


@triton.jit
def _over_sum(a, b, c, d, EPS: tl.constexpr, VENDOR: tl.constexpr):
    total = ((a + b) + (c + d)) + EPS
    if VENDOR == "cuda":
        # Within an ulp, in one instruction; 1 / total takes ten, to be right for denormal numbers too.
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [total], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        inverse = 1.0 / total
    return a * inverse, b * inverse, c * inverse, d * inverse


@triton.jit
def _sinkhorn(logits, comb, token, real, ITERATIONS: tl.constexpr, EPS: tl.constexpr, VENDOR: tl.constexpr):
    """Writes comb of some tokens. Every thread has whole matrices, so no step waits for another thread."""
    a0, a1, a2, a3 = _softmax(
        _column(logits, 8),
        _column(logits, 9),
        _column(logits, 10),
        _column(logits, 11),
        EPS,
    )
    b0, b1, b2, b3 = _softmax(
        _column(logits, 12),
        _column(logits, 13),
        _column(logits, 14),
        _column(logits, 15),
        EPS,
    )
    c0, c1, c2, c3 = _softmax(
        _column(logits, 16),
        _column(logits, 17),
        _column(logits, 18),
        _column(logits, 19),
        EPS,
    )
    d0, d1, d2, d3 = _softmax(
        _column(logits, 20),
        _column(logits, 21),
        _column(logits, 22),
        _column(logits, 23),
        EPS,
    )
    a0, b0, c0, d0 = _over_sum(a0, b0, c0, d0, EPS, VENDOR)
    a1, b1, c1, d1 = _over_sum(a1, b1, c1, d1, EPS, VENDOR)
    a2, b2, c2, d2 = _over_sum(a2, b2, c2, d2, EPS, VENDOR)
    a3, b3, c3, d3 = _over_sum(a3, b3, c3, d3, EPS, VENDOR)
    for _ in range(ITERATIONS - 1):
        a0, a1, a2, a3 = _over_sum(a0, a1, a2, a3, EPS, VENDOR)
        b0, b1, b2, b3 = _over_sum(b0, b1, b2, b3, EPS, VENDOR)
        c0, c1, c2, c3 = _over_sum(c0, c1, c2, c3, EPS, VENDOR)
        d0, d1, d2, d3 = _over_sum(d0, d1, d2, d3, EPS, VENDOR)
        a0, b0, c0, d0 = _over_sum(a0, b0, c0, d0, EPS, VENDOR)
        a1, b1, c1, d1 = _over_sum(a1, b1, c1, d1, EPS, VENDOR)
        a2, b2, c2, d2 = _over_sum(a2, b2, c2, d2, EPS, VENDOR)
        a3, b3, c3, d3 = _over_sum(a3, b3, c3, d3, EPS, VENDOR)
    row = comb + token * 16
    _store_row(row, a0, a1, a2, a3, real)
    _store_row(row + 4, b0, b1, b2, b3, real)
    _store_row(row + 8, c0, c1, c2, c3, real)
    _store_row(row + 12, d0, d1, d2, d3, real)


@triton.jit
def _store_row(row, a, b, c, d, real):
    tl.store(row, a, mask=real)
    tl.store(row + 1, b, mask=real)
    tl.store(row + 2, c, mask=real)
    tl.store(row + 3, d, mask=real)


@triton.jit
def _collapse(
    streams,
    partial,
    scale,
    base,
    norm_weight,
    x,
    place,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    COLUMNS: tl.constexpr,
    EPS: tl.constexpr,
    NORM_EPS: tl.constexpr,
    NORM: tl.constexpr,
):
    """Writes x of one token."""
    # The last tokens were written last, so they are what the cache still holds.
    token = TOKENS - 1 - place
    channel = tl.arange(0, WIDTH_PADDED)
    real = channel < WIDTH
    stream = streams + token.to(tl.int64) * (4 * WIDTH) + channel
    # These wait for nothing, so they come before the sums.
    x0 = tl.load(stream, mask=real, other=0.0).to(tl.float32)
    x1 = tl.load(stream + WIDTH, mask=real, other=0.0).to(tl.float32)
    x2 = tl.load(stream + 2 * WIDTH, mask=real, other=0.0).to(tl.float32)
    x3 = tl.load(stream + 3 * WIDTH, mask=real, other=0.0).to(tl.float32)
    one = token + tl.arange(0, 1)
    logits = _logits(
        partial, scale, base, one, one < TOKENS, TOKENS, WIDTH, ROWS, SPLITS, SPLITS_PADDED, COLUMNS, NORM_EPS
    )
    pre = _sigmoid(logits) + EPS
    collapsed = tl.sum(_column(pre, 0), 0) * x0 + tl.sum(_column(pre, 1), 0) * x1
    collapsed += tl.sum(_column(pre, 2), 0) * x2 + tl.sum(_column(pre, 3), 0) * x3
    out = collapsed.to(tl.bfloat16)
    if NORM:
        wide = out.to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + NORM_EPS)
        weight = tl.load(norm_weight + channel, mask=real, other=0.0).to(tl.float32)
        out = (wide * inverse_rms * weight).to(tl.bfloat16)
    tl.store(x + token.to(tl.int64) * WIDTH + channel, out, mask=real)


@triton.jit
def _finish(
    streams,  # [TOKENS, 4, WIDTH] bfloat16
    partial,  # [SPLITS, TOKENS, COLUMNS] float32
    scale,  # [3] float32
    base,  # [ROWS] float32
    norm_weight,  # [WIDTH]; never read unless NORM
    x,  # [TOKENS, WIDTH] bfloat16
    post,  # [TOKENS, 4] float32
    comb,  # [TOKENS, 4, 4] float32
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    COLUMNS: tl.constexpr,
    EPS: tl.constexpr,
    NORM_EPS: tl.constexpr,
    NORM: tl.constexpr,
    ITERATIONS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    VENDOR: tl.constexpr,
):
    program = tl.program_id(0)
    if program < TILES:
        token = program * TILE + tl.arange(0, TILE)
        real = token < TOKENS
        logits = _logits(
            partial, scale, base, token, real, TOKENS, WIDTH, ROWS, SPLITS, SPLITS_PADDED, COLUMNS, NORM_EPS
        )
        twice = 2.0 * _sigmoid(logits)
        _store_row(
            post + token * 4,
            _column(twice, 4),
            _column(twice, 5),
            _column(twice, 6),
            _column(twice, 7),
            real,
        )
        _sinkhorn(logits, comb, token, real, ITERATIONS, EPS, VENDOR)
    else:
        _collapse(
            streams,
            partial,
            scale,
            base,
            norm_weight,
            x,
            program - TILES,
            TOKENS,
            WIDTH,
            WIDTH_PADDED,
            ROWS,
            SPLITS,
            SPLITS_PADDED,
            COLUMNS,
            EPS,
            NORM_EPS,
            NORM,
        )


@triton.jit
def _finish_head(
    streams,  # [TOKENS, 4, WIDTH] bfloat16
    partial,  # [SPLITS, TOKENS, COLUMNS] float32
    scale,  # [1] float32
    base,  # [4] float32
    norm_weight,  # [WIDTH]; never read unless NORM
    x,  # [TOKENS, WIDTH] bfloat16
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    COLUMNS: tl.constexpr,
    EPS: tl.constexpr,
    NORM_EPS: tl.constexpr,
    NORM: tl.constexpr,
):
    _collapse(
        streams,
        partial,
        scale,
        base,
        norm_weight,
        x,
        tl.program_id(0),
        TOKENS,
        WIDTH,
        WIDTH_PADDED,
        ROWS,
        SPLITS,
        SPLITS_PADDED,
        COLUMNS,
        EPS,
        NORM_EPS,
        NORM,
    )


# --- launches


def hc_pre(
    streams: jax.Array,
    fn: jax.Array,
    scale: jax.Array,
    base: jax.Array,
    sinkhorn_iters: int,
    eps: float,
    norm_eps: float,
    norm_weight: jax.Array | None,
    tiles: Tiling | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    tiles = tiles or tiling(math.prod(streams.shape[:-2]))
    partial = _launch_project(streams, fn, tiles)
    return _launch_finish(streams, partial, scale, base, sinkhorn_iters, eps, norm_eps, norm_weight)


def hc_post_pre(
    y: jax.Array,
    streams: jax.Array,
    post: jax.Array,
    comb: jax.Array,
    fn: jax.Array,
    scale: jax.Array,
    base: jax.Array,
    sinkhorn_iters: int,
    eps: float,
    norm_eps: float,
    norm_weight: jax.Array | None,
    tiles: Tiling | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    tiles = tiles or tiling(math.prod(streams.shape[:-2]))
    partial, constants, grid = _shared_out(streams, fn, tiles)
    new, partial = triton_call(
        _post_project,
        y,
        streams,
        post,
        comb,
        _cut(fn) if tiles.cuts_first else fn,
        out=(jax.ShapeDtypeStruct(streams.shape, streams.dtype), partial),
        grid=grid,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **constants,
    )
    x, post, comb = _launch_finish(new, partial, scale, base, sinkhorn_iters, eps, norm_eps, norm_weight)
    return new, x, post, comb


def hc_post(y: jax.Array, streams: jax.Array, post: jax.Array, comb: jax.Array) -> jax.Array:
    *outer, _, width = streams.shape
    tokens = math.prod(outer)
    channels = 512 if tokens <= 128 else 1024  # few tokens are spread over more programs
    splits = -(-width // channels)
    return triton_call(
        _post,
        y,
        streams,
        post,
        comb,
        out=jax.ShapeDtypeStruct(streams.shape, streams.dtype),
        grid=(tokens * splits,),
        WIDTH=width,
        CHANNELS=channels,
        SPLITS=splits,
    )


def hc_head(
    streams: jax.Array,
    fn: jax.Array,
    scale: jax.Array,
    base: jax.Array,
    eps: float,
    norm_eps: float,
    norm_weight: jax.Array | None,
    tiles: Tiling | None = None,
) -> jax.Array:
    tokens = math.prod(streams.shape[:-2])
    partial = _launch_project(streams, fn, tiles or tiling(tokens))
    return triton_call(
        _finish_head,
        streams,
        partial,
        scale,
        base,
        base if norm_weight is None else norm_weight,
        out=_collapsed(streams),
        grid=(tokens,),
        num_warps=8,
        NORM=norm_weight is not None,
        **_finish_constants(streams, partial, base, eps, norm_eps),
    )


def _shared_out(
    streams: jax.Array, fn: jax.Array, tiles: Tiling
) -> tuple[jax.ShapeDtypeStruct, dict[str, Any], tuple[int]]:
    """Shape of `partial`, constants and grid of the first kernel."""
    *outer, _, width = streams.shape
    tokens = math.prod(outer)
    blocks = math.gcd(width // tiles.channels, tiles.most_blocks)
    splits = width // (blocks * tiles.channels)
    constants = {
        "TOKENS": tokens,
        "WIDTH": width,
        "ROWS": fn.shape[0],
        "SPLITS": splits,
        "BLOCKS": blocks,
        "TILE": tiles.tokens,
        "CHANNELS": tiles.channels,
        "COLUMNS": _COLUMNS,
        "STAGES": tiles.num_stages,
        "CUT": tiles.cuts_first,
    }
    partial = jax.ShapeDtypeStruct((splits, tokens, _COLUMNS), jnp.float32)
    return partial, constants, (-(-tokens // tiles.tokens) * splits,)


def _cut(fn: jax.Array) -> jax.Array:
    """Three bfloat16 numbers whose sum is that of `fn`, [3, ROWS, 4*WIDTH]."""
    high = jax.lax.reduce_precision(fn, 8, 7)  # which XLA leaves alone, unlike a cast and its way back
    middle = jax.lax.reduce_precision(fn - high, 8, 7)
    return jnp.stack([high, middle, fn - high - middle]).astype(jnp.bfloat16)


def _launch_project(streams: jax.Array, fn: jax.Array, tiles: Tiling) -> jax.Array:
    partial, constants, grid = _shared_out(streams, fn, tiles)
    return triton_call(
        _project,
        streams,
        _cut(fn) if tiles.cuts_first else fn,
        out=partial,
        grid=grid,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **constants,
    )


def _launch_finish(streams, partial, scale, base, sinkhorn_iters, eps, norm_eps, norm_weight):
    outer = streams.shape[:-2]
    tokens = math.prod(outer)
    constants = _finish_constants(streams, partial, base, eps, norm_eps)
    tile = max(1, min(16, 128 // constants["SPLITS_PADDED"]))  # tokens that fit a program's registers
    tiles = -(-tokens // tile)
    return triton_call(
        _finish,
        streams,
        partial,
        scale,
        base,
        base if norm_weight is None else norm_weight,
        out=(
            _collapsed(streams),
            jax.ShapeDtypeStruct((*outer, STREAMS), jnp.float32),
            jax.ShapeDtypeStruct((*outer, STREAMS, STREAMS), jnp.float32),
        ),
        grid=(tiles + tokens,),
        # With one warp for each of the four schedulers, the Sinkhorn steps of few tokens are done soonest.
        num_warps=4 if tokens <= 128 else 8,
        NORM=norm_weight is not None,
        ITERATIONS=sinkhorn_iters,
        TILE=tile,
        TILES=tiles,
        **constants,
    )


def _collapsed(streams: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*streams.shape[:-2], streams.shape[-1]), streams.dtype)


def _finish_constants(streams, partial, base, eps: float, norm_eps: float) -> dict[str, Any]:
    splits, tokens, columns = partial.shape
    return {
        "TOKENS": tokens,
        "WIDTH": streams.shape[-1],
        "WIDTH_PADDED": 1 << (streams.shape[-1] - 1).bit_length(),
        "ROWS": base.size,
        "SPLITS": splits,
        "SPLITS_PADDED": 1 << (splits - 1).bit_length(),
        "COLUMNS": columns,
        "EPS": eps,
        "NORM_EPS": norm_eps,
    }
