"""Routed experts for few tokens on Hopper, FP4 by FP8: one launch, at the pace of the memory.

For few tokens all of the time is in reading weights, so nothing may interrupt it. A program is a
multiprocessor's. Its share of both products is a run of 64 rows each, in the order of the experts. One
warpgroup of it brings weights into a ring of stages, always as far ahead as shared memory has room: weights
depend on nothing, so those of the second product arrive while the first is being finished everywhere. Four
warpgroups multiply. They share 64 rows and divide the columns among them, so activations are a quarter each;
they quantise their own. One more warpgroup adds the four parts of a sum up and writes, so that those that
multiply never wait for memory themselves.

Programs do not meet. What the second product needs of the first is counted by tile of tokens
(`Plan.arrivals`), and every program begins with the first.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.expert_mlp import few_ptx as ptx
from pallas_kernels.expert_mlp.assembly import Lane, Numbers, Total, arrays, assemble, lane, registers
from pallas_kernels.expert_mlp.mosaic_config import BLOCK, HEIGHT, PART_SLOTS, FewConfig, multiprocessors
from pallas_kernels.expert_mlp.mosaic_ptx import step_ptx
from pallas_kernels.expert_mlp.plan import Plan, total_of_choices
from pallas_kernels.expert_mlp.tiles import CODES_BYTES, TILE_BYTES, TILE_SHAPE, ExpertTiles

WARPS = 4  # of a warpgroup, which finish sixteen rows each


class Shape(NamedTuple):
    """One of the products: [rows, columns] of each expert.

    Attributes:
      activations: which rows they are, see `load_ptx`.
      limit: of the gated activation, None where there is none.
      arrivals: how many times a tile of tokens is counted by this product and by both.
    """

    rows: int
    columns: int
    activations: ptx.Rows
    limit: float | None
    arrivals: tuple[int, int]

    @property
    def stride(self) -> int:
        """Bytes of a row of the result."""
        return self.rows if self.limit is not None else self.rows * 2


class Item(NamedTuple):
    """A tile of tokens by 64 rows of its expert's weight.

    Attributes:
      row: the first.
      start: the tile's first token, in sorted order.
      real: how many of its tokens are there.
    """

    tile: Any
    expert: Any
    row: Any
    start: Any
    real: Any


# --- places


def load_places(config: FewConfig, shape: Shape, total: Total, item: Item, group: Any) -> dict[str, Any]:
    """Where the operands of `load_ptx` lie: bytes from the start of each array."""
    each = config.blocks_each(shape.columns)
    return {
        "x": total((group, config.blocks * BLOCK * 2)),
        "order": total((item.start, 4)),
        "values": total((group, each * config.places * BLOCK)),
        "scales": total((group, each * config.scales * 4)),
    }


def step_places(
    config: FewConfig, shape: Shape, total: Total, slot: Any, step: Any, group: Any, at: Lane
) -> dict[str, Any]:
    """The same for `step_ptx`, in shared memory; `step` is the number of the stage in the row."""
    each = config.blocks_each(shape.columns)
    first = total((slot, config.consumers * config.blocks * TILE_BYTES), (group, config.blocks * TILE_BYTES))
    block = total((group, each), (step, config.blocks))
    return {
        "x": total((block, config.places * BLOCK)),
        "codes": total(first, (at.warp, 1024), (at.row, 64), (at.place, 16)),
        "multipliers": total(first, CODES_BYTES, (at.warp, 64), (at.row, 8), (at.place, 2)),
        "scales": total((block, config.scales * 4), (at.place, 8)),
    }


def part_place(config: FewConfig, total: Total, number: Any, group: Any, at: Lane) -> Any:
    """A thread's part of the sums of consumer `group`: of the item `number` of a program."""
    part = config.tokens // 8 * 2048
    return total((number, config.consumers * part), (group, part), (at.thread, 16))


