"""What a consumer of the Mosaic kernel does, as PTX text: a stage's products, and the way out.

It is PTX for two reasons. The tensor core's instructions return before they are done, and only the assembler
may know when a register is free. And nothing else would map bytes to threads as `tiles.py` laid them out.

`$name` stands for an operand of the inline assembly. A thread of a warp is t, q = divmod(lane, 4).
"""

from typing import NamedTuple

import numpy as np

from pallas_kernels.expert_mlp.mosaic_config import BLOCK, HEIGHT, Config, FewConfig
from pallas_kernels.expert_mlp.tiles import TILE_BYTES
from pallas_kernels.formats import FORMATS


def _hexadecimal(number: float) -> str:
    return f"0f{np.float32(number).view(np.uint32):08X}"


def _table_ptx() -> list[str]:
    """Registers low{h} and high{h}: the E4M3 bytes of the eight magnitudes times the group's power of two,
    for rows t and t + 8. See `_e4m3_by_table` of the Triton kernels.
    """
    lines = ["and.b32 share0, shares, 0xFF;", "shr.u32 share1, shares, 8;"]
    for h in range(2):
        lines += [
            f"mad.lo.u32 low{h}, share{h}, 0x08080800, 0x14100800;",
            f"mad.lo.u32 high{h}, share{h}, 0x08080808, 0x24201C18;",
        ]
    return lines


def _word_ptx(word: str, h: int, first: str, second: str) -> list[str]:
    """Eight values of a word as E4M3 bytes: 0-3 and 4-7."""
    return [
        f"and.b32 which, {word}, 0x77777777;",
        f"prmt.b32 found, low{h}, high{h}, which;",
        f"lop3.b32 {first}, found, {word}, 0x80808080, 0xF8;",
        "shr.u32 which, which, 16;",
        f"prmt.b32 found, low{h}, high{h}, which;",
        f"shl.b32 which, {word}, 4;",
        f"lop3.b32 {second}, found, which, 0x80808080, 0xF8;",
    ]


class _Piece(NamedTuple):
    """One product of the tensor core: a wave's 64 rows of a block by `width` tokens from the `first`."""

    block: int
    wave: int
    first: int
    width: int

    @property
    def operand(self) -> str:
        """Registers of the 64 rows and 128 columns: four for each 32 columns."""
        return f"a{self.block}{self.wave}"


def _decode_ptx(config: Config | FewConfig, piece: _Piece) -> list[str]:
    """A piece's operand. Of four registers the first two are rows t and t + 8 in columns 4q to 4q + 3, in the
    order of the tiles, the other two the same rows 16 columns further on.
    """
    tile = (piece.wave * config.blocks + piece.block) * TILE_BYTES
    lines = [f"ld.shared.u16 shares, [$multipliers+{tile}];", *_table_ptx()]
    for half in range(2):  # of the columns
        lines.append(f"ld.shared.v4.b32 {{w0, w1, w2, w3}}, [$codes+{tile + 512 * half}];")
        for word in range(4):
            step, h = divmod(word, 2)
            registers = [f"{piece.operand}_{8 * half + 4 * step + h + 2 * j}" for j in range(2)]
            if config.without == "decoding":
                lines += [f"xor.b32 {register}, w{word}, low{h};" for register in registers]
            else:
                lines += _word_ptx(f"w{word}", h, *registers)
    return lines


