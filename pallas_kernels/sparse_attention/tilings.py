"""How the work of `sparse_attention` is cut into programs.

A program takes a group of heads of one query. A group of 64 reads each key once for all its heads and keeps
the tensor cores busy; groups of 16, and several programs that share a query's keys, are for when there are
too few queries to give every multiprocessor a program.
"""

from typing import NamedTuple

# Multiprocessors, or compute units, of a chip; an unknown one is treated as an H200.
_PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304, "gfx950": 256}
_FEW = 32  # groups of 16 heads: so many or fewer are split more finely than multiprocessors ask for
_MOST_SPLITS = 32  # one program of the second kernel holds the results of all


class Tiling(NamedTuple):
    """What a program takes.

    Attributes:
      heads: of one query, a power of two from 16 on.
      keys: in one step, a power of two from 16 on.
      splits: programs that share a query's keys; more than one need a second kernel.
      num_warps, num_stages: as Triton means them.
    """

    heads: int
    keys: int
    splits: int
    num_warps: int
    num_stages: int


def tiling_for(arch: str, queries: int, heads: int, places: int) -> Tiling:
    """For so many queries (batch times tokens) of so many heads, each with so many indices."""
    processors = _PROCESSORS.get(arch, _PROCESSORS["sm_90"])
    steps = -(-places // 32)

    def splits(group: int, programs: int) -> int:
        """So that there are about so many programs, none of them without a step."""
        return max(1, min(programs // (queries * -(-heads // group)), steps, _MOST_SPLITS))

    if arch.startswith("gfx"):  # 64 KiB of LDS hold 32 keys once
        return Tiling(16, 32, splits(16, 2 * processors), 4, 1)
    if queries * -(-heads // 16) <= _FEW:
        shares = splits(16, 5 * processors)
        return Tiling(16, 32, shares, 4, 1 if shares == steps else 3)
    if heads <= 32:
        group = 16 if heads <= 16 else 32
        return Tiling(group, 32, splits(group, 2 * processors), 4, 3)
    # A split of 32 keys a step leaves less over than one of 64, which on Hopper only fit beside 64 queries.
    shares = splits(64, processors)
    return Tiling(64, 64 if shares == 1 and arch == "sm_90" else 32, shares, 8, 3 if arch != "sm_80" else 2)