def finish_places(shape: Shape, total: Total, item: Item, at: Lane) -> dict[str, Any]:
    """The same for `finish_ptx`, in memory."""
    row = total(item.row, (at.warp, 16), at.row)
    if shape.limit is None:
        out = total((row, 2))
    else:
        # Eight inner columns for sixteen rows of gates and ups.
        out = total(item.row, (at.warp, 16), (at.row, 2), (item.start, shape.stride))
    return {
        "exponents": total((item.expert, shape.rows), row),
        "order": total((item.start, 4)),
        "out": out,
        "arrivals": total((item.tile, 4)),
    }


# --- PTX in the kernel

_REF, _NUMBER = plgpu.RefType(), plgpu.Layout.WG_SPLAT


def _load(config: FewConfig, shape: Shape, refs: Sequence[Any], item: Item, group: jax.Array) -> None:
    """A consumer's part of a tile's activations."""

    def clear(_) -> None:
        mgpu_utils.warpgroup_barrier()  # all have done with those before

    def emit(_, x, order, values, scales, *numbers: mgpu.FragmentedArray) -> None:
        item, group, first = Item(*numbers[:5]), numbers[5], numbers[6]
        narrow, wide = Numbers(32), Numbers(64)
        places = load_places(config, shape, wide.total, item, group)
        shared = {name: narrow.of(places.pop(name)) for name in ("values", "scales")}
        operands = wide.addresses({"x": x, "order": order}, places)
        operands |= narrow.addresses({"values": values, "scales": scales}, shared)
        operands |= {"thread": lane().thread, "number": narrow.of(first)}
        operands |= {"count": narrow.of(item.real), "start": narrow.of(item.start)}
        text = ptx.load_ptx(config, shape.columns, shape.activations)
        assemble(text, {name: value for name, value in operands.items() if f"${name}" in text})

    def leave(_) -> None:
        assemble(ptx.LOADED_PTX, {})
        mgpu_utils.warpgroup_barrier()

    inline: Any = plgpu.inline_mgpu
    inline()(clear)()
    blocks = item.real * config.blocks_each(shape.columns)

    @pl.loop(0, lax.div(blocks + ptx.TOGETHER - 1, jnp.int32(ptx.TOGETHER)))
    def _(turn: jax.Array) -> None:
        run = inline(arg_types=(_REF, _REF, _REF, _REF, *(_NUMBER,) * 7))(emit)
        run(*refs, *item, group, turn * ptx.TOGETHER)

    inline()(leave)()


def _await(arrivals: Any, tile: jax.Array, goal: int) -> None:
    """Until all of the first product has arrived for a tile."""

    def emit(_, arrivals, tile: mgpu.FragmentedArray) -> None:
        wide = Numbers(64)
        address = wide.total(wide.address(arrivals), (tile, 4))
        assemble(ptx.await_ptx(goal), {"thread": lane().thread, "arrivals": address})
        mgpu_utils.warpgroup_barrier()

    inline: Any = plgpu.inline_mgpu(arg_types=(_REF, _NUMBER))
    inline(emit)(arrivals, tile)


def _multiply(
    config: FewConfig, shape: Shape, refs: Sequence[Any], slot: Any, step: Any, group: Any, sums: Any
) -> Any:
    """`sums` with a consumer's columns of a stage added."""

    def emit(_, tiles, values, scales, slot, step, group, sums: mgpu.FragmentedArray):
        numbers = Numbers(32)
        refs = {"codes": tiles, "multipliers": tiles, "x": values, "scales": scales}
        places = step_places(config, shape, numbers.total, slot, step, group, lane())
        text = step_ptx(config, (config.places,))
        return arrays(assemble(text, numbers.addresses(refs, places), registers([sums])), [sums])[0]

    inline: Any = plgpu.inline_mgpu(
        arg_types=(_REF, _REF, _REF, _NUMBER, _NUMBER, _NUMBER, plgpu.Layout.WGMMA),
        return_type=plgpu.ShapeDtypeStruct((HEIGHT, config.places), jnp.float32, layout=plgpu.Layout.WGMMA),
    )
    return inline(emit)(*refs, slot, step, group, sums)


