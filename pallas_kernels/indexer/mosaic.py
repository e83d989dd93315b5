"""Scores of the indexer on Hopper: keys in FP4 by queries in E4M3, in registers from product to score.

Keys are the rows of the tensor core's product, and its operand in registers, decoded once for all queries of
an item: a tile of keys by a chunk of a sequence's queries. One warpgroup of a program loads: keys and their
scales into one ring, queries and the weights of their heads into another. The others multiply, each its share
of a tile's keys by every query. Of 64 columns of a product, a query's heads, one number is left.

Items are dealt out in turn. The one that loads goes through the sequences' chunks and counts the tiles of
which a query of the chunk sees any; the others learn from it what they have before them. So it does not
matter how long the cache could become, and sequences of any lengths fill the chip.
"""

import functools
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

from pallas_kernels.formats import QuantArray
from pallas_kernels.indexer.mosaic_ptx import CHANNELS, HEADS, WAVE, keys_ptx, operands, scores_ptx
from pallas_kernels.indexer.queries import TiledQueries

MULTIPROCESSORS = 132
SHARED_BYTES = 232448 - 4096  # what a program may have on Hopper, less room for barriers and alignment
CODE_BYTES, SCALE_BYTES = CHANNELS // 2, CHANNELS // 32  # of a key
QUERY_BYTES, WEIGHT_BYTES = HEADS * CHANNELS, HEADS * 4
# Registers of a thread once all know their part, those that load and those that multiply, by the number of
# warpgroups that multiply.
REGISTERS = {2: (40, 232), 4: (32, 112)}
MOST_COPIED = 256  # rows at a time

SWIZZLED = (plgpu.SwizzleTransform(128),)  # pyright: ignore[reportAbstractUsage]
SCALAR = plgpu.Layout.WG_SPLAT


class Config(NamedTuple):
    """How the work is cut.

    Attributes:
      chunk: queries of an item.
      queries: that are loaded, and multiplied by a tile of keys, at a time.
      consumers: warpgroups that multiply: 2 or 4.
      waves: times 64 keys that each of them has: 1, 2 or 4.
      key_stages, query_stages: tiles of keys, and times `queries`, that are under way or in use.
    """

    chunk: int
    queries: int
    consumers: int
    waves: int
    key_stages: int
    query_stages: int

    @property
    def keys(self) -> int:
        """Of a tile."""
        return self.consumers * self.waves * WAVE

    @property
    def copies(self) -> int:
        """Of a tile of keys, and as many of its scales."""
        return -(-self.keys // MOST_COPIED)

    @property
    def parts(self) -> int:
        """Products of a consumer that are under way at a time."""
        return min(2, self.queries * self.waves)

    @property
    def shared_bytes(self) -> int:
        keys = self.keys * (CODE_BYTES + SCALE_BYTES) + 1024
        return self.key_stages * keys + self.query_stages * self.queries * (QUERY_BYTES + WEIGHT_BYTES)


FEW_QUERIES = 4  # so many or fewer of a sequence are one item; decoding keys is the work then
MANY_KEYS = 2**18  # of all sequences: enough large tiles for all multiprocessors


def config_for(rows: int, keys: int) -> Config:
    """For so many queries of each sequence, and keys of all of them together."""
    if rows > FEW_QUERIES:
        return Config(chunk=128, queries=4, consumers=2, waves=4, key_stages=1, query_stages=4)
    waves = 4 if keys >= MANY_KEYS else 2
    return Config(chunk=rows, queries=1, consumers=2, waves=waves, key_stages=4, query_stages=4)


class Sizes(NamedTuple):
    """`rows` of each sequence's `tokens` queries, its `entries`, and columns of a row of scores."""

    tokens: int
    rows: int
    entries: int
    stride: int


# --- PTX inside of the kernel


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _assemble(text: str, results: int, **operands: ir.Value) -> list[ir.Value]:
    """Inline assembly: `$name` is an operand, $operand0 and so on are its results if it has any, float32."""
    f32 = ir.F32Type.get()
    names = [f"operand{n}" for n in range(results)] + list(operands)
    kinds = {f32: "f", _i32(): "r"}
    constraints = ["=&f"] * results + [kinds.get(value.type, "l") for value in operands.values()]
    numbers = {name: number for number, name in enumerate(names)}
    found = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * results) if results else ir.Type.parse("!llvm.void"),
        list(operands.values()),
        "{ " + re.sub(r"\$(\w+)", lambda match: f"${numbers[match[1]]}", text) + " }",
        ",".join(constraints),
        has_side_effects=True,
    )
    return [llvm.extractvalue(f32, found, [n]) for n in range(results)]


def _thread() -> ir.Value:
    """Its number in the warpgroup."""
    return arith.remui(mgpu_utils.thread_idx(), mgpu_utils.c(128, _i32()))


