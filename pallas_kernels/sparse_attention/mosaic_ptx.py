"""What the Mosaic kernel of `sparse_attention` does that Mosaic has no words for, in PTX.

The copy engine of Hopper takes no list of rows, and Mosaic knows neither copies of 16 bytes by each thread,
nor a barrier that these report to, nor bytes that become bfloat16 on their way to shared memory. A "scalar"
here may be another number in each thread: it is a register that one piece of assembly leaves to the next.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.sparse_attention.mosaic_config import PAIRS, SLOTS, Sizes
from pallas_kernels.sparse_attention.mosaic_texts import (
    AWAIT_TEXT,
    DECODED_TEXT,
    RAW,
    SEEN_TEXT,
    ahead_text,
    decode_text,
    fetch_text,
    look_text,
    raw_text,
    rope_text,
    rows_text,
)

TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]
ROW = plgpu.Layout.WGMMA.reduce(1)  # one number a head, where a product has that head
SCALAR = plgpu.Layout.WG_SPLAT
REF, TILE_REF = plgpu.RefType(), plgpu.RefType(TILED)

# --- how assembly gets into a kernel


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _thread() -> ir.Value:
    """Of the warpgroup."""
    return arith.remui(mgpu_utils.thread_idx(), mgpu_utils.c(128, _i32()))


def _assemble(text: str, results: int = 0, **operands: Any) -> tuple[mgpu.FragmentedArray, ...]:
    """Inline assembly on addresses of arrays, integers and `$thread`; returns `$result0` and so on.

    Whatever it reads of operands it must have read before it writes a result: they may share a register.
    """
    values = {"thread": _thread()}
    for name, operand in operands.items():
        if isinstance(operand, mgpu.FragmentedArray):
            values[name] = operand.registers.item()
        else:
            values[name] = mgpu_utils.memref_ptr(operand)
    names = [*(f"result{n}" for n in range(results)), *values]
    numbers = {name: number for number, name in enumerate(names)}
    kinds = ["=r"] * results + ["r" if value.type == _i32() else "l" for value in values.values()]
    types = [_i32()] * results
    kind: Any = ir.Type.parse("!llvm.void")
    if results:
        kind = types[0] if results == 1 else llvm.StructType.get_literal(types)
    found = llvm.inline_asm(
        kind,
        list(values.values()),
        "{ " + re.sub(r"\$(\w+)", lambda match: f"${numbers[match[1]]}", text) + " }",
        ",".join(kinds),
        has_side_effects=True,
    )
    parts = [found] if results == 1 else [llvm.extractvalue(_i32(), found, [n]) for n in range(results)]
    return tuple(mgpu.FragmentedArray.splat(part, (), is_signed=True) for part in parts if results)


def _inline(emit: Any, *arguments: Any, kinds: tuple[Any, ...], results: int = 0) -> Any:
    """Runs `emit` where Mosaic makes its instructions; returns int32 scalars."""
    one = plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR)
    inline: Any = plgpu.inline_mgpu(
        arg_types=kinds, return_type=(None, one)[results] if results < 2 else (one,) * results
    )
    return inline(lambda _, *operands: emit(*operands))(*arguments)


def _numbered(name: str, scalars: Any) -> dict[str, Any]:
    return {f"{name}{n}": scalar for n, scalar in enumerate(scalars)}


# --- steps of the kernel


def prepare(sizes: Sizes, arrived: Any) -> None:
    """The barriers of blocks, for all threads of the warpgroup."""

    def emit(arrived):
        text = ".reg .pred first; setp.eq.u32 first, $thread, 0;"
        for slot in range(SLOTS):
            text += f"@first mbarrier.init.shared::cta.b64 [$arrived+{8 * slot}], {sizes.arrivals};"
        _assemble(text, arrived=arrived)
        mgpu_utils.warpgroup_barrier()

    _inline(emit, arrived, kinds=(REF,))


def look(sizes: Sizes, lists: Any, seen: Any, query: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First block of a query's lists with a row, and the one after the last that has one."""

    def emit(window, compressed, seen, query):
        mgpu_utils.warpgroup_barrier()  # what the last call saw has been read
        _assemble(look_text(sizes), window=window, compressed=compressed, seen=seen, query=query)
        mgpu_utils.warpgroup_barrier()
        return _assemble(SEEN_TEXT, 2, seen=seen)

    return _inline(emit, *lists, seen, query, kinds=(REF, REF, REF, SCALAR), results=2)


