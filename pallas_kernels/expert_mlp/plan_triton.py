"""The plan by counting: where an expert's rows begin follows from how many pairs every expert has.

Up to `_FEW` pairs, one launch: each program counts all pairs anew and places those of its own few experts.
Above, a launch counts by segments of pairs, and a second places each segment's. A pair's row is where its
expert begins, plus how many pairs of that expert come before it: no atomics, so the order is always the same.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.expert_mlp.plan import Plan, tile_count
from pallas_kernels.triton_call import triton_call

_FEW = 2048
_SEGMENT = 2048
_EXPERTS_OF_FEW, _EXPERTS_OF_MANY = 2, 8  # that one program places
_AT_ONCE = tl.constexpr(16)  # segments whose counts are added up together


@triton.jit
def _place(
    chosen,  # [pairs] expert of each
    pair,
    counts,  # [BINS] pairs of each expert
    before,  # [BINS] how many of them come before these
    none_before,  # pairs of no expert that do
    first,  # of the experts to place; the one after the last stands for none
    order,
    row,
    TOTAL: tl.constexpr,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
):
    at, bins = tl.zeros_like(pair), tl.arange(0, BINS)
    for expert in range(first, first + EXPERTS):
        mine = chosen == expert
        earlier = tl.where((bins < expert) & (bins < TOTAL), counts, tl.where(bins == expert, before, 0))
        begin = tl.sum(earlier, 0) + tl.where(expert == TOTAL, none_before, 0)
        at = tl.where(mine, begin + tl.cumsum(mine.to(tl.int32), 0) - 1, at)
    placed = (chosen >= first) & (chosen < first + EXPERTS)
    tl.store(order + at, pair, mask=placed)
    tl.store(row + pair, at, mask=placed)


@triton.jit
def _write_tiles(
    counts,  # [BINS] pairs of each expert
    tile_expert,
    tile_start,
    tile_end,
    tile_count,
    arrivals,
    ROWS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILES: tl.constexpr,
    BINS: tl.constexpr,
):
    expert = tl.arange(0, BINS)
    end = tl.cumsum(counts, 0)
    tiles = (counts + TILE_ROWS - 1) // TILE_ROWS
    at = tl.cumsum(tiles, 0) - tiles
    tl.store(tile_count, tl.sum(tiles, 0))
    for first in range(0, TILES, BINS):
        tl.store(arrivals + first + expert, tl.zeros_like(expert), mask=first + expert < TILES)
    for nth in range(0, tl.max(tiles, 0)):
        real = nth < tiles
        tl.store(tile_expert + at + nth, expert, mask=real)
        tl.store(tile_start + at + nth, end - counts + nth * TILE_ROWS, mask=real)
        tl.store(tile_end + at + nth, end, mask=real)
    for absent in range(tl.sum(tiles, 0), TILES, BINS):
        tile = absent + expert
        tl.store(tile_expert + tile, tl.full((BINS,), -1, tl.int32), mask=tile < TILES)
        tl.store(tile_start + tile, tl.full((BINS,), ROWS, tl.int32), mask=tile < TILES)
        tl.store(tile_end + tile, tl.full((BINS,), ROWS, tl.int32), mask=tile < TILES)


@triton.jit
def _plan_few(
    experts,  # [ROWS] int32
    order,  # [ROWS] int32
    row,  # [ROWS] int32
    tile_expert,  # [TILES] int32
    tile_start,
    tile_end,
    tile_count,  # [1] int32
    arrivals,  # [TILES] int32
    ROWS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILES: tl.constexpr,
    TOTAL: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    pair = tl.arange(0, BLOCK)
    chosen = tl.load(experts + pair, mask=pair < ROWS, other=-1)
    counts = tl.histogram(chosen, BINS, mask=(pair < ROWS) & (chosen < TOTAL))
    first, nothing = tl.program_id(0) * EXPERTS, tl.zeros_like(counts)
    _place(chosen, pair, counts, nothing, 0, first, order, row, TOTAL, EXPERTS, BINS)
    if tl.program_id(0) == 0:
        _write_tiles(
            counts,
            tile_expert,
            tile_start,
            tile_end,
            tile_count,
            arrivals,
            ROWS,
            TILE_ROWS,
            TILES,
            BINS,
        )


@triton.jit
def _count(
    experts,  # [ROWS] int32
    counts,  # [segments, BINS] int32
    ROWS: tl.constexpr,
    TOTAL: tl.constexpr,
    SEGMENT: tl.constexpr,
    BINS: tl.constexpr,
):
    pair = tl.program_id(0) * SEGMENT + tl.arange(0, SEGMENT)
    chosen = tl.load(experts + pair, mask=pair < ROWS, other=-1)
    found = tl.histogram(chosen, BINS, mask=(pair < ROWS) & (chosen < TOTAL))
    tl.store(counts + tl.program_id(0) * BINS + tl.arange(0, BINS), found)


@triton.jit
def _plan_many(
    experts,  # [ROWS] int32
    counts,  # [SEGMENTS, BINS] int32
    order,  # [ROWS] int32
    row,  # [ROWS] int32
    tile_expert,  # [TILES] int32
    tile_start,
    tile_end,
    tile_count,  # [1] int32
    arrivals,  # [TILES] int32
    ROWS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILES: tl.constexpr,
    TOTAL: tl.constexpr,
    EXPERTS: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BINS: tl.constexpr,
):
    segment = tl.program_id(1)
    pair = segment * SEGMENT + tl.arange(0, SEGMENT)
    chosen = tl.load(experts + pair, mask=pair < ROWS, other=-1)
    total = tl.zeros((BINS,), tl.int32)
    before = tl.zeros((BINS,), tl.int32)
    for first in range(0, SEGMENTS, _AT_ONCE):
        other = (first + tl.arange(0, _AT_ONCE))[:, None]
        some = tl.load(counts + other * BINS + tl.arange(0, BINS)[None, :], mask=other < SEGMENTS, other=0)
        total += tl.sum(some, 0)
        before += tl.sum(tl.where(other < segment, some, 0), 0)
    first, none_before = tl.program_id(0) * EXPERTS, segment * SEGMENT - tl.sum(before, 0)
    _place(chosen, pair, total, before, none_before, first, order, row, TOTAL, EXPERTS, BINS)
    if (tl.program_id(0) == 0) & (segment == 0):
        _write_tiles(
            total, tile_expert, tile_start, tile_end, tile_count, arrivals, ROWS, TILE_ROWS, TILES, BINS
        )


def plan(experts: jax.Array, n_routed_experts: int, tile_rows: int) -> Plan:
    rows, pairs = experts.size, experts.reshape(-1)
    tiles = tile_count(rows, n_routed_experts, tile_rows)
    bins = max(128, triton.next_power_of_2(n_routed_experts))
    out = [jax.ShapeDtypeStruct((size,), jnp.int32) for size in (rows, rows, tiles, tiles, tiles, 1, tiles)]
    sizes = {"ROWS": rows, "TILE_ROWS": tile_rows, "TILES": tiles, "TOTAL": n_routed_experts, "BINS": bins}
    if rows <= _FEW:
        # At least one pair for each thread of AMD's four warps: a histogram must count no pair twice.
        block = max(256, triton.next_power_of_2(rows))
        filled = triton_call(
            _plan_few,
            pairs,
            out=out,
            grid=(n_routed_experts // _EXPERTS_OF_FEW + 1,),
            num_warps=4 if block <= 512 else 8,
            EXPERTS=_EXPERTS_OF_FEW,
            BLOCK=block,
            **sizes,
        )
        return Plan(*filled)
    segments = -(-rows // _SEGMENT)
    counts = triton_call(
        _count,
        pairs,
        out=jax.ShapeDtypeStruct((segments, bins), jnp.int32),
        grid=(segments,),
        num_warps=8,
        ROWS=rows,
        TOTAL=n_routed_experts,
        SEGMENT=_SEGMENT,
        BINS=bins,
    )
    filled = triton_call(
        _plan_many,
        pairs,
        counts,
        out=out,
        grid=(n_routed_experts // _EXPERTS_OF_MANY + 1, segments),
        num_warps=8,
        EXPERTS=_EXPERTS_OF_MANY,
        SEGMENT=_SEGMENT,
        SEGMENTS=segments,
        **sizes,
    )
    return Plan(*filled)
