"""What a consumer of the Mosaic kernel does, as PTX text: keys to the tensor core's operand, and scores.

It is PTX for two reasons. The tensor core's instructions return before they are done, and only the assembler
may know when a register is free. And nothing else would map bytes of packed keys to threads as
`queries.channel_order` has it.

`$name` stands for an operand of the inline assembly. A thread of a warp is t, q = divmod(lane, 4). A wave is
64 keys, the rows of a product; of those a thread has t and t + 8 of its warp's sixteen.
"""

HEADS, CHANNELS = 64, 128  # the columns of a product, and what it sums over
WAVE = 64
STEPS = CHANNELS // 32  # instructions of a product
OPERAND = 4 * STEPS  # registers of a thread's part of a wave's keys
SUMS = HEADS // 2  # of a product


def pairs(waves: int) -> int:
    """Scores of a query that a thread writes: one of every two waves, or every other thread that of one."""
    return -(-waves // 2)


def operands(waves: int) -> int:
    """Registers that keys are held in, with their factors."""
    return OPERAND * waves + pairs(waves)


def _table_ptx(half: int) -> list[str]:
    """Registers low and high: the E4M3 bytes of the eight magnitudes times the power of two of the thread's
    group; and `factor{half}`, half of what the key's products are to be multiplied by.

    Groups are scaled relative to the largest scale of their key, which is 2^6 here, so that 6 becomes 384 of
    the most 448. One more in an exponent is 8 more in a byte, from 2^-5 up; smaller groups become 0.
    """
    exponents = f"e{half}"
    return [
        f"and.b32 most, {exponents}, 0x00FF00FF;",
        f"shr.u32 found, {exponents}, 8;",
        "and.b32 found, found, 0x00FF00FF;",
        "max.u16x2 most, most, found;",
        "shr.u32 found, most, 16;",
        "max.u16x2 most, most, found;",
        "and.b32 most, most, 0xFFFF;",
        f"shr.u32 share, {exponents}, shift;",
        "and.b32 share, share, 0xFF;",
        "sub.s32 share, share, most;",
        "add.s32 share, share, 11;",
        "setp.lt.s32 tiny, share, 0;",
        "mad.lo.u32 low, share, 0x08080800, 0x14100800;",
        "mad.lo.u32 high, share, 0x08080808, 0x24201C18;",
        "selp.b32 low, 0, low, tiny;",
        "selp.b32 high, 0, high, tiny;",
        # E8M0: 0xFF is not a number.
        "setp.eq.u32 tiny, most, 255;",
        "sub.s32 most, most, 7;",
        "max.s32 most, most, 0;",
        "shl.b32 most, most, 23;",
        "selp.b32 most, 0x7FC00000, most, tiny;",
        f"mov.b32 factor{half}, most;",
    ]


def _word_ptx(word: str, first: str, second: str) -> list[str]:
    """Eight values, the first in the lowest bits, as E4M3 bytes: 0-3 and 4-7."""
    return [
        f"and.b32 which, {word}, 0x77777777;",
        f"shl.b32 signs, {word}, 4;",
        # A digit of prmt above 7 asks for the sign of a byte, eight times.
        "prmt.b32 found, low, high, which;",
        f"prmt.b32 sign, signs, {word}, 0xD9C8;",
        f"lop3.b32 {first}, found, sign, 0x80808080, 0xF8;",
        "shr.u32 which, which, 16;",
        "prmt.b32 found, low, high, which;",
        f"prmt.b32 sign, signs, {word}, 0xFBEA;",
        f"lop3.b32 {second}, found, sign, 0x80808080, 0xF8;",
    ]


DECODE_REGISTERS = [
    ".reg .pred tiny;",
    ".reg .b32 c0_<4>, c1_<4>, e<2>, shift, most, found, share, low, high, which, signs, sign;",
    ".reg .f32 factor<2>;",
    "and.b32 shift, $thread, 3;",
    "shl.b32 shift, shift, 3;",
]


def decode_ptx(wave: int) -> list[str]:
    """Registers a{wave}_0 to 15, of packed keys in c0_0 to c1_3 and their scales in e0 and e1.

    Of four registers the first two are rows t and t + 8 in places 4q to 4q + 3 of 32, the other two the same
    rows 16 places further on.
    """
    lines = []
    for half in range(2):
        lines += _table_ptx(half)
        for word in range(STEPS):
            first, second = (f"a{wave}_{4 * word + half + 2 * n}" for n in range(2))
            lines += _word_ptx(f"c{half}_{word}", first, second)
    return lines


def keys_ptx(waves: int) -> str:
    """The operands of a tile's keys, from shared memory to registers `operand0` and so on, 16 for each wave;
    then the thread's factors, of the keys whose scores `scores_ptx` has it write.

    Operands: `thread` of the warpgroup; `codes` and `scales`, addresses of the warpgroup's first key.
    """
    lines = [
        *DECODE_REGISTERS,
        ".reg .pred odd;",
        ".reg .b32 row, codes, scales;",
        f".reg .f32 mine<{pairs(waves)}>;",
        *(f".reg .b32 a{wave}_<{OPERAND}>;" for wave in range(waves)),
        # Rows and quarters of a warp are 64 and 16 bytes apart, and a warp has 16 rows.
        "bfe.u32 row, $thread, 2, 3;",
        "shr.u32 codes, $thread, 5;",
        "mad.lo.u32 row, codes, 16, row;",
        "and.b32 codes, $thread, 3;",
        "mad.lo.u32 codes, codes, 16, $codes;",
        "mad.lo.u32 codes, row, 64, codes;",
        "mad.lo.u32 scales, row, 4, $scales;",
    ]
    for wave in range(waves):
        for half in range(2):
            row = wave * WAVE + 8 * half
            words = ", ".join(f"c{half}_{n}" for n in range(4))
            lines += [
                f"ld.shared.v4.b32 {{{words}}}, [codes+{row * 64}];",
                f"ld.shared.b32 e{half}, [scales+{row * 4}];",
            ]
        lines += decode_ptx(wave)
        # One bit of the thread's number is its half of a wave's rows; of two waves, another is its wave.
        lines += [
            f"and.b32 row, $thread, {1 if waves == 1 else 2};",
            "setp.ne.u32 odd, row, 0;",
            "selp.f32 factor0, factor1, factor0, odd;",
        ]
        mine = f"mine{wave // 2}"
        if wave % 2 == 0:
            lines.append(f"mov.f32 {mine}, factor0;")
        else:
            lines += [
                "and.b32 row, $thread, 1;",
                "setp.ne.u32 odd, row, 0;",
                f"selp.f32 {mine}, factor0, {mine}, odd;",
            ]
    names = [f"a{wave}_{n}" for wave in range(waves) for n in range(OPERAND)]
    lines += [f"mov.b32 $operand{n}, {name};" for n, name in enumerate(names)]
    lines += [f"mov.f32 $operand{len(names) + n}, mine{n};" for n in range(pairs(waves))]
    return "\n".join(lines)


def _heads_ptx(query: int) -> list[str]:
    """Registers heads0 to heads3: where the tensor core finds the 32 channels of each step of a query."""
    # Upper half of a descriptor: 128-byte swizzle; 1024 bytes, in units of 16, from eight rows to the next.
    upper = (1 << 30) | (1024 >> 4)
    lines = [] if query else ["bfe.u32 place, $q, 4, 14;"]
    for step in range(STEPS):
        further = (query * HEADS * CHANNELS + 32 * step) // 16
        lines += [f"add.u32 address, place, {further};", f"mov.b64 heads{step}, {{address, {upper}}};"]
    return lines


def _issue_ptx(wave: int, part: str, add: str) -> list[str]:
    """Starts the product of a wave with the heads of a query; `add` is a predicate that is false."""
    registers = ", ".join(f"{part}_{n}" for n in range(SUMS))
    lines = ["wgmma.fence.sync.aligned;"]
    for step in range(STEPS):
        operand = ", ".join(f"a{wave}_{4 * step + n}" for n in range(4))
        instruction = f"wgmma.mma_async.sync.aligned.m64n{HEADS}k32.f32.e4m3.e4m3"
        # The first of a product does not add to what the registers hold.
        lines.append(
            f"{instruction} {{{registers}}}, {{{operand}}}, heads{step}, {'more' if step else add}, 1, 1;"
        )
    return [*lines, "wgmma.commit_group.sync.aligned;"]


def _weights_ptx(query: int) -> list[str]:
    """Registers w0 to w15: the weights of the thread's heads, 2q and 2q + 1 of every eight."""
    return [
        f"ld.shared.v2.f32 {{w{2 * n}, w{2 * n + 1}}}, [weights+{4 * (query * HEADS + 8 * n)}];"
        for n in range(HEADS // 8)
    ]


def _sum_ptx(wave: int, part: str) -> list[str]:
    """Registers s{wave}_0 and s{wave}_1: of rows t and t + 8, twice the sum over the thread's heads."""
    lines, started = [], set()
    for n in range(SUMS):
        eight, half, odd = n // 4, n // 2 % 2, n % 2
        total = f"h{half}_{eight % 2}"  # two sums of each row, to wait less for the one before
        lines += [f"abs.f32 hit, {part}_{n};", f"add.f32 hit, hit, {part}_{n};"]  # twice what is positive
        if total in started:
            lines.append(f"fma.rn.f32 {total}, hit, w{2 * eight + odd}, {total};")
        else:
            lines.append(f"mul.f32 {total}, hit, w{2 * eight + odd};")
        started.add(total)
    return [*lines, *(f"add.f32 s{wave}_{half}, h{half}_0, h{half}_1;" for half in range(2))]


def _trade_ptx(kept: str, first: str, second: str, bit: str, distance: int) -> list[str]:
    """`first` of a thread without the bit and of its neighbour, added; `second` where it has the bit."""
    return [
        f"selp.f32 given, {first}, {second}, {bit};",
        f"selp.f32 {kept}, {second}, {first}, {bit};",
        f"shfl.sync.bfly.b32 given, given, {distance}, 31, 0xFFFFFFFF;",
        f"add.f32 {kept}, {kept}, given;",
    ]


def _finish_ptx(query: int, wave: int, waves: int, stride: int) -> list[str]:
    """The sums of four threads added up, of each row by one of them, which writes the score.

    For the last wave, or for this one and the one before it.
    """
    if waves == 1:
        lines = _trade_ptx("score", "s0_0", "s0_1", "odd", 1)
        lines += ["shfl.sync.bfly.b32 given, score, 2, 31, 0xFFFFFFFF;", "add.f32 score, score, given;"]
    else:
        low, high = f"s{wave - 1}", f"s{wave}"
        lines = [
            *_trade_ptx(f"{low}_0", f"{low}_0", f"{high}_0", "odd", 1),
            *_trade_ptx(f"{low}_1", f"{low}_1", f"{high}_1", "odd", 1),
            *_trade_ptx("score", f"{low}_0", f"{low}_1", "upper", 2),
        ]
    pair = wave // 2
    return [
        *lines,
        # A sum of negative zeros is to be zero as any other: the order of scores tells them apart.
        f"fma.rn.f32 score, score, factor{pair}, 0f00000000;",
        f"setp.gt.and.u32 written, $count, {query}, inside{pair};",
        f"@written st.global.f32 [out+{query * stride + pair * 2 * WAVE * 4}], score;",
    ]


def scores_ptx(queries: int, waves: int, parts: int, stride: int) -> str:
    """The scores of some queries for the keys in the registers `operand0` and so on.

    Args:
      parts: products under way at a time.
      stride: bytes from one query's scores to the next's.

    Operands: `thread` of the warpgroup; `q` and `weights`, addresses of the first query's; `count` of queries
    that are real; `room`, how many keys there are from the warpgroup's first on; `out`, address of the first
    query's score of that key.
    """
    lines = [
        f".reg .pred none, never, more, odd, upper, written, inside<{pairs(waves)}>;",
        ".reg .b32 address, place, row, weights;",
        f".reg .b64 heads<{STEPS}>, out;",
        f".reg .f32 hit, given, score, factor<{pairs(waves)}>, w<16>, h0_<2>, h1_<2>;",
        *(f".reg .b32 a{wave}_<{OPERAND}>;" for wave in range(waves)),
        *(f".reg .f32 s{wave}_<2>;" for wave in range(waves)),
        *(f".reg .f32 p{n}_<{SUMS}>;" for n in range(parts)),
        *(
            f"mov.b32 a{wave}_{n}, $operand{wave * OPERAND + n};"
            for wave in range(waves)
            for n in range(OPERAND)
        ),
        *(f"mov.f32 factor{n}, $operand{waves * OPERAND + n};" for n in range(pairs(waves))),
        "setp.ne.b32 none, 0, 0;",
        # Where registers are used again, the assembler must not know that it is false: that of CUDA 12.8 then
        # drops the product before, though its sums were read.
        "setp.gt.u32 never, $q, 0xFFFFFF;",
        "setp.ne.b32 more, 1, 0;",
        "and.b32 row, $thread, 3;",
        "mad.lo.u32 weights, row, 8, $weights;",
        "and.b32 row, $thread, 1;",
        "setp.ne.u32 odd, row, 0;",
        "and.b32 row, $thread, 2;",
        "setp.ne.u32 upper, row, 0;",
        # The row whose score the thread writes. Of one wave two threads have the same: one of them writes.
        "shr.u32 row, $thread, 5;",
        "shl.b32 row, row, 4;",
        "bfe.u32 address, $thread, 2, 3;",
        "add.u32 row, row, address;",
        f"bfe.u32 address, $thread, {0 if waves == 1 else 1}, 1;",
        "mad.lo.u32 row, address, 8, row;",
    ]
    if waves > 1:
        lines += ["and.b32 address, $thread, 1;", f"mad.lo.u32 row, address, {WAVE}, row;"]
    lines += ["mul.wide.u32 out, row, 4;", "add.u64 out, out, $out;"]
    for pair in range(pairs(waves)):
        lines += [f"setp.lt.s32 inside{pair}, row, $room;", f"add.u32 row, row, {2 * WAVE};"]
    if waves == 1:
        lines += ["not.pred written, upper;", "and.pred inside0, inside0, written;"]
    products = [(query, wave) for query in range(queries) for wave in range(waves)]
    behind = parts - 1  # a product is waited for once so many more are on their way
    for number in range(len(products) + behind):
        if number < len(products):
            query, wave = products[number]
            lines += _heads_ptx(query) if wave == 0 else []
            lines += _issue_ptx(wave, f"p{number % parts}", "none" if number < parts else "never")
        if number >= behind:
            query, wave = products[number - behind]
            lines += _weights_ptx(query) if wave == 0 else []
            left = min(behind, len(products) - 1 - (number - behind))
            lines.append(f"wgmma.wait_group.sync.aligned {left};")
            lines += _sum_ptx(wave, f"p{(number - behind) % parts}")
            if wave % 2 == 1 or wave == waves - 1:
                lines += _finish_ptx(query, wave, waves, stride)
    return "\n".join(lines)
