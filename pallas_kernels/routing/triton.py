"""Routing in one launch: scores, the choice by them or by token id, and the weights of what was chosen.

`exp` and `log1p` are those of the vendor's math library, as XLA takes them too: Triton's own are approximate,
and log(1 + x) of a small x would lose its digits.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from triton.language.extra import libdevice

from pallas_kernels.triton_call import triton_call

_TOKENS = 32  # that one program routes by id
_LOWEST = tl.constexpr(-(2**31))


@triton.jit
def _score(logits):
    """sqrt(softplus(logits)); not a number stays so."""
    softplus = tl.maximum(logits, 0.0) + libdevice.log1p(libdevice.exp(-tl.abs(logits)))
    return tl.sqrt_rn(softplus)


@triton.jit
def _weights(logits, used, SCALING: tl.constexpr):
    """Weights [tokens, slots] from the logits of the experts chosen; slots not `used` count for nothing."""
    score = tl.where(used, _score(logits), 0.0)
    return tl.div_rn(score, tl.broadcast_to(tl.sum(score, 1, keep_dims=True), score.shape)) * SCALING


@triton.jit
def _route_by_score(
    logits,  # [N, E] float32
    bias,  # [E] float32
    experts,  # [N, TOP_K] int32
    weights,  # [N, TOP_K] float32
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    SCALING: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """One warp routes one token, so that finding a maximum needs no barrier."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    real = column < E
    score = _score(tl.load(logits + token * E + column, mask=real, other=0.0))
    affinity = score + tl.load(bias + column, mask=real, other=0.0)
    # Integers in the order of the floats, NaN above all: a warp has an instruction for their maximum.
    bits = affinity.to(tl.int32, bitcast=True)
    rank = tl.where(real, bits ^ ((bits >> 31) & 0x7FFFFFFF), _LOWEST)

    slot = tl.arange(0, SLOTS)
    chosen = tl.zeros((SLOTS,), tl.int32)
    for nth in tl.static_range(TOP_K):
        best = tl.max(rank, 0)
        expert = tl.min(tl.where(rank == best, column, COLUMNS), 0)
        chosen = tl.where(slot == nth, expert, chosen)
        rank = tl.where(column == expert, _LOWEST, rank)

    used = slot < TOP_K
    # The row is in the cache still: reading six of its numbers again is quicker than six more reductions.
    again = tl.load(logits + token * E + chosen, mask=used, other=0.0)
    tl.store(experts + token * TOP_K + slot, chosen, mask=used)
    at = (weights + token * TOP_K + slot)[None, :]
    tl.store(at, _weights(again[None, :], used[None, :], SCALING), mask=used[None, :])


@triton.jit
def _route_by_id(
    logits,  # [N, E] float32
    ids,  # [N] int32
    table,  # [V, CHOICES] int32
    experts,  # [N, CHOICES] int32
    weights,  # [N, CHOICES] float32
    N: tl.constexpr,
    E: tl.constexpr,
    V: tl.constexpr,
    CHOICES: tl.constexpr,
    SCALING: tl.constexpr,
    SLOTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    there = token < N
    slot = tl.arange(0, SLOTS)[None, :]
    used = there[:, None] & (slot < CHOICES)
    id = tl.load(ids + token, mask=there, other=0)
    id = tl.minimum(tl.maximum(id, 0), V - 1).to(tl.int64)
    chosen = tl.load(table + id[:, None] * CHOICES + slot, mask=used, other=0)
    numbers = tl.load(logits + token[:, None] * E + chosen, mask=used, other=0.0)
    at = token[:, None] * CHOICES + slot
    tl.store(experts + at, chosen, mask=used)
    # Rows past the last token are all zeros: their weights are never stored.
    tl.store(weights + at, _weights(numbers, used, SCALING), mask=used)


def route_by_score(
    logits: jax.Array, bias: jax.Array, top_k: int, scaling_factor: float
) -> tuple[jax.Array, jax.Array]:
    tokens, experts = logits.shape
    return triton_call(
        _route_by_score,
        logits,
        bias,
        out=_out(tokens, top_k),
        grid=(tokens,),
        num_warps=1,
        E=experts,
        TOP_K=top_k,
        SCALING=scaling_factor,
        COLUMNS=triton.next_power_of_2(experts),
        SLOTS=triton.next_power_of_2(top_k),
    )


def route_by_id(
    logits: jax.Array, ids: jax.Array, table: jax.Array, scaling_factor: float
) -> tuple[jax.Array, jax.Array]:
    (tokens, experts), (vocabulary, choices) = logits.shape, table.shape
    return triton_call(
        _route_by_id,
        logits,
        ids,
        table,
        out=_out(tokens, choices),
        grid=(-(-tokens // _TOKENS),),
        N=tokens,
        E=experts,
        V=vocabulary,
        CHOICES=choices,
        SCALING=scaling_factor,
        SLOTS=triton.next_power_of_2(choices),
        TOKENS=_TOKENS,
    )


def _out(tokens: int, choices: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Experts and weights."""
    shape = (tokens, choices)
    return jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)