def rows(sizes: Sizes, lists: Any, query: jax.Array, block: jax.Array) -> tuple[jax.Array, ...]:
    """The rows of a thread in a block, as "scalars"."""

    def emit(window, compressed, query, block):
        values = {"window": window, "compressed": compressed, "query": query, "block": block}
        return _assemble(rows_text(sizes), sizes.rows_a_thread, **values)

    kinds = (REF, REF, SCALAR, SCALAR)
    return _inline(emit, *lists, query, block, kinds=kinds, results=sizes.rows_a_thread)


def load(sizes: Sizes, kvs: Any, batch: jax.Array, block: jax.Array, rows: Any) -> tuple[jax.Array, ...]:
    """What is read of a block before there is room for it: for each row of a thread codes and scales."""
    if not sizes.codes:
        return ()

    def emit(window_nope, window_scale, compressed_nope, compressed_scale, batch, block, row):
        arrays = {"window_nope": window_nope, "window_scale": window_scale}
        arrays |= {"compressed_nope": compressed_nope, "compressed_scale": compressed_scale}
        return _assemble(raw_text(sizes), RAW, **arrays, batch=batch, block=block, row=row)

    (window, compressed), kinds = kvs, (*(REF,) * 4, *(SCALAR,) * 3)
    arrays = (window.nope, window.scale, compressed.nope, compressed.scale)
    held = [_inline(emit, *arrays, batch, block, row, kinds=kinds, results=RAW) for row in rows]
    return tuple(word for words in held for word in words)


def ahead(sizes: Sizes, kvs: Any, batch: jax.Array, block: jax.Array, rows: Any) -> None:
    """Asks the L2 cache for the rows of a block."""

    def emit(*operands):
        arrays = dict(zip(_named("nope", "scale", "rope"), operands, strict=False))
        batch, block, *rows = operands[len(arrays) :]
        _assemble(ahead_text(sizes), **arrays, batch=batch, block=block, **_numbered("row", rows))

    kinds = (*(REF,) * 6, *(SCALAR,) * (2 + len(rows)))
    _inline(emit, *_arrays(kvs, "nope", "scale", "rope"), batch, block, *rows, kinds=kinds)


def store(
    sizes: Sizes,
    kvs: Any,
    tile: Any,
    starts: Any,
    arrived: Any,
    batch: jax.Array,
    block: jax.Array,
    rows: Any,
    held: tuple[jax.Array, ...],
    slot: int,
) -> None:
    """Brings a block to a slot that is free; the slot's barrier will hear of it."""
    tile, starts = tile.at[slot], starts.at[slot]

    def at_slot(text: str) -> str:
        return text.replace("[$arrived]", f"[$arrived+{8 * slot}]")

    def emit_plain(window, compressed, tile, starts, arrived, batch, block, *rows):
        at = {"window_kv": window, "compressed_kv": compressed, "tile": tile, "starts": starts}
        at |= {"arrived": arrived, "batch": batch, "block": block}
        _assemble(at_slot(fetch_text(sizes)), **at, **_numbered("row", rows))

    if not sizes.codes:
        kinds = (REF, REF, TILE_REF, REF, REF, *(SCALAR,) * (2 + len(rows)))
        _inline(emit_plain, *kvs, tile, starts, arrived, batch, block, *rows, kinds=kinds)
        return

    def emit_rope(window_rope, compressed_rope, tile, batch, block, *rows):
        at = {"window_rope": window_rope, "compressed_rope": compressed_rope, "tile": tile}
        _assemble(rope_text(sizes), **at, batch=batch, block=block, **_numbered("row", rows))

    kinds = (REF, REF, TILE_REF, *(SCALAR,) * (2 + len(rows)))
    _inline(emit_rope, *_arrays(kvs, "rope"), tile, batch, block, *rows, kinds=kinds)
    for half, row in enumerate(rows):

        def emit_decode(tile, starts, row, *raw, half=half):
            _assemble(decode_text(half), tile=tile, starts=starts, row=row, **_numbered("raw", raw))

        raw = held[RAW * half : RAW * (half + 1)]
        _inline(emit_decode, tile, starts, row, *raw, kinds=(TILE_REF, REF, *(SCALAR,) * (1 + RAW)))
    _inline(lambda arrived: _assemble(at_slot(DECODED_TEXT), arrived=arrived), arrived, kinds=(REF,))


