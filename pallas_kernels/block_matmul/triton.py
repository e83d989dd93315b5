"""Products with FP8 weights on the tensor cores, scales included.

Sums run over 128 columns at a time, the width of a block of scales, and are multiplied by the scales of both
sides before they are added in float32: the released arithmetic. Two kernels share it. `_tiled` walks along K
with one tile of each operand. `_spanned` is for few tokens, where there are only weights to read: its warps
walk along K side by side, so that few rows of the weight make enough loads to keep a multiprocessor busy.
"""

import triton
import triton.language as tl


@triton.jit
def _number(scale):
    """A scale as float32. An E8M0 byte becomes the exponent: 255, not a number, turns into infinity."""
    if scale.dtype == tl.uint8:
        scale = (scale.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def _bfloat16(values):
    """FP8 values, or their bits where the device has no FP8, as bfloat16: exact."""
    if values.dtype == tl.uint8:
        # Sign, exponent and mantissa in their places of a bfloat16, whose exponents start 120 lower.
        bits = ((values & 0x80).to(tl.uint16) << 8) | ((values & 0x7F).to(tl.uint16) << 4)
        values = bits.to(tl.bfloat16, bitcast=True) * tl.full((), 2.0**120, tl.bfloat16)
    elif values.dtype != tl.bfloat16:
        # By way of float32: Hopper converts float16, the first stop, to bfloat16 at a quarter of the speed.
        values = values.to(tl.float32).to(tl.bfloat16)
    return values


@triton.jit
def _product(x, w):
    """x @ w.T of the last two axes, summed in float32."""
    if x.dtype == w.dtype and x.dtype != tl.uint8:
        product = tl.dot(x, tl.trans(w))
    else:
        # Hopper's tensor cores take their first operand from registers, which is where weights are converted.
        product = tl.trans(tl.dot(_bfloat16(w), tl.trans(_bfloat16(x))))
    return product


@triton.jit
def _tiled(
    x,  # [M, GROUPS, K] FP8 or its bits, or bfloat16 without scales
    x_scale,  # [M, GROUPS, K / 128]
    w,  # [N, K] FP8 or its bits
    w_scale,  # [N / 128, K / 128]
    out,  # [SPLITS, M, N]
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    STACK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    BLOCKS: tl.constexpr = K // 128
    STEPS: tl.constexpr = BLOCKS // SPLITS
    HEIGHT: tl.constexpr = TOKENS * STACK
    HIGH: tl.constexpr = (M + HEIGHT - 1) // HEIGHT
    WIDE: tl.constexpr = (N + ROWS - 1) // ROWS
    # Eight tiles of tokens share each tile of weights while both are in the L2 cache.
    band = tl.program_id(0) // (8 * WIDE) * 8
    place = tl.program_id(0) % (8 * WIDE)
    height = tl.minimum(HIGH - band, 8)
    first_token = (band + place % height) * HEIGHT
    first_row = place // height * ROWS
    group = first_row // (N // GROUPS)
    split = tl.program_id(1)

    tokens, rows, columns = tl.arange(0, TOKENS), tl.arange(0, ROWS), tl.arange(0, 128)
    start = first_token.to(tl.int64) * GROUPS + group
    x_at = x + start * K + split * STEPS * 128 + (tokens[:, None] * (GROUPS * K) + columns[None, :])
    x_scale_at = x_scale + start * BLOCKS + split * STEPS + tokens * (GROUPS * BLOCKS)
    w_row = rows if N % ROWS == 0 else tl.minimum(rows, N - 1 - first_row)
    w_at = w + first_row.to(tl.int64) * K + split * STEPS * 128 + (w_row[:, None] * K + columns[None, :])
    w_scale_at = w_scale + first_row // 128 * BLOCKS + split * STEPS
    real = tokens < M - first_token
    lower_real = tokens < M - TOKENS - first_token

    total = tl.zeros((TOKENS, ROWS), tl.float32)
    lower = tl.zeros((TOKENS, ROWS), tl.float32)
    for k in range(STEPS):
        weights = tl.load(w_at + k * 128)
        scale = _number(tl.load(w_scale_at + k))
        total += _scaled_product(x_at + k * 128, x_scale_at + k, real, weights, scale)
        if STACK == 2:
            below, scale_below = x_at + TOKENS * GROUPS * K, x_scale_at + TOKENS * GROUPS * BLOCKS
            lower += _scaled_product(below + k * 128, scale_below + k, lower_real, weights, scale)

    out_at = out + (split * M + first_token.to(tl.int64)) * N + first_row + tokens[:, None] * N + rows[None, :]
    inside = (rows < N - first_row)[None, :]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=real[:, None] & inside)
    if STACK == 2:
        tl.store(out_at + TOKENS * N, lower.to(out.dtype.element_ty), mask=lower_real[:, None] & inside)


@triton.jit
def _scaled_product(x_at, x_scale_at, real, weights, scale):
    """[tokens, rows] sum over one block of columns."""
    product = _product(tl.load(x_at, mask=real[:, None], other=0.0), weights)
    if x_at.dtype.element_ty == tl.bfloat16:
        product *= scale
    else:
        product *= (_number(tl.load(x_scale_at, mask=real, other=0)) * scale)[:, None]
    return product