def _hand_over(config: FewConfig, parts: Any, place: jax.Array, group: jax.Array, sums: jax.Array) -> None:
    """A consumer's sums to where they are finished."""

    def emit(_, parts, place, group, sums: mgpu.FragmentedArray) -> None:
        numbers = Numbers(32)
        at = part_place(config, numbers.total, place, group, lane())
        assemble(ptx.part_ptx(config), numbers.addresses({"part": parts}, {"part": at}), registers([sums]))

    inline: Any = plgpu.inline_mgpu(arg_types=(_REF, _NUMBER, _NUMBER, plgpu.Layout.WGMMA))
    inline(emit)(parts, place, group, sums)


def _finish(
    config: FewConfig, shape: Shape, refs: Sequence[Any], item: Item, place: jax.Array, *, warm: bool = False
) -> None:
    """The four parts of 64 rows to the result; with `warm`, only brings near what else that needs."""

    def emit(_, parts, exponents, order, weights, out, arrivals, *numbers: mgpu.FragmentedArray) -> None:
        item, place = Item(*numbers[:5]), numbers[5]
        narrow, wide, thread = Numbers(32), Numbers(64), lane()
        refs = {"exponents": exponents, "order": order, "out": out, "arrivals": arrivals}
        operands = wide.addresses(refs, finish_places(shape, wide.total, item, thread))
        operands |= {"thread": thread.thread, "count": narrow.of(item.real), "weights": wide.address(weights)}
        at = part_place(config, narrow.total, place, 0, thread)
        operands |= narrow.addresses({"parts": parts}, {"parts": at})
        if warm:
            text = ptx.warm_ptx(shape.limit is not None)
        else:
            text = ptx.finish_ptx(config, shape.stride, shape.limit, shape.arrivals[1])
        assemble(text, {name: value for name, value in operands.items() if f"${name}" in text})

    inline: Any = plgpu.inline_mgpu(arg_types=((_REF,) * 6 + (_NUMBER,) * 6))
    inline(emit)(*refs, *item, place)


# --- the kernel


