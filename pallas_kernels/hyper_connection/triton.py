"""Hyper-connections of four streams in Triton, two launches around every sub-layer.

`project` multiplies the streams by `fn` and sums their squares; programs share out tokens and channels, so
that a single token keeps the whole chip busy. `post_project` writes the new streams on the way and projects
what it has just written. What each of them leaves in `partial` is a sum over some channels.

`finish` adds these sums up, in the same order for every run. Some of its programs take whole tokens through
the Sinkhorn steps, 16 numbers in registers; the others collapse the streams of one token each.

The projection runs on tensor cores and is that of float32: streams are bfloat16, and every number of `fn` is
cut into three bfloat16 numbers whose sum it is.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.hyper_connection.finish_triton import finish, finish_head
from pallas_kernels.hyper_connection.project_triton import post_project, project, write_back
from pallas_kernels.triton_call import triton_call

STREAMS = 4
_COLUMNS = 32  # of a row of `partial`: a product with every row of fn, then the sum of squares


class Tiling(NamedTuple):
    """How `project` and `post_project` are shared out.

    Attributes:
      tokens, channels: of a tile; a program has this tile of all streams.
      most_blocks: tiles that a program goes through at most, along the channels.
      cuts_first: whether `fn` is cut up once, in a launch of its own, and not by every program.
    """

    tokens: int
    channels: int
    most_blocks: int
    num_warps: int
    num_stages: int
    cuts_first: bool = False


def tiling(tokens: int) -> Tiling:
    """A few tokens are spread over many programs; many tokens share what a program reads of `fn`."""
    if tokens <= 16:
        return Tiling(16, 32, 1, 4, 1)
    blocks = 1 << max(0, (tokens // 128).bit_length() - 1)  # which leaves some 256 programs
    if tokens < 1024:
        return Tiling(64, 32, blocks, 8, 1 if blocks == 1 else 2)
    return Tiling(64, 32, blocks, 4, 2, cuts_first=True)


# --- launches


def hc_pre(
    streams: jax.Array,
    fn: jax.Array,
    scale: jax.Array,
    base: jax.Array,
    sinkhorn_iters: int,
    eps: float,
    norm_eps: float,
    norm_weight: jax.Array | None,
    tiles: Tiling | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    tiles = tiles or tiling(math.prod(streams.shape[:-2]))
    partial = _launch_project(streams, fn, tiles)
    return _launch_finish(streams, partial, scale, base, sinkhorn_iters, eps, norm_eps, norm_weight)


def hc_post_pre(
    y: jax.Array,
    streams: jax.Array,
    post: jax.Array,
    comb: jax.Array,
    fn: jax.Array,
    scale: jax.Array,
    base: jax.Array,
    sinkhorn_iters: int,
    eps: float,
    norm_eps: float,
    norm_weight: jax.Array | None,
    tiles: Tiling | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    tiles = tiles or tiling(math.prod(streams.shape[:-2]))
    partial, constants, grid = _shared_out(streams, fn, tiles)
    new, partial = triton_call(
        post_project,
        y,
        streams,
        post,
        comb,
        _cut(fn) if tiles.cuts_first else fn,
        out=(jax.ShapeDtypeStruct(streams.shape, streams.dtype), partial),
        grid=grid,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **constants,
    )
    x, post, comb = _launch_finish(new, partial, scale, base, sinkhorn_iters, eps, norm_eps, norm_weight)
    return new, x, post, comb


def hc_post(y: jax.Array, streams: jax.Array, post: jax.Array, comb: jax.Array) -> jax.Array:
    *outer, _, width = streams.shape
    tokens = math.prod(outer)
    channels = 512 if tokens <= 128 else 1024  # few tokens are spread over more programs
    splits = -(-width // channels)
    return triton_call(
        write_back,
        y,
        streams,
        post,
        comb,
        out=jax.ShapeDtypeStruct(streams.shape, streams.dtype),
        grid=(tokens * splits,),
        WIDTH=width,
        CHANNELS=channels,
        SPLITS=splits,
    )


def hc_head(
    streams: jax.Array,
    fn: jax.Array,
    scale: jax.Array,
    base: jax.Array,
    eps: float,
    norm_eps: float,
    norm_weight: jax.Array | None,
    tiles: Tiling | None = None,
) -> jax.Array:
    tokens = math.prod(streams.shape[:-2])
    partial = _launch_project(streams, fn, tiles or tiling(tokens))
    return triton_call(
        finish_head,
        streams,
        partial,
        scale,
        base,
        base if norm_weight is None else norm_weight,
        out=_collapsed(streams),
        grid=(tokens,),
        num_warps=8,
        NORM=norm_weight is not None,
        **_finish_constants(streams, partial, base, eps, norm_eps),
    )


def _shared_out(
    streams: jax.Array, fn: jax.Array, tiles: Tiling
) -> tuple[jax.ShapeDtypeStruct, dict[str, Any], tuple[int]]:
    """Shape of `partial`, constants and grid of the first kernel."""
    *outer, _, width = streams.shape
    tokens = math.prod(outer)
    blocks = math.gcd(width // tiles.channels, tiles.most_blocks)
    splits = width // (blocks * tiles.channels)
    constants = {
        "TOKENS": tokens,
        "WIDTH": width,
        "ROWS": fn.shape[0],
        "SPLITS": splits,
        "BLOCKS": blocks,
        "TILE": tiles.tokens,
        "CHANNELS": tiles.channels,
        "COLUMNS": _COLUMNS,
        "STAGES": tiles.num_stages,
        "CUT": tiles.cuts_first,
    }
    partial = jax.ShapeDtypeStruct((splits, tokens, _COLUMNS), jnp.float32)
    return partial, constants, (-(-tokens // tiles.tokens) * splits,)


def _cut(fn: jax.Array) -> jax.Array:
    """Three bfloat16 numbers whose sum is that of `fn`, [3, ROWS, 4*WIDTH]."""
    high = jax.lax.reduce_precision(fn, 8, 7)  # which XLA leaves alone, unlike a cast and its way back
    middle = jax.lax.reduce_precision(fn - high, 8, 7)
    return jnp.stack([high, middle, fn - high - middle]).astype(jnp.bfloat16)


def _launch_project(streams: jax.Array, fn: jax.Array, tiles: Tiling) -> jax.Array:
    partial, constants, grid = _shared_out(streams, fn, tiles)
    return triton_call(
        project,
        streams,
        _cut(fn) if tiles.cuts_first else fn,
        out=partial,
        grid=grid,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **constants,
    )


def _launch_finish(streams, partial, scale, base, sinkhorn_iters, eps, norm_eps, norm_weight):
    outer = streams.shape[:-2]
    tokens = math.prod(outer)
    constants = _finish_constants(streams, partial, base, eps, norm_eps)
    tile = max(1, min(16, 128 // constants["SPLITS_PADDED"]))  # tokens that fit a program's registers
    tiles = -(-tokens // tile)
    return triton_call(
        finish,
        streams,
        partial,
        scale,
        base,
        base if norm_weight is None else norm_weight,
        out=(
            _collapsed(streams),
            jax.ShapeDtypeStruct((*outer, STREAMS), jnp.float32),
            jax.ShapeDtypeStruct((*outer, STREAMS, STREAMS), jnp.float32),
        ),
        grid=(tiles + tokens,),
        # With one warp for each of the four schedulers, the Sinkhorn steps of few tokens are done soonest.
        num_warps=4 if tokens <= 128 else 8,
        NORM=norm_weight is not None,
        ITERATIONS=sinkhorn_iters,
        TILE=tile,
        TILES=tiles,
        **constants,
    )


def _collapsed(streams: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*streams.shape[:-2], streams.shape[-1]), streams.dtype)


def _finish_constants(streams, partial, base, eps: float, norm_eps: float) -> dict[str, Any]:
    splits, tokens, columns = partial.shape
    return {
        "TOKENS": tokens,
        "WIDTH": streams.shape[-1],
        "WIDTH_PADDED": 1 << (streams.shape[-1] - 1).bit_length(),
        "ROWS": base.size,
        "SPLITS": splits,
        "SPLITS_PADDED": 1 << (splits - 1).bit_length(),
        "COLUMNS": columns,
        "EPS": eps,
        "NORM_EPS": norm_eps,
    }
