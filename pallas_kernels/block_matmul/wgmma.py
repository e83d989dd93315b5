"""One product of the tensor core on Hopper: 64 rows by up to 256, over the 128 columns of a stage."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.mosaic.gpu.fragmented_array import WGMMA_LAYOUT, WGMMA_LAYOUT_ACC_32BIT
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.block_matmul.tiles import BLOCK

HEIGHT = 64  # rows of the first operand
SWIZZLED = (plgpu.SwizzleTransform(128),)  # pyright: ignore[reportAbstractUsage]


def start(
    a_ref: Any, b_ref: Any, slot: jax.Array, a_row: jax.Array, b_row: jax.Array | int, spent: jax.Array
) -> jax.Array:
    """Starts a product; its sums, [64, width], are not to be touched before `finish` has returned them.

    Mosaic's own `wgmma` adds to an accumulator, which has to be filled with zeros for every product. Here the
    first of the four instructions ignores what the registers hold. Their addresses, made from the number of
    the stage, stay out of reach of LLVM, which would keep each of them in registers all along. `spent` are
    sums that have been promoted: without it the assembler starts a product before it has promoted the last
    one, and has too few registers for both.

    Args:
      a_ref, b_ref: [slots, rows, 128] in FP8.
      a_row, b_row: first rows of the product in the slot, multiples of 8.
    """

    def emit(
        _, a: ir.Value, b: ir.Value, slot: Any, a_row: Any, b_row: Any, spent: mgpu.FragmentedArray
    ) -> mgpu.FragmentedArray:
        i32 = ir.IntegerType.get_signless(32)

        def address(ref: ir.Value, row: Any) -> ir.Value:
            height = ir.MemRefType(ref.type).shape[1]
            start = llvm.ptrtoint(i32, mgpu_utils.memref_ptr(ref))
            at = arith.muli(slot.registers.item(), mgpu_utils.c(height, i32))
            at = arith.addi(at, row.registers.item())
            return arith.addi(start, arith.muli(at, mgpu_utils.c(BLOCK, i32)))

        return _inline(_start_ptx(width), spent, address(a, a_row), address(b, b_row))

    width = spent.shape[1]
    inline: Any = plgpu.inline_mgpu(
        arg_types=(*(plgpu.RefType(SWIZZLED),) * 2, *(plgpu.Layout.WG_SPLAT,) * 3, plgpu.Layout.WGMMA),
        return_type=_sums(width),
    )
    return inline(emit)(a_ref, b_ref, slot, jnp.int32(a_row), jnp.int32(b_row), spent)


def finish(sums: jax.Array, later: int = 0) -> jax.Array:
    """Waits for the product that `start` has begun, but not for as many begun `later`."""
    text = f"wgmma.wait_group.sync.aligned {later};"
    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=_sums(sums.shape[1]))
    return inline(lambda _, sums: _inline(text, sums))(sums)


def _sums(width: int) -> Any:
    return plgpu.ShapeDtypeStruct((HEIGHT, width), jnp.float32, layout=plgpu.Layout.WGMMA)


def _inline(text: str, sums: mgpu.FragmentedArray, *numbers: ir.Value) -> mgpu.FragmentedArray:
    """PTX that reads and writes the sums: its first operands, and again the next, before the numbers."""
    f32, sums = ir.F32Type.get(), sums.to_layout(WGMMA_LAYOUT_ACC_32BIT)
    registers = [vector.extract(each, [], [0]) for each in sums.registers.flat]
    results = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * len(registers)),
        [*registers, *numbers],
        text,
        ",".join(["=f"] * len(registers) + [str(n) for n in range(len(registers))] + ["r"] * len(numbers)),
        has_side_effects=True,
    )
    values = [llvm.extractvalue(f32, results, [n]) for n in range(len(registers))]
    vectors = [vector.broadcast(ir.VectorType.get((1,), f32), value) for value in values]
    return mgpu.FragmentedArray(
        _registers=np.array(vectors, dtype=object).reshape(sums.registers.shape),
        _layout=WGMMA_LAYOUT_ACC_32BIT,
        _is_signed=None,
    ).to_layout(WGMMA_LAYOUT)


def _start_ptx(width: int) -> str:
    """The product of 128 columns, begun. Operands: the sums, in and out, and both operands' addresses."""
    registers = width // 2
    sums = ", ".join(f"${n}" for n in range(registers))
    a, b = (f"${registers + n + registers}" for n in range(2))
    # Upper half of a descriptor: 128-byte swizzle; 1024 bytes, in units of 16, from eight rows to the next.
    upper = (1 << 30) | (1024 >> 4)
    lines = [".reg .pred never;", ".reg .b32 low;", ".reg .b64 a, b;"]
    for name, place in (("a", a), ("b", b)):
        lines += [f"shr.u32 low, {place}, 4;", f"mov.b64 {name}, {{low, {upper}}};"]
    # No address of shared memory is that high. The assembler does not know: it would see that the first of
    # the instructions does not need the old sums and choose other registers.
    lines.append(f"setp.gt.u32 never, {a}, 0x7fffffff;")
    lines.append("wgmma.fence.sync.aligned;")
    for step in range(BLOCK // 32):
        if step:
            lines += ["add.s64 a, a, 2;", "add.s64 b, b, 2;"]  # 32 bytes further
        instruction = f"wgmma.mma_async.sync.aligned.m64n{width}k32.f32.e4m3.e4m3"
        lines.append(f"{instruction} {{{sums}}}, a, b, {'1' if step else 'never'}, 1, 1;")
    lines.append("wgmma.commit_group.sync.aligned;")
    return "{ " + "\n".join(lines) + " }"
