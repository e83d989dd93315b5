"""What the threads of the Mosaic kernel do, as PTX text: those with channels, and those with a token.

A cluster of 16 programs works on tiles of 16 tokens, one tile after the other. Each program has 256 channels
of all four streams, and a row of `fn` has a piece of them in its shared memory. Of its 640 threads 512 mix:
each has four channels of two tokens. What they find is added up by the programs' other threads, each program
for one token of the tile, and comes back to all. Three messages go around for each tile:

- sums: from each program to the one that has the token, its part of the 24 products and of the sum of
  squares;
- shares: from there to all, what the input takes of each stream;
- totals: from each program to all, its part of the sum of squares of each token's input.

Programs write them into each other's shared memory, where a barrier counts the bytes. What a tile's tokens
are mixed by, `post` and `comb`, is brought in two tiles ahead.

`$name` stands for an operand of the inline assembly. A thread of a warp is t, c = divmod(lane, 4).
"""

import math
from typing import NamedTuple

import numpy as np

TOKENS = 16  # of a tile, and programs of a cluster: one for each
STREAMS, ROWS = 4, 24
WIDTH = 4096
SLICE = WIDTH // TOKENS  # channels of a program
MIXERS, WARPS = 512, 16  # threads that mix
PIECE = SLICE * 4  # bytes of a row of fn, of one stream
PIECE_STRIDE = PIECE + 64  # from one to the next: two threads' pieces lie in different banks
SUMS = 26  # places of a token: products, the sum of squares, and an unused one
RECEIVED = 32  # places of a program's sums, where they are received
FN, SUM, SHARE, TOTAL, MIX = range(5)  # the barriers, of 8 bytes each; there are two of the last
MIX_BYTES = TOKENS * (64 + 16)  # of comb, then of post
BYTES = {FN: ROWS * STREAMS * PIECE, SUM: TOKENS * 25 * 4, SHARE: TOKENS * 16, TOTAL: TOKENS * TOKENS * 4}
MIXING_BARRIER, OWNING_BARRIER = 8, 9  # of all threads that mix, and of the others
LOG2_E = math.log2(math.e)


