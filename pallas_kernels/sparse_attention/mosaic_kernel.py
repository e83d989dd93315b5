"""The kernel of `sparse_attention` for many queries on Hopper: one warpgroup gathers, two attend.

A program takes 64 heads of one query after the other, the rows of the tensor core's products. The keys of a
query are blocks of 64 places of its lists, first the window's, then those of compressed entries; two blocks
are in shared memory. Both consumers work on both: each computes the logits and weights of one, gives the
weights to the other, and adds both blocks' values to its half of the channels, for 64 x 512 sums fill the
registers of two warpgroups. So the maximum goes from the first consumer to the second and back.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.cached_rows import QuantKV
from pallas_kernels.sparse_attention import mosaic_ptx as ptx
from pallas_kernels.sparse_attention.mosaic_config import (
    CHANNELS,
    COLUMNS,
    HEADS,
    KEYS,
    LOG2_E,
    LOWEST,
    MULTIPROCESSORS,
    SLOTS,
    Config,
    Sizes,
)

ROW = ptx.ROW
COLUMN = plgpu.Layout.WGMMA.reduce(0)  # one number a key
SUMS: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]

# --- arithmetic


def _wide(numbers: jax.Array, columns: int) -> jax.Array:
    """One number a head, for all columns."""
    return lax.broadcast_in_dim(numbers, (HEADS, columns), [0])


def _logits(queries: Any, keys: Any, start: jax.Array, zero: jax.Array) -> jax.Array:
    """[64 heads, 64 keys]: the products, added to one number a key."""

    def multiply(sums: Any) -> None:
        for half in range(2):
            channels = pl.ds(half * (CHANNELS // 2), CHANNELS // 2)
            plgpu.wgmma(sums, queries.at[zero + half], keys.at[:, channels].transpose((1, 0)))

    return pl.run_state(multiply)(SUMS.init(lax.broadcast_in_dim(start, (HEADS, KEYS), [1])))


def _add(sums: jax.Array, weights: Any, values: Any, meanwhile: Any = None, carry: Any = None) -> Any:
    """`sums` + weights x values, weights in registers or in shared memory.

    With `meanwhile`, also what that makes of `carry` while the tensor core is busy.
    """
    if meanwhile is None:
        return pl.run_state(lambda total: plgpu.wgmma(total, weights, values))(SUMS.init(sums))

    def multiply(refs: Any) -> None:
        total, kept = refs
        plgpu.wgmma(total, weights, values)
        kept[...] = meanwhile(kept[...])

    return pl.run_state(multiply)((SUMS.init(sums), carry))


def _shrunk(sums: jax.Array, factor: jax.Array) -> jax.Array:
    """Each head's sums times its factor, which mostly is 1."""
    return lax.cond(ptx.moved(factor) != 0, lambda: sums * _wide(factor, sums.shape[1]), lambda: sums)


# --- the kernel


def programs_of(sizes: Sizes, config: Config) -> int:
    return min(sizes.queries * sizes.groups * config.splits, MULTIPROCESSORS)


