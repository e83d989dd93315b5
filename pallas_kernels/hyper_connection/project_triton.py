"""Triton kernels that multiply the streams by `fn`, and those that write the new streams back."""

import triton
import triton.language as tl


@triton.jit
def column_of(numbers, INDEX: tl.constexpr):
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
def project(
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
    c0 = column_of(comb, STREAM)[:, None]
    c1 = column_of(comb, 4 + STREAM)[:, None]
    c2 = column_of(comb, 8 + STREAM)[:, None]
    c3 = column_of(comb, 12 + STREAM)[:, None]
    return (column_of(post, STREAM)[:, None] * y + (c0 * x0 + c1 * x1 + c2 * x2 + c3 * x3)).to(tl.bfloat16)


@triton.jit
def post_project(
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
def write_back(
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
