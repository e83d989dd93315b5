"""The best k of each row of scores, by the order of their indices, ties to the smaller index.

Scores become integers of the same order. Their digits, from the highest on, find the k-th largest: entries of
each digit are counted, and those of the one in which it lies go on. What is above it, and as many as there
is room for of those that equal it, is written side by side. Long rows are cut into parts, whose best k each
go to the next round.
"""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.target import current_target
from pallas_kernels.triton_call import triton_call

_HIDDEN = tl.constexpr(-(2**31) + 0x7FFFFF)  # the rank of -infinity, and of what is not visible
_DIGIT = {"cuda": 10, "rocm": 8}  # bits
_MOST_ONCE = 32768  # entries that one program holds in registers
_FEW_ROWS = 64


@triton.jit
def _rank(score):
    """Integers in the order of the floats, NaN first; a NaN with its sign bit set is as -infinity."""
    bits = score.to(tl.int32, bitcast=True)
    return tl.maximum(bits ^ ((bits >> 31) & 0x7FFFFFFF), _HIDDEN)


@triton.jit
def _counters(BINS: tl.constexpr):
    """The address of as many int32 in shared memory, not initialised (CUDA)."""
    return tl.inline_asm_elementwise(
        f"{{ .shared .align 16 .b32 counters[{BINS}]; mov.u32 $0, counters; }}",
        "=r,r",
        [tl.program_id(0)],
        tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _histogram(rank, low, shift, width, counters, BINS: tl.constexpr, VENDOR: tl.constexpr):
    """How many ranks have each digit, (rank - low) >> shift, of those below `width`, from BINS - 1 down to 0.

    Triton 3.6 has each warp vote on every entry's bits and count votes for every bin; adding to shared memory
    costs the same for any number of bins. A thread must have no entry that another has, too: it would count
    twice. In one piece, a digit takes no register while another is made.
    """
    if VENDOR != "cuda":
        digit = (rank - low).to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)
        inside = (rank >= low) & (digit < width.to(tl.uint32))
        return tl.histogram(BINS - 1 - digit.to(tl.int32), BINS, inside)
    each = counters + 4 * tl.arange(0, BINS)
    tl.inline_asm_elementwise(
        "st.shared.u32 [$1], 0; mov.u32 $0, 0;", "=r,r", [each], tl.int32, is_pure=False, pack=1
    )
    tl.debug_barrier()
    tl.inline_asm_elementwise(
        """{
        .reg .pred inside;
        .reg .b32 digit;
        sub.u32 digit, $1, $2;
        shr.u32 digit, digit, $3;
        setp.ge.s32 inside, $1, $2;
        setp.lt.and.u32 inside, digit, $4, inside;
        mad.lo.s32 digit, digit, -4, $5;
        @inside red.shared.add.u32 [digit], 1;
        mov.u32 $0, 0;
        }""",
        "=r,r,r,r,r,r",
        [rank, low, shift, width, counters + 4 * (BINS - 1)],
        tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.debug_barrier()
    return tl.inline_asm_elementwise(
        "ld.shared.u32 $0, [$1];", "=r,r", [each], tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _next(skipped, above, reach, other_skipped, other_above, other_reach):
    return skipped + other_skipped, tl.maximum(above, other_above), tl.minimum(reach, other_reach)


@triton.jit
def _in_group(count, most, other_count, other_most):
    return count + other_count, tl.maximum(most, other_most)


@triton.jit
def _of_groups(count, low, high, other_count, other_low, other_high):
    return count + other_count, tl.minimum(low, other_low), tl.maximum(high, other_high)


@triton.jit
def _cut(rank, K: tl.constexpr, BLOCK: tl.constexpr, DIGIT: tl.constexpr, VENDOR: tl.constexpr):
    """The lowest rank to keep, how many to keep, and how many of those that have just this rank.

    Of a rank's distance from the lowest candidate it takes one digit after the other, counts how many
    candidates have each, and goes on with those of the digit in which the k-th largest lies.
    """
    BINS: tl.constexpr = 2**DIGIT
    GROUPS: tl.constexpr = triton.next_power_of_2(K)
    counters = _counters(BINS) if VENDOR == "cuda" else 0
    # Of K groups or more, however made, the largest of each are K that are not below the lowest of these.
    groups = tl.reshape(rank, (GROUPS, BLOCK // GROUPS), can_reorder=True)
    shown, most = tl.reduce(((groups > _HIDDEN).to(tl.int32), groups), 1, _in_group)
    reach, low, high = tl.reduce((shown, most, most), 0, _of_groups)
    low = tl.maximum(low, _HIDDEN + 1)
    # As many bits as the distance has, or one more if rounding to float32 carries.
    bits = ((high - low).to(tl.uint32, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126
    above = reach * 0
    while (reach > K) & (bits > 0):
        shift = tl.maximum(bits - DIGIT, 0)
        # The last digit may be shorter: what is beyond it is above already. Bins begin at the highest digit,
        # so that running sums count what is not below.
        count = _histogram(rank, low, shift, 1 << (bits - shift), counters, BINS, VENDOR)
        running = above + tl.cumsum(count, 0)
        short = running < K
        skipped, above, reach = tl.reduce(
            (short.to(tl.int32), tl.where(short, running, above), tl.where(short, BLOCK, running)), 0, _next
        )
        low += (BINS - 1 - skipped) << shift
        bits = shift
    return low, tl.minimum(reach, K), tl.where(reach > K, K - above, K)


@triton.jit
def _best(
    source,  # [R, STRIDE]: float32 scores, or int32 ranks that a round before has left
    index,  # [R, STRIDE] int32: of ranks
    visible,  # [R] int32; read with scores only
    chosen,  # [R, PARTS, K] int32
    ranks,  # [R, PARTS, K] int32, not written in the last round
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    DIGIT: tl.constexpr,
    LAST: tl.constexpr,
    VENDOR: tl.constexpr,
):
    """A program takes a part of a row, in the last round all of it."""
    PARTS: tl.constexpr = (S + BLOCK - 1) // BLOCK
    SCORES: tl.constexpr = source.dtype.element_ty == tl.float32
    row = (tl.program_id(0) // PARTS).to(tl.int64)
    part = tl.program_id(0) % PARTS
    place = part * BLOCK + tl.arange(0, BLOCK)
    chosen += (row * PARTS + part) * K
    ranks += (row * PARTS + part) * K
    seen = S
    if SCORES:
        seen = tl.minimum(tl.load(visible + row), S)
    count = 0
    if part * BLOCK < seen:
        source += row * STRIDE
        index += row * STRIDE
        # Whole fours where rows hold them, so that they are one load each.
        limit = seen
        if S % 4 == 0:
            limit = tl.cdiv(seen, 4) * 4
        if SCORES:
            rank = _rank(tl.load(source + place, mask=place < limit, other=float("-inf")))
        else:
            rank = tl.load(source + place, mask=place < limit, other=_HIDDEN)
        rank = tl.where(place < seen, rank, _HIDDEN)
        low, count, own = _cut(rank, K, BLOCK, DIGIT, VENDOR)
        above, equal = rank > low, rank == low
        running = tl.cumsum((above.to(tl.int32) << 16) + equal.to(tl.int32), 0)
        higher, same = running >> 16, running & 0xFFFF
        stays = (above | (equal & (same <= own))) & (rank > _HIDDEN)
        to = higher + tl.minimum(same, own) - 1
        if SCORES:
            tl.store(chosen + to, place, mask=stays)
        else:
            tl.store(chosen + to, tl.load(index + place, mask=stays), mask=stays)
        if not LAST:
            tl.store(ranks + to, rank, mask=stays)
    to = tl.arange(0, triton.next_power_of_2(K))
    left = (to >= count) & (to < K)
    if LAST:
        tl.store(chosen + to, -1, mask=left)
    else:
        tl.store(ranks + to, _HIDDEN, mask=left)


def _padded(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


def warps_for(block: int, amd: bool) -> int:
    """Warps of a program that holds so many entries."""
    threads = max(128, min(1024, block // 16))
    return threads // (64 if amd else 32)


def part_for(rows: int, columns: int, count: int) -> int:
    """Entries of a part: whole rows where there are many, else enough parts to fill a chip."""
    whole = _padded(columns)
    if rows >= _FEW_ROWS or whole <= 8192:
        return min(whole, _MOST_ONCE)
    # The next round should hold what all parts leave.
    parts = max(1, min(whole // 8192, _MOST_ONCE // count))
    return min(max(whole // parts, 4 * _padded(count)), _MOST_ONCE)


def index_top_k(
    scores: jax.Array,
    visible: jax.Array,
    top_k: int,
    *,
    columns: int | None = None,
    part: int | None = None,
    num_warps: int | None = None,
    digit: int | None = None,
) -> jax.Array:
    """The min(top_k, columns) best of the first `visible` of each row in their order; -1 for what is missing.

    Args:
      scores: [B, T, stride] float32; -infinity is as not visible, NaN the best.
      visible: [B, T] int32.
      columns: how many there are, `stride` by default.
      part: entries of a program in the first round, a power of two, and its num_warps: in place of this
        module's choice.
      digit: bits of a digit, likewise.

    Returns:
      [B, T, min(top_k, columns)] int32.
    """
    batch, tokens, stride = scores.shape
    rows = batch * tokens
    columns = columns or stride
    amd = current_target().vendor == "rocm"
    digit = digit or _DIGIT["rocm" if amd else "cuda"]
    count = min(top_k, columns)
    part = part or part_for(rows, columns, count)

    source, index = scores, visible  # which index is not read in the first round
    while True:
        warps = num_warps or warps_for(part, amd)
        part = max(part, warps * (64 if amd else 32))  # else threads would share entries
        parts = -(-columns // part)
        shape = (batch, tokens, count) if parts == 1 else (rows, parts * count)
        outs = [jax.ShapeDtypeStruct(shape, jnp.int32)]
        outs.append(outs[0] if parts > 1 else jax.ShapeDtypeStruct((1,), jnp.int32))
        sizes: dict[str, Any] = {"S": columns, "STRIDE": stride, "K": count, "BLOCK": part, "DIGIT": digit}
        index, source = triton_call(
            _best,
            *(source, index, visible),
            out=outs,
            grid=(rows * parts,),
            num_warps=warps,
            LAST=parts == 1,
            **sizes,
        )
        if parts == 1:
            return index
        columns = stride = parts * count
        part, num_warps = min(_padded(columns), _MOST_ONCE), None
