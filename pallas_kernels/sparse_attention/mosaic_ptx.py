"""What the Mosaic kernel of `sparse_attention` does that Mosaic has no words for, in PTX.

The copy engine of Hopper takes no list of rows, and Mosaic knows neither copies of 16 bytes by each thread,
nor a barrier that these report to, nor bytes that become bfloat16 on their way to shared memory. A "scalar"
here may be another number in each thread: it is a register that one piece of assembly leaves to the next.

A block of rows lies as the tensor core wants it: in pieces of 8 rows x 64 columns, 1 KiB each, in which
sixteen bytes trade places by row. Where a place has no row nothing is read: it becomes zeros, and its logits
start at -inf.
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

from pallas_kernels.sparse_attention.mosaic_config import (
    CHANNELS,
    COLUMNS,
    HEADS,
    KEYS,
    LOG2_E,
    LOWEST,
    NOPE,
    PAIRS,
    SLOTS,
    Sizes,
)

TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]
ROW = plgpu.Layout.WGMMA.reduce(1)  # one number a head, where a product has that head
SCALAR = plgpu.Layout.WG_SPLAT
REF, TILE_REF = plgpu.RefType(), plgpu.RefType(TILED)
AT_ONCE = 8  # places of a list that a thread looks up before it waits
CHUNKS = NOPE // 64  # of 16 codes, that a thread takes of a row
RAW = 4 * CHUNKS + 2  # words of a row that it holds: codes and all of the row's scales

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


# --- texts


def _lines(*lines: str) -> str:
    return "\n".join(lines)


def rows_text(sizes: Sizes) -> str:
    """What stands at a thread's places of a block: the first of its rows, and every so many further on."""
    step, load = 128 // sizes.threads_a_row, _load(sizes)
    lines = [
        ".reg .pred in_window, there;",
        ".reg .b32 place, length;",
        ".reg .b64 list, at;",
        f"shr.u32 place, $thread, {sizes.threads_a_row.bit_length() - 1};",
        f"mad.lo.u32 place, $block, {KEYS}, place;",
        f"mul.wide.u32 list, $query, {4 * sizes.window};",
        "add.u64 list, list, $window;",
        f"mov.b32 length, {sizes.window};",
    ]
    if sizes.chosen:
        lines += [
            f"setp.lt.u32 in_window, $block, {sizes.window_blocks};",
            f"mul.wide.u32 at, $query, {4 * sizes.chosen};",
            "add.u64 at, at, $compressed;",
            "selp.b64 list, list, at, in_window;",
            f"selp.b32 length, {sizes.window}, {sizes.chosen}, in_window;",
            f"@!in_window sub.u32 place, place, {sizes.window_blocks * KEYS};",
        ]
    lines += ["mul.wide.u32 at, place, 4;", "add.u64 at, at, list;"]
    for n in range(sizes.rows_a_thread):
        lines += [
            "setp.lt.u32 there, place, length;",
            f"mov.b32 $result{n}, -1;",
            f"@there {load}.b32 $result{n}, [at+{4 * step * n}];",
            f"add.u32 place, place, {step};",
        ]
    return _lines(*lines)


def _load(sizes: Sizes) -> str:
    """A load that is not volatile the assembler may put off until what it reads is needed."""
    return "ld.volatile.global" if sizes.early else "ld.global.nc"


def _chosen_text(sizes: Sizes, *names: str) -> str:
    """`last` row, `batch_rows`, rows before this batch; and for each name the array that the block is of."""
    lines = [".reg .pred in_window;", ".reg .b32 last, batch_rows;"]
    lines += [f".reg .b64 {name};" for name in names]
    if not sizes.chosen:
        lines += [f"mov.b64 {name}, $window_{name};" for name in names]
        return _lines(
            *lines, f"mov.b32 last, {sizes.rows - 1};", f"mul.lo.u32 batch_rows, $batch, {sizes.rows};"
        )
    return _lines(
        *lines,
        f"setp.lt.u32 in_window, $block, {sizes.window_blocks};",
        *(f"selp.b64 {name}, $window_{name}, $compressed_{name}, in_window;" for name in names),
        f"selp.b32 batch_rows, {sizes.rows}, {sizes.entries}, in_window;",
        "sub.u32 last, batch_rows, 1;",
        "mul.lo.u32 batch_rows, $batch, batch_rows;",
    )