def _arrays(kvs: Any, *names: str) -> list[Any]:
    return [getattr(kv, name) for name in names for kv in kvs]


def _named(*names: str) -> list[str]:
    """Of the arrays that `_arrays` gives."""
    return [f"{whose}_{name}" for name in names for whose in ("window", "compressed")]


def wait_for(arrived: Any, slot: int, phase: jax.Array) -> None:
    """Waits for the block of a slot; `phase` is 0 for its first, then 1, then 0."""

    def emit(arrived, phase):
        _assemble(AWAIT_TEXT.replace("[$arrived]", f"[$arrived+{8 * slot}]"), arrived=arrived, phase=phase)

    _inline(emit, arrived, phase, kinds=(REF, SCALAR))


def zero() -> jax.Array:
    """LLVM does not see that it is 0, and so keeps no addresses made from it in registers."""

    def emit():
        return _assemble("mov.b32 $result0, 0;", 1)[0]

    return _inline(emit, kinds=(), results=1)


def moved(factor: jax.Array) -> jax.Array:
    """Whether any of the warp's factors is not 1: a "scalar" that warps may differ in."""

    def emit(factor):
        i1 = ir.IntegerType.get_signless(1)
        moved = mgpu_utils.c(0, i1)
        for register in factor.registers.flat:
            number, one = vector.extract(register, [], [0]), mgpu_utils.c(1.0, ir.F32Type.get())
            moved = arith.ori(moved, arith.cmpf(arith.CmpFPredicate.UNE, number, one))
        mine = mgpu.FragmentedArray.splat(arith.extui(_i32(), moved), (), is_signed=True)
        text = ".reg .pred mine; setp.ne.u32 mine, $mine, 0; vote.sync.any.pred mine, mine, 0xFFFFFFFF;"
        return _assemble(f"{text} selp.b32 $result0, 1, 0, mine;", 1, mine=mine)[0]

    return _inline(emit, factor, kinds=(ROW,), results=1)


def turned_back(columns: jax.Array, cos: Any, sin: Any, query: jax.Array) -> jax.Array:
    """[64 heads, 64 columns] turned by the negative angles of a query, pair by pair of neighbours.

    A thread has both columns of a pair in one register.
    """
    layout = plgpu.Layout.WGMMA

    def emit(columns, cos, sin, query):
        f32 = ir.F32Type.get()
        registers = np.empty_like(columns.registers)
        turns = {}
        for index, pair in np.ndenumerate(columns.registers):
            tile = index[1]  # of eight columns
            if tile not in turns:
                turns[tile] = [
                    llvm.inline_asm(
                        f32,
                        [mgpu_utils.memref_ptr(ref), query.registers.item(), _thread()],
                        "{ .reg .b32 at; .reg .b64 from; and.b32 at, $3, 3;"
                        f" mad.lo.u32 at, $2, {PAIRS}, at; mul.wide.u32 from, at, 4; add.u64 from, from, $1;"
                        f" ld.global.nc.f32 $0, [from+{16 * tile}]; }}",
                        "=f,l,r,r",
                        has_side_effects=True,
                    )
                    for ref in (cos, sin)
                ]
            cosine, sine = turns[tile]
            even, odd = (vector.extract(pair, [], [n]) for n in range(2))
            new_even = arith.addf(arith.mulf(even, cosine), arith.mulf(odd, sine))
            new_odd = arith.subf(arith.mulf(odd, cosine), arith.mulf(even, sine))
            registers[index] = vector.from_elements(pair.type, [new_even, new_odd])
        return mgpu.FragmentedArray(
            _registers=registers, _layout=columns.layout, _is_signed=columns.is_signed
        )

    inline: Any = plgpu.inline_mgpu(
        arg_types=(layout, REF, REF, SCALAR),
        return_type=plgpu.ShapeDtypeStruct(columns.shape, columns.dtype, layout=layout),
    )
    return inline(lambda _, *operands: emit(*operands))(columns, cos, sin, query)
