"""Scores of the indexer on tensor cores: keys are the rows of a product, heads of queries its columns.

A program that is to serve many queries holds a tile of keys and walks along queries; where there are few,
it holds the queries and walks along keys, so that each key is read once. Either way relu, weights and the sum
over heads happen in registers, and a score is all that is written.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.formats import QuantArray
from pallas_kernels.target import current_target
from pallas_kernels.triton_call import triton_call

FEW_QUERIES = 4  # of a sequence: so many or fewer are held together while keys go by


class Tiling(NamedTuple):
    """What a program takes.

    Attributes:
      keys: in one product, a power of two from 64 on.
      queries: in one product, a power of two.
      steps: products of a program: tiles of keys where it holds queries, else groups of queries.
      in_registers: whether keys that are held lie in registers; else in shared memory.
      num_warps, num_stages: as Triton means them.
    """

    keys: int
    queries: int
    steps: int
    in_registers: bool
    num_warps: int
    num_stages: int


def tiling_for(arch: str, batch: int, tokens: int, entries: int, heads: int, quantized: bool) -> Tiling:
    """For so many queries of each sequence and so many keys."""
    amd = arch.startswith("gfx")
    if tokens <= FEW_QUERIES:
        tiles = batch * -(-entries // 128)
        steps = max(
            1, min(8, tiles // 264)
        )  # two programs for each multiprocessor, as long as there are keys
        queries = 1 << (tokens - 1).bit_length()
        return Tiling(128, queries, steps, False, 4 if queries * heads <= 128 else 8, 1 if amd else 3)
    if amd:
        return Tiling(128, 1, 32, False, 4, 1)
    if arch == "sm_90":
        return Tiling(128, 1, 64, True, 4, 3)
    return Tiling(128, 1, 64, False, 4, 3 if not quantized else 4)


@triton.jit
def _power_of_two(exponent):
    """2^(b-127) of a byte; 0, which stands for 2^-127, is taken for 0, and 255 is infinite."""
    return (exponent.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _weights(weights, q_scale, before, head, taken, QUANTIZED: tl.constexpr):
    """The weight of each head of some queries, with the scale of its query in it."""
    weight = tl.load(weights + before + head, mask=taken, other=0.0)
    if QUANTIZED:
        weight *= _power_of_two(tl.load(q_scale + before + head, mask=taken, other=0))
    return weight


@triton.jit
def _sum_heads(logit, weight, QUERIES: tl.constexpr, HEADS: tl.constexpr):
    """[keys, queries] of logits [keys, queries * heads]."""
    hit = tl.maximum(logit, 0.0, propagate_nan=tl.PropagateNan.ALL) * weight[None, :]
    if QUERIES == 1:
        total = tl.sum(hit, 1)[:, None]
    else:
        total = tl.sum(tl.reshape(hit, (hit.shape[0], QUERIES, HEADS)), 2)
    # A sum of negative zeros is to be zero as any other: the order of scores tells them apart.
    return total + 0.0


@triton.jit
def _into_registers(keys, VENDOR: tl.constexpr):
    """The same keys, as a value that Triton does not know to have come from memory, so it keeps it here."""
    if VENDOR != "cuda":
        return keys
    if keys.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [keys], keys.dtype, is_pure=True, pack=2)
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [keys], keys.dtype, is_pure=True, pack=4)


@triton.jit
def _hold_keys(
    q,  # [B, T, I, J] bfloat16 or float8
    q_scale,  # [B, T, I] uint8, of float8
    keys,  # [B, S, J], as q
    key_scale,  # [B, S] uint8, of float8
    weights,  # [B, T, I] float32
    visible,  # [B, T] int32
    first,  # [1] int32: the query of each sequence that row 0 of its scores is for
    scores,  # [B, ROWS, STRIDE] float32
    T: tl.constexpr,
    S: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    J: tl.constexpr,
    ROWS: tl.constexpr,
    STRIDE: tl.constexpr,
    QUANTIZED: tl.constexpr,
    CAUSAL: tl.constexpr,  # whether scores of entries that are not visible may stay unwritten
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    STEPS: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
    VENDOR: tl.constexpr,
):
    """A program scores a tile of keys for QUERIES * STEPS queries of one sequence."""
    TILES: tl.constexpr = (S + KEYS - 1) // KEYS
    TAKEN: tl.constexpr = QUERIES * STEPS
    GROUPS: tl.constexpr = (ROWS + TAKEN - 1) // TAKEN
    # Programs that run at the same time share queries, of which there are more bytes than of keys.
    tile = tl.program_id(0) % TILES
    start = tl.program_id(0) // TILES % GROUPS * TAKEN
    batch = (tl.program_id(0) // (TILES * GROUPS)).to(tl.int64)
    key = tile * KEYS + tl.arange(0, KEYS)
    real = key < S
    query_0 = batch * T + tl.load(first)

    begin, end = 0, tl.minimum(ROWS - start, TAKEN)
    if CAUSAL:
        place = tl.arange(0, triton.next_power_of_2(TAKEN))
        seen = tl.load(visible + query_0 + start + place, mask=place < end, other=0)
        sees = seen > tile * KEYS
        begin = tl.min(tl.where(sees, place, TAKEN), 0) // QUERIES * QUERIES
        end = tl.max(tl.where(sees, place + 1, 0), 0)
    if begin < end:
        channel = tl.arange(0, J)
        keys_KJ = tl.load(
            keys + batch * (S * J) + key[:, None] * J + channel[None, :], mask=real[:, None], other=0.0
        )
        if IN_REGISTERS:
            keys_KJ = _into_registers(keys_KJ, VENDOR)
        if QUANTIZED:
            scale = _power_of_two(tl.load(key_scale + batch * S + key, mask=real, other=0))
        head = tl.arange(0, QUERIES * I)
        q_at = head[:, None] * J + channel[None, :]
        which = tl.arange(0, QUERIES)
        out_at = which[None, :] * STRIDE + key[:, None]
        for step in tl.range(begin, end, QUERIES):
            row = start + step
            q_row, heads_before = q + (query_0 + row) * (I * J), (query_0 + row) * I
            row_out = scores + (batch * ROWS + row) * STRIDE
            if ROWS % QUERIES == 0:
                weight = _weights(weights, q_scale, heads_before, head, head >= 0, QUANTIZED)
                q_NJ = tl.load(q_row + q_at)
            else:
                taken = head < (ROWS - row) * I
                weight = _weights(weights, q_scale, heads_before, head, taken, QUANTIZED)
                q_NJ = tl.load(q_row + q_at, mask=taken[:, None], other=0.0)
            score = _sum_heads(tl.dot(keys_KJ, q_NJ.T), weight, QUERIES, I)
            if QUANTIZED:
                score *= scale[:, None]
            tl.store(row_out + out_at, score, mask=real[:, None] & (which < ROWS - row)[None, :])


@triton.jit
def _hold_queries(
    q,
    q_scale,
    keys,
    key_scale,
    weights,
    visible,
    first,
    scores,
    T: tl.constexpr,
    S: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    J: tl.constexpr,
    ROWS: tl.constexpr,
    STRIDE: tl.constexpr,
    QUANTIZED: tl.constexpr,
    CAUSAL: tl.constexpr,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """A program scores KEYS * STEPS keys for up to QUERIES queries, all that a sequence has here."""
    TILES: tl.constexpr = (S + KEYS - 1) // KEYS
    CHUNKS: tl.constexpr = (TILES + STEPS - 1) // STEPS
    batch = (tl.program_id(0) // CHUNKS).to(tl.int64)
    start = tl.program_id(0) % CHUNKS * STEPS
    query_0 = batch * T + tl.load(first)
    which = tl.arange(0, QUERIES)

    end = tl.minimum(start + STEPS, TILES)
    if CAUSAL:
        seen = tl.max(tl.load(visible + query_0 + which, mask=which < ROWS, other=0), 0)
        end = tl.minimum(end, (seen + KEYS - 1) // KEYS)
    if start < end:
        channel = tl.arange(0, J)
        head = tl.arange(0, QUERIES * I)
        taken = head < ROWS * I
        weight = _weights(weights, q_scale, query_0 * I, head, taken, QUANTIZED)
        q_at = head[:, None] * J + channel[None, :]
        q_NJ = tl.load(q + query_0 * (I * J) + q_at, mask=taken[:, None], other=0.0)
        keys += batch * (S * J)
        scores += batch * ROWS * STRIDE
        for tile in tl.range(start, end):
            key = tile * KEYS + tl.arange(0, KEYS)
            real = key < S
            key_at = key[:, None] * J + channel[None, :]
            if S % KEYS == 0:
                keys_KJ = tl.load(keys + key_at)
            else:
                keys_KJ = tl.load(keys + key_at, mask=real[:, None], other=0.0)
            if QUANTIZED:
                scale = _power_of_two(tl.load(key_scale + batch * S + key, mask=real, other=0))
            score = _sum_heads(tl.dot(keys_KJ, q_NJ.T), weight, QUERIES, I)
            if QUANTIZED:
                score *= scale[:, None]
            out_at = which[None, :] * STRIDE + key[:, None]
            tl.store(scores + out_at, score, mask=real[:, None] & (which < ROWS)[None, :])


def index_scores(
    q: jax.Array | QuantArray,
    keys: jax.Array | QuantArray,
    weights: jax.Array,
    visible: jax.Array | None = None,
    *,
    first: jax.Array | None = None,
    rows: int | None = None,
    stride: int | None = None,
    tiling: Tiling | None = None,
) -> jax.Array:
    """Scores of queries `first` to `first + rows` of each sequence; all queries by default.

    Operands are bfloat16, or both `fp8_token128` of 128 channels with E8M0 scales.

    Args:
      visible: [B, T]; entries from there on may be left out, and what stands in their places is undefined.
      first: [1] int32.
      stride: columns of the result, from S on; those from S on are undefined.
      tiling: in place of `tiling_for`'s.

    Returns:
      [B, rows, stride] float32.
    """
    batch, tokens, heads, channels = q.shape
    entries = keys.shape[1]
    rows, stride = rows or tokens, stride or entries
    first = jnp.zeros(1, jnp.int32) if first is None else first
    quantized = isinstance(q, QuantArray)
    # In place of scales that are not there stands what is never read.
    operands = [
        *((q.values, q.scale) if isinstance(q, QuantArray) else (q, weights)),
        *((keys.values, keys.scale) if isinstance(keys, QuantArray) else (keys, weights)),
    ]
    tiling = tiling or tiling_for(current_target().arch, batch, rows, entries, heads, quantized)
    tiles = -(-entries // tiling.keys)
    constants: dict[str, Any] = {
        **{"T": tokens, "S": entries, "I": heads, "J": channels, "ROWS": rows, "STRIDE": stride},
        **{"QUANTIZED": quantized, "CAUSAL": visible is not None},
        **{"KEYS": tiling.keys, "QUERIES": tiling.queries, "STEPS": tiling.steps},
        **{"num_warps": tiling.num_warps, "num_stages": tiling.num_stages},
    }
    arrays = (*operands, weights, first if visible is None else visible, first)
    out = jax.ShapeDtypeStruct((batch, rows, stride), jnp.float32)
    if rows <= tiling.queries:
        grid = (batch * -(-tiles // tiling.steps),)
        return triton_call(_hold_queries, *arrays, out=out, grid=grid, **constants)
    constants["IN_REGISTERS"] = tiling.in_registers
    grid = (batch * -(-rows // (tiling.queries * tiling.steps)) * tiles,)
    return triton_call(_hold_keys, *arrays, out=out, grid=grid, **constants)
