"""Products of many tokens with FP8 weights on Hopper: one warpgroup loads, two or three multiply.

The tensor core's sum over 128 columns has to leave it, be scaled, and be added in float32 ("promotion"). One
program cannot do that and keep the tensor core busy. So a multiprocessor holds a few warpgroups for its whole
life: one brings tiles of both operands into a ring of stages, and two or three multiply them, each for its
part of the tokens; while one promotes, the tensor core has another's product to work on.

A tile's place in the result, and so the order of tiles, is a number that all warpgroups count by themselves.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_matmul import wgmma
from pallas_kernels.block_matmul.mosaic_config import MULTIPROCESSORS, SHARED_BYTES, Many, Shape, many_for
from pallas_kernels.block_matmul.tiles import BLOCK
from pallas_kernels.block_matmul.wgmma import HEIGHT, SWIZZLED
from pallas_kernels.formats import QuantArray

# Registers of a thread once all know their part, those that load and those that multiply, by the number of
# warpgroups that multiply. At first all have the same: 168 of 384 threads, 128 of 512.
REGISTERS = {2: (40, 232), 3: (32, 160)}
TOGETHER = 4  # blocks of columns in one turn of the loop, if products are begun ahead

ROW = plgpu.Layout.WGMMA.reduce(1)  # one number a token, where a product has that token


# --- what a tile is


class Plan(NamedTuple):
    """The tiles of a product, dealt out to programs."""

    shape: Shape
    config: Many

    @property
    def down(self) -> int:
        """Tiles along the tokens."""
        return -(-self.shape.tokens // self.config.tokens)

    @property
    def across(self) -> int:
        """Tiles along the rows of the weight."""
        return -(-self.shape.rows // self.config.rows)

    @property
    def steps(self) -> int:
        return self.shape.columns // BLOCK

    @property
    def programs(self) -> int:
        """As many as run at once, or fewer if there is not a tile for each."""
        return min(MULTIPROCESSORS, self.down * self.across)

    def start(self, tile: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First token and first row of a tile."""
        band = min(self.config.band, self.down)
        first = lax.div(tile, band * self.across) * band
        place = lax.rem(tile, band * self.across)
        # By a constant a division is two instructions, else some forty.
        high = jnp.minimum(self.down - first, band) if self.down % band else jnp.int32(band)
        down, across = first + lax.rem(place, high), lax.div(place, high)
        # A last tile that would reach past the tokens starts earlier: some are computed twice, to the same
        # bits, and none is read that does not exist.
        token = jnp.minimum(down * self.config.tokens, self.shape.tokens - self.config.tokens)
        return token, across * self.config.rows


# --- scales


def _number(scale: jax.Array) -> jax.Array:
    """Scales as float32. An E8M0 byte is its exponent: 0 becomes zero, 255 (not a number) infinity."""
    if scale.dtype == jnp.uint8:
        scale = lax.bitcast_convert_type(scale.astype(jnp.int32) << 23, jnp.float32)
    return scale


class Scales(NamedTuple):
    """As stored, for one block of columns: a vector for each 64 tokens, a scalar for each chunk of rows."""

    x: tuple[jax.Array, ...]
    w: tuple[jax.Array, ...]

    def products(self) -> list[list[jax.Array]]:
        """x times w in float32, for each 64 tokens and each chunk."""

        def both(x: jax.Array, w: jax.Array) -> jax.Array:
            return _number(x) * _number(plgpu.layout_cast(jnp.full((HEIGHT,), w, w.dtype), ROW))

        return [[both(x, w) for w in self.w] for x in self.x]


# --- the kernel


