"""The best k of each row of scores, best first, ties to the smaller index.

Scores become integers of the same order. Bisection finds one that at least k and at most 2 k' entries reach
(k' is the next power of two from 64 on), which takes few steps because it need not be the k-th itself; those
entries are put side by side in memory, in the order of their indices, and sorted. Long rows are cut into
parts, each of which leaves its best 2 k' to the next round.

An entry travels as one int64: rank above, 2^31 - 1 - index below, so that the larger one goes first.
"""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.target import current_target
from pallas_kernels.triton_call import triton_call

_HIDDEN = tl.constexpr(-(2**31) + 0x7FFFFF)  # the rank of -infinity, and of what is not visible
_NOTHING = tl.constexpr((-(2**31) + 0x7FFFFF) * 2**32)  # an entry that is none
_LAST = tl.constexpr(2**31 - 1)
_BY_VALUE = tl.constexpr(8)  # steps of bisection between scores; then between their bits, which must end
_MOST_ONCE = 32768  # entries that one program holds in registers
_FEWEST = 64  # places that are sorted
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
def _entry(rank, order):
    return (rank.to(tl.int64) << 32) | order.to(tl.int64)


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
def _bisect(rank, K: tl.constexpr, ROOM: tl.constexpr):
    """The lowest rank to keep, how many reach it, and how many of its own may stay.

    As many as there are up to ROOM, else at least K. If more than ROOM reach the K-th largest, it is that.
    """
    shown = rank > _HIDDEN
    reach, least, most = tl.reduce(
        (shown.to(tl.int32), tl.where(shown, rank, _LAST), rank), 0, _with, keep_dims=False
    )
    low, high, above = least.to(tl.int64), most.to(tl.int64) + 1, reach * 0
    step = above
    while (reach > ROOM) & (high - low > 1):
        middle = _between(low, high, step)
        count = tl.sum((rank >= middle.to(tl.int32)).to(tl.int32), 0)
        if count >= K:
            low, reach = middle, count
        else:
            high, above = middle, count
        step += 1
    return low.to(tl.int32), tl.minimum(reach, ROOM), tl.where(reach > ROOM, ROOM - above, ROOM)


@triton.jit
def _keep(rank, order, kept, K: tl.constexpr, ROOM: tl.constexpr):
    """Writes the entries worth keeping to `kept` in their order; returns how many."""
    low, count, own = _bisect(rank, K, ROOM)
    above = rank > low
    equal = rank == low
    running = tl.cumsum((above.to(tl.int32) << 16) + equal.to(tl.int32), 0)
    higher, same = running >> 16, running & 0xFFFF
    stays = (above | (equal & (same <= own))) & (rank > _HIDDEN)
    tl.store(kept + higher + tl.minimum(same, own) - 1, _entry(rank, order), mask=stays)
    return count


