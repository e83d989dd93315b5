"""Products of 2 to some hundreds of tokens with FP8 weights on Hopper, where reading the weight is the work.

Rows of the weight are the rows of the tensor core's product, tokens its columns: few tokens make a narrow
product. One warpgroup of a program brings both operands into a ring of stages, as many bytes under way as
shared memory holds; the others multiply, each 64 rows by its share of the tokens.

A cluster of programs works together. Where the weight has too few rows for all multiprocessors, `splits`
programs take a part of K each; then each sends all but its part of its sums into the shared memory of the
programs that own those parts, and adds what it receives in a fixed order. And `sharers` programs with
neighbouring rows need the same tokens: each brings a part of a tile and the copy engine gives it to all.
"""

import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.mosaic.gpu.fragmented_array import WGMMA_LAYOUT, WGMMA_LAYOUT_ACC_32BIT
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.block_matmul import wgmma
from pallas_kernels.block_matmul.tiles import BLOCK
from pallas_kernels.block_matmul.wgmma import HEIGHT, SWIZZLED
from pallas_kernels.formats import QuantArray
from pallas_kernels.target import Target

SHARED_OF_ALL = 233472  # bytes of shared memory of a multiprocessor
SHARED_OVERHEAD = 1024 + 2048  # of a program: what CUDA keeps, and room for barriers and alignment
SHARED_BYTES = SHARED_OF_ALL - SHARED_OVERHEAD  # what a program may have
MULTIPROCESSORS = 132
MOST_BARRIERS = 32  # of one array, in Mosaic
MOST_TOKENS = 256  # that it takes where nothing was measured
TOKEN = plgpu.Layout.WGMMA.reduce(0)  # one number a token, where a product has that token
PADDING = 2  # numbers between steps of the table of scales: a warp's stores meet other banks


