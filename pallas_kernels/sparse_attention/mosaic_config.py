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
MOST_IN_CLUSTER = 8  # programs, on every Hopper
MOST_SPLITS = 32  # one program of the second kernel holds the results of all
LOWEST = -3.4028234663852886e38  # float32; finite, so that its difference to itself is 0
LOG2_E = math.log2(math.e)


class Config(NamedTuple):
    """How the work is dealt out, and how a program goes about it.

    Attributes:
      splits: programs that share a query's keys.
      cluster: whether these run side by side and put their results together themselves. If not, more than one
        need a second kernel.
      look: whether a query's lists are searched for their first and last row, to walk only what is between.
      slack: a maximum stays in use until a logit is larger by so many powers of two. Sums have to be
        multiplied whenever it moves, which beyond the first blocks it then hardly does.
      early: whether loads are kept from being put off by the assembler until what they read is needed, and
        rows asked for ahead by each thread and not by the copy engine. It has not run on a device yet.
    """

    splits: int = 1
    cluster: bool = False
    look: bool = True
    slack: float = 8.0
    early: bool = False


class Sizes(NamedTuple):
    """Of the arguments: T tokens, H heads as groups of 64, R rows and W places, S entries and K places.

    `codes` says whether rows are QuantKV, `turned` whether the result is turned back; `early` is Config's.
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
    early: bool = False

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

    A cluster's programs wait for each other, which is sooner done than a second kernel; but it has few, and
    with long lists more are better. These may be empty for the most part, and are searched first; over the
    few blocks of a program of a cluster it has walked sooner.
    """
    programs, pairs = sizes.queries * sizes.groups, -(-sizes.blocks // 2)
    splits = max(1, min(MULTIPROCESSORS // programs, pairs, MOST_SPLITS))
    cluster = splits > 1 and pairs <= 2 * MOST_IN_CLUSTER
    return Config(min(splits, MOST_IN_CLUSTER) if cluster else splits, cluster, look=not cluster)