@triton.jit
def _read(source, visible, row, part, S: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Both halves of the entries of a part of a row: of scores, or such as a round before has left."""
    place = part * BLOCK + tl.arange(0, BLOCK)
    if source.dtype.element_ty == tl.float32:
        seen = tl.minimum(tl.load(visible + row), S)
        score = tl.load(source + row * STRIDE + place, mask=place < seen, other=float("-inf"))
        rank = _rank(score)
        order = place ^ _LAST
    else:
        entries = source.to(tl.pointer_type(tl.int64))
        entry = tl.load(entries + row * STRIDE + place, mask=place < S, other=_NOTHING)
        rank, order = (entry >> 32).to(tl.int32), entry.to(tl.int32)
    return rank, order


@triton.jit
def _leave_best(
    source,  # [R, STRIDE] float32 scores, or int32 [R, 2 * STRIDE]: pairs that are entries
    visible,  # [R] int32; read with scores only
    kept,  # [R, PARTS, 2 * ROOM] int32: entries; what is left is filled with none
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    K: tl.constexpr,
    ROOM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program takes a part of a row: at least its best K go on."""
    PARTS: tl.constexpr = (S + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // PARTS).to(tl.int64)
    part = tl.program_id(0) % PARTS
    kept = kept.to(tl.pointer_type(tl.int64)) + (row * PARTS + part) * ROOM
    seen = S
    if source.dtype.element_ty == tl.float32:
        seen = tl.minimum(tl.load(visible + row), S)
    count = 0
    if part * BLOCK < seen:
        rank, order = _read(source, visible, row, part, S, STRIDE, BLOCK)
        count = _keep(rank, order, kept, K, ROOM)
    place = tl.arange(0, ROOM)
    tl.store(kept + place, tl.full((ROOM,), _NOTHING, tl.int64), mask=place >= count)


@triton.jit
def _choose(
    source,
    visible,
    chosen,  # [R, K] int32
    kept,  # [R, 2 * ROOM] int32: room for entries
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    K: tl.constexpr,
    ROOM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program takes a row that fits into it."""
    row = tl.program_id(0).to(tl.int64)
    rank, order = _read(source, visible, row, 0, S, STRIDE, BLOCK)
    if BLOCK > ROOM:
        kept = kept.to(tl.pointer_type(tl.int64)) + row * ROOM
        count = _keep(rank, order, kept, K, ROOM)
        tl.debug_barrier()  # what other threads wrote is read from here on
        place = tl.arange(0, ROOM)
        entry = tl.load(kept + place, mask=place < count, other=_NOTHING)
    else:
        entry = _entry(rank, order)
    PLACES: tl.constexpr = ROOM // 2
    best = tl.topk(entry, PLACES)
    index = tl.where((best >> 32) > _HIDDEN, best.to(tl.int32) ^ _LAST, -1)
    place = tl.arange(0, PLACES)
    tl.store(chosen + row * K + place, index, mask=place < K)


def _padded(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


def warps_for(block: int, amd: bool) -> int:
    """Warps of a program that holds so many entries."""
    threads = max(128, min(1024, block // 16))
    return threads // (64 if amd else 32)


def part_for(rows: int, columns: int, room: int) -> int:
    """Entries of a part: whole rows where there are many, else enough parts to fill a chip."""
    whole = max(_padded(columns), room)
    if rows >= _FEW_ROWS or whole <= 8192:
        return min(whole, _MOST_ONCE)
    # The next round should hold what all parts leave.
    parts = max(1, min(whole // 8192, _MOST_ONCE // 2 // room))
    return min(max(whole // parts, 4 * room), _MOST_ONCE)


def index_top_k(
    scores: jax.Array,
    visible: jax.Array,
    top_k: int,
    *,
    columns: int | None = None,
    part: int | None = None,
    num_warps: int | None = None,
) -> jax.Array:
    """The min(top_k, columns) best of the first `visible` of each row, best first; -1 where there are fewer.

    Args:
      scores: [B, T, stride] float32; -infinity is as not visible, NaN the best.
      visible: [B, T] int32.
      columns: how many there are, `stride` by default.
      part: entries of a program, a power of two, and num_warps: in place of this module's choice.

    Returns:
      [B, T, min(top_k, columns)] int32.
    """
    batch, tokens, stride = scores.shape
    rows = batch * tokens
    columns = columns or stride
    amd = current_target().vendor == "rocm"
    count = min(top_k, columns)
    places = max(_FEWEST, _padded(count))
    room = 2 * places
    part = part or part_for(rows, columns, room)
    warps = num_warps or warps_for(part, amd)

    source = scores
    while columns > part:
        parts = -(-columns // part)
        out = jax.ShapeDtypeStruct((rows, parts, 2 * room), jnp.int32)
        sizes: dict[str, Any] = {"S": columns, "STRIDE": stride, "K": count, "ROOM": room, "BLOCK": part}
        grid = (rows * parts,)
        source = triton_call(_leave_best, source, visible, out=out, grid=grid, num_warps=warps, **sizes)
        columns = stride = parts * room
        part = min(_padded(columns), _MOST_ONCE)
        warps = warps_for(part, amd)
    part = max(_padded(columns), places)
    sizes = {"S": columns, "STRIDE": stride, "K": count, "ROOM": room, "BLOCK": part}
    outs = (
        jax.ShapeDtypeStruct((batch, tokens, count), jnp.int32),
        jax.ShapeDtypeStruct((rows, 2 * room if part > room else 2), jnp.int32),
    )
    chosen, _ = triton_call(_choose, source, visible, out=outs, grid=(rows,), num_warps=warps, **sizes)
    return chosen