class Config(NamedTuple):
    """How a product is cut, and how a program works through its part.

    Attributes:
      tokens: columns of the product of a program: 8, 16, 32, 64 or 128.
      rows: of the weight, of a program: 64, 128 or 256.
      splits: parts of K, for a program of a cluster each: 1, 2, 4 or 8.
      sharers: tiles of rows whose programs are in one cluster and share the tokens that they load.
      stages: that are under way or in use.
      beside: warpgroups that divide the tokens of 64 rows among them: 1 or 2.
      blocks: of 128 columns, in a stage.
    """

    tokens: int
    rows: int = 128
    splits: int = 1
    sharers: int = 1
    stages: int = 8
    beside: int = 1
    blocks: int = 1

    @property
    def consumers(self) -> int:
        return self.rows // HEIGHT * self.beside

    @property
    def share(self) -> int:
        """Tokens of a consumer."""
        return self.tokens // self.beside

    @property
    def parts(self) -> int:
        """Into how many a consumer's tokens are cut: to be added up by a program each, or to be written."""
        return min(self.splits, self.share // 8) if self.splits > 1 else -(-self.share // 32)

    @property
    def piece(self) -> int:
        """Tokens of such a part."""
        return self.share // self.parts

    @property
    def tables(self) -> int:
        """Of scales: rows of one block, times a consumer's tokens, have one."""
        return -(-self.rows // BLOCK) * self.beside

    @property
    def width(self) -> int:
        """Tokens of one tensor core product; its sums need registers beside the running ones."""
        return self.share if self.consumers <= 2 else min(self.share, 64)

    @property
    def registers(self) -> tuple[int, int] | None:
        """Of a thread that loads and of one that multiplies, once all know their part; None: all alike."""
        at_start = 65536 // 128 // (self.consumers + 1) // 8 * 8  # all of a program share what these make
        if self.share // 2 + self.width + 40 <= at_start or at_start >= 232:  # sums; two products; all else
            return None
        return 24, min(232, (at_start * (self.consumers + 1) - 24) // self.consumers // 8 * 8)

    def shared_bytes(self, steps: int) -> int:
        """Of shared memory, for so many blocks of columns in each part of K."""
        loaded = (self.tokens + self.rows) * BLOCK * self.blocks * self.stages
        table = self.tables * steps * (self.share + PADDING) * 4
        received = self.consumers * (self.splits - 1) * HEIGHT * self.piece * 4
        return loaded + table + received + self.consumers * self.piece * HEIGHT * 2


class Shape(NamedTuple):
    """tokens x rows of the result, and the columns that it sums over."""

    tokens: int
    rows: int
    columns: int


def fits(target: Target, x: Any, weight: Any, out_dtype: Any) -> bool:
    """Whether `block_matmul` takes these and is the one to take them: FP8 by FP8, few tokens, on Hopper."""
    if target.vendor != "cuda" or target.arch != "sm_90":
        return False
    if not isinstance(x, QuantArray) or not isinstance(weight, QuantArray):
        return False
    right_formats = x.format == "fp8_token128" and weight.format == "fp8_block128" and weight.ndim == 2
    if not right_formats or jnp.dtype(out_dtype) != jnp.bfloat16:
        return False
    shape = Shape(math.prod(x.shape[:-1]), *weight.shape)
    right_size = shape.columns % BLOCK == 0 and shape.columns > 0 and shape.rows % 8 == 0 and shape.rows > 0
    most = max(MEASURED.get(shape[1:], {}), default=MOST_TOKENS)
    return right_size and 1 < shape.tokens <= most and config_for(shape).stages > 0


def config_for(shape: Shape) -> Config:
    """As many programs as multiprocessors, if K can be split so, with all of their shared memory in use."""
    measured = MEASURED.get(shape[1:], {})
    if any(most >= shape.tokens for most in measured):
        return measured[min(most for most in measured if most >= shape.tokens)]
    tokens = min(max(8, 1 << (shape.tokens - 1).bit_length()), 128)
    down = -(-shape.tokens // tokens)
    rows = 256 if down * shape.rows >= 256 * 100 else 128
    programs = down * -(-shape.rows // rows)
    blocks = shape.columns // BLOCK
    splits = max(n for n in (1, 2, 4, 8) if n == 1 or (blocks % n == 0 and programs * n <= MULTIPROCESSORS))
    return deepest(Config(tokens, rows, splits, beside=2 if tokens >= 64 and rows == 128 else 1), shape)


def deepest(config: Config, shape: Shape, resident: int = 1) -> Config:
    """With as many stages as shared memory has room for, if so many programs share a multiprocessor's."""
    steps = shape.columns // BLOCK // config.splits
    fixed, more = (config._replace(stages=n).shared_bytes(steps) for n in (0, 1))
    room = (SHARED_OF_ALL // resident - SHARED_OVERHEAD - fixed) // (more - fixed)
    return config._replace(stages=max(0, min(steps // config.blocks, room, MOST_BARRIERS)))


# By rows and columns of the weight, by the most tokens that it is for: the fastest on an H200, among those of
# scripts/bench/block_matmul_mosaic.py --few --sweep. A weight that is here has none for more tokens.
MEASURED: dict[tuple[int, int], dict[int, Config]] = {}


# --- scales


def _thread() -> ir.Value:
    """Its number in the warpgroup."""
    return arith.remui(mgpu_utils.thread_idx(), mgpu_utils.c(128, ir.IntegerType.get_signless(32)))


def _load_factors(
    table: Any,
    x_scale: Any,
    w_scale: Any,
    place: jax.Array,
    token: jax.Array,
    row: jax.Array,
    step: jax.Array,
) -> None:
    """Fills a table, [steps, tokens]: the scale of a token times that of a consumer's rows.

    All consumers that share a table write it, the same numbers; none reads before it has written. Tokens and
    rows that do not exist have the scales of the last ones.

    Args:
      table: [tables, steps, tokens + PADDING] in shared memory; `place` is the number of this one.
      x_scale, w_scale: as stored.
      token, row, step: the consumer's first token and row, and the program's first block of columns.
    """
    _, steps, padded = table.shape
    count = steps * (padded - PADDING)

    def emit(_, table: ir.Value, x_scale: ir.Value, w_scale: ir.Value, *numbers: Any) -> None:
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        start, token, row, first = (number.registers.item() for number in numbers)

        def c(number: int) -> ir.Value:
            return mgpu_utils.c(number, i32)

        def number(scales: ir.Value, row: ir.Value, column: ir.Value) -> ir.Value:
            """As float32. An E8M0 byte is its exponent: 0 becomes zero, 255 (not a number) infinity."""
            kind = ir.MemRefType(scales.type)
            at = arith.addi(arith.muli(arith.minsi(row, c(kind.shape[0] - 1)), c(kind.shape[1])), column)
            where = mgpu_utils.getelementptr(mgpu_utils.memref_ptr(scales), [at], kind.element_type)
            stored = llvm.load(kind.element_type, where)
            if kind.element_type == f32:
                return stored
            return arith.bitcast(f32, arith.shli(arith.extui(i32, stored), c(23)))

        block = arith.divui(row, c(BLOCK))
        # Threads side by side take steps side by side, which are neighbours in memory.
        for n in range(0, count, 128):
            flat = arith.minsi(arith.addi(_thread(), c(n)), c(count - 1))
            other, step = arith.divui(flat, c(steps)), arith.remui(flat, c(steps))
            column = arith.addi(first, step)
            scale = number(x_scale, arith.addi(token, other), column)
            factor = arith.mulf(scale, number(w_scale, block, column))
            to = arith.addi(arith.muli(start, c(steps)), step)
            to = arith.addi(arith.muli(to, c(padded)), other)
            llvm.store(factor, mgpu_utils.getelementptr(mgpu_utils.memref_ptr(table), [to], f32))
        mgpu_utils.warpgroup_barrier()

    ref: Any = plgpu.RefType()
    inline: Any = plgpu.inline_mgpu(arg_types=(ref, ref, ref, *(plgpu.Layout.WG_SPLAT,) * 4))
    inline(emit)(table, x_scale, w_scale, place, token, row, step)


# --- sums of the parts of K
#
# A barrier in shared memory counts the bytes that a consumer's piece receives. Mosaic's own stores to another
# program's memory announce their bytes there, which first waits for all memory operations of the sender; here
# the receiver announces them to itself, at the start.


def _assemble(text: str, names: str, values: list[ir.Value]) -> None:
    """Inline PTX without results: `$name` is the value in the place of the name."""
    kinds = {ir.F32Type.get(): "f", ir.IntegerType.get_signless(32): "r"}
    for number, name in enumerate(names.split()):
        text = re.sub(rf"\${name}\b", f"${number}", text)
    constraints = ",".join(kinds[value.type] for value in values)
    llvm.inline_asm(ir.Type.parse("!llvm.void"), values, text, constraints, has_side_effects=True)


def _address(ref: ir.Value, *offsets: Any) -> ir.Value:
    """Of shared memory, with bytes added."""
    i32 = ir.IntegerType.get_signless(32)
    return functools.reduce(arith.addi, offsets, llvm.ptrtoint(i32, mgpu_utils.memref_ptr(ref)))


def _open(config: Config, arrived: Any, group: jax.Array) -> None:
    """Makes a consumer's barrier, which opens when all has been received, and tells the cluster.

    The fence is all that others must see; a release would wait for every memory operation before it.
    """

    def emit(_, arrived: ir.Value, group: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)
        bytes = (config.splits - 1) * HEIGHT * config.piece * 4
        barrier = _address(arrived, arith.muli(group.registers.item(), mgpu_utils.c(8, i32)))
        text = f"""{{
            .reg .pred one;
            setp.eq.u32 one, $thread, 0;
            @one mbarrier.init.shared::cta.b64 [$barrier], 1;
            @one mbarrier.arrive.expect_tx.shared::cta.b64 _, [$barrier], {bytes};
            @one fence.mbarrier_init.release.cluster;
            barrier.cluster.arrive.relaxed;
        }}"""
        _assemble(text, "thread barrier", [_thread(), barrier])

    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    inline(emit)(arrived, group)


def _meet() -> None:
    """Nothing follows before all programs of the cluster have opened their barriers."""
    inline: Any = plgpu.inline_mgpu()
    inline(lambda _: _assemble("barrier.cluster.wait.acquire;", "", []))()


def _send(
    config: Config, piece: jax.Array, owner: jax.Array, received: Any, arrived: Any, group: jax.Array
) -> None:
    """A piece of sums to another program of the cluster, which keeps the place for it."""
    count = config.piece // 2  # numbers of a thread
    me = lax.axis_index("split")
    place = lax.rem(me - owner - 1 + config.splits, jnp.int32(config.splits))
    start = (group * (config.splits - 1) + place) * (HEIGHT * config.piece * 4)

    def emit(_, received: ir.Value, arrived: ir.Value, *values: mgpu.FragmentedArray) -> None:
        i32 = ir.IntegerType.get_signless(32)
        start, group, further = (value.registers.item() for value in values[:3])
        sums = [
            vector.extract(each, [], [0])
            for each in values[3].to_layout(WGMMA_LAYOUT_ACC_32BIT).registers.flat
        ]
        to = _address(received, start, arith.muli(_thread(), mgpu_utils.c(16, i32)))
        barrier = _address(arrived, arith.muli(group, mgpu_utils.c(8, i32)))
        lines = [
            ".reg .b32 rank, to, barrier;",
            "mov.u32 rank, %cluster_ctarank;",
            "add.s32 rank, rank, $further;",
            "mapa.shared::cluster.u32 to, $to, rank;",
            "mapa.shared::cluster.u32 barrier, $barrier, rank;",
        ]
        store = "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32"
        for n in range(0, count, 4):
            four = ", ".join(f"$s{n + m}" for m in range(4))
            lines.append(f"{store} [to+{n // 4 * 2048}], {{{four}}}, [barrier];")
        names = ["to", "barrier", "further", *(f"s{n}" for n in range(count))]
        _assemble("{ " + "\n".join(lines) + " }", " ".join(names), [to, barrier, further, *sums])

    ref, number = plgpu.RefType(), plgpu.Layout.WG_SPLAT
    inline: Any = plgpu.inline_mgpu(arg_types=(ref, ref, number, number, number, plgpu.Layout.WGMMA))
    inline(emit)(received, arrived, start, group, owner - me, piece)


def _receive(config: Config, total: jax.Array, received: Any, arrived: Any, group: jax.Array) -> jax.Array:
    """A piece with all that was sent added, in a fixed order."""
    count = config.piece // 2

    def emit(_, received: ir.Value, arrived: ir.Value, group: Any, total: mgpu.FragmentedArray) -> Any:
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        group = group.registers.item()
        size = mgpu_utils.c((config.splits - 1) * HEIGHT * config.piece * 4, i32)
        place = _address(received, arith.muli(group, size), arith.muli(_thread(), mgpu_utils.c(16, i32)))
        barrier = _address(arrived, arith.muli(group, mgpu_utils.c(8, i32)))
        total = total.to_layout(WGMMA_LAYOUT_ACC_32BIT)
        sums = [vector.extract(each, [], [0]) for each in total.registers.flat]
        lines = [
            ".reg .pred done;",
            ".reg .f32 v<4>;",
            "again:",
            f"mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [${2 * count + 1}], 0;",
            "@!done bra again;",
        ]
        for n in range(0, (config.splits - 1) * count, 4):
            lines.append(f"ld.shared.v4.f32 {{v0, v1, v2, v3}}, [${2 * count}+{n // 4 * 2048}];")
            lines += [f"add.f32 ${(n + m) % count}, ${(n + m) % count}, v{m};" for m in range(4)]
        results = llvm.inline_asm(
            llvm.StructType.get_literal([f32] * count),
            [*sums, place, barrier],
            "{ " + "\n".join(lines) + " }",
            ",".join(["=f"] * count + [str(n) for n in range(count)] + ["r", "r"]),
            has_side_effects=True,
        )
        values = [llvm.extractvalue(f32, results, [n]) for n in range(count)]
        vectors = [vector.broadcast(ir.VectorType.get((1,), f32), value) for value in values]
        return mgpu.FragmentedArray(
            _registers=np.array(vectors, dtype=object).reshape(total.registers.shape),
            _layout=WGMMA_LAYOUT_ACC_32BIT,
            _is_signed=None,
        ).to_layout(WGMMA_LAYOUT)

    ref = plgpu.RefType()
    inline: Any = plgpu.inline_mgpu(
        arg_types=(ref, ref, plgpu.Layout.WG_SPLAT, plgpu.Layout.WGMMA),
        return_type=plgpu.ShapeDtypeStruct((HEIGHT, config.piece), jnp.float32, layout=plgpu.Layout.WGMMA),
    )
    return inline(emit)(received, arrived, group, total)


# --- the kernel


def _kernel(
    shape: Shape, config: Config, x: Any, x_scale: Any, w: Any, w_scale: Any, out: Any, *scratch: Any
) -> None:
    x_tiles, w_tiles, table, staged, full, free, *more = scratch
    steps = shape.columns // BLOCK // config.splits
    group = lax.axis_index("warpgroup")
    if config.splits > 1:
        _open(config, more[1], group)
    tile = lax.axis_index("tile") * config.sharers + lax.axis_index("sharer")
    token, row = lax.axis_index("tokens") * config.tokens, tile * config.rows
    first = lax.axis_index("split") * steps
    last = config.stages - 1

    def producer() -> None:
        if config.registers:
            plgpu.set_max_registers(config.registers[0], action="decrease")

        def one_stage(number: jax.Array, slot: jax.Array) -> jax.Array:
            @pl.when(number >= config.stages)
            def _() -> None:
                plgpu.barrier_wait(free.at[slot])

            for block in range(config.blocks):
                columns = pl.ds((first + number * config.blocks + block) * BLOCK, BLOCK)
                at = slot * config.blocks + block
                plgpu.copy_gmem_to_smem(w.at[pl.ds(row, config.rows), columns], w_tiles.at[at], full.at[slot])
                plgpu.copy_gmem_to_smem(
                    x.at[pl.ds(token, config.tokens), columns],
                    x_tiles.at[at],
                    full.at[slot],
                    collective_axes="sharer" if config.sharers > 1 else None,
                )
            return jnp.where(slot == last, 0, slot + 1)

        slot = lax.fori_loop(0, steps // config.blocks, one_stage, jnp.int32(0))

        if config.splits > 1:
            _meet()

        # Leave when all has been reported: a program that is gone must not hear from its cluster.
        def one_report(_, slot: jax.Array) -> jax.Array:
            plgpu.barrier_wait(free.at[slot])
            return jnp.where(slot == last, 0, slot + 1)

        lax.fori_loop(0, config.stages, one_report, slot)

    def consumer() -> None:
        if config.registers:
            plgpu.set_max_registers(config.registers[1], action="increase")
        down, across = lax.div(group, jnp.int32(config.beside)), lax.rem(group, jnp.int32(config.beside))
        a_row, b_row = down * HEIGHT, across * config.share
        place = lax.div(a_row, jnp.int32(BLOCK)) * config.beside + across
        _load_factors(table, x_scale, w_scale, place, token + b_row, row + a_row, first)
        starts = range(0, config.share, config.width)

        def zeros(columns: int) -> jax.Array:
            return plgpu.layout_cast(jnp.zeros((HEIGHT, columns), jnp.float32), plgpu.Layout.WGMMA)

        def one_stage(number: jax.Array, carry: Any) -> Any:
            sums, parts, slot = carry
            sums, parts = list(sums), list(parts)
            plgpu.barrier_wait(full.at[slot])
            products = [(block, start) for block in range(config.blocks) for start in starts]

            def begin(product: tuple[int, int], spent: jax.Array) -> jax.Array:
                block, start = product
                at = slot * config.blocks + block
                return wgmma.start(w_tiles, x_tiles, at, a_row, b_row + start, spent)

            parts[0] = begin(products[0], parts[0])
            for product, following in zip(products, [*products[1:], None], strict=True):
                if following:  # the tensor core has work while this product is promoted
                    parts[1] = begin(following, parts[1])
                block, start = product
                scales = table.at[place, number * config.blocks + block, pl.ds(start, config.width)]
                factor = plgpu.load(scales, layout=TOKEN, optimized=False)
                parts[0] = wgmma.finish(parts[0], later=1 if following else 0)
                if not following:
                    plgpu.barrier_arrive(free.at[slot])
                sums[start // config.width] += parts[0] * lax.broadcast_in_dim(factor, parts[0].shape, [1])
                if following:
                    parts.reverse()
            return tuple(sums), tuple(parts), jnp.where(slot == last, 0, slot + 1)

        sums, parts = (tuple(zeros(config.width) for _ in each) for each in (starts, range(2)))
        stages = steps // config.blocks
        sums, _, _ = lax.fori_loop(0, stages, one_stage, (sums, parts, jnp.int32(0)))
        pieces = [
            sums[n // config.width][:, n % config.width : n % config.width + config.piece]
            for n in range(0, config.share, config.piece)
        ]

        def write(values: jax.Array, number: jax.Array | int) -> None:
            values = plgpu.layout_cast(values.astype(out.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
            staged.at[group].T[...] = values
            plgpu.commit_smem()
            tokens = pl.ds(token + b_row + number * config.piece, config.piece)
            plgpu.copy_smem_to_gmem(staged.at[group], out.at[tokens, pl.ds(row + a_row, HEIGHT)])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        if config.splits == 1:
            for number, piece in enumerate(pieces):
                write(piece, number)
            return
        # Piece p of consumer g belongs to program (g * parts + p) % splits of the cluster; where there are
        # fewer pieces than programs, some have none.
        received, arrived = more
        me, splits = lax.axis_index("split"), jnp.int32(config.splits)
        mine = lax.rem(me + splits - lax.rem(group * config.parts, splits), splits)
        own = pieces[0]
        _meet()
        for number, piece in enumerate(pieces):
            own = lax.select(lax.broadcast_in_dim(mine == number, piece.shape, []), piece, own)

            @pl.when(mine != number)
            def _(number: int = number, piece: jax.Array = piece) -> None:
                owner = lax.rem(group * config.parts + number, splits)
                _send(config, piece, owner, received, arrived, group)

        @pl.when(mine < config.parts)
        def _() -> None:
            write(_receive(config, own, received, arrived, group), mine)

    lax.cond(group == config.consumers, producer, consumer)


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def _launch(
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    *,
    config: Config,
    interpret: Any = None,
) -> jax.Array:
    """[tokens, rows] in bfloat16. A jit of its own, so that calls of one shape share one lowering."""
    shape = Shape(x.shape[0], *w.shape)
    steps = shape.columns // BLOCK // config.splits
    config = config._replace(stages=min(config.stages, steps // config.blocks))
    consumers, piece = config.consumers, config.piece
    scratch: list[Any] = [
        plgpu.SMEM((config.stages * config.blocks, config.tokens, BLOCK), x.dtype, transforms=SWIZZLED),
        plgpu.SMEM((config.stages * config.blocks, config.rows, BLOCK), w.dtype, transforms=SWIZZLED),
        plgpu.SMEM((config.tables, steps, config.share + PADDING), jnp.float32),
        plgpu.SMEM((consumers, piece, HEIGHT), jnp.bfloat16, transforms=SWIZZLED),
        plgpu.Barrier(num_arrivals=2 * config.blocks, num_barriers=config.stages),
    ]
    if config.sharers > 1:
        scratch.append(
            plgpu.ClusterBarrier(
                collective_axes=("sharer",), num_arrivals=consumers, num_barriers=config.stages
            )
        )
    else:
        scratch.append(plgpu.Barrier(num_arrivals=consumers, num_barriers=config.stages))
    if config.splits > 1:
        scratch += [
            plgpu.SMEM((consumers * (config.splits - 1) * HEIGHT * piece,), jnp.float32),
            plgpu.SMEM((consumers + 1, 2), jnp.uint32),  # barriers of 8 bytes; that of the producer is unused
        ]
    return plgpu.kernel(
        functools.partial(_kernel, shape, config),
        out_type=jax.ShapeDtypeStruct((shape.tokens, shape.rows), jnp.bfloat16),
        scratch_types=scratch,
        grid=(-(-shape.rows // (config.rows * config.sharers)), -(-shape.tokens // config.tokens)),
        grid_names=("tile", "tokens"),  # those that share rows of the weight run side by side
        cluster=(config.sharers, config.splits),
        cluster_names=("sharer", "split"),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        # Only copies write what the products read; all else has its barriers already.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
        kernel_name=f"block_matmul_few_{config.tokens}x{config.rows}",
    )(x, x_scale, w, w_scale)


def block_matmul(
    x: QuantArray, weight: QuantArray, out_dtype: Any, *, config: Config | None = None, interpret: Any = None
) -> jax.Array:
    """x @ weight.T, see `pallas_kernels.block_matmul`; `fits` says which arguments it is for.

    Raises:
      ValueError: the config does not fit the shape, or needs more shared memory than there is.
    """
    *outer, columns = x.shape
    shape = Shape(math.prod(outer), weight.shape[0], columns)
    config = config or config_for(shape)
    if jnp.dtype(out_dtype) != jnp.bfloat16:
        raise ValueError(f"the kernel writes bfloat16, not {jnp.dtype(out_dtype)}")
    if columns // BLOCK % (config.splits * config.blocks):
        raise ValueError(f"{config} does not split {columns} columns")
    needed = config.shared_bytes(columns // BLOCK // config.splits)
    if needed > SHARED_BYTES:
        raise ValueError(f"{config} needs {needed} bytes of shared memory, there are {SHARED_BYTES}")
    if not shape.tokens:
        return jnp.zeros((*outer, shape.rows), jnp.bfloat16)
    out = _launch(
        x.values.reshape(-1, columns),
        x.scale.reshape(-1, columns // BLOCK),
        weight.values,
        weight.scale,
        config=config,
        interpret=interpret,
    )
    return out.reshape(*outer, shape.rows)
