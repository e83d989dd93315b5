"""What the Mosaic kernel for few tokens does besides `mosaic_ptx.step_ptx`, as PTX text: how activations come
in, how the parts of a sum meet, and how it leaves.

`$name` stands for an operand of the inline assembly. A thread of a warp is t, q = divmod(lane, 4).
"""

from typing import Literal

from pallas_kernels.expert_mlp.mosaic_config import BLOCK, FewConfig
from pallas_kernels.expert_mlp.mosaic_ptx import (
    QUANTISE_REGISTERS,
    gate_ptx,
    power_ptx,
    quantise_ptx,
    scale_ptx,
)

Rows = int | Literal["sorted", "one"]
TOGETHER = 16  # blocks of 128 columns that a warpgroup quantises at a time, eight threads each


def load_ptx(config: FewConfig, columns: int, rows: Rows) -> str:
    """Some of a consumer's blocks of activations, from memory to shared memory, as `fp8_token128`.

    It has every fourth `config.blocks` of all; numbers run over these, then over tokens. A token's row of x
    is that of its (token, choice) pair in `order`, of so many choices; or the only one; or it follows `start`
    as the token follows the tile's first.

    Operands: `thread`; `number` of the first of them; `count` of tokens that are real; `x`, address of the
    consumer's first block in row 0; `order`, address of the pair of the tile's first token; `start`; `values`
    and `scales`, addresses of the consumer's in shared memory.
    """
    each = config.blocks_each(columns)
    lines = [
        *QUANTISE_REGISTERS,
        ".reg .pred real, all;",
        ".reg .b32 number, eighth, token, block, row, swizzle, to;",
        ".reg .b64 from, more;",
        "shr.u32 number, $thread, 3;",
        "add.u32 number, number, $number;",
        "and.b32 eighth, $thread, 7;",
        f"div.u32 token, number, {each};",
        f"mul.lo.u32 block, token, {each};",
        "sub.u32 block, number, block;",
        "setp.lt.u32 real, token, $count;",
    ]
    if rows == "sorted":
        lines.append("add.u32 row, token, $start;")
    elif rows == "one":
        lines.append("mov.b32 row, 0;")
    else:
        lines += [
            "mul.wide.u32 from, token, 4;",
            "add.u64 from, from, $order;",
            "mov.b32 row, 0;",
            "@real ld.global.nc.b32 row, [from];",
            f"div.u32 row, row, {rows};",
        ]
    lines += [
        f"mul.wide.u32 from, row, {columns * 2};",
        "add.u64 from, from, $x;",
        f"div.u32 to, block, {config.blocks};",
        f"mul.wide.u32 more, to, {(config.consumers - 1) * config.blocks * BLOCK * 2};",
        "add.u64 from, from, more;",
        f"mul.wide.u32 more, block, {BLOCK * 2};",
        "add.u64 from, from, more;",
        "mul.wide.u32 more, eighth, 8;",
        "add.u64 from, from, more;",
    ]
    for q in range(4):
        lines += [
            f"mov.b32 v{2 * q}, 0;",
            f"mov.b32 v{2 * q + 1}, 0;",
            f"@real ld.global.v2.b32 {{v{2 * q}, v{2 * q + 1}}}, [from+{q * 64}];",
        ]
    lines += quantise_ptx(config.terms)
    lines += [
        "and.b32 swizzle, token, 7;",
        "xor.b32 swizzle, swizzle, eighth;",
        f"mad.lo.u32 to, block, {config.places * BLOCK}, $values;",
        f"mad.lo.u32 to, token, {BLOCK}, to;",
        "mad.lo.u32 to, swizzle, 16, to;",
        "@real st.shared.v4.b32 [to], {o0, o1, o2, o3};",
    ]
    if config.terms == 2:
        lines.append(f"@real st.shared.v4.b32 [to+{config.tokens * BLOCK}], {{p0, p1, p2, p3}};")
    lines += [
        "setp.eq.u32 all, eighth, 0;",
        "and.pred all, all, real;",
        f"mad.lo.u32 to, block, {config.places * 4}, $scales;",
        "mad.lo.u32 to, token, 4, to;",
        "@all st.shared.b32 [to], most;",
    ]
    if config.terms == 2:
        lines.append(f"@all st.shared.b32 [to+{config.tokens * 4}], most;")
    return "\n".join(lines)


LOADED_PTX = "fence.proxy.async.shared::cta;"  # the tensor core reads shared memory by another way


def await_ptx(goal: int) -> str:
    """The first thread waits until so many have arrived. Operands: `thread`; `arrivals`, an address."""
    return f"""
    .reg .pred other, fewer;
    .reg .b32 arrived;
    setp.ne.u32 other, $thread, 0;
    @other bra there;
    again:
    ld.acquire.gpu.global.u32 arrived, [$arrivals];
    setp.lt.u32 fewer, arrived, {goal};
    @fewer bra again;
    there:
    """


