"""Routed experts for many tokens on Hopper, FP4 by FP8: one warpgroup loads, two or four multiply.

As in the Triton kernels, weights are the rows of the tensor core's product and tokens its columns, and a
thread's bytes of a tile of weights are its operand. A weight is decoded once for each tile of tokens, so a
tile should hold all of an expert's: up to 256. Sums over 128 columns leave the tensor core piece by piece,
are multiplied by their token's scale and added to the running sums, while the tensor core works on the next
piece, or for the other warpgroup that multiplies.

The loop's body is PTX, for two reasons. The tensor core's instructions return before they are done, and only
the assembler may know when a register is free. And nothing else would map bytes to threads as `tiles.py` laid
them out.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.mosaic.gpu.fragmented_array import WGMMA_LAYOUT, WGMMA_LAYOUT_ACC_32BIT
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.activation_quant import activation_quant
from pallas_kernels.activation_quant.triton import quantized
from pallas_kernels.expert_mlp.plan import Plan, plan
from pallas_kernels.expert_mlp.tiles import TILE, ExpertTiles
from pallas_kernels.formats import E4M3_MAX, FORMATS, e8m0_decode
from pallas_kernels.target import Target
from pallas_kernels.triton_call import triton_call

HEIGHT = 64  # rows of a weight in one tensor core product
BLOCK = 128  # columns that share an activation's scale
CODES, MULTIPLIERS = 64, 4  # bytes of a row of a tile
SHARED_BYTES = 232448 - 2048  # what a program may have on Hopper, less room for barriers
MULTIPROCESSORS = 132
# Registers of a thread once all know their part, those that load and those that multiply, by the number of
# warpgroups that multiply. At first all have the same: 168 of 384 threads, 96 of 640.
REGISTERS = {2: (40, 232), 4: (32, 112)}

SWIZZLED = (plgpu.SwizzleTransform(128),)  # pyright: ignore[reportAbstractUsage]


class Config(NamedTuple):
    """How a product is cut into tiles, and how a program works through one.

    Attributes:
      widths: tokens of each tensor core product; together they are the tokens of a tile, at most 256. All are
        multiples of 16. Products under way need registers beside the running sums.
      waves: times 64 rows of the weight that each consumer multiplies by those tokens: 1 or 2.
      stages: blocks of 128 columns that are under way or in use.
      consumers: warpgroups that multiply, 2 or 4: more hide each other's waiting, fewer have more registers.
      without: work to leave out, for measuring what it costs; the result is wrong then.
    """

    widths: tuple[int, ...]
    waves: int = 1
    stages: int = 2
    consumers: int = 2
    without: Literal["", "decoding", "promotion"] = ""

    @property
    def tokens(self) -> int:
        return sum(self.widths)

    @property
    def parts(self) -> int:
        """Products under way at a time: with four consumers the others' keep the tensor core busy."""
        return 2 if self.consumers == 2 else 1

    @property
    def scales(self) -> int:
        """Scales of a tile as stored: padded, since copies start at multiples of 128 bytes."""
        return -(-self.tokens // 32) * 32

    @property
    def rows(self) -> int:
        """Rows of the weight that a program takes: of whole tiles."""
        return self.consumers * self.waves * HEIGHT

    def shared_bytes(self, gated: bool) -> int:
        stage = self.tokens * BLOCK + self.rows * (CODES + MULTIPLIERS) + self.scales * 4
        return self.stages * stage + self.consumers * self.tokens * self.out_bytes(gated)

    def out_bytes(self, gated: bool) -> int:
        """Bytes of a token that a consumer writes: bfloat16, half as many where gates are applied."""
        return self.waves * HEIGHT * (1 if gated else 2)


class Configs(NamedTuple):
    """Of both products; their tiles of tokens are the same."""

    gate_up: Config
    down: Config


def deepest(widths: tuple[int, ...], waves: int, consumers: int = 2) -> Configs:
    """Those with as many stages as shared memory has room for, up to eight."""

    def one(gated: bool) -> Config:
        possible = [Config(widths, waves, stages, consumers) for stages in range(2, 9)]
        return max(config for config in possible if config.shared_bytes(gated) <= SHARED_BYTES)

    return Configs(one(True), one(False))


# By the tokens that an expert has on average, up to which they are meant.
CONFIGS = (
    (14, deepest((16,), 1, consumers=4)),
    (26, deepest((32,), 1, consumers=4)),
    (84, deepest((64,), 1, consumers=4)),
    (2**31, deepest((64, 64, 48, 48), 1)),
)


def configs_for(rows: int, n_routed_experts: int) -> Configs:
    """For so many (token, choice) rows: most experts' rows fit a tile."""
    return next(configs for most, configs in CONFIGS if rows <= most * n_routed_experts)


FEWEST_ROWS = 512  # of (token, choice) pairs: below, the Triton kernels are as fast


def fits(target: Target, x, experts, weights, w1, w2, w3, limit, activation) -> bool:
    """Whether `expert_mlp` takes these: FP4 in tiles by quantised activations, many rows, on Hopper."""
    prepared = w3 is None and isinstance(w1, ExpertTiles) and isinstance(w2, ExpertTiles)
    if target.arch != "sm_90" or not prepared or activation is None or x.dtype != jnp.bfloat16:
        return False
    return experts.size >= FEWEST_ROWS and w1.shape[1] % 256 == 0 and w2.shape[1] % 256 == 0


# --- PTX. `$name` stands for an operand of the inline assembly, `_numbered` gives it its number


def _word_ptx(word: str, first: str, second: str) -> list[str]:
    """Eight values of a word, times the power of two of `share`, as E4M3 bytes: 0-3 and 4-7.

    See `_e4m3_by_table` of the Triton kernels.
    """
    return [
        "mad.lo.u32 low, share, 0x08080800, 0x14100800;",
        "mad.lo.u32 high, share, 0x08080808, 0x24201C18;",
        f"and.b32 which, {word}, 0x77777777;",
        "prmt.b32 found, low, high, which;",
        f"lop3.b32 {first}, found, {word}, 0x80808080, 0xF8;",
        "shr.u32 which, which, 16;",
        "prmt.b32 found, low, high, which;",
        f"shl.b32 which, {word}, 4;",
        f"lop3.b32 {second}, found, which, 0x80808080, 0xF8;",
    ]


def _decode_ptx(config: Config, wave: int) -> list[str]:
    """A thread's operand of 64 rows and 128 columns: registers a{wave}_0 to 15, four for each 32 columns.

    Of these four the first two are rows t and t + 8 in columns 4q to 4q + 3, for t, q = divmod(lane, 4), the
    other two the same rows 16 columns further on.
    """
    lines = []
    for half in range(2):  # of the columns
        codes, shares = wave * HEIGHT * CODES + 512 * half, wave * HEIGHT * MULTIPLIERS + 32 * half
        lines += [
            f"ld.shared.v4.b32 {{w0, w1, w2, w3}}, [$codes+{codes}];",
            f"ld.shared.b32 shares, [$multipliers+{shares}];",
        ]
        for word in range(4):
            group, lower = divmod(word, 2)  # lower: row t + 8
            operand = [f"a{wave}_{8 * half + 4 * group + lower + 2 * j}" for j in range(2)]
            if config.without == "decoding":
                lines += [f"xor.b32 {register}, w{word}, shares;" for register in operand]
            else:
                lines += [f"bfe.u32 share, shares, {8 * word}, 8;", *_word_ptx(f"w{word}", *operand)]
    return lines


def _issue_ptx(piece: "_Piece", part: str) -> list[str]:
    """Starts a product: four times 32 columns."""
    registers = ", ".join(f"{part}_{n}" for n in range(piece.width // 2))
    # Upper half of a descriptor: 128-byte swizzle; 1024 bytes, in units of 16, from eight rows to the next.
    upper = (1 << 30) | (1024 >> 4)
    lines = [
        f"add.u32 low, $x, {piece.first * BLOCK};",
        "bfe.u32 low, low, 4, 14;",
        f"mov.b64 tokens, {{low, {upper}}};",
        "wgmma.fence.sync.aligned;",
    ]
    for step in range(BLOCK // 32):
        operand = ", ".join(f"a{piece.wave}_{4 * step + n}" for n in range(4))
        instruction = f"wgmma.mma_async.sync.aligned.m64n{piece.width}k32.f32.e4m3.e4m3"
        # The first does not add to what the registers hold.
        lines.append(
            f"{instruction} {{{registers}}}, {{{operand}}}, tokens, {'more' if step else 'none'}, 1, 1;"
        )
        lines.append("add.s64 tokens, tokens, 2;")  # 32 bytes further
    return [*lines, "wgmma.commit_group.sync.aligned;"]


def _scales_ptx(piece: "_Piece") -> list[str]:
    """Registers s0 and on: the scales of a thread's tokens, four of every sixteen."""
    return [
        f"ld.shared.v4.f32 {{{', '.join(f's{token // 4 + n}' for n in range(4))}}},"
        f" [$scales+{(piece.first + token) * 4}];"
        for token in range(0, piece.width, 16)
    ]


def _promote_ptx(config: Config, piece: "_Piece", part: str) -> list[str]:
    """Adds a finished product, times the scales of its tokens, to the running sums."""
    lines = []
    for n in range(piece.width // 2):
        total = f"$sum{(piece.wave * config.tokens + piece.first) // 2 + n}"
        factor = f"s{n // 8 * 4 + n // 4 % 2 * 2 + n % 2}"
        if config.without != "promotion":
            lines.append(f"fma.rn.f32 {total}, {part}_{n}, {factor}, {total};")
        elif n % 8 == 0:
            lines.append(f"add.f32 {total}, {total}, {part}_{n};")
    return lines


class _Piece(NamedTuple):
    """One product of the tensor core: a wave's 64 rows by `width` tokens from the `first`."""

    wave: int
    first: int
    width: int


def step_ptx(config: Config) -> str:
    """One block of 128 columns: all products of a consumer, decoding and promotion between them.

    Operands: `sum0` and so on, the running sums: for each wave and each eight tokens those of row t for
    tokens 2q and 2q + 1, then those of row t + 8; `x`, address of the tile of tokens; `codes`, `multipliers`
    and `scales`, addresses of the thread's first.
    """
    starts = np.cumsum([0, *config.widths[:-1]]).tolist()
    pieces = [
        _Piece(wave, first, width)
        for wave in range(config.waves)
        for first, width in zip(starts, config.widths, strict=True)
    ]
    lines = [
        ".reg .pred none, more;",
        ".reg .b32 w<4>, low, high, which, found, share, shares;",
        ".reg .b64 tokens;",
        f".reg .f32 s<{max(config.widths) // 4}>;",
        *(f".reg .b32 a{wave}_<16>;" for wave in range(config.waves)),
        *(f".reg .f32 p{n}_<{max(config.widths) // 2}>;" for n in range(config.parts)),
        "setp.gt.u32 none, $x, 0xFFFFFF;",
        "setp.ne.b32 more, 1, 0;",
    ]
    behind = config.parts - 1  # a product is waited for once so many more are on their way
    for number in range(len(pieces) + behind):
        if number < len(pieces):
            if pieces[number].first == 0:
                lines += _decode_ptx(config, pieces[number].wave)
            lines += _issue_ptx(pieces[number], f"p{number % config.parts}")
        if number >= behind:
            done = number - behind
            lines += _scales_ptx(pieces[done])
            lines.append(f"wgmma.wait_group.sync.aligned {min(behind, len(pieces) - 1 - done)};")
            lines += _promote_ptx(config, pieces[done], f"p{done % config.parts}")
    return "\n".join(lines)


def _swizzle_ptx(out_bytes: int) -> str:
    """Which 16 bytes of `token` trade places: eight tokens' lie in different banks."""
    return "bfe.u32 swizzle, token, 1, 2;" if out_bytes == 64 else "and.b32 swizzle, token, 7;"


def _gate_ptx(sums: list[str], shares: int, limit: float) -> list[str]:
    """Registers o0 and o1: for both eights of sixteen tokens, the inner activations of two tokens."""
    lines = [f"ld.global.nc.v4.f32 {{s0, s1, s2, s3}}, [$shares+{shares}];"]
    most, least = (f"0f{np.float32(bound).view(np.uint32):08X}" for bound in (limit, -limit))
    for eight in range(2):
        for name, row in (("gate", 0), ("up", 1)):
            for n in range(2):
                lines.append(f"mul.f32 {name}{n}, {sums[4 * eight + 2 * row + n]}, power{row};")
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
                f"mul.f32 gate{n}, gate{n}, s{2 * eight + n};",
            ]
        lines.append(f"cvt.rn.bf16x2.f32 o{eight}, gate1, gate0;")
    return lines


def _scale_ptx(sums: list[str]) -> list[str]:
    """Registers o0 to o3: for both eights of sixteen tokens, rows t and t + 8 of two tokens."""
    lines = []
    for n in range(4):
        first, second = sums[2 * n : 2 * n + 2]
        lines += [
            f"mul.f32 gate0, {first}, power{n % 2};",
            f"mul.f32 gate1, {second}, power{n % 2};",
            f"cvt.rn.bf16x2.f32 o{n}, gate1, gate0;",
        ]
    return lines


def stage_ptx(config: Config, limit: float | None) -> str:
    """The finished sums to shared memory in bfloat16, transposed: a token's lie side by side.

    Rows of gate and up alternate eight by eight, so a thread has both of an inner column. Operands: `sum0`
    and so on; `thread` of the warpgroup; `stage`, address of the consumer's space; `exponents`, address of
    that of the thread's first row; `shares`, address of the routing weights of the thread's first tokens.
    """
    gated = limit is not None
    out_bytes, chunks = config.out_bytes(gated), 4 if gated else 8  # chunks of 16 bytes of a wave
    lines = [
        ".reg .b32 token, chunk, swizzle, at, both, one, o<4>;",
        ".reg .f32 s<4>, power<2>, gate<2>, up<2>, sigmoid;",
        # The eight rows of a small matrix, whose places the threads give: tokens.
        "and.b32 token, $thread, 7;",
        _swizzle_ptx(out_bytes),
        f"bfe.u32 at, $thread, {3 if gated else 4}, 1;",
        "mad.lo.u32 token, at, 8, token;",
        f"mad.lo.u32 token, token, {out_bytes}, $stage;",
        "shr.u32 chunk, $thread, 5;",
    ]
    if not gated:
        lines += ["bfe.u32 at, $thread, 3, 1;", "mad.lo.u32 chunk, chunk, 2, at;"]
    for wave in range(config.waves):
        for row in range(2):
            # The row's scale is that of its largest group, which has multiplier 11: 2^(11 - 5) too much.
            lines += [
                f"ld.global.nc.u8 one, [$exponents+{wave * HEIGHT + 8 * row}];",
                "max.u32 one, one, 1;",
                "shl.b32 one, one, 23;",
                f"mov.b32 power{row}, one;",
                f"mul.f32 power{row}, power{row}, 0f3C800000;",
            ]
        lines += [
            f"add.u32 at, chunk, {wave * chunks};",
            "xor.b32 at, at, swizzle;",
            "mad.lo.u32 at, at, 16, token;",
        ]
        for first in range(0, config.tokens, 16):
            sums = [f"$sum{(wave * config.tokens + first) // 2 + n}" for n in range(8)]
            found = _gate_ptx(sums, first * 4, limit) if limit is not None else _scale_ptx(sums)
            registers = ", ".join(f"o{n}" for n in range(2 if gated else 4))
            count = "x2" if gated else "x4"
            place = f"[at+{first * out_bytes}]"
            store = f"stmatrix.sync.aligned.m8n8.{count}.trans.shared.b16 {place}, {{{registers}}};"
            lines += [*found, store]
    return "\n".join(lines)


def write_ptx(config: Config, stride: int, gated: bool) -> str:
    """The tokens of a tile from shared memory to theirs in the result, 16 bytes a thread.

    Operands: `thread`, `stage`; `count` of tokens that are real; `out`, address of the consumer's first
    column, of the tile's first row if `gated`, otherwise of row 0; `order`, address of the row, among those
    of `stride` bytes, of the tile's first token.
    """
    out_bytes = config.out_bytes(gated)
    chunks = out_bytes // 16
    together = 128 // chunks  # tokens that the threads take at once
    rounds = -(-config.tokens // together)
    lines = [
        ".reg .pred real;",
        f".reg .b32 token, chunk, swizzle, from, v<4>, pair<{rounds}>;",
        ".reg .b64 first, to, place;",
        f"and.b32 chunk, $thread, {chunks - 1};",
        f"shr.u32 token, $thread, {chunks.bit_length() - 1};",
        _swizzle_ptx(out_bytes),
        "xor.b32 swizzle, swizzle, chunk;",
        f"mad.lo.u32 from, token, {out_bytes}, $stage;",
        "mad.lo.u32 from, swizzle, 16, from;",
        "mul.wide.u32 first, chunk, 16;",
        "add.u64 first, first, $out;",
    ]
    if not gated:
        lines += ["mul.wide.u32 place, token, 4;", "add.u64 place, place, $order;"]
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
            f"mul.wide.u32 to, {'chunk' if gated else f'pair{n}'}, {stride};",
            "add.u64 to, to, first;",
            f"@real ld.shared.v4.b32 {{v0, v1, v2, v3}}, [from+{n * together * out_bytes}];",
            "@real st.global.v4.b32 [to], {v0, v1, v2, v3};",
        ]
    return "\n".join(lines)


# --- PTX inside of the kernel


def _numbered(text: str, names: Sequence[str]) -> str:
    """The text with `$name` as `$0` and so on."""
    numbers = {name: number for number, name in enumerate(names)}
    return "{ " + re.sub(r"\$(\w+)", lambda match: f"${numbers[match[1]]}", text) + " }"


def _assemble(
    text: str, sums: Sequence[ir.Value], written: bool, more: dict[str, ir.Value]
) -> list[ir.Value]:
    """Inline assembly on float32 registers, which it may write, and on addresses and integers."""
    f32, names = ir.F32Type.get(), [*(f"sum{n}" for n in range(len(sums))), *more]
    kinds = ["l" if value.type == ir.IntegerType.get_signless(64) else "r" for value in more.values()]
    if not written:
        void = ir.Type.parse("!llvm.void")
        constraints = ",".join(["f"] * len(sums) + kinds)
        llvm.inline_asm(
            void, [*sums, *more.values()], _numbered(text, names), constraints, has_side_effects=True
        )
        return []
    # Sums that come in have numbers, too, behind those that go out.
    names = [*names[: len(sums)], *("" for _ in sums), *more]
    results = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * len(sums)),
        [*sums, *more.values()],
        _numbered(text, names),
        ",".join(["=f"] * len(sums) + [str(n) for n in range(len(sums))] + kinds),
        has_side_effects=True,
    )
    return [llvm.extractvalue(f32, results, [n]) for n in range(len(sums))]


def _registers(arrays: Sequence[mgpu.FragmentedArray]) -> list[ir.Value]:
    """Of sums [64, tokens], in the tensor core's order."""
    return [
        vector.extract(register, [], [0])
        for array in arrays
        for register in array.to_layout(WGMMA_LAYOUT_ACC_32BIT).registers.flat
    ]


def _arrays(
    registers: Sequence[ir.Value], like: Sequence[mgpu.FragmentedArray]
) -> list[mgpu.FragmentedArray]:
    """The inverse of `_registers`."""
    one, arrays, rest = ir.VectorType.get((1,), ir.F32Type.get()), [], list(registers)
    for array in like:
        shape = array.to_layout(WGMMA_LAYOUT_ACC_32BIT).registers.shape
        taken, rest = rest[: math.prod(shape)], rest[math.prod(shape) :]
        vectors = np.array([vector.broadcast(one, value) for value in taken], dtype=object).reshape(shape)
        layout = WGMMA_LAYOUT_ACC_32BIT
        arrays.append(
            mgpu.FragmentedArray(_registers=vectors, _layout=layout, _is_signed=None).to_layout(WGMMA_LAYOUT)
        )
    return arrays


class _Numbers:
    """Integer arithmetic on IR values, of 32 or 64 bits."""

    def __init__(self, bits: int):
        self.type = ir.IntegerType.get_signless(bits)

    def of(self, value: Any) -> ir.Value:
        if isinstance(value, mgpu.FragmentedArray):
            value = value.registers.item()
        if isinstance(value, int):
            return mgpu_utils.c(value, self.type)
        if value.type == self.type:
            return value
        return (arith.extui if value.type.width < self.type.width else arith.trunci)(self.type, value)

    def total(self, *terms: Any) -> ir.Value:
        """Of values, and of products given as pairs."""
        values = [
            arith.muli(*map(self.of, term)) if isinstance(term, tuple) else self.of(term) for term in terms
        ]
        return functools.reduce(arith.addi, values)

    def address(self, ref: ir.Value) -> ir.Value:
        return llvm.ptrtoint(self.type, mgpu_utils.memref_ptr(ref))


# --- places


class Item(NamedTuple):
    """What a program works on: a tile of tokens by rows `row` and on of its expert's weight.

    Attributes:
      start: the tile's first token, in sorted order.
      real: how many of its tokens are there.
    """

    tile: Any
    expert: Any
    row: Any
    start: Any
    real: Any


class Shape(NamedTuple):
    """A product: [rows, columns] of each expert by its tokens.

    Attributes:
      limit: of the gated activation, None where there is none.
    """

    rows: int
    columns: int
    limit: float | None

    @property
    def gated(self) -> bool:
        return self.limit is not None

    @property
    def stride(self) -> int:
        """Bytes from one row of the result to the next."""
        return self.rows if self.gated else self.rows * 2


class Lane(NamedTuple):
    """A thread: its number in the warpgroup and its warp, row and place in the tensor core's result."""

    thread: Any
    warp: Any
    row: Any
    place: Any


# Sums of numbers, and of products given as pairs: integers, or values of the kernel.
_Total = Callable[..., Any]


def step_places(config: Config, total: _Total, slot: Any, group: Any, lane: Lane) -> dict[str, Any]:
    """Where a thread's operands of `step_ptx` lie in the stages: bytes from the start of each array."""
    first = total((slot, config.rows), (group, config.waves * HEIGHT), (lane.warp, 16))
    return {
        "x": total((slot, config.tokens * BLOCK)),
        "codes": total((first, CODES), (lane.row, 64), (lane.place, 16)),
        "multipliers": total((first, MULTIPLIERS), (lane.row, 4)),
        "scales": total((slot, config.scales * 4), (lane.place, 16)),
    }


def write_places(
    config: Config, shape: Shape, total: _Total, item: Item, group: Any, lane: Lane
) -> dict[str, Any]:
    """The same for `stage_ptx` and `write_ptx`, in memory and, for `stage`, in shared memory."""
    row = total(item.row, (group, config.waves * HEIGHT))  # the consumer's first
    places = {
        "stage": total((group, config.tokens * config.out_bytes(shape.gated))),
        "exponents": total((item.expert, shape.rows), row, (lane.warp, 16), lane.row),
    }
    if shape.gated:  # of bfloat16, half as many as rows
        shares = total((item.tile, config.scales * 4), (lane.place, 16))
        return places | {"shares": shares, "out": total(row, (item.start, shape.stride))}
    return places | {"order": total((item.start, 4)), "out": total((row, 2))}


def _lane() -> Lane:
    i32 = ir.IntegerType.get_signless(32)

    def split(value: ir.Value, by: int) -> tuple[ir.Value, ir.Value]:
        return arith.divui(value, mgpu_utils.c(by, i32)), arith.remui(value, mgpu_utils.c(by, i32))

    _, thread = split(mgpu_utils.thread_idx(), 128)
    warp, lane = split(thread, 32)
    return Lane(thread, warp, *split(lane, 4))


def _multiply(config: Config, refs: Sequence[Any], slot: jax.Array, group: jax.Array, sums: Any) -> Any:
    """`sums` with a stage's 128 columns added, of the rows of consumer `group`."""

    def emit(_, codes, multipliers, x, scales, slot, group, *sums: mgpu.FragmentedArray):
        numbers = _Numbers(32)
        arrays = {"codes": codes, "multipliers": multipliers, "x": x, "scales": scales}
        places = step_places(config, numbers.total, slot, group, _lane())
        more = {name: numbers.total(numbers.address(arrays[name]), place) for name, place in places.items()}
        return tuple(_arrays(_assemble(step_ptx(config), _registers(sums), True, more), sums))

    ref, swizzled, number = plgpu.RefType(), plgpu.RefType(SWIZZLED), plgpu.Layout.WG_SPLAT
    part = plgpu.ShapeDtypeStruct((HEIGHT, config.tokens), jnp.float32, layout=plgpu.Layout.WGMMA)
    inline: Any = plgpu.inline_mgpu(
        arg_types=(ref, ref, swizzled, ref, number, number, *(plgpu.Layout.WGMMA,) * config.waves),
        return_type=(part,) * config.waves,
    )
    return inline(emit)(*refs, slot, group, *sums)


def _write(
    config: Config, shape: Shape, refs: Sequence[Any], item: Item, group: jax.Array, sums: Any
) -> None:
    """The sums of a consumer to their places in the result."""

    def emit(_, exponents, places, staged, out, *numbers_and_sums: mgpu.FragmentedArray):
        item, group, sums = Item(*numbers_and_sums[:5]), numbers_and_sums[5], numbers_and_sums[6:]
        narrow, wide, lane = _Numbers(32), _Numbers(64), _lane()
        arrays = {"exponents": exponents, "shares": places, "order": places, "out": out}
        found = write_places(config, shape, wide.total, item, group, lane)
        stage = narrow.total(narrow.address(staged), narrow.of(found.pop("stage")))
        at = {name: wide.total(wide.address(arrays[name]), place) for name, place in found.items()}
        both = {"thread": lane.thread, "stage": stage}
        first = {name: at[name] for name in ("exponents", "shares") if name in at}
        second = {name: at[name] for name in ("out", "order") if name in at}
        mgpu_utils.warpgroup_barrier()  # the last tile has left
        _assemble(stage_ptx(config, shape.limit), _registers(sums), False, both | first)
        mgpu_utils.warpgroup_barrier()
        text = write_ptx(config, shape.stride, shape.gated)
        _assemble(text, (), False, both | second | {"count": narrow.of(item.real)})
        return ()

    inline: Any = plgpu.inline_mgpu(
        arg_types=(
            *(plgpu.RefType(),) * 4,
            *(plgpu.Layout.WG_SPLAT,) * 6,
            *(plgpu.Layout.WGMMA,) * config.waves,
        ),
    )
    inline(emit)(*refs, *item, group, *sums)


# --- the kernel


def _kernel(config: Config, shape: Shape, *refs: Any) -> None:
    codes, multipliers, exponents, x, scales, places, experts, starts, ends, tiles = refs[:10]
    out, code_stages, multiplier_stages, x_stages, scale_stages, staged, full, free = refs[10:]
    group, program = lax.axis_index("warpgroup"), lax.axis_index("program")
    steps, blocks = shape.columns // BLOCK, shape.rows // config.rows
    programs = jnp.int32(MULTIPROCESSORS)
    mine = lax.div(tiles[0] * blocks - program + programs - 1, programs)

    def item_of(number: jax.Array) -> Item:
        """All rows of a tile of tokens at about the same time: they stay in the L2 cache."""
        item = program + number * programs
        tile, block = lax.div(item, jnp.int32(blocks)), lax.rem(item, jnp.int32(blocks))
        start = starts[tile]
        real = jnp.minimum(ends[tile] - start, config.tokens)
        return Item(tile, experts[tile], block * config.rows, start, real)

    def producer() -> None:
        plgpu.set_max_registers(REGISTERS[config.consumers][0], action="decrease")
        high = config.rows // TILE

        @pl.loop(0, mine)
        def _(number: jax.Array) -> None:
            item = item_of(number)
            blocks = pl.ds(lax.div(item.row, TILE), high)

            @pl.loop(0, steps)
            def _(step: jax.Array) -> None:
                count = number * steps + step
                slot = lax.rem(count, jnp.int32(config.stages))

                @pl.when(count >= config.stages)
                def _() -> None:
                    plgpu.barrier_wait(free.at[slot])

                for source, stages in (
                    (codes.at[item.expert, blocks, step], code_stages),
                    (multipliers.at[item.expert, blocks, step], multiplier_stages),
                    (x.at[pl.ds(item.start, config.tokens), pl.ds(step * BLOCK, BLOCK)], x_stages),
                    (scales.at[item.tile, step], scale_stages),
                ):
                    plgpu.copy_gmem_to_smem(source, stages.at[slot], full.at[slot])

        # Leave when all has been reported: the interpreter wants every phase of a barrier seen.
        count = mine * steps

        @pl.loop(jnp.maximum(count - config.stages, 0), count)
        def _(count: jax.Array) -> None:
            plgpu.barrier_wait(free.at[lax.rem(count, jnp.int32(config.stages))])

    def consumer() -> None:
        plgpu.set_max_registers(REGISTERS[config.consumers][1], action="increase")
        stages = (code_stages, multiplier_stages, x_stages, scale_stages)

        @pl.loop(0, mine)
        def _(number: jax.Array) -> None:
            def one_step(_: jax.Array, carry: Any) -> Any:
                slot, sums = carry
                plgpu.barrier_wait(full.at[slot])
                sums = _multiply(config, stages, slot, group, sums)
                plgpu.barrier_arrive(free.at[slot])
                # A remainder would be a chain of a dozen instructions before each wait.
                return jnp.where(slot == config.stages - 1, 0, slot + 1), sums

            zeros = plgpu.layout_cast(jnp.zeros((HEIGHT, config.tokens), jnp.float32), plgpu.Layout.WGMMA)
            first = lax.rem(number * steps, jnp.int32(config.stages))
            _, sums = lax.fori_loop(0, steps, one_step, (first, (zeros,) * config.waves))
            _write(config, shape, (exponents, places, staged, out), item_of(number), group, sums)

    lax.cond(group == config.consumers, producer, consumer)


@functools.partial(jax.jit, static_argnames=("config", "limit", "interpret"))
def _launch(
    weight: ExpertTiles,
    x: jax.Array,  # [R, columns] e4m3, rows sorted by expert
    scales: jax.Array,  # [tiles, columns / 128, config.scales] float32
    places: jax.Array,  # [tiles, config.scales] float32 routing weights, or [R] int32 rows of the result
    planned: Plan,
    *,
    config: Config,
    limit: float | None,
    interpret: Any = None,
) -> jax.Array:
    """[R, rows] in bfloat16, or half as wide. A jit of its own: calls of one shape share one lowering."""
    count, rows, columns = weight.shape
    shape, outer = Shape(rows, columns, limit), (count, rows // TILE, columns // BLOCK)
    out_columns = rows // 2 if shape.gated else rows
    high, stages = config.rows // TILE, config.stages
    # A copy's pieces are at most 256 long.
    codes = weight.codes.reshape(*outer, CODES, TILE)
    multipliers = weight.multipliers.reshape(*outer, MULTIPLIERS, TILE)
    return plgpu.kernel(
        functools.partial(_kernel, config, shape),
        out_type=jax.ShapeDtypeStruct((x.shape[0], out_columns), jnp.bfloat16),
        scratch_types=(
            plgpu.SMEM((stages, high, CODES, TILE), jnp.uint8),
            plgpu.SMEM((stages, high, MULTIPLIERS, TILE), jnp.uint8),
            plgpu.SMEM((stages, config.tokens, BLOCK), x.dtype, transforms=SWIZZLED),
            plgpu.SMEM((stages, config.scales), jnp.float32),
            plgpu.SMEM((config.consumers, config.tokens, config.out_bytes(shape.gated)), jnp.uint8),
            plgpu.Barrier(num_arrivals=4, num_barriers=stages),
            plgpu.Barrier(num_arrivals=config.consumers, num_barriers=stages),
        ),
        grid=(MULTIPROCESSORS,),
        grid_names=("program",),
        num_threads=config.consumers + 1,
        thread_name="warpgroup",
        # Only copies write what the products read; what is staged has its barriers.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
        kernel_name=f"experts_{'gate_up' if shape.gated else 'down'}_{config.tokens}x{config.rows}",
    )(
        codes,
        multipliers,
        weight.row_exponent.reshape(-1),
        x,
        scales,
        places,
        planned.expert,
        planned.start,
        planned.end,
        (planned.expert >= 0).sum(dtype=jnp.int32)[None],
    )


# --- around it


@triton.jit
def _sorted_quant(
    x,  # [T, K] bfloat16
    row,  # [T * CHOICES] int32, the sorted row of each pair
    values,  # [T * CHOICES, K] e4m3
    scale,  # [T, K/128] uint8
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCKS: tl.constexpr,
    FLOOR: tl.constexpr,
    MOST: tl.constexpr,
):
    token = tl.program_id(0) // (K // 128 // BLOCKS)
    block = tl.program_id(0) % (K // 128 // BLOCKS) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * 128 + tl.arange(0, 128)[None, :]
    found, exponent = quantized(tl.load(x + token.to(tl.int64) * K + at), FLOOR, MOST)
    tl.store(scale + token.to(tl.int64) * (K // 128) + block, exponent.to(tl.uint8))
    for choice in tl.static_range(CHOICES):
        tl.store(values + tl.load(row + token * CHOICES + choice).to(tl.int64) * K + at, found)


def _quant_sorted(x: jax.Array, planned: Plan, choices: int) -> tuple[jax.Array, jax.Array]:
    """x in `fp8_token128`: values [R, K], once for each choice, in sorted order; scales [T, K/128]."""
    tokens, columns = x.shape
    blocks = math.gcd(columns // BLOCK, 16)
    return triton_call(
        _sorted_quant,
        x,
        planned.row,
        out=(
            jax.ShapeDtypeStruct((tokens * choices, columns), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((tokens, columns // BLOCK), jnp.uint8),
        ),
        grid=(tokens * (columns // BLOCK // blocks),),
        K=columns,
        CHOICES=choices,
        BLOCKS=blocks,
        FLOOR=FORMATS["fp8_token128"].floor,
        MOST=E4M3_MAX,
    )


def lane_order(tokens: int) -> np.ndarray:
    """The token at each place of a tile's scales: sixteen by sixteen, a thread's four are side by side."""
    sixteen = np.arange(16).reshape(2, 4, 2).transpose(1, 0, 2).reshape(-1)
    return (16 * np.arange(tokens // 16)[:, None] + sixteen).reshape(-1)


def _by_tile(planned: Plan, config: Config, numbers: jax.Array, choices: int) -> jax.Array:
    """[tiles, config.scales, C] of what each token, in `choices` rows, or each row has: [T, C]."""
    rows = planned.start[:, None] + jnp.asarray(lane_order(config.tokens), jnp.int32)
    known = jnp.minimum(rows, planned.order.size - 1)
    # Rows of one choice are in sorted order already.
    found = numbers[planned.order[known] // choices if choices > 1 else known]
    found = jnp.where((rows < planned.end[:, None])[..., None], found, 0)
    return jnp.pad(found, ((0, 0), (0, config.scales - config.tokens), (0, 0)))


def _scales(planned: Plan, config: Config, exponents: jax.Array, choices: int) -> jax.Array:
    """[tiles, K/128, config.scales] float32, of E8M0 bytes [T, K/128]."""
    return e8m0_decode(_by_tile(planned, config, exponents, choices).swapaxes(1, 2))


def gate_up(
    x: jax.Array, planned: Plan, weights: jax.Array, w13: ExpertTiles, limit: float, config: Config
) -> jax.Array:
    """[R, F] bfloat16 in sorted order: weight * silu(gate) * up. The plan is for tiles of `config.tokens`."""
    choices = weights.shape[1]
    values, exponents = _quant_sorted(x, planned, choices)
    shares = _by_tile(planned, config, weights.reshape(-1)[planned.order][:, None], 1)[..., 0]
    scales = _scales(planned, config, exponents, choices)
    return _launch(w13, values, scales, shares, planned, config=config, limit=limit)


def down(inner: jax.Array, planned: Plan, w2: ExpertTiles, config: Config) -> jax.Array:
    """[R, M] bfloat16 in (token, choice) order."""
    quant = activation_quant(inner)
    scales = _scales(planned, config, quant.scale, 1)
    return _launch(w2, quant.values, scales, planned.order, planned, config=config, limit=None)


def planned_mlp(
    x: jax.Array,
    planned: Plan,
    weights: jax.Array,
    w13: ExpertTiles,
    w2: ExpertTiles,
    limit: float,
    configs: Configs,
) -> jax.Array:
    """`expert_mlp` once its plan is made."""
    inner = gate_up(x, planned, weights, w13, limit, configs.gate_up)
    out = down(inner, planned, w2, configs.down)
    # Always in the order of the choices: the same bits in every run.
    return out.reshape(*weights.shape, -1).astype(jnp.float32).sum(1)


def expert_mlp(
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    w1: ExpertTiles,
    w2: ExpertTiles,
    w3: None,
    limit: float,
    activation: str,
) -> jax.Array:
    """See `pallas_kernels.expert_mlp`; `fits` says which arguments it is for."""
    configs = configs_for(experts.size, w1.shape[0])
    planned = plan(experts, w1.shape[0], configs.gate_up.tokens)
    return planned_mlp(x, planned, weights, w1, w2, limit, configs)
