"""Routed experts for many tokens on Hopper, FP4 by FP8: one warpgroup loads, two or four multiply.

As in the Triton kernels, weights are the rows of the tensor core's product and tokens its columns, and a
thread's bytes of a tile of weights are its operand. A weight is decoded once for each tile of tokens, so a
tile should hold all of an expert's: up to 256. Sums over 128 columns leave the tensor core piece by piece,
are multiplied by their token's scale and added to the running sums, while the tensor core works on the next
piece, or for another warpgroup that multiplies.

Activations lie block by block of 128 columns, expert by expert (`quant.sorted_tile_quant`), so a stage's are
one copy. The first product leaves what the second takes, in that order, already quantised: its programs work
on whole blocks of 128 inner columns.
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

from pallas_kernels.expert_mlp import mosaic_ptx as ptx
from pallas_kernels.expert_mlp.assembly import Lane, Numbers, Total, arrays, assemble, lane, registers
from pallas_kernels.expert_mlp.mosaic_config import BLOCK, HEIGHT, Config, Configs, multiprocessors
from pallas_kernels.expert_mlp.plan import Plan, total_of_choices
from pallas_kernels.expert_mlp.quant import place_count, places_of, sorted_tile_quant
from pallas_kernels.expert_mlp.tiles import CODES_BYTES, TILE_BYTES, TILE_SHAPE, ExpertTiles

# Registers of a thread once all know their part, those that load and those that multiply, by the number of
# warpgroups that multiply. At first all have the same: 168 of 384 threads, 96 of 640.
REGISTERS = {2: (40, 232), 4: (32, 112)}

SWIZZLED = (plgpu.SwizzleTransform(128),)  # pyright: ignore[reportAbstractUsage]


# --- places


class Item(NamedTuple):
    """What a program works on: a tile of tokens by rows `row` and on of its expert's weight.

    Attributes:
      start: the tile's first token, in sorted order.
      first: its place.
      real: how many of its tokens are there.
    """

    tile: Any
    expert: Any
    row: Any
    start: Any
    first: Any
    real: Any


class Shape(NamedTuple):
    """A product: [rows, columns] of each expert by its tokens, of which there are `tokens` places.

    Attributes:
      limit: of the gated activation, None where there is none.
    """

    tokens: int
    rows: int
    columns: int
    limit: float | None

    @property
    def gated(self) -> bool:
        return self.limit is not None


def step_places(config: Config, total: Total, slot: Any, group: Any, at: Lane) -> dict[str, Any]:
    """Where a thread's operands of `step_ptx` lie in the stages: bytes from the start of each array."""
    tile = config.blocks * TILE_BYTES  # of 64 rows in a stage
    first = total((slot, config.rows // HEIGHT * tile), (group, config.waves * tile))
    return {
        "x": total((slot, config.blocks * config.tokens * BLOCK)),
        "codes": total(first, (at.warp, 1024), (at.row, 64), (at.place, 16)),
        "multipliers": total(first, CODES_BYTES, (at.warp, 64), (at.row, 8), (at.place, 2)),
        "scales": total((slot, config.blocks * config.scales * 4), (at.place, 8)),
    }


def stage_places(
    config: Config, shape: Shape, total: Total, item: Item, turn: Any, group: Any, at: Lane
) -> dict[str, Any]:
    """The same for `stage_ptx`: `stage` in shared memory, the others in memory; and its operand `first`."""
    row = total((turn, config.rows), (group, config.waves * HEIGHT))  # of the item's: the consumer's first
    places = {"exponents": total((item.expert, shape.rows), item.row, row, (at.warp, 16), at.row)}
    if not shape.gated:
        own = (group, config.tokens * config.out_bytes(False))
        return places | {"stage": total(own), "first": total(0), "shares": total(0)}
    first = total((turn, config.consumers * config.waves * 4), (group, config.waves * 4))
    shares = total((item.first, 4), (at.place, 8))
    return places | {"stage": total(0), "first": first, "shares": shares}


def quant_places(shape: Shape, total: Total, item: Item, block: Any) -> dict[str, Any]:
    """The same for `quant_ptx`; `block` is that of the item's inner columns."""
    place = total((block, shape.tokens), item.first)
    return {"out": total((place, BLOCK)), "scales": total((place, 4))}


def write_places(config: Config, total: Total, item: Item, group: Any) -> dict[str, Any]:
    """The same for `write_ptx`."""
    own = (group, config.tokens * config.out_bytes(False))
    column = total(item.row, (group, config.waves * HEIGHT))
    return {"stage": total(own), "out": total((column, 2)), "order": total((item.start, 4))}


# --- PTX in the kernel

_REF, _NUMBER = plgpu.RefType(), plgpu.Layout.WG_SPLAT


def _multiply(
    config: Config, cut: Config, refs: Sequence[Any], slot: jax.Array, group: jax.Array, sums: Any
) -> Any:
    """`sums` with a stage's columns added, of the rows of consumer `group` by the tokens of the `cut`."""

    def emit(_, tiles, x, scales, slot, group, *sums: mgpu.FragmentedArray):
        numbers = Numbers(32)
        refs = {"codes": tiles, "multipliers": tiles, "x": x, "scales": scales}
        places = step_places(config, numbers.total, slot, group, lane())
        operands = numbers.addresses(refs, places)
        return tuple(arrays(assemble(ptx.step_ptx(cut, cut.widths), operands, registers(sums)), sums))

    swizzled = plgpu.RefType(SWIZZLED)
    part = plgpu.ShapeDtypeStruct((HEIGHT, cut.tokens), jnp.float32, layout=plgpu.Layout.WGMMA)
    inline: Any = plgpu.inline_mgpu(
        arg_types=(_REF, swizzled, _REF, _NUMBER, _NUMBER, *(plgpu.Layout.WGMMA,) * config.waves),
        return_type=(part,) * config.waves,
    )
    return inline(emit)(*refs, slot, group, *sums)


def _stage(
    config: Config,
    cut: Config,
    shape: Shape,
    refs: Sequence[Any],
    item: Item,
    turn: jax.Array,
    group: jax.Array,
    sums: Any,
) -> None:
    """The sums of a consumer to shared memory; `turn` is how many times the item's rows went before."""

    def emit(_, exponents, shares, staged, *values: mgpu.FragmentedArray):
        item, (turn, group), sums = Item(*values[:6]), values[6:8], values[8:]
        narrow, wide, thread = Numbers(32), Numbers(64), lane()
        places = stage_places(config, shape, wide.total, item, turn, group, thread)
        operands = {"thread": thread.thread, "first": narrow.of(places.pop("first"))}
        operands["stage"] = narrow.total(narrow.address(staged), narrow.of(places.pop("stage")))
        operands |= wide.addresses({"exponents": exponents, "shares": shares}, places)
        mgpu_utils.warpgroup_barrier()  # what was there has left
        assemble(ptx.stage_ptx(cut, shape.limit), operands, registers(sums))
        mgpu_utils.warpgroup_barrier()
        return ()

    numbers = (_NUMBER,) * 8
    inline: Any = plgpu.inline_mgpu(
        arg_types=(_REF, _REF, _REF, *numbers, *(plgpu.Layout.WGMMA,) * config.waves)
    )
    inline(emit)(*refs, *item, turn, group, *sums)


def _write_quantised(config: Config, shape: Shape, refs: Sequence[Any], item: Item, group: jax.Array) -> None:
    """A block of inner columns, which is whole in shared memory: a consumer's share of its tokens."""

    def emit(_, staged, values, scales, *numbers: mgpu.FragmentedArray):
        item, group = Item(*numbers[:6]), numbers[6]
        narrow, wide = Numbers(32), Numbers(64)
        block = wide.divided(item.row, 2 * BLOCK)
        operands = wide.addresses(
            {"out": values, "scales": scales}, quant_places(shape, wide.total, item, block)
        )
        operands |= {"thread": lane().thread, "number": narrow.of(group), "count": narrow.of(item.real)}
        assemble(ptx.quant_ptx(config), operands | {"stage": narrow.address(staged)})
        return ()

    inline: Any = plgpu.inline_mgpu(arg_types=(_REF, _REF, _REF, *(_NUMBER,) * 7))
    inline(emit)(*refs, *item, group)


def _write(config: Config, shape: Shape, refs: Sequence[Any], item: Item, group: jax.Array) -> None:
    """The rows of a consumer, which are in shared memory, to their places in the result."""

    def emit(_, staged, order, out, *numbers: mgpu.FragmentedArray):
        item, group = Item(*numbers[:6]), numbers[6]
        narrow, wide = Numbers(32), Numbers(64)
        places = write_places(config, wide.total, item, group)
        operands = {"thread": lane().thread, "count": narrow.of(item.real)}
        operands["stage"] = narrow.total(narrow.address(staged), narrow.of(places.pop("stage")))
        operands |= wide.addresses({"out": out, "order": order}, places)
        assemble(ptx.write_ptx(config, shape.rows * 2), operands)
        return ()

    inline: Any = plgpu.inline_mgpu(arg_types=(_REF, _REF, _REF, *(_NUMBER,) * 7))
    inline(emit)(*refs, *item, group)


# --- the kernel


def _kernel(config: Config, shape: Shape, *refs: Any) -> None:
    tiles, exponents, x, scales, places, experts, starts, ends, firsts, count = refs[:10]
    *outs, tile_stages, x_stages, scale_stages, staged, full, free, whole = refs[10:]
    group, program = lax.axis_index("warpgroup"), lax.axis_index("program")
    turns = config.passes(shape.gated)
    steps, blocks = shape.columns // BLOCK // config.blocks, shape.rows // (config.rows * turns)
    programs, of_item = jnp.int32(multiprocessors()), turns * steps
    mine = lax.div(count[0] * blocks - program + programs - 1, programs)

    def item_of(number: jax.Array) -> Item:
        """All rows of a tile of tokens at about the same time: they stay in the L2 cache."""
        item = program + number * programs
        tile, block = lax.div(item, jnp.int32(blocks)), lax.rem(item, jnp.int32(blocks))
        start = starts[tile]
        real = jnp.minimum(ends[tile] - start, config.tokens)
        return Item(tile, experts[tile], block * (config.rows * turns), start, firsts[tile], real)

    def producer() -> None:
        plgpu.set_max_registers(REGISTERS[config.consumers][0], action="decrease")
        high = config.rows // HEIGHT

        @pl.loop(0, mine)
        def _(number: jax.Array) -> None:
            item = item_of(number)

            @pl.loop(0, of_item)
            def _(step: jax.Array) -> None:
                count = number * of_item + step
                slot = lax.rem(count, jnp.int32(config.stages))
                turn, step = (lax.div(step, steps), lax.rem(step, steps)) if turns > 1 else (0, step)
                block = pl.ds(step * config.blocks, config.blocks)
                rows = pl.ds(lax.div(item.row, HEIGHT) + turn * high, high)

                @pl.when(count >= config.stages)
                def _() -> None:
                    plgpu.barrier_wait(free.at[slot])

                for source, stages in (
                    (tiles.at[item.expert, rows, block], tile_stages),
                    (x.at[block, pl.ds(item.first, config.places)], x_stages),
                    (scales.at[block, pl.ds(item.first, config.scales)], scale_stages),
                ):
                    plgpu.copy_gmem_to_smem(source, stages.at[slot], full.at[slot])

        # Leave when all has been reported: the interpreter wants every phase of a barrier seen.
        count = mine * of_item

        @pl.loop(jnp.maximum(count - config.stages, 0), count)
        def _(count: jax.Array) -> None:
            plgpu.barrier_wait(free.at[lax.rem(count, jnp.int32(config.stages))])

    def one_turn(item: Item, turn: jax.Array, first: jax.Array, cut: Config) -> None:
        """A consumer's rows, to shared memory; `first` is the stage that comes next."""

        def one_step(_: jax.Array, carry: Any) -> Any:
            slot, sums = carry
            plgpu.barrier_wait(full.at[slot])
            sums = _multiply(config, cut, (tile_stages, x_stages, scale_stages), slot, group, sums)
            plgpu.barrier_arrive(free.at[slot])
            # A remainder would be a chain of a dozen instructions before each wait.
            return jnp.where(slot == config.stages - 1, 0, slot + 1), sums

        zeros = plgpu.layout_cast(jnp.zeros((HEIGHT, cut.tokens), jnp.float32), plgpu.Layout.WGMMA)
        _, sums = lax.fori_loop(0, steps, one_step, (first, (zeros,) * config.waves))
        _stage(config, cut, shape, (exponents, places, staged), item, turn, group, sums)

    def consumer() -> None:
        plgpu.set_max_registers(REGISTERS[config.consumers][1], action="increase")
        cuts = [functools.partial(one_turn, cut=config.cut(widths)) for widths in config.all_widths]

        def all_consumers() -> None:
            plgpu.barrier_arrive(whole)
            plgpu.barrier_wait(whole)

        @pl.loop(0, mine)
        def _(number: jax.Array) -> None:
            item = item_of(number)
            narrow = sum((item.real > sum(widths)).astype(jnp.int32) for widths in config.shorter)

            @pl.loop(0, turns)
            def _(turn: jax.Array) -> None:
                first = lax.rem(number * of_item + turn * steps, jnp.int32(config.stages))
                lax.switch(narrow, cuts, item, turn, first) if config.shorter else cuts[0](item, turn, first)

            if shape.gated:
                all_consumers()
                _write_quantised(config, shape, (staged, *outs), item, group)
                all_consumers()
            else:
                _write(config, shape, (staged, places, *outs), item, group)

    lax.cond(group == config.consumers, producer, consumer)


@functools.partial(jax.jit, static_argnames=("config", "limit", "interpret"))
def launch(
    weight: ExpertTiles,
    x: jax.Array,  # [columns / 128, P, 128] e4m3, by places
    scales: jax.Array,  # [columns / 128, P] float32
    places: jax.Array,  # [P] float32 routing weights; or [R] int32 rows of the result, in sorted order
    planned: Plan,
    firsts: jax.Array,  # [tiles] int32, place of the first row of each
    *,
    config: Config,
    limit: float | None,
    interpret: Any = None,
) -> Any:
    """The inner activations as `x` and `scales` are, or [R, rows] in bfloat16, in (token, choice) order.

    A jit of its own: calls of one shape share one lowering.
    """
    count, rows, columns = weight.shape
    shape, stages = Shape(x.shape[1], rows, columns, limit), config.stages
    if shape.gated:
        outer = (rows // 2 // BLOCK, x.shape[1])
        out: Any = (
            jax.ShapeDtypeStruct((*outer, BLOCK), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct(outer, jnp.float32),
        )
    else:
        out = jax.ShapeDtypeStruct((planned.order.size, rows), jnp.bfloat16)
    staged = (1 if shape.gated else config.consumers) * config.tokens * config.out_bytes(shape.gated)
    return plgpu.kernel(
        functools.partial(_kernel, config, shape),
        out_type=out,
        scratch_types=(
            plgpu.SMEM((stages, config.rows // HEIGHT, config.blocks, *TILE_SHAPE), jnp.uint8),
            plgpu.SMEM((stages, config.blocks, config.tokens, BLOCK), x.dtype, transforms=SWIZZLED),
            plgpu.SMEM((stages, config.blocks, config.scales), jnp.float32),
            plgpu.SMEM((staged,), jnp.uint8),
            plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            plgpu.Barrier(num_arrivals=config.consumers, num_barriers=stages),
            plgpu.Barrier(num_arrivals=config.consumers),
        ),
        grid=(multiprocessors(),),
        grid_names=("program",),
        num_threads=config.consumers + 1,
        thread_name="warpgroup",
        # Only copies write what the products read; what is staged has its barriers.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
        kernel_name=f"experts_{'gate_up' if shape.gated else 'down'}_{config.tokens}x{config.rows}",
    )(
        weight.tiles.reshape(count, rows // HEIGHT, columns // BLOCK, *TILE_SHAPE),
        weight.row_exponent.reshape(-1),
        x,
        scales,
        places,
        planned.expert,
        planned.start,
        planned.end,
        firsts,
        planned.count,
    )


# --- around it


def products(
    x: jax.Array,
    planned: Plan,
    weights: jax.Array,
    w13: ExpertTiles,
    w2: ExpertTiles,
    limit: float,
    configs: Configs,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array, jax.Array]:
    """Inner activations as `launch` leaves them, the place of each pair, and [R, M] bfloat16 in
    (token, choice) order.
    """
    place, firsts = places_of(planned)
    places = place_count(planned, w13.shape[0], configs.gate_up.tokens)
    values, scales, shares = sorted_tile_quant(x, weights, place, places)
    inner = launch(w13, values, scales, shares, planned, firsts, config=configs.gate_up, limit=limit)
    return (
        inner,
        place,
        launch(w2, *inner, planned.order, planned, firsts, config=configs.down, limit=None),
    )


def planned_mlp(
    x: jax.Array,
    planned: Plan,
    weights: jax.Array,
    w13: ExpertTiles,
    w2: ExpertTiles,
    limit: float,
    configs: Configs,
) -> jax.Array:
    """`expert_mlp` once its plan is made, for tiles of `configs`."""
    _, _, out = products(x, planned, weights, w13, w2, limit, configs)
    return total_of_choices(out, weights)