def part_ptx(config: FewConfig) -> str:
    """A consumer's sums to shared memory. Operands: `sum0` and so on; `part`, address of the thread's."""
    lines = [".reg .f32 s<4>;"]
    for eight in range(config.tokens // 8):
        sums = [f"$sum{4 * eight + n}" for n in range(4)]
        if config.terms == 2:
            rest = config.tokens // 2
            lines += [f"add.f32 s{n}, {sums[n]}, $sum{4 * eight + n + rest};" for n in range(4)]
            sums = [f"s{n}" for n in range(4)]
        lines.append(f"st.shared.v4.f32 [$part+{eight * 2048}], {{{', '.join(sums)}}};")
    return "\n".join(lines)


def warm_ptx(gated: bool) -> str:
    """Brings near what `finish_ptx` is going to read, with all others that read it. Operands: as of that."""
    lines = [
        ".reg .pred real;",
        ".reg .b32 token, found;",
        ".reg .b64 place;",
        "ld.global.nc.u8 found, [$exponents];",
        "ld.global.nc.u8 found, [$exponents+8];",
        "and.b32 token, $thread, 31;",
        "setp.lt.u32 real, token, $count;",
        "mul.wide.u32 place, token, 4;",
        "add.u64 place, place, $order;",
        "@real ld.global.nc.b32 found, [place];",
    ]
    if gated:
        lines += [
            "mul.wide.u32 place, found, 4;",
            "add.u64 place, place, $weights;",
            "@real ld.global.nc.f32 found, [place];",
        ]
    return "\n".join(lines)


def finish_ptx(config: FewConfig, stride: int, limit: float | None, arrivals: int) -> str:
    """Adds the parts of 64 rows up, in their order, and writes sixteen of them a warp, in bfloat16.

    With a limit they are gates and ups, eight by eight, and eight inner activations are written, of each
    token in its place in sorted order; otherwise rows of each token in its place in `order`.

    Operands: `thread`; `parts`, address of the thread's of the first part; `count` of tokens that are real;
    `exponents`, address of that of the thread's first row; `order`, address of the (token, choice) pair of
    the tile's first token; `weights`, address of the routing weights of pairs (with a limit only); `out`,
    address of the thread's first column, in the tile's first row with a limit, otherwise in row 0, of rows of
    `stride` bytes; `arrivals`, address of a number that is to count all `arrivals` and be 0 after the last.
    """
    gated = limit is not None
    lines = [
        ".reg .pred real<2>, first;",
        ".reg .b32 token<2>, pair<2>, both, one, o<2>, narrow;",
        ".reg .f32 s<2>, power<2>, gate<2>, up<2>, sigmoid;",
        ".reg .f32 part<4>, sum<4>;",
        ".reg .b64 place, to;",
        ".reg .b16 low, high;",
        *power_ptx(0, "$exponents"),
        *power_ptx(1, "$exponents+8"),
        "and.b32 token0, $thread, 3;",
        "shl.b32 token0, token0, 1;",
        "add.u32 token1, token0, 1;",
    ]
    for eight in range(config.tokens // 8):
        for n in range(2):
            lines += [
                f"setp.lt.u32 real{n}, token{n}, $count;",
                f"mul.wide.u32 place, token{n}, 4;",
                "add.u64 place, place, $order;",
                f"mov.b32 pair{n}, 0;",
                f"@real{n} ld.global.nc.b32 pair{n}, [place];",
            ]
            if gated:
                lines += [
                    f"mul.wide.u32 place, pair{n}, 4;",
                    "add.u64 place, place, $weights;",
                    f"ld.global.nc.f32 s{n}, [place];",
                ]
        for consumer in range(config.consumers):
            at = (consumer * (config.tokens // 8) + eight) * 2048
            names = "sum" if consumer == 0 else "part"
            registers = ", ".join(f"{names}{n}" for n in range(4))
            lines.append(f"ld.shared.v4.f32 {{{registers}}}, [$parts+{at}];")
            if consumer:
                lines += [f"add.f32 sum{n}, sum{n}, part{n};" for n in range(4)]
        sums = [f"sum{n}" for n in range(4)]
        outs = ["o0"] if gated else ["o0", "o1"]
        if limit is not None:
            lines += gate_ptx(sums, ["s0", "s1"], outs[0], limit)
        else:
            lines += scale_ptx(sums, outs)
        for n in range(2):
            lines += [
                f"mul.wide.u32 to, {'token' if gated else 'pair'}{n}, {stride};",
                "add.u64 to, to, $out;",
            ]
            for row, out in enumerate(outs):
                lines += [
                    f"mov.b32 {{low, high}}, {out};",
                    f"@real{n} st.global.b16 [to+{16 * row}], {('low', 'high')[n]};",
                ]
            lines.append(f"add.u32 token{n}, token{n}, 8;")
    return "\n".join(
        [
            *lines,
            "bar.warp.sync 0xFFFFFFFF;",
            "and.b32 narrow, $thread, 31;",
            "setp.eq.u32 first, narrow, 0;",
            # What the warp has written is seen by who sees that it has arrived.
            f"@first red.release.gpu.global.inc.u32 [$arrivals], {arrivals - 1};",
        ]
    )
