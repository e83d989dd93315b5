"""How a product is cut into programs: by table where it was measured, by rule elsewhere."""

import functools
import json
import math
from collections.abc import Mapping
from importlib import resources
from typing import Literal, NamedTuple

BLOCK = 128  # columns that share a scale
PROGRAMS = 128  # how many fill a chip

Operand = Literal["fp8", "bf16"]  # what x holds


class Tile(NamedTuple):
    """What one program multiplies, and how.

    Attributes:
      tokens: rows of x in an accumulator; with 1, a program multiplies all of K without the tensor core.
      rows: rows of the weight in an accumulator, a divisor of 128.
      stack, beside: accumulators below each other and side by side: 1 or 2, not 2 of both. Two halve the
        registers that the sums of a block need, for a tile that is as wide and high.
      span: blocks of 128 columns multiplied side by side, each by warps of its own, and added at the end.
      splits: parts of K that go to programs of their own, added by another kernel.
      num_warps, num_stages: as Triton means them.
    """

    tokens: int
    rows: int
    stack: int = 1
    beside: int = 1
    span: int = 1
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 4

    def divides(self, columns: int, group_rows: int, groups: int) -> bool:
        """Whether K falls into equal parts, and no tile has rows of two groups."""
        whole_steps = columns % (BLOCK * self.span * self.splits) == 0
        return whole_steps and (groups == 1 or group_rows % (self.rows * self.beside) == 0)


@functools.cache
def tuned() -> Mapping[str, Mapping[str, Mapping[str, Mapping[int, Tile]]]]:
    """The fastest tiles measured (`tuned.json`, which `scripts/bench/block_matmul.py --tune` writes).

    By arch, by what x holds, by "rows x columns" of the weight, by the most tokens a tile is for.
    """
    text = resources.files(__package__).joinpath("tuned.json").read_text()
    return {
        arch: {
            operand: {
                shape: {int(tokens): Tile(**fields) for tokens, fields in tiles.items()}
                for shape, tiles in shapes.items()
            }
            for operand, shapes in operands.items()
        }
        for arch, operands in json.loads(text).items()
    }


def tile_for(arch: str, operand: Operand, tokens: int, rows: int, columns: int, groups: int = 1) -> Tile:
    """The tile for a weight of `rows` x `columns`, all groups together."""
    table = tuned().get(arch, {}).get(operand, {}).get(f"{rows}x{columns}")
    if table:
        tile = table[min((most for most in table if most >= tokens), default=max(table))]
        if tile.divides(columns, rows // groups, groups):
            return tile
    return _by_rule(arch, operand, tokens, rows, columns, groups)


def _by_rule(arch: str, operand: Operand, tokens: int, rows: int, columns: int, groups: int) -> Tile:
    blocks = columns // BLOCK
    most = 128 if groups == 1 else math.gcd(rows // groups, 128)
    busy = min(most, next((size for size in (128, 64, 32) if rows // size >= PROGRAMS), 16))
    if arch not in ("sm_90", "sm_100"):
        # Nothing is measured here. 64 KiB of shared memory, all that a CDNA3 chip has, hold any of these.
        span = math.gcd(blocks, 4)
        if tokens <= 16 and span > 1:
            return Tile(16, min(busy, 32), span=span, num_warps=span, num_stages=2)
        return Tile(32 if tokens <= 32 else 64, min(64, most), num_stages=2)
    if tokens == 1:
        return streamed_tile(rows, columns, most=most)
    if tokens <= 16:
        few = 8 if tokens <= 8 else 16
        span = math.gcd(blocks, 8 if busy == 16 else 4)
        if span > 1 and busy <= 32:
            return Tile(few, busy, span=span, num_warps=max(span, 4), num_stages=4)
        return Tile(few, busy, num_stages=5)
    if tokens <= 128:
        wide = min(max(busy, 64), most)
        parts = max(1, 2 * PROGRAMS // -(-rows // wide))
        splits = math.gcd(blocks, 1 << min(parts.bit_length() - 1, 2)) if wide < 128 else 1
        return Tile(32 if tokens <= 32 else 64, wide, stack=1 if tokens <= 64 else 2, splits=splits)
    if operand == "bf16":
        return Tile(128, most, num_warps=8, num_stages=3)
    wide = min(128 if tokens * rows >= PROGRAMS * 128**2 else 64, most)
    return Tile(64, wide, stack=2, num_stages=3)


def streamed_tile(rows: int, columns: int, itemsize: int = 1, most: int = 128) -> Tile:
    """For one token: as many rows as make 32 KiB, 128 bytes a thread, while two programs an SM remain."""
    size = itemsize << (columns - 1).bit_length()
    few = max(1, min(most, 32768 // size))
    while few > 1 and rows // few < 2 * PROGRAMS:
        few //= 2
    return Tile(1, few, num_warps=max(4, min(8, few * size // 4096)), num_stages=1)
