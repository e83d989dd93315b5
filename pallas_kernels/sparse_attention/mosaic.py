"""`sparse_attention` of many queries on Hopper: one warpgroup gathers, two attend.

A program takes 64 heads of one query after the other, the rows of the tensor core's products. The keys of a
query are blocks of 64 places of its lists, first the window's, then those of compressed entries; two blocks
are in shared memory. Both consumers work on both: each computes the logits and weights of one, gives the
weights to the other, and adds both blocks' values to its half of the channels, for 64 x 512 sums fill the
registers of two warpgroups. So the maximum goes from the first consumer to the second and back.

The copy engine of Hopper takes no list of rows, and Mosaic has no words for what does, copies of 16 bytes by
each thread, nor for a barrier that they report to. Those few pieces are PTX. Where a place has no row nothing
is read: its copies write zeros, and its logits start at -inf.
"""

import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.sparse_attention.triton import combine
from pallas_kernels.target import Target

HEADS = 64  # of a program: the rows of a tensor core product
CHANNELS = 512
KEYS = 64  # places of a block
COLUMNS = 64  # of bfloat16: as wide as the swizzle, 128 bytes
SLOTS = 2  # blocks in shared memory
MULTIPROCESSORS = 132
# Registers of a thread once all know their part: 128 threads that gather, 256 that attend, 168 each at first.
GATHERING_REGISTERS, ATTENDING_REGISTERS = 40, 232
LOWEST = float(jnp.finfo(jnp.float32).min)  # finite, so that its difference to itself is 0
LOG2_E = math.log2(math.e)
AT_ONCE = 8  # places of a list that a thread looks up before it waits

TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]
ROW = plgpu.Layout.WGMMA.reduce(1)  # one number a head, where a product has that head
COLUMN = plgpu.Layout.WGMMA.reduce(0)  # one number a key
SCALAR = plgpu.Layout.WG_SPLAT
SUMS: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]


class Config(NamedTuple):
    """How the work is dealt out, and how a program goes about it.

    Attributes:
      splits: programs that share a query's keys; more than one need a second kernel.
      look: whether a query's lists are searched for their first and last row, to walk only what is between.
      slack: a maximum stays in use until a logit is larger by so many powers of two. Sums have to be
        multiplied whenever it moves, which beyond the first blocks it then hardly does.
    """

    splits: int = 1
    look: bool = True
    slack: float = 8.0