def _kernel(config: FewConfig, shapes: tuple[Shape, Shape], tiles: int | None, *refs: Any) -> None:
    """`tiles`: how many tiles of tokens there are, where that is known; None to read it first."""
    tiles13, exponents13, tiles2, exponents2, x, weights, order = refs[:7]
    experts, starts, ends, count, arrivals, inner, out = refs[7:14]
    tile_stages, values, scales, parts, full, free, ready, taken = refs[14:]
    group, program = lax.axis_index("warpgroup"), lax.axis_index("program")
    programs = jnp.int32(multiprocessors())
    products = (
        (shapes[0], tiles13, exponents13, x, inner),
        (shapes[1], tiles2, exponents2, inner, out),
    )

    def range_of(shape: Shape) -> tuple[jax.Array, jax.Array]:
        """The program's first item of a product, and the one after its last."""
        items = (count[0] if tiles is None else tiles) * (shape.rows // HEIGHT)
        return lax.div(program * items, programs), lax.div((program + 1) * items, programs)

    def expert_of(tile: jax.Array) -> jax.Array:
        """Some expert, for no tokens, where `tiles` counts tiles that are not there."""
        return experts[tile] if tiles is None else jnp.maximum(experts[tile], 0)

    def item_of(shape: Shape, number: jax.Array) -> Item:
        blocks = jnp.int32(shape.rows // HEIGHT)
        tile, block = lax.div(number, blocks), lax.rem(number, blocks)
        start, expert, row = starts[tile], expert_of(tile), block * HEIGHT
        return Item(tile, expert, row, start, jnp.minimum(ends[tile] - start, config.tokens))

    def next_slot(slot: jax.Array) -> jax.Array:
        # A remainder would be a chain of a dozen instructions before each wait.
        return jnp.where(slot == config.stages - 1, 0, slot + 1)

    def load_all(shape: Shape, weight: Any, loaded: jax.Array) -> jax.Array:
        """A product's weights, after so many stages of the other; returns how many then are loaded."""
        first, last = range_of(shape)
        steps, tiles_of_row = shape.columns // config.columns, shape.columns // BLOCK
        blocks, stage = jnp.int32(shape.rows // HEIGHT), config.consumers * config.blocks

        @pl.loop(first, last)
        def _(number: jax.Array) -> None:
            row = expert_of(lax.div(number, blocks)) * blocks + lax.rem(number, blocks)
            before = loaded + (number - first) * steps

            @pl.loop(0, steps)
            def _(step: jax.Array) -> None:
                slot = lax.rem(before + step, jnp.int32(config.stages))

                @pl.when(before + step >= config.stages)
                def _() -> None:
                    plgpu.barrier_wait(free.at[slot])

                if config.ahead:

                    @pl.when(before + step >= config.ahead)
                    def _() -> None:
                        behind = jnp.where(slot < config.ahead, slot + config.stages, slot) - config.ahead
                        plgpu.barrier_wait(full.at[behind])

                source = weight.at[pl.ds(row * tiles_of_row + step * stage, stage)]
                plgpu.copy_gmem_to_smem(source, tile_stages.at[slot], full.at[slot])

        return loaded + (last - first) * steps

    def producer() -> None:
        loaded = jnp.int32(0)
        for shape, weight, *_ in products:
            loaded = load_all(shape, weight, loaded)

        def see(barrier: Any, behind: int) -> None:
            """The interpreter wants every phase of a barrier seen."""

            @pl.loop(jnp.maximum(loaded - behind, 0), loaded)
            def _(count: jax.Array) -> None:
                plgpu.barrier_wait(barrier.at[lax.rem(count, jnp.int32(config.stages))])

        if config.ahead:
            see(full, config.ahead)
        see(free, config.stages)

    def consumer() -> None:
        slot, handed = jnp.int32(0), jnp.int32(0)
        for which, (shape, _, _, source, _) in enumerate(products):
            first, last = range_of(shape)

            def one_item(
                number: jax.Array,
                carry: Any,
                which=which,
                shape=shape,
                source=source,
                first=first,
                handed=handed,
            ) -> Any:
                slot, tile = carry
                item = item_of(shape, number)

                @pl.when(item.tile != tile)
                def _() -> None:
                    if which == 1:
                        _await(arrivals, item.tile, shapes[0].arrivals[0])
                    _load(config, shape, (source, order, values, scales), item, group)

                def one_step(step: jax.Array, carry: Any) -> Any:
                    slot, sums = carry
                    plgpu.barrier_wait(full.at[slot])
                    stages = (tile_stages, values, scales)
                    sums = _multiply(config, shape, stages, slot, step, group, sums)
                    plgpu.barrier_arrive(free.at[slot])
                    return next_slot(slot), sums

                zeros = jnp.zeros((HEIGHT, config.places), jnp.float32)
                start = (slot, plgpu.layout_cast(zeros, plgpu.Layout.WGMMA))
                slot, sums = lax.fori_loop(0, shape.columns // config.columns, one_step, start)
                so_far = handed + number - first
                place = lax.rem(so_far, jnp.int32(PART_SLOTS))

                @pl.when(so_far >= PART_SLOTS)
                def _() -> None:
                    plgpu.barrier_wait(taken.at[place])

                _hand_over(config, parts, place, group, sums)
                plgpu.barrier_arrive(ready.at[place])
                return slot, item.tile

            slot, _ = lax.fori_loop(first, last, one_item, (slot, jnp.int32(-1)))
            handed += last - first

        @pl.loop(jnp.maximum(handed - PART_SLOTS, 0), handed)
        def _(count: jax.Array) -> None:
            plgpu.barrier_wait(taken.at[lax.rem(count, jnp.int32(PART_SLOTS))])

    def finish_all(shape: Shape, exponents: Any, result: Any, done: jax.Array) -> jax.Array:
        """A product's sums, after so many of the other; returns how many then are finished."""
        first, last = range_of(shape)
        arrays = (parts, exponents, order, weights, result, arrivals)

        def warm(item: Item) -> None:
            _finish(config, shape, arrays, item, jnp.int32(0), warm=True)

        if config.ahead:
            pl.when(first < last)(lambda: warm(item_of(shape, first)))

        @pl.loop(first, last)
        def _(number: jax.Array) -> None:
            item, place = item_of(shape, number), lax.rem(done + number - first, jnp.int32(PART_SLOTS))
            if config.ahead:
                pl.when(number + 1 < last)(lambda: warm(item_of(shape, number + 1)))
            else:
                warm(item)
            plgpu.barrier_wait(ready.at[place])
            _finish(config, shape, arrays, item, place)
            plgpu.barrier_arrive(taken.at[place])

        return done + last - first

    def finisher() -> None:
        done = jnp.int32(0)
        for shape, _, exponents, _, result in products:
            done = finish_all(shape, exponents, result, done)

    role = jnp.maximum(group - config.consumers + 1, 0)
    lax.switch(role, (consumer, producer, finisher))


@functools.partial(jax.jit, static_argnames=("limit", "config", "interpret"))
def products(
    x: jax.Array,
    planned: Plan,
    weights: jax.Array,
    w13: ExpertTiles,
    w2: ExpertTiles,
    *,
    limit: float,
    config: FewConfig,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Both in bfloat16: inner activations [R, F] in sorted order, and [R, M] in (token, choice) order.

    A jit of its own: calls of one shape share one lowering.
    """
    _, both, hidden = w13.shape
    pairs, choices = weights.size, weights.shape[1]
    single = len(x) == 1 and config.ahead > 0
    each = [WARPS * rows // HEIGHT for rows in (both, hidden)]
    shapes = (
        Shape(both, hidden, "one" if single else choices, limit, (each[0], sum(each))),
        Shape(hidden, both // 2, "sorted", None, (each[1], sum(each))),
    )
    stage, widest = config.consumers * config.blocks, max(hidden, both // 2)
    blocks = widest // BLOCK
    return plgpu.kernel(
        functools.partial(_kernel, config, shapes, planned.expert.size if single else None),
        out_type=(
            jax.ShapeDtypeStruct((pairs, both // 2), jnp.bfloat16),
            jax.ShapeDtypeStruct((pairs, hidden), jnp.bfloat16),
        ),
        scratch_types=(
            plgpu.SMEM((config.stages, stage, *TILE_SHAPE), jnp.uint8),
            plgpu.SMEM((blocks * config.places * BLOCK,), jnp.uint8),
            plgpu.SMEM((blocks * config.scales,), jnp.float32),
            plgpu.SMEM((PART_SLOTS * config.consumers * HEIGHT * config.tokens,), jnp.float32),
            plgpu.Barrier(num_arrivals=1, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=config.consumers, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=config.consumers, num_barriers=PART_SLOTS),
            plgpu.Barrier(num_arrivals=1, num_barriers=PART_SLOTS),
        ),
        grid=(multiprocessors(),),
        grid_names=("program",),
        num_threads=config.consumers + 2,
        thread_name="warpgroup",
        # What the copies do not write has its barriers.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
        kernel_name=f"experts_{config.tokens}",
    )(
        w13.tiles.reshape(-1, *TILE_SHAPE),
        w13.row_exponent.reshape(-1),
        w2.tiles.reshape(-1, *TILE_SHAPE),
        w2.row_exponent.reshape(-1),
        x,
        weights.reshape(-1),
        planned.order,
        planned.expert,
        planned.start,
        planned.end,
        planned.count,
        planned.arrivals,
    )


def planned_mlp(
    x: jax.Array,
    planned: Plan,
    weights: jax.Array,
    w13: ExpertTiles,
    w2: ExpertTiles,
    limit: float,
    config: FewConfig,
) -> jax.Array:
    """`expert_mlp` once its plan is made, for tiles of `config`."""
    _, out = products(x, planned, weights, w13, w2, limit=limit, config=config)
    return total_of_choices(out, weights)
