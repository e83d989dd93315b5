"""How a product is cut into programs: by table where it was measured, by rule elsewhere."""

import math
from typing import NamedTuple

BLOCK = 128  # columns that share a scale; sums within one are promoted to float32 before they are scaled


class Tile(NamedTuple):
    """What one program multiplies, and how.

    Attributes:
      tokens: rows of x in one accumulator.
      rows: rows of the weight, a divisor of 128.
      stack: accumulators, one below the other: a tile is `stack * tokens` tokens high. Two let each sum of
        a block be small enough for registers while a tile reads half as much per product.
      span: blocks of 128 columns multiplied side by side, each by warps of their own, and added at the end.
      splits: parts of K that go to different programs, added by another kernel.
      num_warps, num_stages: as Triton means them.
    """

    tokens: int
    rows: int
    stack: int = 1
    span: int = 1
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 4

    def fits(self, columns: int, group_rows: int) -> bool:
        """Whether it divides K, and the rows of the weight that share an input."""
        steps, rest = divmod(columns, BLOCK * self.span * self.splits)
        return steps > 0 and rest == 0 and (group_rows % self.rows == 0 or group_rows > BLOCK)
