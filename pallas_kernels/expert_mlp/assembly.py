"""PTX text inside of a Mosaic kernel: named operands, addresses, and sums in the tensor core's registers."""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.mosaic.gpu.fragmented_array import WGMMA_LAYOUT, WGMMA_LAYOUT_ACC_32BIT
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector


def assemble(text: str, operands: Mapping[str, ir.Value], sums: Sequence[ir.Value] = ()) -> list[ir.Value]:
    """Inline assembly in which `$name` is an operand, `$sum0` and so on float32 registers that it updates.

    Returns:
      The sums as the text leaves them.
    """
    f32, names = ir.F32Type.get(), [f"sum{n}" for n in range(len(sums))]
    kinds = [_KINDS[str(value.type)] for value in operands.values()]
    # Sums that come in have numbers, too, behind those that go out.
    numbers = {name: n for n, name in enumerate([*names, *("" for _ in names), *operands])}
    text = "{ " + re.sub(r"\$(\w+)", lambda match: f"${numbers[match[1]]}", text) + " }"
    results = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * len(sums)) if sums else ir.Type.parse("!llvm.void"),
        [*sums, *operands.values()],
        text,
        ",".join(["=f"] * len(sums) + [str(n) for n in range(len(sums))] + kinds),
        has_side_effects=True,
    )
    return [llvm.extractvalue(f32, results, [n]) for n in range(len(sums))]


_KINDS = {"i32": "r", "i64": "l", "f32": "f"}


def registers(arrays: Sequence[mgpu.FragmentedArray]) -> list[ir.Value]:
    """Of sums [64, tokens], in the tensor core's order."""
    return [
        vector.extract(register, [], [0])
        for array in arrays
        for register in array.to_layout(WGMMA_LAYOUT_ACC_32BIT).registers.flat
    ]


def arrays(values: Sequence[ir.Value], like: Sequence[mgpu.FragmentedArray]) -> list[mgpu.FragmentedArray]:
    """The inverse of `registers`."""
    one, found, rest = ir.VectorType.get((1,), ir.F32Type.get()), [], list(values)
    for array in like:
        shape = array.to_layout(WGMMA_LAYOUT_ACC_32BIT).registers.shape
        taken, rest = rest[: math.prod(shape)], rest[math.prod(shape) :]
        vectors = np.array([vector.broadcast(one, value) for value in taken], dtype=object).reshape(shape)
        array = mgpu.FragmentedArray(_registers=vectors, _layout=WGMMA_LAYOUT_ACC_32BIT, _is_signed=None)
        found.append(array.to_layout(WGMMA_LAYOUT))
    return found


class Numbers:
    """Integer arithmetic on IR values, of 32 or 64 bits."""

    def __init__(self, bits: int):
        self.type = ir.IntegerType.get_signless(bits)

    def of(self, value: Any) -> ir.Value:
        if isinstance(value, mgpu.FragmentedArray):
            value = value.registers.item()
        if isinstance(value, int):
            return mgpu_utils.c(value, self.type)
        if value.type == self.type:
            return value
        return (arith.extui if value.type.width < self.type.width else arith.trunci)(self.type, value)

    def total(self, *terms: Any) -> ir.Value:
        """Of values, and of products given as pairs."""
        values = [
            arith.muli(*map(self.of, term)) if isinstance(term, tuple) else self.of(term) for term in terms
        ]
        return functools.reduce(arith.addi, values)

    def divided(self, value: Any, by: int) -> ir.Value:
        return arith.divui(self.of(value), mgpu_utils.c(by, self.type))

    def address(self, ref: ir.Value) -> ir.Value:
        return llvm.ptrtoint(self.type, mgpu_utils.memref_ptr(ref))

    def addresses(self, refs: Mapping[str, ir.Value], places: Mapping[str, Any]) -> dict[str, ir.Value]:
        """Of a place in each of these arrays, in bytes from its start."""
        return {name: self.total(self.address(refs[name]), place) for name, place in places.items()}


# Sums of numbers, and of products given as pairs: integers, or values of a kernel.
Total = Callable[..., Any]


class Lane(NamedTuple):
    """A thread: its number in the warpgroup, its warp, and row and place in the tensor core's result."""

    thread: Any
    warp: Any
    row: Any
    place: Any


def lane() -> Lane:
    i32 = ir.IntegerType.get_signless(32)

    def split(value: ir.Value, by: int) -> tuple[ir.Value, ir.Value]:
        return arith.divui(value, mgpu_utils.c(by, i32)), arith.remui(value, mgpu_utils.c(by, i32))

    _, thread = split(mgpu_utils.thread_idx(), 128)
    warp, within = split(thread, 32)
    return Lane(thread, warp, *split(within, 4))