def _issue_ptx(config: Config | FewConfig, piece: _Piece, part: str) -> list[str]:
    """Starts a product: four times 32 columns."""
    registers = ", ".join(f"{part}_{n}" for n in range(piece.width // 2))
    # Upper half of a descriptor: 128-byte swizzle; 1024 bytes, in units of 16, from eight rows to the next.
    upper = (1 << 30) | (1024 >> 4)
    lines = [
        f"add.u32 low, $x, {(piece.block * config.places + piece.first) * BLOCK};",
        "bfe.u32 low, low, 4, 14;",
        "wgmma.fence.sync.aligned;",
    ]
    for step in range(1 if config.without == "products" else BLOCK // 32):
        operand = ", ".join(f"{piece.operand}_{4 * step + n}" for n in range(4))
        instruction = f"wgmma.mma_async.sync.aligned.m64n{piece.width}k32.f32.e4m3.e4m3"
        lines += [
            # 32 bytes further each. Of 32 bits, for the upper half to stay a constant.
            f"add.u32 further, low, {2 * step};",
            f"mov.b64 tokens, {{further, {upper}}};",
            # The first does not add to what the registers hold.
            f"{instruction} {{{registers}}}, {{{operand}}}, tokens, {'more' if step else 'none'}, 1, 1;",
        ]
    return [*lines, "wgmma.commit_group.sync.aligned;"]


def _promote_ptx(config: Config | FewConfig, piece: _Piece, part: str, pending: int) -> list[str]:
    """Waits for a product, and adds it, times the scales of its tokens, to the running sums.

    Registers s0 and on are the scales: of 32 tokens they are there before the product is, of the others they
    come when its operand needs no registers any more.
    """
    place = piece.block * config.scales + piece.first
    scales = [
        f"ld.shared.v2.f32 {{s{token // 4}, s{token // 4 + 1}}}, [$scales+{(place + token) * 4}];"
        for token in range(0, piece.width, 8)
    ]
    lines = [*scales[:4], f"wgmma.wait_group.sync.aligned {pending};", *scales[4:]]
    for n in range(piece.width // 2):
        total = f"$sum{(piece.wave * config.sums + piece.first) // 2 + n}"
        if config.without != "promotion":
            lines.append(f"fma.rn.f32 {total}, {part}_{n}, s{n // 4 * 2 + n % 2}, {total};")
        elif n % 8 == 0:
            lines.append(f"add.f32 {total}, {total}, {part}_{n};")
    return lines


def step_ptx(config: Config | FewConfig, widths: tuple[int, ...]) -> str:
    """A stage: all products of a consumer by the first tokens of a tile, decoding and promotion between them.

    Operands: `sum0` and so on, the running sums: for each wave and each eight tokens those of row t for
    tokens 2q and 2q + 1, then those of row t + 8; `x`, address of the tile of tokens; `codes`, `multipliers`
    and `scales`, addresses of the thread's first.
    """
    starts = np.cumsum([0, *widths[:-1]]).tolist()
    pieces = [
        _Piece(block, wave, first, width)
        for block in range(config.blocks)
        for wave in range(config.waves)
        for first, width in zip(starts, widths, strict=True)
    ]
    operands = dict.fromkeys(piece.operand for piece in pieces)
    lines = [
        ".reg .pred none, more;",
        ".reg .b32 w<4>, low, further, low<2>, high<2>, which, found, shares, share<2>;",
        ".reg .b64 tokens;",
        f".reg .f32 s<{max(widths) // 4}>;",
        *(f".reg .b32 {operand}_<16>;" for operand in operands),
        *(f".reg .f32 p{n}_<{max(widths) // 2}>;" for n in range(config.parts)),
        "setp.gt.u32 none, $x, 0xFFFFFF;",  # never, but the assembler would clear registers if it knew
        "setp.ne.b32 more, 1, 0;",
        *_decode_ptx(config, pieces[0]),
    ]
    behind = config.parts - 1  # a product is waited for once so many more are on their way
    for number in range(len(pieces) + behind):
        if number < len(pieces):
            lines += _issue_ptx(config, pieces[number], f"p{number % config.parts}")
        if number + 1 < len(pieces) and pieces[number + 1].first == 0:
            lines += _decode_ptx(config, pieces[number + 1])
        if number >= behind:
            done = number - behind
            pending = min(behind, len(pieces) - 1 - done)
            lines += _promote_ptx(config, pieces[done], f"p{done % config.parts}", pending)
    return "\n".join(lines)


# --- the way out


def power_ptx(row: int, exponent: str) -> list[str]:
    """Register power{row}: the scale of a row of the weight, of its E8M0 byte at `exponent`."""
    return [
        f"ld.global.nc.u8 one, [{exponent}];",
        "max.u32 one, one, 1;",
        "shl.b32 one, one, 23;",
        f"mov.b32 power{row}, one;",
        # It is that of the row's largest group, which has multiplier 11: 2^(11 - 5) too much.
        f"mul.f32 power{row}, power{row}, 0f3C800000;",
    ]


def gate_ptx(sums: list[str], shares: list[str], out: str, limit: float) -> list[str]:
    """Register `out`: the inner activations of two tokens, of their gates and ups."""
    most, least = _hexadecimal(limit), _hexadecimal(-limit)
    lines = []
    for name, row in (("gate", 0), ("up", 1)):
        lines += [f"mul.f32 {name}{n}, {sums[2 * row + n]}, power{row};" for n in range(2)]
        lines += [  # through bfloat16
            f"cvt.rn.bf16x2.f32 both, {name}1, {name}0;",
            "shl.b32 one, both, 16;",
            f"mov.b32 {name}0, one;",
            "and.b32 one, both, 0xFFFF0000;",
            f"mov.b32 {name}1, one;",
        ]
    for n in range(2):
        lines += [
            f"min.f32 gate{n}, gate{n}, {most};",
            f"min.f32 up{n}, up{n}, {most};",
            f"max.f32 up{n}, up{n}, {least};",
            f"mul.f32 sigmoid, gate{n}, 0fBFB8AA3B;",  # -log2(e)
            "ex2.approx.ftz.f32 sigmoid, sigmoid;",
            "add.f32 sigmoid, sigmoid, 0f3F800000;",
            "rcp.approx.ftz.f32 sigmoid, sigmoid;",
            f"mul.f32 gate{n}, gate{n}, sigmoid;",
            f"mul.f32 gate{n}, gate{n}, up{n};",
            f"mul.f32 gate{n}, gate{n}, {shares[n]};",
        ]
    return [*lines, f"cvt.rn.bf16x2.f32 {out}, gate1, gate0;"]


def scale_ptx(sums: list[str], outs: list[str]) -> list[str]:
    """Registers `outs`: rows t and t + 8 of two tokens."""
    lines = []
    for row, out in enumerate(outs):
        lines += [f"mul.f32 gate{n}, {sums[2 * row + n]}, power{row};" for n in range(2)]
        lines.append(f"cvt.rn.bf16x2.f32 {out}, gate1, gate0;")
    return lines


def stage_ptx(config: Config, limit: float | None) -> str:
    """The finished sums to shared memory in bfloat16, transposed: a token's lie side by side, 16 bytes of it
    where those of eight tokens lie in different banks.

    Rows of gate and up alternate eight by eight, so a thread has both of an inner column. Operands: `sum0`
    and so on; `thread` of the warpgroup; `stage`, address of the space; `first`, number of the consumer's
    first 16 bytes of a token; `exponents`, address of that of the thread's first row; `shares`, address of
    the routing weights of the thread's first tokens.
    """
    gated = limit is not None
    out_bytes, chunks = config.out_bytes(gated), 4 if gated else 8  # chunks of 16 bytes of a wave
    lines = [
        ".reg .b32 token, chunk, swizzle, at, both, one, o<4>;",
        ".reg .f32 s<4>, power<2>, gate<2>, up<2>, sigmoid;",
        # The eight rows of a small matrix, whose places the threads give: tokens.
        "and.b32 token, $thread, 7;",
        "mov.b32 swizzle, token;",
        f"bfe.u32 at, $thread, {3 if gated else 4}, 1;",
        "mad.lo.u32 token, at, 8, token;",
        f"mad.lo.u32 token, token, {out_bytes}, $stage;",
        "shr.u32 chunk, $thread, 5;",
    ]
    if not gated:
        lines += ["bfe.u32 at, $thread, 3, 1;", "mad.lo.u32 chunk, chunk, 2, at;"]
    lines.append("add.u32 chunk, chunk, $first;")
    for wave in range(config.waves):
        for row in range(2):
            lines += power_ptx(row, f"$exponents+{wave * HEIGHT + 8 * row}")
        lines += [
            f"add.u32 at, chunk, {wave * chunks};",
            "xor.b32 at, at, swizzle;",
            "mad.lo.u32 at, at, 16, token;",
        ]
        for first in range(0, config.tokens, 16):
            registers = []
            for eight in range(2):
                start = (wave * config.tokens + first + 8 * eight) // 2
                sums = [f"$sum{start + n}" for n in range(4)]
                if limit is None:
                    outs = [f"o{2 * eight}", f"o{2 * eight + 1}"]
                    lines += scale_ptx(sums, outs)
                else:
                    outs = [f"o{eight}"]
                    place = (first + 8 * eight) * 4
                    lines += [f"ld.global.nc.f32 s{n}, [$shares+{place + n * 4}];" for n in range(2)]
                    lines += gate_ptx(sums, ["s0", "s1"], outs[0], limit)
                registers += outs
            place, count = f"[at+{first * out_bytes}]", len(registers)
            store = f"stmatrix.sync.aligned.m8n8.x{count}.trans.shared.b16 {place}"
            lines.append(f"{store}, {{{', '.join(registers)}}};")
    return "\n".join(lines)


def quantise_ptx(terms: int = 1) -> list[str]:
    """A token's block of 128 columns in `fp8_token128`, by eight threads of which each has sixteen.

    Registers v0 to v7, pairs of bfloat16, become o0 to o3, four bytes of E4M3 each, and `most` the bits of
    the block's scale. With two terms p0 to p3 are what o0 to o3 miss of the numbers, in the same scale: E4M3
    has four significant bits, bfloat16 eight.
    """
    # The largest magnitude: among those, bits of floats are in the order of what they stand for.
    lines = ["and.b32 most, v0, 0x7FFF7FFF;"]
    for n in range(1, 8):
        lines += [f"and.b32 other, v{n}, 0x7FFF7FFF;", "max.u16x2 most, most, other;"]
    for distance in (1, 2, 4):
        lines += [
            f"shfl.sync.bfly.b32 other, most, {distance}, 31, 0xFFFFFFFF;",
            "max.u16x2 most, most, other;",
        ]
    lines += [
        "shl.b32 other, most, 16;",
        "and.b32 most, most, 0xFFFF0000;",
        "max.u32 most, most, other;",
        f"max.u32 most, most, 0x{np.float32(FORMATS['fp8_token128'].floor).view(np.uint32):08X};",
        "setp.ge.u32 infinite, most, 0x7F800000;",
        # The smallest power of two by which the largest is at most 448 = 1.75 * 2^8. The definition asks for
        # one that is at least the rounded quotient: the same for numbers of eight significant bits.
        "add.u32 most, most, 0x1FFFFF;",
        "shr.u32 most, most, 23;",
        "sub.u32 most, most, 8;",
        "sub.u32 inverse, 254, most;",
        "shl.b32 inverse, inverse, 23;",
        "mov.b32 factor, inverse;",
        "shl.b32 most, most, 23;",
        "selp.b32 most, 0x7FC00000, most, infinite;",
    ]
    for q in range(4):
        for half in range(2):
            lines += [
                f"shl.b32 other, v{2 * q + half}, 16;",
                "mov.b32 first, other;",
                f"and.b32 other, v{2 * q + half}, 0xFFFF0000;",
                "mov.b32 second, other;",
                "mul.f32 first, first, factor;",
                "mul.f32 second, second, factor;",
                f"cvt.rn.satfinite.e4m3x2.f32 pair{half}, second, first;",
            ]
            if terms == 2:
                lines += [
                    f"cvt.rn.f16x2.e4m3x2 other, pair{half};",
                    "mov.b32 {low, high}, other;",
                    "cvt.f32.f16 rounded, low;",
                    "sub.f32 first, first, rounded;",
                    "cvt.f32.f16 rounded, high;",
                    "sub.f32 second, second, rounded;",
                    f"cvt.rn.satfinite.e4m3x2.f32 rest{half}, second, first;",
                ]
        lines.append(f"mov.b32 o{q}, {{pair0, pair1}};")
        if terms == 2:
            lines.append(f"mov.b32 p{q}, {{rest0, rest1}};")
    return lines


# What `quantise_ptx` names.
QUANTISE_REGISTERS = (
    ".reg .pred infinite;",
    ".reg .b32 v<8>, most, other, inverse, o<4>, p<4>;",
    ".reg .b16 pair<2>, rest<2>, low, high;",
    ".reg .f32 first, second, factor, rounded;",
)


def quant_ptx(config: Config) -> str:
    """A block of inner columns from shared memory to memory in `fp8_token128`: eight threads a token, each
    with 16 bytes of what it writes. In the order of the tiles these are four columns of each group of 32.

    Operands: `thread`; `stage`; `number` of the consumer; `count` of tokens that are real; `out` and
    `scales`, addresses of the tile's first token and of its scale in the block.
    """
    together = config.consumers * 16
    lines = [
        *QUANTISE_REGISTERS,
        ".reg .pred real, all;",
        ".reg .b32 token, eighth, chunk, swizzle, at<4>;",
        ".reg .b64 to, scale;",
        "shr.u32 token, $thread, 3;",
        "mad.lo.u32 token, $number, 16, token;",
        "and.b32 eighth, $thread, 7;",
        "and.b32 swizzle, token, 7;",
    ]
    for q in range(4):
        lines += [
            "shr.u32 chunk, eighth, 1;",
            f"add.u32 chunk, chunk, {4 * q};",
            "xor.b32 chunk, chunk, swizzle;",
            f"mad.lo.u32 at{q}, token, {config.out_bytes(True)}, $stage;",
            f"mad.lo.u32 at{q}, chunk, 16, at{q};",
            "and.b32 chunk, eighth, 1;",
            f"mad.lo.u32 at{q}, chunk, 8, at{q};",
        ]
    for start in range(0, config.tokens, together):
        lines.append("setp.lt.u32 real, token, $count;")
        for q in range(4):
            place = f"[at{q}+{start * config.out_bytes(True)}]"
            lines += [
                f"mov.b32 v{2 * q}, 0;",
                f"mov.b32 v{2 * q + 1}, 0;",
                f"@real ld.shared.v2.b32 {{v{2 * q}, v{2 * q + 1}}}, {place};",
            ]
        lines += quantise_ptx()
        lines += [
            "mul.wide.u32 to, token, 128;",
            "add.u64 to, to, $out;",
            "mul.wide.u32 scale, eighth, 16;",
            "add.u64 to, to, scale;",
            "@real st.global.v4.b32 [to], {o0, o1, o2, o3};",
            # One thread writes the scale.
            "setp.eq.u32 all, eighth, 0;",
            "and.pred all, all, real;",
            "mul.wide.u32 scale, token, 4;",
            "add.u64 scale, scale, $scales;",
            "@all st.global.b32 [scale], most;",
            f"add.u32 token, token, {together};",
        ]
    return "\n".join(lines)


def write_ptx(config: Config, stride: int) -> str:
    """The tokens of a tile from shared memory to their rows of the result, 16 bytes a thread.

    Operands: `thread`, `stage`; `count` of tokens that are real; `out`, address of the consumer's first
    column in row 0; `order`, address of the row, among those of `stride` bytes, of the tile's first token.
    """
    out_bytes = config.out_bytes(False)
    chunks = out_bytes // 16
    together = 128 // chunks  # tokens that the threads take at once
    rounds = -(-config.tokens // together)
    lines = [
        ".reg .pred real;",
        f".reg .b32 token, chunk, swizzle, from, v<4>, pair<{rounds}>;",
        ".reg .b64 first, to, place;",
        f"and.b32 chunk, $thread, {chunks - 1};",
        f"shr.u32 token, $thread, {chunks.bit_length() - 1};",
        "and.b32 swizzle, token, 7;",
        "xor.b32 swizzle, swizzle, chunk;",
        f"mad.lo.u32 from, token, {out_bytes}, $stage;",
        "mad.lo.u32 from, swizzle, 16, from;",
        "mul.wide.u32 first, chunk, 16;",
        "add.u64 first, first, $out;",
        "mul.wide.u32 place, token, 4;",
        "add.u64 place, place, $order;",
    ]
    for n in range(rounds):
        lines += [
            f"add.u32 chunk, token, {n * together};",
            "setp.lt.u32 real, chunk, $count;",
            f"@real ld.global.nc.b32 pair{n}, [place+{n * together * 4}];",
        ]
    for n in range(rounds):
        lines += [
            f"add.u32 chunk, token, {n * together};",
            "setp.lt.u32 real, chunk, $count;",
            f"mul.wide.u32 to, pair{n}, {stride};",
            "add.u64 to, to, first;",
            f"@real ld.shared.v4.b32 {{v0, v1, v2, v3}}, [from+{n * together * out_bytes}];",
            "@real st.global.v4.b32 [to], {v0, v1, v2, v3};",
        ]
    return "\n".join(lines)
