"""`hc_post_pre` on Hopper in one launch: a cluster of programs keeps a tile of tokens from end to end.

The new streams are written, and stay in registers until the input is made of them: nothing is read twice, and
nothing waits for another kernel. What the threads do is PTX (`mosaic_ptx.py`), as Mosaic has no words for
messages that a barrier counts.
"""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.hyper_connection.mosaic_ptx import (
    MIX,
    MIX_BYTES,
    MIXERS,
    PIECE_STRIDE,
    RECEIVED,
    ROWS,
    STREAMS,
    SUMS,
    TOKENS,
    WARPS,
    Case,
    mixing_ptx,
    owning_ptx,
)

CLUSTERS = 8  # of 16 multiprocessors each, that there is room for
WARPGROUPS = MIXERS // 128
# Registers of a thread once all know their part: those that mix, and the others. At first all have 96.
REGISTERS = 112, 56


def _assemble(text: str, **operands: ir.Value) -> None:
    """Inline assembly without results: `$name` is an operand."""
    i32 = ir.IntegerType.get_signless(32)
    numbers = {name: number for number, name in enumerate(operands)}
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        list(operands.values()),
        "{ " + re.sub(r"\$(\w+)", lambda match: f"${numbers[match[1]]}", text) + " }",
        ",".join("r" if value.type == i32 else "l" for value in operands.values()),
        has_side_effects=True,
    )


MEMORY = {
    False: ("y", "streams", "weight", "new", "x"),
    True: ("weights", "scale", "base", "post", "comb", "new_post", "new_comb"),
}
SHARED = {
    False: ("fn", "mixing", "products", "received", "shares", "squares", "totals", "barriers"),
    True: ("fn", "mixing", "received", "shares", "barriers"),
}


def _run(case: Case, owns: bool, refs: dict[str, Any], tile: jax.Array) -> None:
    names = (*MEMORY[owns], *SHARED[owns])

    def emit(_: Any, tile: Any, *arrays: ir.Value) -> None:
        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        thread = mgpu_utils.thread_idx()
        if owns:
            thread = arith.subi(thread, mgpu_utils.c(MIXERS, i32))
        operands = {
            name: llvm.ptrtoint(i64 if name in MEMORY[owns] else i32, mgpu_utils.memref_ptr(array))
            for name, array in zip(names, arrays, strict=True)
        }
        text = owning_ptx(case) if owns else mixing_ptx(case)
        _assemble(text, thread=thread, tile=tile.registers.item(), **operands)

    kinds = (plgpu.Layout.WG_SPLAT, *(plgpu.RefType(),) * len(names))
    inline: Any = plgpu.inline_mgpu(arg_types=kinds)
    inline(emit)(tile, *(refs[name] for name in names))


def _kernel(case: Case, *refs: Any) -> None:
    inputs = ("y", "streams", "post", "comb", "weights", "scale", "base", "weight")
    outputs = ("new", "x", "new_post", "new_comb")
    named: dict[str, Any] = dict(zip((*inputs, *outputs, *SHARED[False]), refs, strict=True))
    tile = lax.axis_index("tile")

    def mix() -> None:
        plgpu.set_max_registers(REGISTERS[0], action="increase")
        _run(case, False, named, tile)

    def own() -> None:
        plgpu.set_max_registers(REGISTERS[1], action="decrease")
        _run(case, True, named, tile)

    lax.cond(lax.axis_index("warpgroup") == WARPGROUPS, own, mix)


@functools.partial(jax.jit, static_argnames="case")
def _launch(
    y: jax.Array,  # [T, M]
    streams: jax.Array,  # [T, 4, M]
    post: jax.Array,  # [T, 4]
    comb: jax.Array,  # [T, 4, 4]
    fn: jax.Array,  # [24, 4 M]
    scale: jax.Array,
    base: jax.Array,
    weight: jax.Array,  # [M]
    *,
    case: Case,
) -> tuple[jax.Array, ...]:
    """A jit of its own: calls of one shape share one lowering."""
    return plgpu.kernel(
        functools.partial(_kernel, case),
        out_type=tuple(jax.ShapeDtypeStruct(like.shape, like.dtype) for like in (streams, y, post, comb)),
        scratch_types=(
            plgpu.SMEM((ROWS * STREAMS * PIECE_STRIDE // 4,), jnp.float32),
            plgpu.SMEM((2 * MIX_BYTES // 4,), jnp.float32),
            plgpu.SMEM((WARPS * TOKENS * SUMS,), jnp.float32),
            plgpu.SMEM((TOKENS * RECEIVED,), jnp.float32),
            plgpu.SMEM((TOKENS * 4,), jnp.float32),
            plgpu.SMEM((WARPS * TOKENS,), jnp.float32),
            plgpu.SMEM((TOKENS * TOKENS,), jnp.float32),
            plgpu.SMEM((2 * (MIX + 2),), jnp.int32),  # barriers of 8 bytes
        ),
        grid=(case.clusters,),
        grid_names=("tile",),
        cluster=(TOKENS,),
        cluster_names=("program",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name=f"hyper_connection_{case.clusters}",
    )(y, streams, post, comb, fn, scale, base, weight)


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
    norm_weight: jax.Array,
    clusters: int = CLUSTERS,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """See `pallas_kernels.hyper_connection`; for the streams of Flash, with a norm weight."""
    outer = y.shape[:-1]
    tokens = math.prod(outer)
    wide = norm_weight.dtype == jnp.float32
    clusters = min(clusters, -(-tokens // TOKENS))
    case = Case(tokens, clusters, sinkhorn_iters, float(eps), float(norm_eps), wide)
    flat = [array.reshape(tokens, *array.shape[len(outer) :]) for array in (y, streams, post, comb)]
    found = _launch(*flat, fn, scale, base, norm_weight, case=case)
    new, x, post, comb = (array.reshape(*outer, *array.shape[1:]) for array in found)
    return new, x, post, comb