def _address_text(to: str, array: str, row: str, nbytes: int) -> str:
    """Of a row of `array`, which rows of `nbytes` make up; never outside, whatever the row."""
    return _lines(
        "{",
        ".reg .b32 inside;",
        f"min.s32 inside, {row}, last;",
        "max.s32 inside, inside, 0;",
        "add.u32 inside, inside, batch_rows;",
        f"mul.wide.u32 {to}, inside, {nbytes};",
        f"add.u64 {to}, {to}, {array};",
        "}",
    )


def fetch_text(sizes: Sizes) -> str:
    """Starts the copies of a block, 16 bytes each: eight threads a row, four rows a thread.

    The block's barrier hears of the copies when they are done, and of the logits' starts.
    """
    lines = [
        _chosen_text(sizes, "kv"),
        ".reg .pred there, first;",
        ".reg .b32 line, chunk, at, start, size<4>;",
        ".reg .b64 other, to, from<4>;",
        "and.b32 chunk, $thread, 7;",
        "mul.wide.u32 other, chunk, 16;",
        "add.u64 kv, kv, other;",
        "shr.u32 line, $thread, 3;",
        # Eight rows of eight pieces are 8 KiB.
        "shr.u32 at, line, 3;",
        "mul.lo.u32 at, at, 8192;",
        "and.b32 start, line, 7;",
        "mad.lo.u32 at, start, 128, at;",
        "xor.b32 start, start, chunk;",
        "mad.lo.u32 at, start, 16, at;",
        "cvt.u64.u32 to, at;",
        "add.u64 to, to, $tile;",
        "mul.wide.u32 other, line, 4;",
        "add.u64 other, other, $starts;",
        "setp.eq.u32 first, chunk, 0;",
    ]
    for n in range(4):
        lines += [
            f"setp.ge.s32 there, $row{n}, 0;",
            f"selp.b32 size{n}, 16, 0, there;",
            "selp.b32 start, 0, 0xFF800000, there;",
            f"@first st.shared.b32 [other+{64 * n}], start;",
            _address_text(f"from{n}", "kv", f"$row{n}", CHANNELS * 2),
        ]
    for n in range(4):
        for column in range(CHANNELS // COLUMNS):
            lines.append(
                f"cp.async.cg.shared.global.L2::256B [to+{n * 16384 + column * 1024}],"
                f" [from{n}+{column * 128}], 16, size{n};"
            )
    return _lines(
        *lines,
        "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$arrived];",
        "@first mbarrier.arrive.shared::cta.b64 _, [$arrived];",
    )


def raw_text(sizes: Sizes) -> str:
    """A thread's codes of one of its rows, 16 of every 64, and the scales of the row; zeros without a row."""
    lines = [
        _chosen_text(sizes, "nope", "scale"),
        ".reg .pred there;",
        ".reg .b32 lane;",
        ".reg .b64 at, scale_at;",
        "and.b32 lane, $thread, 3;",
        _address_text("at", "nope", "$row", NOPE),
        _address_text("scale_at", "scale", "$row", 8),
        "mul.wide.u32 nope, lane, 16;",
        "add.u64 at, at, nope;",
        "setp.ge.s32 there, $row, 0;",
    ]
    lines += [f"mov.b32 $result{n}, 0;" for n in range(RAW)]
    scales = f"$result{4 * CHUNKS}, $result{4 * CHUNKS + 1}"
    lines.append(f"@there {_load(sizes)}.v2.b32 {{{scales}}}, [scale_at];")
    load = _load(sizes) if sizes.early else "ld.global.nc.L2::128B"
    for chunk in range(CHUNKS):
        words = ", ".join(f"$result{4 * chunk + n}" for n in range(4))
        lines.append(f"@there {load}.v4.b32 {{{words}}}, [at+{64 * chunk}];")
    return _lines(*lines)


def ahead_text(sizes: Sizes) -> str:
    """Asks the L2 cache for rows.

    Early, each of a row's four threads asks for 128 bytes of codes, and two for the rest; or one of them has
    the copy engine fetch all codes, which takes the warp's threads one after the other, and so on.
    """
    lines = [
        _chosen_text(sizes, "nope", "scale", "rope"),
        ".reg .pred there, is_nope, is_rope, is_scale;",
        ".reg .b32 lane;",
        ".reg .b64 at, lane_at;",
        "and.b32 lane, $thread, 3;",
        "mul.wide.u32 lane_at, lane, 128;",
    ]
    for n in range(sizes.rows_a_thread):
        lines.append(f"setp.ge.s32 there, $row{n}, 0;")
        for number, (name, nbytes) in enumerate((("nope", NOPE), ("rope", 4 * PAIRS), ("scale", 8))):
            lines += [
                f"setp.eq.and.u32 is_{name}, lane, {number}, there;",
                _address_text("at", name, f"$row{n}", nbytes),
            ]
            if not sizes.early:
                aligned = ["and.b64 at, at, -16;"] if nbytes < 16 else []
                asked = f"cp.async.bulk.prefetch.L2.global [at], {max(nbytes, 16)};"
                lines += [*aligned, f"@is_{name} {asked}"]
            elif name == "nope":
                lines += [
                    "and.b64 at, at, -128;",
                    "add.u64 at, at, lane_at;",
                    "@there prefetch.global.L2 [at];",
                ]
            else:
                lines.append(f"@is_{name} prefetch.global.L2 [at];")
    return _lines(*lines)


def rope_text(sizes: Sizes) -> str:
    """Starts the copies of a block's rotated columns: two of 16 bytes for each of a thread's rows."""
    lines = [
        _chosen_text(sizes, "rope"),
        ".reg .pred there;",
        ".reg .b32 size;",
        ".reg .b64 from, other;",
        _place_text(),
        ".reg .b32 lane;",
        "and.b32 lane, $thread, 3;",
        "mul.wide.u32 other, lane, 32;",
        "add.u64 rope, rope, other;",
    ]
    column = NOPE // COLUMNS * 1024
    for n in range(sizes.rows_a_thread):
        lines += [
            f"setp.ge.s32 there, $row{n}, 0;",
            "selp.b32 size, 16, 0, there;",
            _address_text("from", "rope", f"$row{n}", 4 * PAIRS),
            f"cp.async.cg.shared.global [to0+{32768 * n + column}], [from], 16, size;",
            f"cp.async.cg.shared.global [to1+{32768 * n + column}], [from+16], 16, size;",
        ]
    return _lines(*lines)


def _place_text() -> str:
    """Where a thread's 32 bytes of the first 64 columns of its first row lie: `to0` and `to1`, 16 each."""
    return _lines(
        ".reg .b32 to_line, to_in, to_at;",
        ".reg .b64 to0, to1;",
        "shr.u32 to_line, $thread, 2;",
        "shr.u32 to_at, to_line, 3;",
        "mul.lo.u32 to_at, to_at, 8192;",
        "and.b32 to_line, to_line, 7;",
        "mad.lo.u32 to_at, to_line, 128, to_at;",
        "and.b32 to_in, $thread, 3;",
        "shl.b32 to_in, to_in, 1;",
        "xor.b32 to_in, to_in, to_line;",
        "mad.lo.u32 to_at, to_in, 16, to_at;",
        "cvt.u64.u32 to0, to_at;",
        "add.u64 to0, to0, $tile;",
        "xor.b32 to_at, to_at, 16;",
        "cvt.u64.u32 to1, to_at;",
        "add.u64 to1, to1, $tile;",
    )


def decode_text(half: int) -> str:
    """Codes of a thread's row become bfloat16 in shared memory; its place's start of logits beside them.

    The bits of a code, moved to those of a bfloat16, are its number times 2^-120, whether normal or not. Both
    products are exact: 2^120 brings it back, the scale is a power of two. Codes that are no numbers become
    480.
    """
    lines = [
        _place_text(),
        ".reg .pred there, first;",
        ".reg .b32 lane, start, scale, bytes, shifted, large, word<8>;",
        ".reg .b64 start_at;",
        "mov.b32 large, 0x7B807B80;",  # two times 2^120
        "setp.ge.s32 there, $row, 0;",
        "selp.b32 start, 0, 0xFF800000, there;",
        "and.b32 lane, $thread, 3;",
        "setp.eq.u32 first, lane, 0;",
        "shr.u32 lane, $thread, 2;",
        "mul.wide.u32 start_at, lane, 4;",
        "add.u64 start_at, start_at, $starts;",
        f"@first st.shared.b32 [start_at+{128 * half}], start;",
    ]
    for chunk in range(CHUNKS):
        lines += [
            f"bfe.u32 scale, $raw{4 * CHUNKS + chunk // 4}, {8 * (chunk % 4)}, 8;",
            "shl.b32 scale, scale, 7;",
            "max.u32 scale, scale, 0x40;",  # 2^-127, the smallest scale, is no normal number
            "mul.lo.u32 scale, scale, 0x10001;",
        ]
        for number in range(4):
            for pair, selector in enumerate((0x1404, 0x3424)):
                word = f"word{2 * number + pair}"
                lines += [
                    f"prmt.b32 bytes, $raw{4 * chunk + number}, 0, {selector};",
                    "shr.u32 shifted, bytes, 4;",
                    "and.b32 shifted, shifted, 0x07F007F0;",
                    "lop3.b32 shifted, bytes, 0x80008000, shifted, 0xEA;",  # first & second | third
                    "mul.bf16x2 shifted, shifted, large;",
                    f"mul.bf16x2 {word}, shifted, scale;",
                ]
        at = 32768 * half + 1024 * chunk
        lines += [
            f"st.shared.v4.b32 [to0+{at}], {{word0, word1, word2, word3}};",
            f"st.shared.v4.b32 [to1+{at}], {{word4, word5, word6, word7}};",
        ]
    return _lines(*lines)


DECODED_TEXT = """
cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$arrived];
fence.proxy.async.shared::cta;
mbarrier.arrive.shared::cta.b64 _, [$arrived];
"""


def look_text(sizes: Sizes) -> str:
    """First block with a row, and the one after the last that has one, as far as a warp has seen."""
    lists = [("window", sizes.window, 0)]
    if sizes.chosen:
        lists.append(("compressed", sizes.chosen, sizes.window_blocks))
    lines = [
        ".reg .pred there, more;",
        ".reg .b32 place, done, block, first, end;",
        ".reg .b64 at, by;",
        f"mov.b32 first, {sizes.blocks};",
        "mov.b32 end, 0;",
        "mul.wide.u32 by, $thread, 4;",
    ]
    uses = []
    for name, length, blocks in lists:
        turns = -(-length // 128)
        together, loops = min(turns, AT_ONCE), turns > AT_ONCE
        lines += [
            f".reg .b32 {name}_<{together}>;",
            f"mul.wide.u32 at, $query, {4 * length};",
            f"add.u64 at, at, ${name};",
            "add.u64 at, at, by;",
            "mov.b32 done, 0;",
        ]
        loads, use = [], []
        for n in range(together):
            index = f"{name}_{n}"
            here = [f"add.u32 place, $thread, {128 * n};"]
            here += ["add.u32 place, place, done;"] if loops else []
            loads += [
                *here,
                f"setp.lt.u32 there, place, {length};",
                f"mov.b32 {index}, -1;",
                f"@there ld.global.nc.b32 {index}, [at+{512 * n}];",
            ]
            use += [
                *here,
                f"setp.ge.s32 there, {index}, 0;",
                "shr.u32 block, place, 6;",
                f"add.u32 block, block, {blocks};",
                "@there min.u32 first, first, block;",
                "add.u32 block, block, 1;",
                "@there max.u32 end, end, block;",
            ]
        if loops:
            lines += [
                f"LOOK_{name}:",
                *loads,
                *use,
                f"add.u32 done, done, {128 * together};",
                f"add.u64 at, at, {512 * together};",
                f"setp.lt.u32 more, done, {length};",
                f"@more bra LOOK_{name};",
            ]
        else:
            lines += loads
            uses += use  # after all loads
    return _lines(
        *lines,
        *uses,
        "redux.sync.min.u32 first, first, 0xFFFFFFFF;",
        "redux.sync.max.u32 end, end, 0xFFFFFFFF;",
        # All threads of a warp write the same.
        "shr.u32 place, $thread, 5;",
        "mul.wide.u32 by, place, 4;",
        "add.u64 by, by, $seen;",
        "st.shared.b32 [by], first;",
        "st.shared.b32 [by+16], end;",
    )


SEEN_TEXT = """
.reg .b32 other<4>;
ld.shared.v4.b32 {$result0, other1, other2, other3}, [$seen];
min.u32 $result0, $result0, other1;
min.u32 other2, other2, other3;
min.u32 $result0, $result0, other2;
ld.shared.v4.b32 {$result1, other1, other2, other3}, [$seen+16];
max.u32 $result1, $result1, other1;
max.u32 other2, other2, other3;
max.u32 $result1, $result1, other2;
"""

AWAIT_TEXT = """
.reg .pred done;
AWAIT: mbarrier.try_wait.parity.shared::cta.b64 done, [$arrived], $phase;
@!done bra AWAIT;
fence.proxy.async.shared::cta;
"""

# What the cluster's programs wrote before is there for all of them after. The engine's copies count as their
# own once they have been waited for.
MEET_TEXT = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"


def combine_text(sizes: Sizes, splits: int, consumer: int) -> str:
    """Every so many heads of the cluster's, of which each program has others: its parts, and the sink.

    Sixty-four threads take a head, eight channels each. The parts, [heads, splits, channels], are the results
    of the splits were they alone; the weights, [heads, splits], log2 of their sums of weights.
    """
    lines = [
        ".reg .pred more, none, turns;",
        ".reg .b32 head, lane, word, at;",
        ".reg .f32 sink, most, total, share, cosine, sine, even, odd;",
        f".reg .f32 weight<{splits}>, sum<8>, cosine<4>, sine<4>;",
        f".reg .b32 part<{4 * splits}>;",
        ".reg .b64 parts, weights, to, other;",
        "shr.u32 head, $thread, 6;",
        f"add.u32 head, head, {2 * consumer};",
        f"mad.lo.u32 head, head, {splits}, $split;",
        "and.b32 lane, $thread, 63;",
    ]
    if sizes.turned:
        lines += [
            f"setp.ge.u32 turns, lane, {NOPE // 8};",
            *(f"mov.f32 cosine{n}, 1.0; mov.f32 sine{n}, 0.0;" for n in range(4)),
            f"sub.u32 at, lane, {NOPE // 8};",
            "shl.b32 at, at, 2;",
            f"mad.lo.u32 at, $query, {PAIRS}, at;",
            "mul.wide.s32 other, at, 4;",
            "add.u64 to, other, $cos;",
            "@turns ld.global.nc.v4.f32 {cosine0, cosine1, cosine2, cosine3}, [to];",
            "add.u64 to, other, $sin;",
            "@turns ld.global.nc.v4.f32 {sine0, sine1, sine2, sine3}, [to];",
        ]
    lines += [
        "COMBINE:",
        f"setp.ge.u32 more, head, {HEADS};",
        "@more bra COMBINED;",
        f"mad.lo.u32 at, $item, {HEADS}, head;",
        f"mul.wide.u32 weights, at, {4 * splits};",
        "add.u64 weights, weights, $weights;",
        f"mul.wide.u32 parts, at, {2 * CHANNELS * splits};",
        "mul.wide.u32 other, lane, 16;",
        "add.u64 parts, parts, other;",
        "add.u64 parts, parts, $parts;",
        f"mul.wide.u32 to, at, {2 * CHANNELS};",
        "add.u64 to, to, other;",
        "add.u64 to, to, $out;",
        f"mad.lo.u32 at, $group, {HEADS}, head;",
        "mul.wide.u32 other, at, 4;",
        "add.u64 other, other, $sink;",
        "ld.global.nc.f32 sink, [other];",
    ]
    for split in range(splits):
        words = ", ".join(f"part{4 * split + n}" for n in range(4))
        lines += [
            f"ld.global.f32 weight{split}, [weights+{4 * split}];",
            f"ld.global.v4.b32 {{{words}}}, [parts+{2 * CHANNELS * split}];",
        ]
    lines += [f"mov.f32 most, {_hex(LOWEST)};"]
    lines += [f"max.f32 most, most, weight{split};" for split in range(splits)]
    lines += ["mov.f32 total, 0f00000000;"]
    for split in range(splits):
        lines += [
            f"sub.f32 weight{split}, weight{split}, most;",
            f"ex2.approx.f32 weight{split}, weight{split};",
            f"add.f32 total, total, weight{split};",
        ]
    lines += [
        # Asked for "none" and not for "some": what is not a number must come through.
        "setp.eq.f32 none, total, 0f00000000;",
        f"mul.f32 sink, sink, {_hex(LOG2_E)};",
        "sub.f32 sink, sink, most;",
        "ex2.approx.f32 sink, sink;",
        "add.f32 total, total, sink;",
        "rcp.approx.f32 share, total;",
        "selp.f32 share, 0f00000000, share, none;",
        *(f"mov.f32 sum{n}, 0f00000000;" for n in range(8)),
    ]
    for split in range(splits):
        for n in range(4):
            lines += [
                f"shl.b32 word, part{4 * split + n}, 16;",
                "mov.b32 even, word;",
                f"and.b32 word, part{4 * split + n}, 0xFFFF0000;",
                "mov.b32 odd, word;",
                f"fma.rn.f32 sum{2 * n}, even, weight{split}, sum{2 * n};",
                f"fma.rn.f32 sum{2 * n + 1}, odd, weight{split}, sum{2 * n + 1};",
            ]
    for n in range(4):
        lines += [f"mul.f32 even, sum{2 * n}, share;", f"mul.f32 odd, sum{2 * n + 1}, share;"]
        if sizes.turned:
            lines += [
                f"mul.f32 cosine, odd, sine{n};",
                f"fma.rn.f32 cosine, even, cosine{n}, cosine;",
                f"mul.f32 sine, even, sine{n};",
                "neg.f32 sine, sine;",
                f"fma.rn.f32 odd, odd, cosine{n}, sine;",
                "mov.f32 even, cosine;",
            ]
        lines.append(f"cvt.rn.bf16x2.f32 part{n}, odd, even;")
    return _lines(
        *lines,
        "st.global.v4.b32 [to], {part0, part1, part2, part3};",
        f"add.u32 head, head, {4 * splits};",
        "bra COMBINE;",
        "COMBINED:",
    )


def _hex(number: float) -> str:
    """A float32 as PTX writes its bits."""
    return f"0f{int(np.float32(number).view(np.uint32)):08X}"


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


def meet() -> None:
    """All programs of the cluster are here, and what they wrote to global memory is seen."""
    _inline(lambda: _assemble(MEET_TEXT), kinds=())


def combine(
    sizes: Sizes,
    splits: int,
    consumer: int,
    parts: Any,
    weights: Any,
    sink: Any,
    turns: tuple[Any, Any],
    out: Any,
    item: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
) -> None:
    """This program's and warpgroup's share of the heads of a cluster, put together from its parts.

    `item` is the number of the 64 heads among all, their query, their group, and this program's number.
    """

    def emit(parts, weights, sink, cos, sin, out, at, query, group, split):
        arrays = {"parts": parts, "weights": weights, "sink": sink, "cos": cos, "sin": sin, "out": out}
        numbers = {"item": at, "query": query, "group": group, "split": split}
        _assemble(combine_text(sizes, splits, consumer), **arrays, **numbers)

    _inline(emit, parts, weights, sink, *turns, out, *item, kinds=(*(REF,) * 6, *(SCALAR,) * 4))
