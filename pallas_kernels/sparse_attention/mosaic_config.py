"""What the Mosaic kernel of `sparse_attention` knows before it starts: sizes, and how work is dealt out."""

import math
from typing import NamedTuple

HEADS = 64  # of a program: the rows of a tensor core product
CHANNELS = 512
PAIRS = 32  # of channels, the last ones, that turn with the position
NOPE = CHANNELS - 2 * PAIRS
KEYS = 64  # places of a block
COLUMNS = 64  # of bfloat16: as wide as the swizzle, 128 bytes
SLOTS = 2  # blocks in shared memory
MULTIPROCESSORS = 132
FEW_PAIRS = 16  # of blocks: sooner walked than searched
MOST_SPLITS = 32  # one program of the second kernel holds the results of all
LOWEST = -3.4028234663852886e38  # float32; finite, so that its difference to itself is 0
LOG2_E = math.log2(math.e)


class Config(NamedTuple):
    """How the work is dealt out, and how a program goes about it.

    Attributes:
      splits: programs that share a query's keys; more than one need a second kernel.
      look: whether a query's lists are searched for their first and last row, to walk only what is between.
      slack: a maximum stays in use until a logit is larger by so many powers of two. Sums have to be
        multiplied whenever it moves, which beyond the first blocks it then hardly does.
    """

    splits: int = 1
    look: bool = True
    slack: float = 8.0


class Sizes(NamedTuple):
    """Of the arguments: T tokens, H heads as groups of 64, R rows and W places, S entries and K places.

    `codes` says whether rows are QuantKV, `turned` whether the result is turned back.
    """

    batch: int
    tokens: int
    groups: int
    rows: int
    window: int
    entries: int
    chosen: int
    codes: bool = False
    turned: bool = False

    @property
    def queries(self) -> int:
        return self.batch * self.tokens

    @property
    def window_blocks(self) -> int:
        return -(-self.window // KEYS)

    @property
    def blocks(self) -> int:
        return self.window_blocks + -(-self.chosen // KEYS)

    @property
    def threads_a_row(self) -> int:
        """That gather it together: eight copy 16 bytes each, four take as many codes to pieces."""
        return 4 if self.codes else 8

    @property
    def rows_a_thread(self) -> int:
        return KEYS * self.threads_a_row // 128

    @property
    def arrivals(self) -> int:
        """At a block's barrier: each thread's copies, and those that write by themselves."""
        return 256 if self.codes else 128 + 16

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread that gathers, and of one that attends: 128 and 256 share the 168 each had at first."""
        return (104, 200) if self.codes else (40, 232)


def config_for(sizes: Sizes) -> Config:
    """As many splits as run at once, none of them without a pair of blocks.

    Long lists may be empty for the most part, and are searched first; over few blocks a program has walked
    sooner.
    """
    programs, pairs = sizes.queries * sizes.groups, -(-sizes.blocks // 2)
    splits = max(1, min(MULTIPROCESSORS // programs, pairs, MOST_SPLITS))
    return Config(splits, look=splits == 1 or pairs > FEW_PAIRS)
