"""The PTX of the Mosaic kernel of `sparse_attention`, as texts with `$names` for operands and results.

A block of rows lies as the tensor core wants it: in pieces of 8 rows x 64 columns, 1 KiB each, in which
sixteen bytes trade places by row. Where a place has no row nothing is read: it becomes zeros, and its logits
start at -inf. Whatever a text reads of operands it reads before it writes a result: they may share registers.
"""

from pallas_kernels.sparse_attention.mosaic_config import (
    CHANNELS,
    COLUMNS,
    KEYS,
    NOPE,
    PAIRS,
    Sizes,
)

AT_ONCE = 8  # places of a list that a thread looks up before it waits
CHUNKS = NOPE // 64  # of 16 codes, that a thread takes of a row
RAW = 4 * CHUNKS + 2  # words of a row that it holds: codes and all of the row's scales


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
    """For codes volatile: other loads the assembler may put off until what they read is needed."""
    return "ld.volatile.global" if sizes.codes else "ld.global.nc"


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
    for chunk in range(CHUNKS):
        words = ", ".join(f"$result{4 * chunk + n}" for n in range(4))
        lines.append(f"@there {_load(sizes)}.v4.b32 {{{words}}}, [at+{64 * chunk}];")
    return _lines(*lines)


def ahead_text(sizes: Sizes) -> str:
    """Asks the L2 cache for rows: each of a row's four threads for 128 bytes of codes, two for the rest.

    The copy engine would take the warp's threads one after the other.
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
            if name == "nope":
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