class Sizes(NamedTuple):
    """Of the arguments: T tokens, H heads as groups of 64, R rows and W places, S entries and K places."""

    batch: int
    tokens: int
    groups: int
    rows: int
    window: int
    entries: int
    chosen: int

    @property
    def queries(self) -> int:
        return self.batch * self.tokens

    @property
    def window_blocks(self) -> int:
        return -(-self.window // KEYS)

    @property
    def blocks(self) -> int:
        return self.window_blocks + -(-self.chosen // KEYS)


FEWEST_QUERIES = 32  # of 64 heads: below, the Triton kernels give more multiprocessors something to do


def fits(
    target: Target, q, window_kv, window_index, compressed_kv, compressed_index, attn_sink, softmax_scale
) -> bool:
    """Whether `sparse_attention` takes these and is the one to take them: many queries of V4, on Hopper."""
    batch, tokens, heads, channels = q.shape
    kvs = (window_kv,) if compressed_kv is None else (window_kv, compressed_kv)
    return (
        target.arch == "sm_90"
        and all(array.dtype == jnp.bfloat16 for array in (q, *kvs))
        and channels == CHANNELS
        and heads % HEADS == 0
        and batch * tokens * heads >= FEWEST_QUERIES * HEADS
        and window_kv.size > 0
        and window_index.size > 0
        and all(kv.shape[0] * kv.shape[1] < 2**31 for kv in kvs)
        and isinstance(softmax_scale, float | int)  # it becomes part of the kernel
        and softmax_scale > 0
    )


def config_for(sizes: Sizes) -> Config:
    """As many splits as run at once, none of them without a pair of blocks.

    Where a program has few blocks, looking for those that are absent takes longer than walking over them.
    """
    programs, pairs = sizes.queries * sizes.groups, -(-sizes.blocks // 2)
    splits = max(1, min(MULTIPROCESSORS // programs, pairs))
    return Config(splits, look=splits == 1 or pairs > 4 * splits)


# --- PTX


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _thread() -> ir.Value:
    """Of the warpgroup."""
    return arith.remui(mgpu_utils.thread_idx(), mgpu_utils.c(128, _i32()))


def _assemble(text: str, results: int = 0, **operands: Any) -> tuple[mgpu.FragmentedArray, ...]:
    """Inline assembly on addresses of arrays, integers and `$thread`; returns `$result0` and so on."""
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


REF, TILE_REF = plgpu.RefType(), plgpu.RefType(TILED)


def rows_ptx(sizes: Sizes) -> str:
    """What stands at four places of a block: a thread's eighth, and 16, 32 and 48 further on."""
    lines = [
        ".reg .pred in_window, there;",
        ".reg .b32 place, length;",
        ".reg .b64 list, at;",
        "shr.u32 place, $thread, 3;",
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
    for n in range(4):
        lines += [
            "setp.lt.u32 there, place, length;",
            f"mov.b32 $result{n}, -1;",
            f"@there ld.global.nc.b32 $result{n}, [at+{64 * n}];",
            "add.u32 place, place, 16;",
        ]
    return "\n".join(lines)


def fetch_ptx(sizes: Sizes) -> str:
    """Starts the copies of a block, 16 bytes each: eight threads a row, four rows a thread.

    The tile is as the tensor core wants it: pieces of 8 rows x 64 columns, in which sixteen bytes trade
    places by row. The block's barrier hears of the copies when they are done, and of the logits' starts.
    """
    lines = [
        ".reg .pred in_window, there, first;",
        ".reg .b32 line, chunk, last, at, start, size<4>;",
        ".reg .b64 kv, other, to, from<4>;",
        "cvt.u64.u32 kv, $batch;",
        f"mad.lo.u64 kv, kv, {sizes.rows * CHANNELS * 2}, $window;",
        f"mov.b32 last, {sizes.rows - 1};",
    ]
    if sizes.chosen:
        lines += [
            f"setp.lt.u32 in_window, $block, {sizes.window_blocks};",
            "cvt.u64.u32 other, $batch;",
            f"mad.lo.u64 other, other, {sizes.entries * CHANNELS * 2}, $compressed;",
            "selp.b64 kv, kv, other, in_window;",
            f"selp.b32 last, {sizes.rows - 1}, {sizes.entries - 1}, in_window;",
        ]
    lines += [
        "and.b32 chunk, $thread, 7;",
        "mul.wide.u32 other, chunk, 16;",
        "add.u64 kv, kv, other;",
        "shr.u32 line, $thread, 3;",
        # Eight rows of eight tiles are 8 KiB.
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
            f"min.s32 at, $row{n}, last;",
            "max.s32 at, at, 0;",
            f"mul.wide.u32 from{n}, at, {CHANNELS * 2};",
            f"add.u64 from{n}, from{n}, kv;",
        ]
    for n in range(4):
        for column in range(CHANNELS // COLUMNS):
            lines.append(
                f"cp.async.cg.shared.global.L2::256B [to+{n * 16384 + column * 1024}],"
                f" [from{n}+{column * 128}], 16, size{n};"
            )
    lines += [
        "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$arrived];",
        "@first mbarrier.arrive.shared::cta.b64 _, [$arrived];",
    ]
    return "\n".join(lines)


ARRIVALS = 128 + 16  # at a block's barrier: each thread's copies, and the writers of logits' starts


def look_ptx(sizes: Sizes) -> str:
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
    return "\n".join(
        [
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
        ]
    )


SEEN_PTX = """
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

AWAIT_PTX = """
.reg .pred done;
AWAIT: mbarrier.try_wait.parity.shared::cta.b64 done, [$arrived], $phase;
@!done bra AWAIT;
fence.proxy.async.shared::cta;
"""


# --- PTX inside of the kernel


def _prepare(arrived: Any) -> None:
    """The barriers of blocks, for all threads of the warpgroup."""

    def emit(arrived):
        text = ".reg .pred first; setp.eq.u32 first, $thread, 0;"
        for slot in range(SLOTS):
            text += f"@first mbarrier.init.shared::cta.b64 [$arrived+{8 * slot}], {ARRIVALS};"
        _assemble(text, arrived=arrived)
        mgpu_utils.warpgroup_barrier()

    _inline(emit, arrived, kinds=(REF,))


def _look(sizes: Sizes, lists: Any, seen: Any, query: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First block of a query's lists with a row, and the one after the last that has one."""

    def emit(window, compressed, seen, query):
        mgpu_utils.warpgroup_barrier()  # what the last call saw has been read
        _assemble(look_ptx(sizes), window=window, compressed=compressed, seen=seen, query=query)
        mgpu_utils.warpgroup_barrier()
        return _assemble(SEEN_PTX, 2, seen=seen)

    return _inline(emit, *lists, seen, query, kinds=(REF, REF, REF, SCALAR), results=2)


def _rows(sizes: Sizes, lists: Any, query: jax.Array, block: jax.Array) -> tuple[jax.Array, ...]:
    """Four "scalars", of which every thread has its own."""

    def emit(window, compressed, query, block):
        return _assemble(rows_ptx(sizes), 4, window=window, compressed=compressed, query=query, block=block)

    return _inline(emit, *lists, query, block, kinds=(REF, REF, SCALAR, SCALAR), results=4)


def _fetch(
    sizes: Sizes,
    kvs: Any,
    tile: Any,
    starts: Any,
    arrived: Any,
    batch: jax.Array,
    block: jax.Array,
    rows: tuple[jax.Array, ...],
    slot: int,
) -> None:
    """Starts the copies of a block, whose rows `_rows` gave, to a slot that is free."""

    def emit(window, compressed, tile, starts, arrived, batch, block, *rows):
        at = {"window": window, "compressed": compressed, "tile": tile, "starts": starts, "arrived": arrived}
        numbered = {f"row{n}": row for n, row in enumerate(rows)}
        text = fetch_ptx(sizes).replace("[$arrived]", f"[$arrived+{8 * slot}]")
        _assemble(text, **at, batch=batch, block=block, **numbered)

    kinds = (REF, REF, TILE_REF, REF, REF, *(SCALAR,) * 6)
    _inline(emit, *kvs, tile.at[slot], starts.at[slot], arrived, batch, block, *rows, kinds=kinds)


def _await(arrived: Any, slot: int, phase: jax.Array) -> None:
    """Waits for the block of a slot; `phase` is 0 for its first, then 1, then 0."""

    def emit(arrived, phase):
        _assemble(AWAIT_PTX.replace("[$arrived]", f"[$arrived+{8 * slot}]"), arrived=arrived, phase=phase)

    _inline(emit, arrived, phase, kinds=(REF, SCALAR))


def _zero() -> jax.Array:
    """LLVM does not see that it is 0, and so keeps no addresses made from it in registers."""

    def emit():
        return _assemble("mov.b32 $result0, 0;", 1)[0]

    return _inline(emit, kinds=(), results=1)


def _moved(factor: jax.Array) -> jax.Array:
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
    return lax.cond(_moved(factor) != 0, lambda: sums * _wide(factor, sums.shape[1]), lambda: sums)


# --- the kernel


class Item(NamedTuple):
    """What a program works on: 64 heads of a query, and a share of its keys."""

    at: Any  # in q: query times groups of heads, plus group
    query: Any
    batch: Any
    group: Any
    split: Any


def _kernel(sizes: Sizes, config: Config, scale: float, *refs: Any) -> None:
    q, window_kv, window_index, compressed_kv, compressed_index, attn_sink, *outs = refs[:-15]
    queries, tiles, early, late, starts, tops, totals, told, seen, arrived = refs[-15:-5]
    loaded, used, free, handed, both = refs[-5:]
    part = lax.axis_index("warpgroup")
    program = lax.axis_index("program")
    items = sizes.queries * sizes.groups * config.splits
    programs = min(items, MULTIPROCESSORS)
    mine = lax.div(items - program + programs - 1, jnp.int32(programs))
    to_bits = scale * LOG2_E

    def item_of(number: jax.Array) -> Item:
        """Groups of heads and splits of one query at about the same time: its keys are in the L2 cache."""
        item = program + number * programs
        at, split = lax.div(item, jnp.int32(config.splits)), lax.rem(item, jnp.int32(config.splits))
        query, group = lax.div(at, jnp.int32(sizes.groups)), lax.rem(at, jnp.int32(sizes.groups))
        return Item(at, query, lax.div(query, jnp.int32(sizes.tokens)), group, split)

    def gatherer() -> None:
        plgpu.set_max_registers(GATHERING_REGISTERS, action="decrease")
        lists, kvs = (window_index, compressed_index), (window_kv, compressed_kv)
        _prepare(arrived)

        @pl.loop(0, mine)
        def _(number: jax.Array) -> None:
            item = item_of(number)
            first, end = jnp.int32(0), jnp.int32(sizes.blocks)
            if config.look:
                first, end = _look(sizes, lists, seen, item.query)
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

            @pl.loop(0, count)
            def _(pair: jax.Array) -> None:
                for slot in range(SLOTS):
                    block = first + 2 * pair + slot
                    rows = _rows(sizes, lists, item.query, block)  # on their way before the slot is free
                    plgpu.barrier_wait(free.at[slot])
                    _fetch(sizes, kvs, tiles, starts, arrived, item.batch, block, rows, slot)

        # Leave when all is done: the interpreter wants every phase of a barrier seen.
        plgpu.barrier_wait(used)
        for slot in range(SLOTS):
            plgpu.barrier_wait(free.at[slot])

    def attender(me: int) -> None:
        plgpu.set_max_registers(ATTENDING_REGISTERS, action="increase")
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
                _await(arrived, 1, phase)
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
            _await(arrived, 0, phase)
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
                _await(arrived, me, phase)
                zero = _zero()
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
                piece[...] = sums[:, n * COLUMNS : (n + 1) * COLUMNS].astype(jnp.bfloat16)
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
                outs[1].at[item.at, :, item.split][...] = weight
            write(item, sums * _wide(share, CHANNELS // 2))
            return phase

        lax.fori_loop(0, mine, one_item, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    pl.when(part == 2)(gatherer)
    for me in range(2):
        pl.when(part == me)(functools.partial(attender, me))


def _launch(
    arguments: Any, sizes: Sizes, config: Config, scale: float, interpret: Any = None
) -> tuple[jax.Array, ...]:
    """[queries x groups, 64, splits, 512], and with splits the log2 of each one's sum of weights."""
    heads, splits = sizes.queries * sizes.groups, (config.splits,) if config.splits > 1 else ()
    outs = [jax.ShapeDtypeStruct((heads, HEADS, *splits, CHANNELS), jnp.bfloat16)]
    if splits:
        outs.append(jax.ShapeDtypeStruct((heads, HEADS, *splits), jnp.float32))
    return plgpu.kernel(
        functools.partial(_kernel, sizes, config, scale),
        out_type=tuple(outs),
        scratch_types=(
            plgpu.SMEM((2, HEADS, CHANNELS // 2), jnp.bfloat16, transforms=TILED),  # queries
            plgpu.SMEM((SLOTS, KEYS, CHANNELS), jnp.bfloat16, transforms=TILED),  # blocks
            plgpu.SMEM((2, HEADS, KEYS), jnp.bfloat16, transforms=TILED),  # weights of first blocks
            plgpu.SMEM((1, HEADS, KEYS), jnp.bfloat16, transforms=TILED),  # of second
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
        ),
        grid=(min(heads * config.splits, MULTIPROCESSORS),),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=interpret,
        kernel_name=f"sparse_attention_{config.splits}",
    )(*arguments)


@functools.partial(jax.jit, static_argnames=("softmax_scale", "config", "interpret"))
def sparse_attention(
    q: jax.Array,
    window_kv: jax.Array,
    window_index: jax.Array,
    compressed_kv: jax.Array | None,
    compressed_index: jax.Array | None,
    attn_sink: jax.Array,
    softmax_scale: float,
    config: Config | None = None,
    interpret: Any = None,
) -> jax.Array:
    """See `pallas_kernels.sparse_attention`; `fits` says which arguments it is for."""
    batch, tokens, heads, channels = q.shape
    if compressed_kv is None or compressed_index is None or 0 in (compressed_kv.size, compressed_index.size):
        compressed_kv, compressed_index, entries, chosen = window_kv, window_index, 0, 0  # never read
    else:
        entries, chosen = compressed_kv.shape[1], compressed_index.shape[2]
    groups = heads // HEADS
    sizes = Sizes(batch, tokens, groups, window_kv.shape[1], window_index.shape[2], entries, chosen)
    config = config or config_for(sizes)
    arguments = (
        q.reshape(-1, HEADS, channels),
        *(window_kv, window_index, compressed_kv, compressed_index, attn_sink),
    )
    out, *weights = _launch(arguments, sizes, config, softmax_scale, interpret)
    if not weights:
        return out.reshape(q.shape)
    shape = (batch, tokens, heads, config.splits)
    return combine(out.reshape(*shape, channels), weights[0].reshape(shape), attn_sink)