def _number(value: Any) -> ir.Value:
    return mgpu_utils.c(value, _i32()) if isinstance(value, int) else value.registers.item()


def _place(ref: ir.Value, *terms: tuple[Any, int]) -> ir.Value:
    """An address of shared memory: so many times so many bytes into an array."""
    start = llvm.ptrtoint(_i32(), mgpu_utils.memref_ptr(ref))
    products = [arith.muli(_number(count), mgpu_utils.c(bytes, _i32())) for count, bytes in terms]
    return functools.reduce(arith.addi, products, start)


# Registers travel through Mosaic as a product's sums do, four for each eight columns.


def _carried(waves: int) -> Any:
    shape = (WAVE, -(-operands(waves) // 4) * 8)
    return plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=plgpu.Layout.WGMMA)


def _keys(config: Config, refs: Any, slot: jax.Array, group: jax.Array) -> jax.Array:
    """A consumer's operand of the tile in a slot, and the factors of its scores."""
    count = operands(config.waves)

    def emit(_, codes: ir.Value, scales: ir.Value, slot: Any, group: Any) -> mgpu.FragmentedArray:
        share = config.waves * WAVE
        places = {
            name: _place(ref, (slot, config.keys * bytes), (group, share * bytes))
            for name, ref, bytes in (("codes", codes, CODE_BYTES), ("scales", scales, SCALE_BYTES))
        }
        found = _assemble(keys_ptx(config.waves), count, thread=_thread(), **places)
        found += [mgpu_utils.c(0.0, ir.F32Type.get())] * (-count % 4)
        one = ir.VectorType.get((1,), ir.F32Type.get())
        registers = np.array([vector.broadcast(one, value) for value in found], dtype=object)
        layout = WGMMA_LAYOUT_ACC_32BIT
        shape = layout.registers_shape(_carried(config.waves).shape)
        carrier = mgpu.FragmentedArray(_registers=registers.reshape(shape), _layout=layout, _is_signed=None)
        return carrier.to_layout(WGMMA_LAYOUT)

    inline: Any = plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), SCALAR, SCALAR), return_type=_carried(config.waves)
    )
    return inline(emit)(*refs, slot, group)


def _score(
    config: Config,
    sizes: Sizes,
    refs: Any,
    operand: jax.Array,
    slot: jax.Array,
    count: jax.Array,
    at: tuple[jax.Array, jax.Array],
) -> None:
    """Writes the scores of a slot's queries, of which `count` are real, from row and column `at` on."""
    stride = 4 * sizes.stride

    def emit(_, q: ir.Value, weights: ir.Value, out: ir.Value, operand: Any, *numbers: Any) -> None:
        slot, count, row, column = numbers
        values = operand.to_layout(WGMMA_LAYOUT_ACC_32BIT).registers.flat
        registers = [vector.extract(each, [], [0]) for each in values][: operands(config.waves)]
        i64 = ir.IntegerType.get_signless(64)
        wide = [arith.extui(i64, _number(each)) for each in (row, column)]
        bytes = [
            arith.muli(each, mgpu_utils.c(size, i64)) for each, size in zip(wide, (stride, 4), strict=True)
        ]
        start = llvm.ptrtoint(i64, mgpu_utils.memref_ptr(out))
        _assemble(
            scores_ptx(config.queries, config.waves, config.parts, stride),
            0,
            thread=_thread(),
            q=_place(q, (slot, config.queries * QUERY_BYTES)),
            weights=_place(weights, (slot, config.queries * WEIGHT_BYTES)),
            count=_number(count),
            room=arith.subi(mgpu_utils.c(sizes.entries, _i32()), _number(column)),
            out=functools.reduce(arith.addi, bytes, start),
            **{f"operand{n}": register for n, register in enumerate(registers)},
        )

    ref = plgpu.RefType()
    inline: Any = plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(SWIZZLED), ref, ref, plgpu.Layout.WGMMA, *(SCALAR,) * 4)
    )
    inline(emit)(*refs, operand, slot, count, *at)


# --- the kernel