def scratch(sizes: Sizes) -> tuple[Any, ...]:
    """Shared memory and barriers."""
    return (
        plgpu.SMEM((2, HEADS, CHANNELS // 2), jnp.bfloat16, transforms=ptx.TILED),  # queries
        plgpu.SMEM((SLOTS, KEYS, CHANNELS), jnp.bfloat16, transforms=ptx.TILED),  # blocks
        plgpu.SMEM((2, HEADS, KEYS), jnp.bfloat16, transforms=ptx.TILED),  # weights of first blocks
        plgpu.SMEM((1, HEADS, KEYS), jnp.bfloat16, transforms=ptx.TILED),  # of second
        plgpu.SMEM((SLOTS, KEYS), jnp.float32),  # where logits start: 0, -inf without a row
        plgpu.SMEM((2, HEADS), jnp.float32),  # maxima
        plgpu.SMEM((2, 2, HEADS), jnp.float32),  # sums of weights
        plgpu.SMEM((1,), jnp.int32),  # pairs of blocks of an item
        plgpu.SMEM((8,), jnp.int32),  # what each warp has seen of the lists
        plgpu.SMEM((2 * SLOTS,), jnp.int32),  # barriers of blocks, 8 bytes each
        plgpu.Barrier(num_arrivals=3),  # queries are there
        plgpu.Barrier(num_arrivals=2),  # their space is free
        plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),  # a block's is
        plgpu.Barrier(num_barriers=2),  # weights of a first, of a second block are there
        plgpu.Barrier(num_arrivals=2),  # sums of weights are
    )


def _named(sizes: Sizes, refs: Any) -> tuple[Any, ...]:
    """Queries; rows of the window and of entries; their lists; sinks; cosines and sines; outputs."""
    if sizes.codes:
        kvs, (window, compressed, *rest) = (QuantKV(*refs[1:4]), QuantKV(*refs[4:7])), refs[7:]
    else:
        kvs, (window, compressed, *rest) = refs[1:3], refs[3:]
    sink, cos, sin, *outs = rest
    return refs[0], kvs, (window, compressed), sink, (cos, sin), outs


class Item(NamedTuple):
    """What a program works on: 64 heads of a query, and a share of its keys."""

    at: Any  # in q: query times groups of heads, plus group
    query: Any
    batch: Any
    group: Any
    split: Any


def kernel(sizes: Sizes, config: Config, scale: float, *refs: Any) -> None:
    """What `mosaic` launches, on arrays in the order in which it names them."""
    *arrays, outs = _named(sizes, refs[:-15])
    q, kvs, lists, attn_sink, turns = arrays
    queries, tiles, early, late, starts, tops, totals, told, seen, arrived = refs[-15:-5]
    loaded, used, free, handed, both = refs[-5:]
    part = lax.axis_index("warpgroup")
    program = lax.axis_index("program")
    items = sizes.queries * sizes.groups * config.splits
    programs = programs_of(sizes, config)
    mine = lax.div(items - program + programs - 1, jnp.int32(programs))
    to_bits = scale * LOG2_E

    def item_of(number: jax.Array) -> Item:
        """Groups of heads and splits of one query at about the same time: its keys are in the L2 cache."""
        item = program + number * programs
        at, split = lax.div(item, jnp.int32(config.splits)), lax.rem(item, jnp.int32(config.splits))
        query, group = lax.div(at, jnp.int32(sizes.groups)), lax.rem(at, jnp.int32(sizes.groups))
        return Item(at, query, lax.div(query, jnp.int32(sizes.tokens)), group, split)

    def gatherer() -> None:
        plgpu.set_max_registers(sizes.registers[0], action="decrease")
        ptx.prepare(sizes, arrived)

        @pl.loop(0, mine)
        def _(number: jax.Array) -> None:
            item = item_of(number)
            first, end = jnp.int32(0), jnp.int32(sizes.blocks)
            if config.look:
                first, end = ptx.look(sizes, lists, seen, item.query)
            # Pairs of blocks, of which this split has those from `begin` on.
            pairs = jnp.where(end > first, lax.div(end - first + 1, jnp.int32(2)), 0)
            begin = lax.div(pairs * item.split, jnp.int32(config.splits))
            count = lax.div(pairs * (item.split + 1), jnp.int32(config.splits)) - begin
            first = first + 2 * begin

            plgpu.barrier_wait(used)
            told[0] = count
            plgpu.barrier_arrive(loaded)
            for half in range(2):
                channels = pl.ds(half * (CHANNELS // 2), CHANNELS // 2)
                plgpu.copy_gmem_to_smem(q.at[item.at, :, channels], queries.at[half], loaded)

            def one_pair(pair: jax.Array, rows: Any) -> Any:
                for slot in range(SLOTS):
                    block = first + 2 * pair + slot
                    held = ptx.load(sizes, kvs, item.batch, block, rows)
                    here, rows = rows, ptx.rows(sizes, lists, item.query, block + 1)
                    plgpu.barrier_wait(free.at[slot])
                    if sizes.codes:
                        ptx.ahead(sizes, kvs, item.batch, block + 1, rows)
                    ptx.store(sizes, kvs, tiles, starts, arrived, item.batch, block, here, held, slot)
                return rows

            lax.fori_loop(0, count, one_pair, ptx.rows(sizes, lists, item.query, first))

        # Leave when all is done: the interpreter wants every phase of a barrier seen.
        plgpu.barrier_wait(used)
        for slot in range(SLOTS):
            plgpu.barrier_wait(free.at[slot])

    def attender(me: int) -> None:
        plgpu.set_max_registers(sizes.registers[1], action="increase")
        half = pl.ds(me * (CHANNELS // 2), CHANNELS // 2)
        plgpu.barrier_arrive(used)
        for slot in range(SLOTS):
            plgpu.barrier_arrive(free.at[slot])

        def row(value: float) -> jax.Array:
            return plgpu.layout_cast(jnp.full((HEADS,), value, jnp.float32), ROW)

        def load_row(ref: Any) -> jax.Array:
            return plgpu.load(ref, layout=ROW, optimized=False)

        def weigh(logits: jax.Array, top: jax.Array) -> jax.Array:
            # Subtracted before scaled: by a fused multiply-add huge logits would differ from themselves.
            return jnp.exp2((logits - _wide(top, KEYS)) * to_bits)

        def raised(top: jax.Array, logits: jax.Array) -> jax.Array:
            highest = logits.max(axis=1)
            return jnp.where(highest > top + config.slack / to_bits, highest, top)

        def shrinkage(old: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.exp2((old - new) * to_bits)

        def first_part(item: Item, sums: Any, top: Any, total: Any, logits: Any, at: Any, phase: Any) -> Any:
            """Weighs the first block of a pair, and hears of the second's weights."""
            tile0, tile1, weights0, weights1 = at
            raised_top = raised(top, logits)
            weights = weigh(logits, raised_top)
            rounded = weights.astype(jnp.bfloat16)
            tops.at[0][...] = raised_top
            weights0[...] = rounded
            plgpu.commit_smem()
            plgpu.barrier_arrive(handed.at[0])
            factor = shrinkage(top, raised_top)
            total = total * factor + weights.sum(axis=1)
            sums = _shrunk(sums, factor)

            def meanwhile(total: jax.Array) -> jax.Array:
                ptx.wait_for(arrived, 1, phase)
                plgpu.barrier_wait(handed.at[1])
                return total

            sums, total = _add(sums, rounded, tile0.at[:, half], meanwhile, total)
            plgpu.barrier_arrive(free.at[0])
            top = load_row(tops.at[1])
            factor = shrinkage(raised_top, top)
            sums = _add(_shrunk(sums, factor), weights1, tile1.at[:, half])
            plgpu.barrier_arrive(free.at[1])
            return sums, top, total * factor

        def second_part(item: Item, sums: Any, top: Any, total: Any, logits: Any, at: Any, phase: Any) -> Any:
            """Weighs the second block, while the first's values are added."""
            tile0, tile1, weights0, weights1 = at
            ptx.wait_for(arrived, 0, phase)
            plgpu.barrier_wait(handed.at[0])
            first_top = load_row(tops.at[0])
            sums = _shrunk(sums, shrinkage(top, first_top))
            raised_top = raised(first_top, logits)

            def meanwhile(total: jax.Array) -> jax.Array:
                weights = weigh(logits, raised_top)
                tops.at[1][...] = raised_top
                weights1[...] = weights.astype(jnp.bfloat16)
                plgpu.commit_smem()
                plgpu.barrier_arrive(handed.at[1])
                return total * shrinkage(top, raised_top) + weights.sum(axis=1)

            sums, total = _add(sums, weights0, tile0.at[:, half], meanwhile, total)
            plgpu.barrier_arrive(free.at[0])
            sums = _add(_shrunk(sums, shrinkage(first_top, raised_top)), weights1, tile1.at[:, half])
            plgpu.barrier_arrive(free.at[1])
            return sums, raised_top, total

        def attend(item: Item, count: jax.Array, phase: jax.Array) -> Any:
            """Sums of a half of the channels, maximum, sum of the weights of this consumer's blocks."""

            def one_pair(pair: jax.Array, carry: Any) -> Any:
                sums, top, total, phase = carry
                ptx.wait_for(arrived, me, phase)
                zero = ptx.zero()
                at = tiles.at[zero], tiles.at[zero + 1], early.at[phase], late.at[zero]
                start = plgpu.load(starts.at[me], layout=COLUMN, optimized=False)
                logits = _logits(queries, at[me], start, zero)
                pl.when(pair == count - 1)(lambda: plgpu.barrier_arrive(used))
                part = (first_part, second_part)[me]
                return *part(item, sums, top, total, logits, at, phase), 1 - phase

            none = plgpu.layout_cast(jnp.zeros((HEADS, CHANNELS // 2), jnp.float32), plgpu.Layout.WGMMA)
            found = lax.fori_loop(0, count, one_pair, (none, row(LOWEST), row(0.0), phase))
            pl.when(count == 0)(lambda: plgpu.barrier_arrive(used))
            return found

        def write(item: Item, sums: jax.Array) -> None:
            """In pieces of 64 columns, through the space of the weights."""
            pieces = (early, late)[me]
            out = outs[0].at[item.at, :, item.split] if config.splits > 1 else outs[0].at[item.at]
            for n in range(CHANNELS // 2 // COLUMNS):
                if n >= 2 - me:
                    plgpu.wait_smem_to_gmem(1 - me, wait_read_only=True)
                piece = pieces.at[n % (2 - me)]
                result = sums[:, n * COLUMNS : (n + 1) * COLUMNS]
                if sizes.turned and config.splits == 1 and (me, n) == (1, 3):
                    result = ptx.turned_back(result, *turns, query=item.query)
                piece[...] = result.astype(jnp.bfloat16)
                plgpu.commit_smem()
                columns = pl.ds(me * (CHANNELS // 2) + n * COLUMNS, COLUMNS)
                plgpu.copy_smem_to_gmem(piece, out.at[:, columns])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def one_item(number: jax.Array, phase: jax.Array) -> jax.Array:
            item = item_of(number)
            sink = load_row(attn_sink.at[pl.ds(item.group * HEADS, HEADS)])
            plgpu.barrier_wait(loaded)
            sums, top, total, phase = attend(item, told[0], phase)
            # Two places for each: the other may be late to read what this says.
            now = lax.rem(number, jnp.int32(2))
            totals.at[now, me][...] = total
            plgpu.commit_smem()
            plgpu.barrier_arrive(both)
            plgpu.barrier_wait(both)
            total = total + load_row(totals.at[now, 1 - me])
            whole = total if config.splits > 1 else total + jnp.exp2(sink * LOG2_E - top * to_bits)
            # Written as "none" and not as "some": what is not a number must come through.
            share = jnp.where(total == 0, 0.0, 1.0 / whole)
            if config.splits > 1 and me == 0:
                weight = jnp.where(total == 0, -jnp.inf, top * to_bits + jnp.log2(total))
                outs[-1].at[item.at, :, item.split][...] = weight
            write(item, sums * _wide(share, CHANNELS // 2))
            return phase

        lax.fori_loop(0, mine, one_item, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    pl.when(part == 2)(gatherer)
    for me in range(2):
        pl.when(part == me)(functools.partial(attender, me))