class Case(NamedTuple):
    """What a kernel is made for.

    Attributes:
      clusters: that share the tiles.
      iterations: of the Sinkhorn steps.
      eps, norm_eps: `hc_eps` and `rms_norm_eps`.
      wide_weight: whether the norm's weight is float32, not bfloat16.
    """

    tokens: int
    clusters: int
    iterations: int
    eps: float
    norm_eps: float
    wide_weight: bool

    @property
    def tiles(self) -> int:
        return -(-self.tokens // TOKENS)


def _number(number: float) -> str:
    return f"0f{np.float32(number).view(np.uint32):08X}"


def _wait(barrier: int, parity: str, label: str) -> list[str]:
    return [
        f"{label}: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done,"
        f" [$barriers+{8 * barrier}], {parity};",
        f"@!done bra {label};",
    ]


def _expect(barrier: int, predicate: str) -> str:
    """The next phase of a barrier of this program is over when so many bytes have come."""
    return (
        f"@{predicate} mbarrier.arrive.expect_tx.shared::cta.b64 _, [$barriers+{8 * barrier}],"
        f" {BYTES[barrier]};"
    )


def _send(kind: str, to: str, values: str, barrier: str, predicate: str) -> str:
    store = f"st.async.weak.shared::cluster.mbarrier::complete_tx::bytes{kind}"
    return f"@{predicate} {store} [{to}], {values}, [{barrier}];"


def _meet() -> list[str]:
    """All barriers of the cluster's programs are open before the first message."""
    return ["barrier.cluster.arrive.release.aligned;", "barrier.cluster.wait.acquire.aligned;"]


def _over_four(total: str) -> list[str]:
    """Adds up what four threads have."""
    lines = []
    for distance in (1, 2):
        lines += [
            f"shfl.sync.bfly.b32 other, {total}, {distance}, 31, 0xFFFFFFFF;",
            f"add.f32 {total}, {total}, other;",
        ]
    return lines


def _halves(pair: str, low: str, high: str) -> list[str]:
    """The two bfloat16 numbers of a word, as float32."""
    return [f"shl.b32 {low}, {pair}, 16;", f"and.b32 {high}, {pair}, 0xFFFF0000;"]


# --- those that mix


def _load(case: Case, tile: str) -> list[str]:
    """A tile's numbers of a thread, of rows 0 and 1, which are tokens t and t + 8; y is stream 4."""
    lines = []
    for row in range(2):
        lines += [
            f"mad.lo.u32 token, {tile}, {TOKENS}, t;",
            f"add.u32 token, token, {8 * row};",
            f"min.u32 token, token, {case.tokens - 1};",  # what does not exist is not written
            f"mul.wide.u32 at, token, {STREAMS * WIDTH * 2};",
            "add.u64 at, at, streams;",
        ]
        for stream in range(STREAMS):
            words = f"{{v{row}{stream}_0, v{row}{stream}_1}}"
            lines.append(f"ld.global.nc.v2.b32 {words}, [at+{stream * WIDTH * 2}];")
        lines += [
            f"mul.wide.u32 at, token, {WIDTH * 2};",
            "add.u64 at, at, y;",
            f"ld.global.nc.v2.b32 {{v{row}4_0, v{row}4_1}}, [at];",
        ]
    return lines


def _mix() -> list[str]:
    """The new streams: written, and in registers a{stream}_0 to 3 as the tensor core takes them; and of each
    row the sum of their squares.

    Of the four the first two are rows 0 and 1 in the thread's first two channels, the others in its last two.
    """
    lines = []
    for row in range(2):
        lines.append(f"mov.f32 squares{row}, 0f00000000;")
        for source in range(STREAMS + 1):
            factors = ", ".join(f"m{source}_{n}" for n in range(STREAMS))
            place = TOKENS * 64 + 8 * row * 16 if source == STREAMS else 8 * row * 64 + source * 16
            base = "taken" if source == STREAMS else "mixing"
            lines.append(f"ld.shared.v4.f32 {{{factors}}}, [{base}+{place}];")
        for pair in range(2):
            for source in range(STREAMS + 1):
                lines += _halves(f"v{row}{source}_{pair}", f"f{source}_0", f"f{source}_1")
            for stream in range(STREAMS):
                for n in range(2):
                    lines.append(f"mul.f32 n{n}, m4_{stream}, f4_{n};")
                    lines += [
                        f"fma.rn.f32 n{n}, m{source}_{stream}, f{source}_{n}, n{n};"
                        for source in range(STREAMS)
                    ]
                word = f"a{stream}_{2 * pair + row}"
                lines += [
                    f"cvt.rn.bf16x2.f32 {word}, n1, n0;",
                    *_halves(word, "n0", "n1"),
                    f"fma.rn.f32 squares{row}, n0, n0, squares{row};",
                    f"fma.rn.f32 squares{row}, n1, n1, squares{row};",
                ]
        lines += [f"mul.wide.u32 at, token{row}, {STREAMS * WIDTH * 2};", "add.u64 at, at, new;"]
        for stream in range(STREAMS):
            words = f"{{a{stream}_{row}, a{stream}_{2 + row}}}"
            lines.append(f"@real{row} st.global.v2.b32 [at+{stream * WIDTH * 2}], {words};")
    return lines


def _project() -> list[str]:
    """Registers d{eight}_0 to 3: products of the new streams with rows of fn, in the tensor core's order.

    Every number of fn is cut into three bfloat16 numbers whose sum it is. The tensor core cuts sums off
    instead of rounding them: the smallest come first.
    """
    lines = []
    for eight in range(ROWS // 8):
        lines += [f"mov.f32 d{eight}_{n}, 0f00000000;" for n in range(4)]
        for stream in range(STREAMS):
            place = (stream * ROWS + 8 * eight) * PIECE_STRIDE
            lines.append(f"ld.shared.v4.f32 {{w0, w1, w2, w3}}, [pieces+{place}];")
            for part in ("high", "middle", "low"):
                for pair in range(2):
                    word, numbers = f"{part}{stream}_{pair}", (f"w{2 * pair}", f"w{2 * pair + 1}")
                    lines.append(f"cvt.rn.bf16x2.f32 {word}, {numbers[1]}, {numbers[0]};")
                    if part != "low":
                        lines += _halves(word, "n0", "n1")
                        lines += [f"sub.f32 {number}, {number}, n{n};" for n, number in enumerate(numbers)]
        sums = ", ".join(f"d{eight}_{n}" for n in range(4))
        for part in ("low", "middle", "high"):
            for stream in range(STREAMS):
                rows = ", ".join(f"a{stream}_{n}" for n in range(4))
                columns = f"{part}{stream}_0, {part}{stream}_1"
                lines.append(
                    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
                    f" {{{sums}}}, {{{rows}}}, {{{columns}}}, {{{sums}}};"
                )
    return lines


def _send_sums() -> list[str]:
    """The warps' sums added up, and each token's to the program that has it."""
    lines = [*_over_four("squares0"), *_over_four("squares1")]
    for row in range(2):
        for eight in range(ROWS // 8):
            at = (8 * row * SUMS + 8 * eight) * 4
            lines.append(f"st.shared.v2.f32 [products+{at}], {{d{eight}_{2 * row}, d{eight}_{2 * row + 1}}};")
        lines.append(f"@first st.shared.f32 [products+{(8 * row * SUMS + ROWS) * 4}], squares{row};")
    lines += [f"bar.sync {MIXING_BARRIER}, {MIXERS};", "mov.f32 n0, 0f00000000;"]
    for warp in range(WARPS):
        lines += [f"ld.shared.f32 n1, [own+{warp * TOKENS * SUMS * 4}];", "add.f32 n0, n0, n1;"]
    return [*lines, _send(".f32", "sum_to", "n0", "sum_barrier", "sends")]


def _collapse() -> list[str]:
    """Registers o{row}_0 and 1: the input in bfloat16; the program's sums of squares go to all."""
    lines = [
        f"ld.shared.v4.f32 {{s{row}_0, s{row}_1, s{row}_2, s{row}_3}}, [shares+{8 * row * 16}];"
        for row in range(2)
    ]
    for row in range(2):
        lines.append(f"mov.f32 squares{row}, 0f00000000;")
        for pair in range(2):
            for stream in range(STREAMS):
                lines += _halves(f"a{stream}_{2 * pair + row}", "w0", "w1")
                step = "mul.f32 n{0}, s{1}, w{0};" if stream == 0 else "fma.rn.f32 n{0}, s{1}, w{0}, n{0};"
                lines += [step.format(n, f"{row}_{stream}") for n in range(2)]
            word = f"o{row}_{pair}"
            lines += [
                f"cvt.rn.bf16x2.f32 {word}, n1, n0;",
                *_halves(word, "n0", "n1"),
                f"fma.rn.f32 squares{row}, n0, n0, squares{row};",
                f"fma.rn.f32 squares{row}, n1, n1, squares{row};",
            ]
        lines += _over_four(f"squares{row}")
        lines.append(f"@first st.shared.f32 [squares+{8 * row * 4}], squares{row};")
    lines += [f"bar.sync {MIXING_BARRIER}, {MIXERS};", "mov.f32 n0, 0f00000000;"]
    for warp in range(WARPS):
        lines += [f"ld.shared.f32 n1, [all+{warp * TOKENS * 4}];", "add.f32 n0, n0, n1;"]
    return [*lines, _send(".f32", "total_to", "n0", "total_barrier", "tells")]


def _write(case: Case) -> list[str]:
    """The input, divided by its root mean square."""
    lines = ["mov.f32 n0, 0f00000000;"]
    for program in range(TOKENS):
        lines += [f"ld.shared.f32 n1, [totals+{program * TOKENS * 4}];", "add.f32 n0, n0, n1;"]
    lines += [
        f"fma.rn.f32 n0, n0, {_number(1 / WIDTH)}, {_number(case.norm_eps)};",
        "rsqrt.approx.ftz.f32 n0, n0;",
        "add.u32 later, t, 8;",
        "shfl.sync.idx.b32 s0_0, n0, t, 31, 0xFFFFFFFF;",
        "shfl.sync.idx.b32 s1_0, n0, later, 31, 0xFFFFFFFF;",
    ]
    for row in range(2):
        for pair in range(2):
            lines += [
                *_halves(f"o{row}_{pair}", "n0", "n1"),
                *(f"mul.f32 n{n}, n{n}, s{row}_0;" for n in range(2)),
                *(f"mul.f32 n{n}, n{n}, g{2 * pair + n};" for n in range(2)),
                f"cvt.rn.bf16x2.f32 o{row}_{pair}, n1, n0;",
            ]
        lines += [
            f"mul.wide.u32 at, token{row}, {WIDTH * 2};",
            "add.u64 at, at, x;",
            f"@real{row} st.global.v2.b32 [at], {{o{row}_0, o{row}_1}};",
        ]
    return lines


def mixing_ptx(case: Case) -> str:
    """All of a thread that mixes.

    Operands: `thread`, below 512; `tile`, the cluster's first; addresses in memory: `y`, `streams`, `weight`,
    `new`, `x`; in shared memory: `fn`, `mixing`, `products`, `received`, `shares`, `squares`, `totals`,
    `barriers`.
    """
    weight_bytes = 4 if case.wide_weight else 2
    lines = [
        ".reg .pred done, first, zero, sends, tells, real0, real1, more;",
        ".reg .b32 rank, lane, warp, t, c, channel, token, token0, token1, later, tile, next, parity, one;",
        ".reg .b32 turn, mixing, taken, ready;",
        ".reg .b32 pieces, products, own, shares, squares, all, totals;",
        ".reg .b32 sum_to, sum_barrier, total_to, total_barrier;",
        ".reg .b64 offset, y, streams, new, x, at;",
        *(f".reg .b32 v{row}{n}_<2>;" for row in range(2) for n in range(STREAMS + 1)),
        *(f".reg .f32 m{n}_<4>;" for n in range(STREAMS + 1)),
        *(f".reg .b32 a{n}_<4>, high{n}_<2>, middle{n}_<2>, low{n}_<2>;" for n in range(STREAMS)),
        *(f".reg .f32 f{n}_<2>;" for n in range(STREAMS + 1)),
        ".reg .f32 d0_<4>, d1_<4>, d2_<4>, w<4>, n<2>, g<4>, s0_<4>, s1_<4>, squares0, squares1, other;",
        ".reg .b32 o0_<2>, o1_<2>, early, late;",
        "mov.u32 rank, %cluster_ctarank;",
        "and.b32 lane, $thread, 31;",
        "shr.u32 warp, $thread, 5;",
        "shr.u32 t, lane, 2;",
        "and.b32 c, lane, 3;",
        "setp.eq.u32 first, c, 0;",
        "setp.eq.u32 zero, $thread, 0;",
        # Of the program, then of all.
        "shl.b32 channel, warp, 4;",
        "mad.lo.u32 channel, c, 4, channel;",
        "mad.lo.u32 pieces, channel, 4, $fn;",
        f"mad.lo.u32 pieces, t, {PIECE_STRIDE}, pieces;",
        f"mad.lo.u32 channel, rank, {SLICE}, channel;",
        "mul.wide.u32 offset, channel, 2;",
        *(f"add.u64 {name}, ${name}, offset;" for name in ("y", "streams", "new", "x")),
        "mov.u32 tile, $tile;",
        *_load(case, "tile"),
        f"mul.wide.u32 offset, channel, {weight_bytes};",
        "add.u64 at, offset, $weight;",
        *(
            ["ld.global.nc.v4.f32 {g0, g1, g2, g3}, [at];"]
            if case.wide_weight
            else [
                "ld.global.nc.v2.b32 {early, late}, [at];",
                *_halves("early", "g0", "g1"),
                *_halves("late", "g2", "g3"),
            ]
        ),
        # Where the thread's sums of a warp go; the place whose sum over all warps it makes, and for whom.
        f"mad.lo.u32 products, warp, {TOKENS * SUMS * 4}, $products;",
        f"mad.lo.u32 products, t, {SUMS * 4}, products;",
        "mad.lo.u32 products, c, 8, products;",
        f"setp.lt.u32 sends, $thread, {TOKENS * SUMS};",
        f"min.u32 one, $thread, {TOKENS * SUMS - 1};",
        "mad.lo.u32 own, one, 4, $products;",
        f"div.u32 token, one, {SUMS};",
        f"rem.u32 one, one, {SUMS};",
        f"setp.lt.and.u32 sends, one, {ROWS + 1}, sends;",
        f"mad.lo.u32 one, rank, {RECEIVED}, one;",
        "mad.lo.u32 one, one, 4, $received;",
        "mapa.shared::cluster.u32 sum_to, one, token;",
        f"add.u32 one, $barriers, {8 * SUM};",
        "mapa.shared::cluster.u32 sum_barrier, one, token;",
        "mad.lo.u32 shares, t, 16, $shares;",
        # The token whose squares it adds up, and for which program.
        f"mad.lo.u32 squares, warp, {TOKENS}, t;",
        "mad.lo.u32 squares, squares, 4, $squares;",
        f"setp.lt.u32 tells, $thread, {TOKENS * TOKENS};",
        f"and.b32 one, $thread, {TOKENS - 1};",
        "mad.lo.u32 all, one, 4, $squares;",
        "mad.lo.u32 totals, one, 4, $totals;",
        f"mad.lo.u32 one, rank, {TOKENS}, one;",
        "mad.lo.u32 one, one, 4, $totals;",
        f"shr.u32 token, $thread, {TOKENS.bit_length() - 1};",
        f"and.b32 token, token, {TOKENS - 1};",
        "mapa.shared::cluster.u32 total_to, one, token;",
        f"add.u32 one, $barriers, {8 * TOTAL};",
        "mapa.shared::cluster.u32 total_barrier, one, token;",
        *_meet(),
        "mov.u32 parity, 0;",
        "mov.u32 turn, 0;",
        "TILE:",
        # Two places by turns; the phase of a place's barrier is another every second time.
        "and.b32 one, turn, 1;",
        f"mad.lo.u32 mixing, one, {MIX_BYTES}, $mixing;",
        "mad.lo.u32 taken, t, 16, mixing;",
        "mad.lo.u32 mixing, t, 64, mixing;",
        "mad.lo.u32 ready, one, 8, $barriers;",
        "bfe.u32 one, turn, 1, 1;",
        "add.u32 turn, turn, 1;",
        f"MIXED: mbarrier.try_wait.parity.shared::cta.b64 done, [ready+{8 * MIX}], one;",
        "@!done bra MIXED;",
    ]
    for row in range(2):
        lines += [
            f"mad.lo.u32 token{row}, tile, {TOKENS}, t;",
            f"add.u32 token{row}, token{row}, {8 * row};",
            f"setp.lt.u32 real{row}, token{row}, {case.tokens};",
        ]
    return "\n".join(
        [
            *lines,
            *_mix(),
            f"add.u32 next, tile, {case.clusters};",
            f"min.u32 token, next, {case.tiles - 1};",
            "mov.u32 later, token;",
            *_load(case, "later"),
            *_wait(FN, "0", "PIECES"),
            *_project(),
            *_send_sums(),
            *_wait(SHARE, "parity", "SHARES"),
            _expect(SHARE, "zero"),
            *_collapse(),
            *_wait(TOTAL, "parity", "TOTALS"),
            _expect(TOTAL, "zero"),
            *_write(case),
            "mov.u32 tile, next;",
            "xor.b32 parity, parity, 1;",
            f"setp.lt.u32 more, tile, {case.tiles};",
            "@more bra TILE;",
        ]
    )


# --- those that have a token


def _sigmoid() -> list[str]:
    return [
        f"mul.f32 share, logit, {_number(-LOG2_E)};",
        "ex2.approx.ftz.f32 share, share;",
        "add.f32 share, share, 0f3F800000;",
        "rcp.approx.ftz.f32 share, share;",
    ]


def _over_sum(eps: float, numbers: list[str], name: str) -> list[str]:
    """Numbers divided by their sum plus eps."""
    a, b, c, d = numbers
    return [
        f"add.f32 {name}0, {a}, {b};",
        f"add.f32 {name}1, {c}, {d};",
        f"add.f32 {name}0, {name}0, {name}1;",
        f"add.f32 {name}0, {name}0, {_number(eps)};",
        f"rcp.approx.ftz.f32 {name}0, {name}0;",
        *(f"mul.f32 {number}, {number}, {name}0;" for number in numbers),
    ]


def _sinkhorn(case: Case) -> list[str]:
    """Registers q0 to q15, logits at first: rows normalised, then columns, by turns."""
    rows = [[f"q{4 * i + j}" for j in range(4)] for i in range(4)]
    columns = [list(column) for column in zip(*rows, strict=True)]
    lines = []
    for n, (a, b, c, d) in enumerate(rows):
        lines += [
            f"max.f32 r{n}_0, {a}, {b};",
            f"max.f32 r{n}_1, {c}, {d};",
            f"max.f32 r{n}_0, r{n}_0, r{n}_1;",
        ]
        for number in (a, b, c, d):
            lines += [
                f"sub.f32 {number}, {number}, r{n}_0;",
                f"mul.f32 {number}, {number}, {_number(LOG2_E)};",
                f"ex2.approx.ftz.f32 {number}, {number};",
            ]
        lines += [
            f"add.f32 r{n}_0, {a}, {b};",
            f"add.f32 r{n}_1, {c}, {d};",
            f"add.f32 r{n}_0, r{n}_0, r{n}_1;",
            f"rcp.approx.ftz.f32 r{n}_0, r{n}_0;",
            *(f"fma.rn.f32 {number}, {number}, r{n}_0, {_number(case.eps)};" for number in (a, b, c, d)),
        ]

    def normalized(groups: list[list[str]]) -> list[str]:
        return [line for n, group in enumerate(groups) for line in _over_sum(case.eps, group, f"r{n}_")]

    lines += normalized(columns)
    if case.iterations > 1:
        lines += [
            "mov.u32 turn, 1;",
            "TURN:",
            *normalized(rows),
            *normalized(columns),
            "add.u32 turn, turn, 1;",
            f"setp.lt.u32 more, turn, {case.iterations};",
            "@more bra TURN;",
        ]
    return lines


def _bring(case: Case, tile: str) -> list[str]:
    """Starts the copies of what a tile, if there is one, is mixed by, to place `turn`, 0 or 1."""
    copy = "@brings cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    return [
        f"setp.lt.and.u32 brings, {tile}, {case.tiles}, zero;",
        f"mul.lo.u32 token, {tile}, {TOKENS};",
        f"sub.u32 count, {case.tokens}, token;",
        f"min.u32 count, count, {TOKENS};",
        f"mad.lo.u32 to, turn, {MIX_BYTES}, $mixing;",
        "mad.lo.u32 barrier, turn, 8, $barriers;",
        f"add.u32 barrier, barrier, {8 * MIX};",
        f"mul.lo.u32 one, count, {MIX_BYTES // TOKENS};",
        "@brings mbarrier.arrive.expect_tx.shared::cta.b64 _, [barrier], one;",
        "mul.wide.u32 at, token, 64;",
        "add.u64 at, at, $comb;",
        "mul.lo.u32 one, count, 64;",
        f"{copy} [to], [at], one, [barrier];",
        "mul.wide.u32 at, token, 16;",
        "add.u64 at, at, $post;",
        "mul.lo.u32 one, count, 16;",
        f"add.u32 to, to, {TOKENS * 64};",
        f"{copy} [to], [at], one, [barrier];",
    ]


def owning_ptx(case: Case) -> str:
    """All of the other threads: they open the barriers, bring fn, and answer for one token of each tile.

    All warps do the same, and the first one tells.

    Operands: `thread`, below 128; `tile`, the cluster's first; addresses in memory: `weights` of fn, `scale`,
    `base`, `post` and `comb`, and the `new_post` and `new_comb`; in shared memory: `fn`, `mixing`,
    `received`, `shares`, `barriers`.
    """
    lines = [
        ".reg .pred done, zero, brings, tells, takes, real, more;",
        ".reg .b32 rank, lane, one, row, tile, next, token, count, parity, turn, received, to, barrier;",
        ".reg .b32 share_to, share_barrier;",
        ".reg .b64 at, from, post;",
        ".reg .f32 sum, part, squares, scale, base, logit, share, p<4>, q<16>;",
        *(f".reg .f32 r{n}_<2>;" for n in range(4)),
        "mov.u32 rank, %cluster_ctarank;",
        "setp.eq.u32 zero, $thread, 0;",
        *(
            f"@zero mbarrier.init.shared::cta.b64 [$barriers+{8 * barrier}], 1;"
            for barrier in (FN, SUM, SHARE, TOTAL, MIX, MIX + 1)
        ),
        "@zero fence.mbarrier_init.release.cluster;",
        *(_expect(barrier, "zero") for barrier in (FN, SUM, SHARE, TOTAL)),
        f"bar.sync {OWNING_BARRIER}, 128;",
        # A thread brings a piece: of row one, and stream `row`.
        f"setp.lt.u32 brings, $thread, {ROWS * STREAMS};",
        f"div.u32 row, $thread, {ROWS};",
        f"rem.u32 one, $thread, {ROWS};",
        f"mul.wide.u32 from, one, {STREAMS * WIDTH * 4};",
        f"mul.wide.u32 at, row, {WIDTH * 4};",
        "add.u64 from, from, at;",
        f"mul.wide.u32 at, rank, {PIECE};",
        "add.u64 from, from, at;",
        "add.u64 from, from, $weights;",
        f"mad.lo.u32 one, $thread, {PIECE_STRIDE}, $fn;",
        "@brings cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
        f" [one], [from], {PIECE}, [$barriers+{8 * FN}];",
        "mov.u32 tile, $tile;",
        "mov.u32 turn, 0;",
        *_bring(case, "tile"),
        f"add.u32 next, tile, {case.clusters};",
        "mov.u32 turn, 1;",
        *_bring(case, "next"),
        # A lane has a row of fn.
        "and.b32 lane, $thread, 31;",
        f"min.u32 one, lane, {ROWS - 1};",
        "mul.wide.u32 at, one, 4;",
        "add.u64 at, at, $base;",
        "ld.global.nc.f32 base, [at];",
        "shr.u32 one, one, 2;",
        "min.u32 one, one, 2;",
        "mul.wide.u32 at, one, 4;",
        "add.u64 at, at, $scale;",
        "ld.global.nc.f32 scale, [at];",
        "mad.lo.u32 received, lane, 4, $received;",
        f"setp.lt.u32 tells, $thread, {TOKENS};",
        f"and.b32 one, lane, {TOKENS - 1};",
        "mad.lo.u32 share_to, rank, 16, $shares;",
        "mapa.shared::cluster.u32 share_to, share_to, one;",
        f"add.u32 share_barrier, $barriers, {8 * SHARE};",
        "mapa.shared::cluster.u32 share_barrier, share_barrier, one;",
        # Lanes 4 to 7 have what streams take.
        "sub.u32 one, $thread, 4;",
        "setp.lt.u32 takes, one, 4;",
        "and.b32 one, one, 3;",
        "mul.wide.u32 post, one, 4;",
        "add.u64 post, post, $new_post;",
        *_meet(),
        "mov.u32 parity, 0;",
        "OWN:",
        *_wait(SUM, "parity", "SUMS"),
        _expect(SUM, "zero"),
        # All have mixed this tile: its place is free.
        f"add.u32 next, tile, {2 * case.clusters};",
        "mov.u32 turn, parity;",
        *_bring(case, "next"),
        "mov.f32 sum, 0f00000000;",
    ]
    for program in range(TOKENS):
        lines += [
            f"ld.shared.f32 part, [received+{program * RECEIVED * 4}];",
            "add.f32 sum, sum, part;",
        ]
    lines += [
        f"shfl.sync.idx.b32 squares, sum, {ROWS}, 31, 0xFFFFFFFF;",
        f"fma.rn.f32 squares, squares, {_number(1 / (STREAMS * WIDTH))}, {_number(case.norm_eps)};",
        "rsqrt.approx.ftz.f32 squares, squares;",
        "mul.f32 sum, sum, squares;",
        "fma.rn.f32 logit, sum, scale, base;",
        *_sigmoid(),
        f"add.f32 part, share, {_number(case.eps)};",
        *(f"shfl.sync.idx.b32 p{n}, part, {n}, 31, 0xFFFFFFFF;" for n in range(4)),
        _send(".v4.f32", "share_to", "{p0, p1, p2, p3}", "share_barrier", "tells"),
        f"mad.lo.u32 token, tile, {TOKENS}, rank;",
        f"setp.lt.u32 real, token, {case.tokens};",
        "add.f32 share, share, share;",
        "mul.wide.u32 at, token, 16;",
        "add.u64 at, at, post;",
        "and.pred more, takes, real;",
        "@more st.global.f32 [at], share;",
        *(f"shfl.sync.idx.b32 q{n}, logit, {8 + n}, 31, 0xFFFFFFFF;" for n in range(16)),
        *_sinkhorn(case),
        "mul.wide.u32 at, token, 64;",
        "add.u64 at, at, $new_comb;",
        "and.pred more, zero, real;",
        *(
            f"@more st.global.v4.f32 [at+{16 * n}], {{q{4 * n}, q{4 * n + 1}, q{4 * n + 2}, q{4 * n + 3}}};"
            for n in range(4)
        ),
        f"add.u32 tile, tile, {case.clusters};",
        "xor.b32 parity, parity, 1;",
        f"setp.lt.u32 more, tile, {case.tiles};",
        "@more bra OWN;",
    ]
    return "\n".join(lines)