def _kernel(config: Config, sizes: Sizes, *refs: Any) -> None:
    q, weights, codes, scales, ends, first, out = refs[:7]
    code_stages, scale_stages, q_stages, weight_stages, told, keys_in, keys_out, q_in, q_out = refs[7:]
    group, program = lax.axis_index("warpgroup"), lax.axis_index("program")
    batch, chunks = codes.shape[0], -(-sizes.rows // config.chunk)
    programs = jnp.int32(MULTIPROCESSORS)

    def next_of(slot: jax.Array, stages: int) -> jax.Array:
        # A remainder would be a chain of a dozen instructions before each wait.
        return jnp.where(slot == stages - 1, 0, slot + 1)

    def steps_of(chunk: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of a chunk: its first query, how many it has, and how many times `queries` these are."""
        start = lax.rem(chunk, jnp.int32(chunks)) * config.chunk
        count = jnp.minimum(sizes.rows - start, config.chunk)
        return start, count, lax.div(count + config.queries - 1, jnp.int32(config.queries))

    def producer() -> None:
        plgpu.set_max_registers(REGISTERS[config.consumers][0], action="decrease")
        offset = first[0]

        def free(stage: jax.Array, stages: int, slot: jax.Array, barriers: Any) -> None:
            @pl.when(stage >= stages)
            def _() -> None:
                plgpu.barrier_wait(barriers.at[slot])

        def one_chunk(chunk: jax.Array, carry: Any) -> Any:
            item, *state = carry
            sequence = lax.div(chunk, jnp.int32(chunks))
            tiles = lax.div(jnp.clip(ends[chunk], 0, sizes.entries) + config.keys - 1, jnp.int32(config.keys))
            start, _, steps = steps_of(chunk)
            query = sequence * sizes.tokens + offset + start

            def one_tile(number: jax.Array, state: Any) -> Any:
                key_stage, key_slot, q_stage, q_slot = state
                tile = item + number * programs
                free(key_stage, config.key_stages, key_slot, keys_out)
                told[key_slot, 0] = chunk
                told[key_slot, 1] = tile
                plgpu.barrier_arrive(keys_in.at[key_slot])
                for part in range(0, config.keys, MOST_COPIED):
                    width = min(MOST_COPIED, config.keys)
                    there, here = pl.ds(tile * config.keys + part, width), pl.ds(part, width)
                    for source, stages in ((codes, code_stages), (scales, scale_stages)):
                        plgpu.copy_gmem_to_smem(
                            source.at[sequence, there], stages.at[key_slot, here], keys_in.at[key_slot]
                        )

                def one_step(step: jax.Array, state: Any) -> Any:
                    q_stage, q_slot = state
                    free(q_stage, config.query_stages, q_slot, q_out)
                    row = query + step * config.queries
                    for source, per_query, stages in ((q, HEADS, q_stages), (weights, 1, weight_stages)):
                        rows = pl.ds(row * per_query, config.queries * per_query)
                        plgpu.copy_gmem_to_smem(source.at[rows], stages.at[q_slot], q_in.at[q_slot])
                    return q_stage + 1, next_of(q_slot, config.query_stages)

                q_stage, q_slot = lax.fori_loop(0, steps, one_step, (q_stage, q_slot))
                return key_stage + 1, next_of(key_slot, config.key_stages), q_stage, q_slot

            # This program's next item is `item` tiles further on; of those here it has every 132nd.
            mine = lax.div(jnp.maximum(tiles - item + programs - 1, 0), programs)
            state = lax.fori_loop(0, mine, one_tile, tuple(state))
            return item + mine * programs - tiles, *state

        zero = jnp.int32(0)
        _, key_stage, key_slot, q_stage, q_slot = lax.fori_loop(
            0, batch * chunks, one_chunk, (program, zero, zero, zero, zero)
        )
        free(key_stage, config.key_stages, key_slot, keys_out)
        told[key_slot, 0] = jnp.int32(-1)
        for _ in range(1 + 2 * config.copies):  # in place of what would be copied, too
            plgpu.barrier_arrive(keys_in.at[key_slot])

        # Leave when all has been reported: the interpreter wants every phase of a barrier seen.
        def report(barriers: Any, stages: int, stage: jax.Array, slot: jax.Array) -> None:
            def one(_: jax.Array, slot: jax.Array) -> jax.Array:
                plgpu.barrier_wait(barriers.at[slot])
                return next_of(slot, stages)

            seen = jnp.minimum(stage, stages)
            lax.fori_loop(0, seen, one, lax.rem(slot - seen + stages, jnp.int32(stages)))

        report(keys_out, config.key_stages, key_stage + 1, next_of(key_slot, config.key_stages))
        report(q_out, config.query_stages, q_stage, q_slot)

    def consumer() -> None:
        plgpu.set_max_registers(REGISTERS[config.consumers][1], action="increase")

        def one_tile(carry: Any) -> Any:
            key_slot, q_slot, _ = carry
            plgpu.barrier_wait(keys_in.at[key_slot])
            chunk, tile = told[key_slot, 0], told[key_slot, 1]
            operand = _keys(config, (code_stages, scale_stages), key_slot, group)
            plgpu.barrier_arrive(keys_out.at[key_slot])
            start, count, steps = steps_of(jnp.maximum(chunk, 0))
            steps = jnp.where(chunk < 0, 0, steps)
            row = lax.div(chunk, jnp.int32(chunks)) * sizes.rows + start
            column = tile * config.keys + group * (config.waves * WAVE)

            def one_step(step: jax.Array, q_slot: jax.Array) -> jax.Array:
                plgpu.barrier_wait(q_in.at[q_slot])
                done = step * config.queries
                at = (row + done, column)
                _score(config, sizes, (q_stages, weight_stages, out), operand, q_slot, count - done, at)
                plgpu.barrier_arrive(q_out.at[q_slot])
                return next_of(q_slot, config.query_stages)

            q_slot = lax.fori_loop(0, steps, one_step, q_slot)
            return next_of(key_slot, config.key_stages), q_slot, chunk

        zero = jnp.int32(0)
        lax.while_loop(lambda carry: carry[2] >= 0, one_tile, (zero, zero, zero))

    lax.cond(group == config.consumers, producer, consumer)


@functools.partial(jax.jit, static_argnames=("rows", "stride", "config", "interpret"))
def _launch(
    q: jax.Array,  # [B, T, I, J] e4m3
    weights: jax.Array,  # [B, T, I] float32
    codes: jax.Array,  # [B, S, J / 2] uint8
    scales: jax.Array,  # [B, S, J / 32] uint8
    ends: jax.Array,  # [B * chunks] int32: entries that any query of a chunk sees
    first: jax.Array,  # [1] int32
    *,
    rows: int,
    stride: int,
    config: Config,
    interpret: Any = None,
) -> jax.Array:
    """[B, rows, stride]. A jit of its own: calls of one shape share one lowering."""
    batch, tokens = q.shape[:2]
    sizes = Sizes(tokens, rows, codes.shape[1], stride)
    keys, queries = config.key_stages, config.query_stages
    out = plgpu.kernel(
        functools.partial(_kernel, config, sizes),
        out_type=jax.ShapeDtypeStruct((batch * rows, stride), jnp.float32),
        scratch_types=(
            plgpu.SMEM((keys, config.keys, CODE_BYTES), jnp.uint8),
            plgpu.SMEM((keys, config.keys), jnp.int32),
            plgpu.SMEM((queries, config.queries * HEADS, CHANNELS), q.dtype, transforms=SWIZZLED),
            plgpu.SMEM((queries, config.queries, HEADS), jnp.float32),
            plgpu.SMEM((keys, 2), jnp.int32),  # chunk and tile of a slot's keys
            plgpu.Barrier(num_arrivals=1 + 2 * config.copies, num_barriers=keys),
            plgpu.Barrier(num_arrivals=config.consumers, num_barriers=keys),
            plgpu.Barrier(num_arrivals=2, num_barriers=queries),
            plgpu.Barrier(num_arrivals=config.consumers, num_barriers=queries),
        ),
        grid=(MULTIPROCESSORS,),
        grid_names=("program",),
        num_threads=config.consumers + 1,
        thread_name="warpgroup",
        # Only copies write what products read; what is told has its barriers.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
        kernel_name=f"index_scores_{config.keys}x{config.queries}",
    )(
        q.reshape(-1, CHANNELS),
        weights.reshape(-1, HEADS),
        codes,
        lax.bitcast_convert_type(scales, jnp.int32),
        ends,
        first,
    )
    return out.reshape(batch, rows, stride)


def _ends(visible: jax.Array, first: jax.Array, rows: int, chunk: int) -> jax.Array:
    """For each chunk of the rows of each sequence, how many entries any of its queries sees."""
    seen = lax.dynamic_slice_in_dim(visible, first[0], rows, 1)
    padded = jnp.pad(seen, ((0, 0), (0, -rows % chunk)))
    return padded.reshape(-1, chunk).max(-1)


def index_scores(
    q: TiledQueries,
    keys: QuantArray,
    weights: jax.Array,
    visible: jax.Array | None = None,
    *,
    first: jax.Array | None = None,
    rows: int | None = None,
    stride: int | None = None,
    config: Config | None = None,
    interpret: Any = None,
) -> jax.Array:
    """As the Triton kernels' `index_scores`; heads are 64, of 128 channels, and S is a multiple of 4."""
    batch, tokens = q.shape[:2]
    entries = keys.shape[1]
    rows, stride = rows or tokens, stride or entries
    config = config or config_for(rows, batch * entries)
    first = jnp.zeros(1, jnp.int32) if first is None else first
    if visible is None:
        visible = jnp.full((batch, tokens), entries, jnp.int32)
    ends = _ends(visible, first, rows, config.chunk)
    settings: dict[str, Any] = {"rows": rows, "stride": stride, "config": config, "interpret": interpret}
    return _launch(q.values, weights, keys.values, keys.scale, ends, first, **settings)
