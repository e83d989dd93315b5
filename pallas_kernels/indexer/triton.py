"""Scores of the indexer on tensor cores: keys are the rows of a product, heads of queries its columns.

A program that is to serve many queries holds a tile of keys and walks along queries; where there are few,
it holds the queries and walks along keys, so that each key is read once. Either way relu, weights and the sum
over heads happen in registers, and a score is all that is written.

Keys in `fp4_group32` are read as they are stored, and meet queries in E4M3; where the chip has none, both
become bfloat16, which holds them exactly.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.formats import QuantArray
from pallas_kernels.indexer.queries import TiledQueries
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


def tiling_for(arch: str, batch: int, tokens: int, entries: int, heads: int) -> Tiling:
    """For so many queries of each sequence and so many keys."""
    amd = arch.startswith("gfx")
    if tokens <= FEW_QUERIES:
        tiles = batch * -(-entries // 128)
        # Two programs for each multiprocessor, as long as there are keys.
        steps = max(1, min(8, tiles // 264))
        queries = 1 << (tokens - 1).bit_length()
        return Tiling(128, queries, steps, False, 4 if queries * heads <= 128 else 8, 1 if amd else 3)
    if amd:
        return Tiling(128, 1, 32, False, 4, 1)
    return Tiling(128, 1, 64, arch == "sm_90", 4, 3)


# --- operands


@triton.jit
def _power_of_two(exponent):
    """2^(b-127) of a byte; 0, which stands for 2^-127, is taken for 0, and 255 is infinite."""
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _e2m1_times_2_to_minus_126(code):
    """As float32: the sign bit, and the other three where exponent and mantissa are."""
    return (((code & 8) << 28) | ((code & 7) << 22)).to(tl.float32, bitcast=True)


@triton.jit
def _fp4_keys(keys, scale, key, real, J: tl.constexpr, E4M3: tl.constexpr):
    """[KEYS, J] as the product takes it, and what a key's products are to be multiplied by."""
    KEYS: tl.constexpr = key.shape[0]
    # Words of eight channels, a quarter of a key's for each thread of four: see `channel_order`.
    WORDS: tl.constexpr = J // 32
    quarter, word, nibble = tl.arange(0, 4), tl.arange(0, WORDS), tl.arange(0, 8)
    at = (key * (J // 8))[:, None, None] + (quarter * WORDS)[None, :, None] + word[None, None, :]
    words = tl.load(keys + at, mask=real[:, None, None], other=0)
    code = (words[:, :, :, None] >> (4 * nibble)[None, None, None, :]) & 15
    at = (key * WORDS)[:, None] + (quarter * WORDS // 4)[None, :]
    exponent = tl.load(scale + at, mask=real[:, None], other=1).to(tl.int32)
    if E4M3:
        # The scales relative to the largest, which is 2^6 here: 6 * 2^6 is the most that a number can be.
        highest = tl.max(exponent, 1)
        exponent = tl.maximum(exponent - highest[:, None] + 6 + 127, 0)
        factor = _power_of_two(tl.maximum(highest - 6, 0))
        factor = tl.where(highest == 255, float("nan"), factor)
    else:
        factor = tl.full((KEYS,), 1.0, tl.float32)
    numbers = _e2m1_times_2_to_minus_126(code) * 2.0**126 * _power_of_two(exponent)[:, :, None, None]
    numbers = tl.permute(tl.reshape(numbers, (KEYS, 4, WORDS, 2, 4)), (0, 2, 3, 1, 4))
    return tl.reshape(numbers, (KEYS, J)).to(tl.float8e4nv if E4M3 else tl.bfloat16), factor


@triton.jit
def _load_keys(keys, scale, key, real, J: tl.constexpr, FP4: tl.constexpr, E4M3: tl.constexpr):
    if FP4:
        keys_KJ, factor = _fp4_keys(keys, scale, key, real, J, E4M3)
    else:
        at = key[:, None] * J + tl.arange(0, J)[None, :]
        keys_KJ = tl.load(keys + at, mask=real[:, None], other=0.0)
        factor = tl.full((key.shape[0],), 1.0, tl.float32)
    return keys_KJ, factor


@triton.jit
def _load_queries(q, at, taken, FP4: tl.constexpr, E4M3: tl.constexpr):
    if FP4:
        values = tl.load(q + at, mask=taken, other=0)
        if E4M3:
            q_NJ = values.to(tl.float8e4nv, bitcast=True)
        else:
            # The bits of E4M3 are those of a float32 that is 2^-120 of it.
            bits = values.to(tl.int32)
            numbers = (((bits & 0x80) << 24) | ((bits & 0x7F) << 20)).to(tl.float32, bitcast=True)
            q_NJ = (numbers * 2.0**120).to(tl.bfloat16)
    else:
        q_NJ = tl.load(q + at, mask=taken, other=0.0)
    return q_NJ


@triton.jit
def _sum_heads(logit, weight, QUERIES: tl.constexpr, HEADS: tl.constexpr):
    """[keys, queries] of logits [keys, queries * heads]."""
    hit = tl.maximum(logit, 0.0, propagate_nan=tl.PropagateNan.ALL) * weight[None, :]
    if QUERIES == 1:
        total = tl.sum(hit, 1)[:, None]
    else:
        total = tl.sum(tl.reshape(hit, (hit.shape[0], QUERIES, HEADS)), 2)
    return total


@triton.jit
def _score(logit, weight, factor, QUERIES: tl.constexpr, HEADS: tl.constexpr):
    # A sum of negative zeros is to be zero as any other: the order of scores tells them apart.
    return _sum_heads(logit, weight, QUERIES, HEADS) * factor[:, None] + 0.0


@triton.jit
def _into_registers(keys, VENDOR: tl.constexpr):
    """The same keys, as a value that Triton does not know to have come from memory, so it keeps it here."""
    if VENDOR == "cuda":
        if keys.dtype == tl.bfloat16:
            keys = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r", [keys], keys.dtype, is_pure=True, pack=2
            )
        else:
            keys = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r", [keys], keys.dtype, is_pure=True, pack=4
            )
    return keys


# --- kernels


@triton.jit
def _hold_keys(
    q,  # [B, T, I, J] bfloat16; with FP4, bytes of TiledQueries
    keys,  # [B, S, J] bfloat16; with FP4, [B, S, J / 8] int32
    key_scale,  # [B, S, J / 32] uint8, read with FP4
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
    FP4: tl.constexpr,
    E4M3: tl.constexpr,
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
        keys_of = keys + batch * (S * J // 8 if FP4 else S * J)
        scales_of = key_scale + batch * (S * J // 32)
        keys_KJ, factor = _load_keys(keys_of, scales_of, key, real, J, FP4, E4M3)
        if IN_REGISTERS:
            keys_KJ = _into_registers(keys_KJ, VENDOR)
        head = tl.arange(0, QUERIES * I)
        q_at = head[:, None] * J + tl.arange(0, J)[None, :]
        which = tl.arange(0, QUERIES)
        out_at = which[None, :] * STRIDE + key[:, None]
        for step in tl.range(begin, end, QUERIES):
            row = start + step
            before = (query_0 + row) * I
            row_out = scores + (batch * ROWS + row) * STRIDE
            taken = head < (ROWS - row) * I
            weight = tl.load(weights + before + head, mask=taken, other=0.0)
            q_NJ = _load_queries(q + before * J, q_at, taken[:, None], FP4, E4M3)
            score = _score(tl.dot(keys_KJ, q_NJ.T), weight, factor, QUERIES, I)
            tl.store(row_out + out_at, score, mask=real[:, None] & (which < ROWS - row)[None, :])


@triton.jit
def _hold_queries(
    q,
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
    FP4: tl.constexpr,
    E4M3: tl.constexpr,
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
        head = tl.arange(0, QUERIES * I)
        taken = head < ROWS * I
        weight = tl.load(weights + query_0 * I + head, mask=taken, other=0.0)
        q_at = head[:, None] * J + tl.arange(0, J)[None, :]
        q_NJ = _load_queries(q + query_0 * (I * J), q_at, taken[:, None], FP4, E4M3)
        keys_of = keys + batch * (S * J // 8 if FP4 else S * J)
        scales_of = key_scale + batch * (S * J // 32)
        scores_of = scores + batch * ROWS * STRIDE
        for tile in tl.range(start, end):
            key = tile * KEYS + tl.arange(0, KEYS)
            real = key < S
            keys_KJ, factor = _load_keys(keys_of, scales_of, key, real, J, FP4, E4M3)
            score = _score(tl.dot(keys_KJ, q_NJ.T), weight, factor, QUERIES, I)
            out_at = which[None, :] * STRIDE + key[:, None]
            tl.store(scores_of + out_at, score, mask=real[:, None] & (which < ROWS)[None, :])


def index_scores(
    q: jax.Array | TiledQueries,
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

    Operands are bfloat16, or tiled queries and keys in `fp4_group32`.

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
    target = current_target()
    operands: list[Any] = [q, keys, weights]  # in place of scales that are not there, never read
    fp4 = isinstance(q, TiledQueries) and isinstance(keys, QuantArray)
    if isinstance(q, TiledQueries) and isinstance(keys, QuantArray):
        words = keys.values.reshape(batch, entries, channels // 8, 4)
        operands = [jax.lax.bitcast_convert_type(q.values, jnp.uint8)]
        operands += [jax.lax.bitcast_convert_type(words, jnp.int32), keys.scale]
    tiling = tiling or tiling_for(target.arch, batch, rows, entries, heads)
    tiles = -(-entries // tiling.keys)
    constants: dict[str, Any] = {
        **{"T": tokens, "S": entries, "I": heads, "J": channels, "ROWS": rows, "STRIDE": stride},
        **{"FP4": fp4, "E4M3": fp4 and target.has_e4m3, "CAUSAL": visible is not None},
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
