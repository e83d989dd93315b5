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
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.block_matmul import cluster_sum, wgmma
from pallas_kernels.block_matmul.mosaic_config import PADDING, SHARED_BYTES, Few, Shape, few_for
from pallas_kernels.block_matmul.tiles import BLOCK
from pallas_kernels.block_matmul.wgmma import HEIGHT, SWIZZLED
from pallas_kernels.formats import QuantArray

TOKEN = plgpu.Layout.WGMMA.reduce(0)  # one number a token, where a product has that token


# --- scales


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
            flat = arith.minsi(arith.addi(cluster_sum.thread(), c(n)), c(count - 1))
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


# --- the kernel


def _kernel(
    shape: Shape, config: Few, x: Any, x_scale: Any, w: Any, w_scale: Any, out: Any, *scratch: Any
) -> None:
    x_tiles, w_tiles, table, staged, full, free, *more = scratch
    steps = shape.columns // BLOCK // config.splits
    group = lax.axis_index("warpgroup")
    if config.splits > 1:
        cluster_sum.prepare(config.exchange, more[1], group)
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
            cluster_sum.meet()

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
        cluster_sum.meet()
        for number, piece in enumerate(pieces):
            own = lax.select(lax.broadcast_in_dim(mine == number, piece.shape, []), piece, own)

            @pl.when(mine != number)
            def _(number: int = number, piece: jax.Array = piece) -> None:
                owner = lax.rem(group * config.parts + number, splits)
                cluster_sum.send(config.exchange, piece, owner, received, arrived, group)

        @pl.when(mine < config.parts)
        def _() -> None:
            write(cluster_sum.receive(config.exchange, own, received, arrived, group), mine)

    lax.cond(group == config.consumers, producer, consumer)


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def _launch(
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    *,
    config: Few,
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
        scratch += config.exchange.scratch(consumers)
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
    x: QuantArray, weight: QuantArray, out_dtype: Any, *, config: Few | None = None, interpret: Any = None
) -> jax.Array:
    """x @ weight.T, see `pallas_kernels.block_matmul`; `mosaic_config.takes` says of which.

    Raises:
      ValueError: the config does not fit the shape, or needs more shared memory than there is.
    """
    *outer, columns = x.shape
    shape = Shape(math.prod(outer), weight.shape[0], columns)
    config = config or few_for(shape)
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
