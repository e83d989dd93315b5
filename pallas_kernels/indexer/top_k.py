"""The best k of each row of scores, by the order of their indices, ties to the smaller index.

Scores become integers of the same order. Bisection finds the k-th largest: first between scores, which takes
a dozen steps, then, where many are alike, between their bits, which must end. What is above it, and as many
as there is room for of those that equal it, is written side by side. Long rows are cut into parts, whose best
k each go to the next round.
"""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.target import current_target
from pallas_kernels.triton_call import triton_call

_HIDDEN = tl.constexpr(-(2**31) + 0x7FFFFF)  # the rank of -infinity, and of what is not visible
_HIGHEST = tl.constexpr(2**31 - 1)
_BY_VALUE = tl.constexpr(20)  # steps of bisection between scores
_MOST_ONCE = 32768  # entries that one program holds in registers
_FEW_ROWS = 64


@triton.jit
def _rank(score):
    """Integers in the order of the floats, NaN first; a NaN with its sign bit set is as -infinity."""
    bits = score.to(tl.int32, bitcast=True)
    return tl.maximum(bits ^ ((bits >> 31) & 0x7FFFFFFF), _HIDDEN)


@triton.jit
def _score(rank):
    return (rank ^ ((rank >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _with(count, least, most, other_count, other_least, other_most):
    return count + other_count, tl.minimum(least, other_least), tl.maximum(most, other_most)


@triton.jit
def _between(low, high, step):
    """Strictly between two ranks (int64) that are not neighbours."""
    middle = (low + high) >> 1
    if step < _BY_VALUE:
        score = _score(low.to(tl.int32)) * 0.5 + _score((high - 1).to(tl.int32)) * 0.5
        middle = _rank(score).to(tl.int64)
    return tl.minimum(tl.maximum(middle, low + 1), high - 1)


@triton.jit
def _cut(rank, K: tl.constexpr):
    """The lowest rank to keep, how many to keep, and how many of those that have just this rank."""
    shown = rank > _HIDDEN
    reach, least, most = tl.reduce(
        (shown.to(tl.int32), tl.where(shown, rank, _HIGHEST), rank), 0, _with, keep_dims=False
    )
    low, high, above = least.to(tl.int64), most.to(tl.int64) + 1, reach * 0
    step = above
    while (reach > K) & (high - low > 1):
        middle = _between(low, high, step)
        count = tl.sum((rank >= middle.to(tl.int32)).to(tl.int32), 0)
        if count >= K:
            low, reach = middle, count
        else:
            high, above = middle, count
        step += 1
    return low.to(tl.int32), tl.minimum(reach, K), tl.where(reach > K, K - above, K)


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
    LAST: tl.constexpr,
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
        at = row * STRIDE + place
        if SCORES:
            rank = _rank(tl.load(source + at, mask=place < seen, other=float("-inf")))
        else:
            rank = tl.load(source + at, mask=place < seen, other=_HIDDEN)
        low, count, own = _cut(rank, K)
        above, equal = rank > low, rank == low
        running = tl.cumsum((above.to(tl.int32) << 16) + equal.to(tl.int32), 0)
        higher, same = running >> 16, running & 0xFFFF
        stays = (above | (equal & (same <= own))) & (rank > _HIDDEN)
        to = higher + tl.minimum(same, own) - 1
        if SCORES:
            tl.store(chosen + to, place, mask=stays)
        else:
            tl.store(chosen + to, tl.load(index + at, mask=stays), mask=stays)
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
) -> jax.Array:
    """The min(top_k, columns) best of the first `visible` of each row in their order; -1 for what is missing.

    Args:
      scores: [B, T, stride] float32; -infinity is as not visible, NaN the best.
      visible: [B, T] int32.
      columns: how many there are, `stride` by default.
      part: entries of a program in the first round, a power of two, and its num_warps: in place of this
        module's choice.

    Returns:
      [B, T, min(top_k, columns)] int32.
    """
    batch, tokens, stride = scores.shape
    rows = batch * tokens
    columns = columns or stride
    amd = current_target().vendor == "rocm"
    count = min(top_k, columns)
    part = part or part_for(rows, columns, count)

    source, index = scores, visible  # which index is not read in the first round
    while True:
        parts = -(-columns // part)
        shape = (batch, tokens, count) if parts == 1 else (rows, parts * count)
        outs = [jax.ShapeDtypeStruct(shape, jnp.int32)]
        outs.append(outs[0] if parts > 1 else jax.ShapeDtypeStruct((1,), jnp.int32))
        sizes: dict[str, Any] = {"S": columns, "STRIDE": stride, "K": count, "BLOCK": part}
        index, source = triton_call(
            _best,
            *(source, index, visible),
            out=outs,
            grid=(rows * parts,),
            num_warps=num_warps or warps_for(part, amd),
            LAST=parts == 1,
            **sizes,
        )
        if parts == 1:
            return index
        columns = stride = parts * count
        part, num_warps = min(_padded(columns), _MOST_ONCE), None