def _kernel(plan: Plan, x: Any, x_scale: Any, w: Any, w_scale: Any, out: Any, *scratch: Any) -> None:
    x_tiles, w_tiles, out_pieces, full, free = scratch
    config, (_, rows, _), steps = plan.config, plan.shape, plan.steps
    group, program = lax.axis_index("warpgroup"), lax.axis_index("program")
    tiles = plan.down * plan.across
    mine = lax.div(tiles - program + plan.programs - 1, jnp.int32(plan.programs))

    def start(number: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First token and row of the program's tile of this number."""
        return plan.start(program + number * plan.programs)

    def producer() -> None:
        plgpu.set_max_registers(REGISTERS[config.consumers][0], action="decrease")

        @pl.loop(0, mine)
        def _(number: jax.Array) -> None:
            token, row = start(number)

            @pl.loop(0, steps)
            def _(step: jax.Array) -> None:
                count = number * steps + step
                slot = lax.rem(count, jnp.int32(config.stages))

                @pl.when(count >= config.stages)
                def _() -> None:
                    plgpu.barrier_wait(free.at[slot])

                columns = pl.ds(step * BLOCK, BLOCK)
                for source, tile, at in ((x, x_tiles, token), (w, w_tiles, row)):
                    rows = source.at[pl.ds(at, tile.shape[1]), columns]
                    plgpu.copy_gmem_to_smem(rows, tile.at[slot], full.at[slot])

        # Consumers wait for one stage more than there is: it is full of nothing.
        count = mine * steps
        slot = lax.rem(count, jnp.int32(config.stages))

        @pl.when(count >= config.stages)
        def _() -> None:
            plgpu.barrier_wait(free.at[slot])

        plgpu.barrier_arrive(full.at[slot])
        plgpu.barrier_arrive(full.at[slot])

        # Leave when all has been reported: the interpreter wants every phase of a barrier seen.
        @pl.loop(jnp.maximum(count - config.stages + 1, 0), count)
        def _(count: jax.Array) -> None:
            plgpu.barrier_wait(free.at[lax.rem(count, jnp.int32(config.stages))])

    def consumer() -> None:
        plgpu.set_max_registers(REGISTERS[config.consumers][1], action="increase")
        share = config.tokens // config.consumers
        waves, width, out_columns = config.waves, config.width, config.out_columns
        # Rows that share their scales wherever a tile starts, and those of them in one product.
        scaled = math.gcd(config.rows, BLOCK)
        chunk = math.gcd(scaled, width)
        pieces = [(wave, row) for wave in range(waves) for row in range(0, config.rows, width)]
        buffers = 2 if config.ahead else 1
        # Steps of one turn of the loop. The assembler loses sight of two products over its end.
        together = math.gcd(steps, TOGETHER) if config.ahead else 1

        def load_scales(number: jax.Array, step: jax.Array) -> Scales:
            token, row = start(number)
            first = token + group * share
            at = [
                jnp.minimum(lax.div(row + n, BLOCK), -(-rows // BLOCK) - 1)
                for n in range(0, config.rows, scaled)
            ]
            return Scales(
                tuple(
                    plgpu.load(x_scale.at[pl.ds(first + n, HEIGHT), step], layout=ROW, optimized=False)
                    for n in range(0, share, HEIGHT)
                ),
                tuple(w_scale[n, step] for n in at),
            )

        def begin(place: tuple[int, int], slot: jax.Array, spent: jax.Array) -> jax.Array:
            token, row = group * share + place[0] * HEIGHT, place[1]
            return wgmma.start(x_tiles, w_tiles, slot, token, row, spent)

        def multiply(number: jax.Array, scales: Scales, parts: Any, slot: jax.Array) -> Any:
            """Sums of one tile by wave and chunk; `scales` are of its first step.

            Unless two are on their way at a time, its first product has begun, and when it ends, so has the
            first of whatever comes next.
            """

            def one_step(step: jax.Array, ends: bool, carry: Any) -> Any:
                sums, scales, parts, slot = carry
                sums, parts = [list(each) for each in sums], list(parts)
                # A remainder would be a chain of a dozen instructions.
                following = jnp.where(slot == config.stages - 1, 0, slot + 1)
                factors: list[list[jax.Array]] = []
                for number_of, (wave, row) in enumerate(pieces):
                    last = number_of == len(pieces) - 1
                    coming = (pieces[0], following) if last else (pieces[number_of + 1], slot)
                    if last:
                        plgpu.barrier_wait(full.at[following])
                    none_ahead = last and ends
                    if config.ahead and not none_ahead:
                        parts[1] = begin(*coming, parts[1])
                    if not factors:  # while the tensor core works: between products is no time for this
                        factors = scales.products()
                        # A step ahead: the way to memory takes as long as a step.
                        scales = load_scales(number, jnp.minimum(step + 1, steps - 1))
                    parts[0] = wgmma.finish(parts[0], later=0 if none_ahead else buffers - 1)
                    if last:
                        plgpu.barrier_arrive(free.at[slot])
                    for n in range(0, width, chunk):
                        place = (row + n) // chunk
                        factor = lax.broadcast_in_dim(
                            factors[wave][(row + n) // scaled], (HEIGHT, chunk), [0]
                        )
                        sums[wave][place] += parts[0][:, n : n + chunk] * factor
                    if config.ahead:
                        parts.reverse()
                    else:
                        parts[0] = begin(*coming, parts[0])
                return sums, scales, tuple(parts), following

            def some_steps(turn: jax.Array, carry: Any) -> Any:
                if config.ahead:
                    sums, scales, parts, slot = carry
                    carry = sums, scales, (begin(pieces[0], slot, parts[0]), parts[1]), slot
                for n in range(together):
                    carry = one_step(turn * together + n, n == together - 1, carry)
                return carry

            sums = [[zeros(chunk) for _ in range(config.rows // chunk)] for _ in range(waves)]
            sums, _, parts, slot = lax.fori_loop(
                0, steps // together, some_steps, (sums, scales, tuple(parts), slot)
            )
            return sums, parts, slot

        def zeros(columns: int) -> jax.Array:
            return plgpu.layout_cast(jnp.zeros((HEIGHT, columns), jnp.float32), plgpu.Layout.WGMMA)

        def write(number: jax.Array, sums: list[list[jax.Array]]) -> None:
            """The tile to memory, piece by piece; the stores of the last pieces are left under way."""
            token, row = start(number)
            places = [(wave, n) for wave in range(waves) for n in range(0, config.rows, out_columns)]
            at_once = config.slots if config.slots == len(places) else max(1, config.slots // 2)
            for first in range(0, len(places), at_once):
                # The pieces just before these may still be on their way out, if theirs are other slots.
                known = first > 0 or len(places) % config.slots == 0
                plgpu.wait_smem_to_gmem(config.slots - at_once if known else 0, wait_read_only=True)
                group_places = list(enumerate(places[first : first + at_once], first))
                for place, (wave, n) in group_places:
                    values = sums[wave][n // chunk][:, n % chunk : n % chunk + out_columns]
                    out_pieces.at[group, place % config.slots][...] = values.astype(out.dtype)
                plgpu.commit_smem()
                for place, (wave, n) in group_places:
                    tokens = pl.ds(token + group * share + wave * HEIGHT, HEIGHT)
                    piece = out_pieces.at[group, place % config.slots]
                    plgpu.copy_smem_to_gmem(piece, out.at[tokens, pl.ds(row + n, out_columns)])

        def one_tile(number: jax.Array, carry: Any) -> Any:
            scales, parts, slot = carry
            sums, parts, slot = multiply(number, scales, parts, slot)
            coming = load_scales(jnp.minimum(number + 1, mine - 1), jnp.int32(0))
            write(number, sums)
            return coming, parts, slot

        scales = load_scales(jnp.int32(0), jnp.int32(0))
        plgpu.barrier_wait(full.at[0])
        parts = [zeros(width) for _ in range(buffers)]
        if not config.ahead:
            parts[0] = begin(pieces[0], jnp.int32(0), parts[0])
        _, parts, _ = lax.fori_loop(0, mine, one_tile, (scales, tuple(parts), jnp.int32(0)))
        if not config.ahead:
            wgmma.finish(parts[0])
        plgpu.wait_smem_to_gmem(0)

    lax.cond(group == config.consumers, producer, consumer)


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def _launch(
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    *,
    config: Many,
    interpret: Any = None,
) -> jax.Array:
    """[tokens, rows] in bfloat16. A jit of its own, so that calls of one shape share one lowering."""
    plan = Plan(Shape(x.shape[0], *w.shape), config)
    swizzled = (plgpu.SwizzleTransform(2 * config.out_columns),)  # pyright: ignore[reportAbstractUsage]
    return plgpu.kernel(
        functools.partial(_kernel, plan),
        out_type=jax.ShapeDtypeStruct((x.shape[0], w.shape[0]), jnp.bfloat16),
        scratch_types=(
            plgpu.SMEM((config.stages, config.tokens, BLOCK), x.dtype, transforms=SWIZZLED),
            plgpu.SMEM((config.stages, config.rows, BLOCK), w.dtype, transforms=SWIZZLED),
            plgpu.SMEM(
                (config.consumers, config.slots, HEIGHT, config.out_columns),
                jnp.bfloat16,
                transforms=swizzled,
            ),
            plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=config.consumers, num_barriers=config.stages),
        ),
        grid=(plan.programs,),
        grid_names=("program",),
        num_threads=config.consumers + 1,
        thread_name="warpgroup",
        # Only copies write what the products read, and what is copied out has its barriers already.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
        kernel_name=f"block_matmul_{config.tokens}x{config.rows}",
    )(x, x_scale, w, w_scale)


def block_matmul(
    x: QuantArray, weight: QuantArray, out_dtype: Any, *, config: Many | None = None, interpret: Any = None
) -> jax.Array:
    """x @ weight.T, see `pallas_kernels.block_matmul`; `mosaic_config.takes` says of which.

    Raises:
      ValueError: the config does not fit the shape, or needs more shared memory than there is.
    """
    *outer, columns = x.shape
    shape = Shape(math.prod(outer), weight.shape[0], columns)
    config = config or many_for(shape)
    if shape.tokens < config.tokens:
        raise ValueError(f"{config} does not take {shape.tokens} tokens")
    if config.stages < 2:
        raise ValueError(f"{config} needs at least 2 stages")
    if config.shared_bytes > SHARED_BYTES:
        raise ValueError(
            f"{config} needs {config.shared_bytes} bytes of shared memory, there are {SHARED_BYTES}"
        )
    if jnp.dtype(out_dtype) != jnp.bfloat16:
        raise ValueError(f"the kernel writes bfloat16, not {jnp.dtype(out_dtype)}")
    out = _launch(
        x.values.reshape(-1, columns),
        x.scale.reshape(-1, columns // BLOCK),
        weight.values,
        weight.scale,
        config=config,
        interpret=interpret,
    )
    return out.reshape(*outer, weight.shape[0])
