"""`sparse_attention` in Pallas for Hopper: which calls it takes, and its launch."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.cached_rows import KeyValues, QuantKV
from pallas_kernels.sparse_attention import mosaic_kernel
from pallas_kernels.sparse_attention.mosaic_config import (
    CHANNELS,
    HEADS,
    NOPE,
    PAIRS,
    Config,
    Sizes,
    config_for,
)
from pallas_kernels.sparse_attention.triton import combine
from pallas_kernels.target import Target

# Queries of 64 heads: for fewer, the Triton kernels give more multiprocessors something to do. They are slow
# at codes.
FEWEST_QUERIES, FEWEST_OF_CODES = 8, 1
Turns = tuple[jax.Array, jax.Array] | None


def fits(
    target: Target,
    q: jax.Array,
    window_kv: KeyValues,
    window_index: jax.Array,
    compressed_kv: KeyValues | None,
    compressed_index: jax.Array | None,
    attn_sink: jax.Array,
    turns: Turns,
    softmax_scale: float,
) -> bool:
    """Whether `sparse_attention` takes these and is the one to take them: many queries of V4, on Hopper."""
    batch, tokens, heads, channels = q.shape
    fewest = FEWEST_OF_CODES if isinstance(window_kv, QuantKV) else FEWEST_QUERIES
    kvs = (window_kv,) if compressed_kv is None else (window_kv, compressed_kv)
    return (
        target.arch == "sm_90"
        and all(array.dtype == jnp.bfloat16 for array in (q, *kvs))
        and all(_takes(kv) for kv in kvs)
        and channels == CHANNELS
        and heads % HEADS == 0
        and batch * tokens * heads >= fewest * HEADS
        and window_kv.size > 0
        and window_index.size > 0
        and all(kv.shape[0] * kv.shape[1] < 2**31 for kv in kvs)
        and (turns is None or turns[0].shape[-1] == PAIRS)
        and isinstance(softmax_scale, float | int)  # it becomes part of the kernel
        and softmax_scale > 0
    )


def _takes(kv: KeyValues) -> bool:
    return not isinstance(kv, QuantKV) or kv.nope.shape[-1] == NOPE


@functools.partial(jax.jit, static_argnames=("softmax_scale", "config", "interpret"))
def sparse_attention(
    q: jax.Array,
    window_kv: KeyValues,
    window_index: jax.Array,
    compressed_kv: KeyValues | None,
    compressed_index: jax.Array | None,
    attn_sink: jax.Array,
    turns: Turns,
    softmax_scale: float,
    config: Config | None = None,
    interpret: Any = None,
) -> jax.Array:
    """See `pallas_kernels.sparse_attention`; `fits` says which arguments it is for."""
    batch, tokens, heads, channels = q.shape
    if compressed_kv is None or compressed_index is None or 0 in (compressed_kv.size, compressed_index.size):
        compressed_kv, compressed_index, entries, chosen = window_kv, window_index, 0, 0  # never read
    else:
        entries, chosen = compressed_kv.shape[1], compressed_index.shape[2]
    kvs, codes = (window_kv, compressed_kv), isinstance(window_kv, QuantKV)
    sizes = Sizes(
        *(batch, tokens, heads // HEADS, window_kv.shape[1], window_index.shape[2], entries, chosen),
        codes=codes,
        turned=turns is not None,
    )
    config = config or config_for(sizes)
    arguments = (
        q.reshape(-1, HEADS, channels),
        *(leaf for kv in kvs for leaf in jax.tree.leaves(kv)),
        *(window_index, compressed_index, attn_sink),
        *((each.reshape(-1, PAIRS) for each in turns) if turns else (attn_sink, attn_sink)),  # never read
    )
    out, *parts = _launch(arguments, sizes, config, softmax_scale, interpret)
    if config.splits == 1:
        return out.reshape(q.shape)
    shape = (batch, tokens, heads, config.splits)
    return combine(out.reshape(*shape, channels), parts[0].reshape(shape), attn_sink, turns)


def _launch(
    arguments: Any, sizes: Sizes, config: Config, scale: float, interpret: Any = None
) -> tuple[jax.Array, ...]:
    """[queries x groups, 64, 512]; with splits [.., splits, 512] and the log2 of their sums of weights."""
    heads, splits = sizes.queries * sizes.groups, (config.splits,) if config.splits > 1 else ()
    outs = [jax.ShapeDtypeStruct((heads, HEADS, *splits, CHANNELS), jnp.bfloat16)]
    if splits:
        outs.append(jax.ShapeDtypeStruct((heads, HEADS, *splits), jnp.float32))
    return plgpu.kernel(
        functools.partial(mosaic_kernel.kernel, sizes, config, scale),
        out_type=tuple(outs),
        scratch_types=mosaic_kernel.scratch(sizes),
        grid=(mosaic_kernel.programs_of(sizes, config),),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=interpret,
        kernel_name=f"sparse_attention_{config.splits}",
    )(*arguments)
