"""Triton kernels of what follows from the projection: shares, Sinkhorn steps, the collapse and its norm."""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from pallas_kernels.hyper_connection.project_triton import column_of


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
    squares = column_of(sums, ROWS)
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
        column_of(logits, 8),
        column_of(logits, 9),
        column_of(logits, 10),
        column_of(logits, 11),
        EPS,
    )
    b0, b1, b2, b3 = _softmax(
        column_of(logits, 12),
        column_of(logits, 13),
        column_of(logits, 14),
        column_of(logits, 15),
        EPS,
    )
    c0, c1, c2, c3 = _softmax(
        column_of(logits, 16),
        column_of(logits, 17),
        column_of(logits, 18),
        column_of(logits, 19),
        EPS,
    )
    d0, d1, d2, d3 = _softmax(
        column_of(logits, 20),
        column_of(logits, 21),
        column_of(logits, 22),
        column_of(logits, 23),
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
    collapsed = tl.sum(column_of(pre, 0), 0) * x0 + tl.sum(column_of(pre, 1), 0) * x1
    collapsed += tl.sum(column_of(pre, 2), 0) * x2 + tl.sum(column_of(pre, 3), 0) * x3
    out = collapsed.to(tl.bfloat16)
    if NORM:
        wide = out.to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + NORM_EPS)
        weight = tl.load(norm_weight + channel, mask=real, other=0.0).to(tl.float32)
        out = (wide * inverse_rms * weight).to(tl.bfloat16)
    tl.store(x + token.to(tl.int64) * WIDTH + channel, out, mask=real)


@triton.jit
def finish(
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
            column_of(twice, 4),
            column_of(twice, 5),
            column_of(twice, 6),
            column_of(twice, 7),
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
def finish_head(
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
