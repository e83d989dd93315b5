"""Sums of parts of K, added up in the programs of a cluster through each other's shared memory, on Hopper.

Each program of a cluster has summed a part of K. It owns a part of the tile: to the owners of the other parts
it sends its sums of those, and to its own it adds what it receives, in a fixed order. Stores to the memory of
another program count their bytes on a barrier there. Mosaic's own would announce the bytes as they are sent,
which first waits for all memory operations of the sender; here the receiver announces them to itself.
"""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.mosaic.gpu.fragmented_array import WGMMA_LAYOUT, WGMMA_LAYOUT_ACC_32BIT
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.block_matmul.wgmma import HEIGHT

AXIS = "split"  # of the cluster: its fastest
THREADS = 128  # of a consumer


class Exchange(NamedTuple):
    """What a consumer, the same in all programs, sends and receives: pieces of 64 rows.

    Attributes:
      splits: programs of the cluster along `AXIS`; each owns one piece or none.
      width: columns of a piece.
    """

    splits: int
    width: int

    @property
    def piece_bytes(self) -> int:
        return HEIGHT * self.width * 4

    @property
    def received_bytes(self) -> int:
        """That a consumer receives."""
        return (self.splits - 1) * self.piece_bytes

    def scratch(self, consumers: int) -> list[Any]:
        """Shared memory for what they receive, and a barrier for each: the arguments of all below.

        One barrier more, unused, is that of the warpgroup that loads.
        """
        numbers = consumers * self.received_bytes // 4
        return [plgpu.SMEM((numbers,), jnp.float32), plgpu.SMEM((consumers + 1, 2), jnp.uint32)]


def prepare(exchange: Exchange, arrived: Any, group: jax.Array) -> None:
    """Makes a warpgroup's barrier, which opens when all has been received, and tells the cluster.

    All warpgroups call it. The fence is all that others must see; a release would wait for every memory
    operation before it.
    """

    def emit(_, arrived: ir.Value, group: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)
        barrier = _address(arrived, arith.muli(group.registers.item(), mgpu_utils.c(8, i32)))
        text = f"""{{
            .reg .pred one;
            setp.eq.u32 one, $thread, 0;
            @one mbarrier.init.shared::cta.b64 [$barrier], 1;
            @one mbarrier.arrive.expect_tx.shared::cta.b64 _, [$barrier], {exchange.received_bytes};
            @one fence.mbarrier_init.release.cluster;
            barrier.cluster.arrive.relaxed;
        }}"""
        _assemble(text, "thread barrier", [thread(), barrier])

    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    inline(emit)(arrived, group)


def meet() -> None:
    """Nothing follows before all warpgroups of the cluster have prepared; all call it, once."""
    inline: Any = plgpu.inline_mgpu()
    inline(lambda _: _assemble("barrier.cluster.wait.acquire;", "", []))()


def send(
    exchange: Exchange, sums: jax.Array, owner: jax.Array, received: Any, arrived: Any, group: jax.Array
) -> None:
    """Sums of a piece to the program that owns it."""
    me, others = lax.axis_index(AXIS), exchange.splits - 1
    place = lax.rem(me - owner - 1 + exchange.splits, jnp.int32(exchange.splits))
    start = (group * others + place) * exchange.piece_bytes

    def emit(_, received: ir.Value, arrived: ir.Value, *values: mgpu.FragmentedArray) -> None:
        i32 = ir.IntegerType.get_signless(32)
        start, group, further = (value.registers.item() for value in values[:3])
        numbers = _registers(values[3])
        to = _address(received, start, arith.muli(thread(), mgpu_utils.c(16, i32)))
        barrier = _address(arrived, arith.muli(group, mgpu_utils.c(8, i32)))
        lines = [
            ".reg .b32 rank, to, barrier;",
            "mov.u32 rank, %cluster_ctarank;",
            "add.s32 rank, rank, $further;",
            "mapa.shared::cluster.u32 to, $to, rank;",
            "mapa.shared::cluster.u32 barrier, $barrier, rank;",
        ]
        store = "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32"
        for n in range(0, len(numbers), 4):
            four = ", ".join(f"$s{n + m}" for m in range(4))
            lines.append(f"{store} [to+{n * THREADS * 4}], {{{four}}}, [barrier];")
        names = ["to", "barrier", "further", *(f"s{n}" for n in range(len(numbers)))]
        _assemble("{ " + "\n".join(lines) + " }", " ".join(names), [to, barrier, further, *numbers])

    ref, number = plgpu.RefType(), plgpu.Layout.WG_SPLAT
    inline: Any = plgpu.inline_mgpu(arg_types=(ref, ref, number, number, number, plgpu.Layout.WGMMA))
    inline(emit)(received, arrived, start, group, owner - me, sums)


def receive(exchange: Exchange, sums: jax.Array, received: Any, arrived: Any, group: jax.Array) -> jax.Array:
    """Sums of a piece of its own with all that was sent added."""
    count, others = exchange.width // 2, exchange.splits - 1  # numbers of a thread

    def emit(_, received: ir.Value, arrived: ir.Value, group: Any, sums: mgpu.FragmentedArray) -> Any:
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        group = group.registers.item()
        start = arith.muli(group, mgpu_utils.c(exchange.received_bytes, i32))
        place = _address(received, start, arith.muli(thread(), mgpu_utils.c(16, i32)))
        barrier = _address(arrived, arith.muli(group, mgpu_utils.c(8, i32)))
        lines = [
            ".reg .pred done;",
            ".reg .f32 v<4>;",
            "again:",
            f"mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [${2 * count + 1}], 0;",
            "@!done bra again;",
        ]
        for n in range(0, others * count, 4):
            lines.append(f"ld.shared.v4.f32 {{v0, v1, v2, v3}}, [${2 * count}+{n * THREADS * 4}];")
            lines += [f"add.f32 ${(n + m) % count}, ${(n + m) % count}, v{m};" for m in range(4)]
        results = llvm.inline_asm(
            llvm.StructType.get_literal([f32] * count),
            [*_registers(sums), place, barrier],
            "{ " + "\n".join(lines) + " }",
            ",".join(["=f"] * count + [str(n) for n in range(count)] + ["r", "r"]),
            has_side_effects=True,
        )
        values = [llvm.extractvalue(f32, results, [n]) for n in range(count)]
        vectors = [vector.broadcast(ir.VectorType.get((1,), f32), value) for value in values]
        layout = sums.to_layout(WGMMA_LAYOUT_ACC_32BIT)
        return mgpu.FragmentedArray(
            _registers=np.array(vectors, dtype=object).reshape(layout.registers.shape),
            _layout=WGMMA_LAYOUT_ACC_32BIT,
            _is_signed=None,
        ).to_layout(WGMMA_LAYOUT)

    ref = plgpu.RefType()
    inline: Any = plgpu.inline_mgpu(
        arg_types=(ref, ref, plgpu.Layout.WG_SPLAT, plgpu.Layout.WGMMA),
        return_type=plgpu.ShapeDtypeStruct((HEIGHT, exchange.width), jnp.float32, layout=plgpu.Layout.WGMMA),
    )
    return inline(emit)(received, arrived, group, sums)


def thread() -> ir.Value:
    """Its number in the warpgroup."""
    return arith.remui(mgpu_utils.thread_idx(), mgpu_utils.c(THREADS, ir.IntegerType.get_signless(32)))


def _registers(sums: mgpu.FragmentedArray) -> list[ir.Value]:
    flat = sums.to_layout(WGMMA_LAYOUT_ACC_32BIT).registers.flat
    return [vector.extract(each, [], [0]) for each in flat]


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
