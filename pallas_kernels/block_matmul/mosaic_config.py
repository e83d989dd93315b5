"""How the Mosaic kernels cut a product on Hopper, and which of them is for it: by table, or by rule."""

import functools
import json
import math
from importlib import resources
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.block_matmul.cluster_sum import Exchange
from pallas_kernels.block_matmul.tiles import BLOCK
from pallas_kernels.block_matmul.wgmma import HEIGHT
from pallas_kernels.formats import QuantArray

MULTIPROCESSORS = 132
SHARED_OF_ALL = 233472  # bytes of shared memory of a multiprocessor
SHARED_OVERHEAD = 1024 + 2048  # of a program: what CUDA keeps, and room for barriers and alignment
SHARED_BYTES = SHARED_OF_ALL - SHARED_OVERHEAD  # what a program may have
REGISTERS = 65536 // 128  # of a multiprocessor, for each of the 128 threads of a warpgroup
MOST_BARRIERS = 32  # of one array, in Mosaic
PADDING = 2  # numbers between steps of the table of scales: a warp's stores meet other banks
# Clusters of so many programs that run at once, if each program has a multiprocessor of its own: a cluster
# stays within a group of some 16 multiprocessors, not all of which are whole.
MOST_CLUSTERS = {1: 132, 2: 66, 4: 30, 8: 15}
STEP_COST = 4000  # of a step beside its products, in units of the tile's size; measured on an H200


class Shape(NamedTuple):
    """tokens x rows of the result, and the columns that it sums over."""

    tokens: int
    rows: int
    columns: int


class Few(NamedTuple):
    """How `mosaic_few` cuts a product, and how a program works through its part.

    Attributes:
      tokens: columns of the product of a program: 8, 16, 32, 64 or 128.
      rows: of the weight, of a program: 64, 128 or 256.
      splits: parts of K, for a program of a cluster each: 1, 2, 4 or 8.
      sharers: tiles of rows whose programs are in one cluster and share the tokens that they load.
      stages: that are under way or in use.
      beside: warpgroups that divide the tokens of 64 rows among them: 1 or 2.
      blocks: of 128 columns, in a stage.
    """

    tokens: int
    rows: int = 128
    splits: int = 1
    sharers: int = 1
    stages: int = 8
    beside: int = 1
    blocks: int = 1

    @property
    def consumers(self) -> int:
        return self.rows // HEIGHT * self.beside

    @property
    def share(self) -> int:
        """Tokens of a consumer."""
        return self.tokens // self.beside

    @property
    def parts(self) -> int:
        """Into how many a consumer's tokens are cut: to be added up by a program each, or to be written."""
        return min(self.splits, self.share // 8) if self.splits > 1 else -(-self.share // 32)

    @property
    def piece(self) -> int:
        """Tokens of such a part."""
        return self.share // self.parts

    @property
    def exchange(self) -> Exchange:
        return Exchange(self.splits, self.piece)

    @property
    def tables(self) -> int:
        """Of scales: rows of one block, times a consumer's tokens, have one."""
        return -(-self.rows // BLOCK) * self.beside

    @property
    def width(self) -> int:
        """Tokens of one tensor core product; its sums need registers beside the running ones."""
        return self.share if self.consumers <= 2 else min(self.share, 64)

    @property
    def registers(self) -> tuple[int, int] | None:
        """Of a thread that loads and of one that multiplies, once all know their part; None: all alike."""
        at_start = REGISTERS // (self.consumers + 1) // 8 * 8  # all of a program share what these make
        if self.share // 2 + self.width + 40 <= at_start or at_start >= 232:  # sums; two products; all else
            return None
        return 24, min(232, (at_start * (self.consumers + 1) - 24) // self.consumers // 8 * 8)

    def shared_bytes(self, steps: int) -> int:
        """Of shared memory, for so many blocks of columns in each part of K."""
        loaded = (self.tokens + self.rows) * BLOCK * self.blocks * self.stages
        table = self.tables * steps * (self.share + PADDING) * 4
        received = self.consumers * self.exchange.received_bytes
        return loaded + table + received + self.consumers * self.piece * HEIGHT * 2

    def deepest(self, shape: Shape, resident: int = 1) -> "Few":
        """With as many stages as there is shared memory for, if so many programs share a multiprocessor's."""
        steps = shape.columns // BLOCK // self.splits
        fixed, more = (self._replace(stages=n).shared_bytes(steps) for n in (0, 1))
        room = (SHARED_OF_ALL // resident - SHARED_OVERHEAD - fixed) // (more - fixed)
        return self._replace(stages=max(0, min(steps // self.blocks, room, MOST_BARRIERS)))


class Many(NamedTuple):
    """How `mosaic` cuts a product into tiles, and how a program works through one.

    Attributes:
      tokens: rows of x in a tile: 64 or 128 of each consumer.
      rows: rows of the weight in a tile: 64, 128, 192 or 256.
      stages: blocks of 128 columns that are under way or in use, at least 2.
      slots: pieces of the result, 64 rows high, that a consumer can have on their way out.
      band: tiles of tokens that go before the next ones, so that the L2 cache holds what they share.
      consumers: warpgroups that multiply, 2 or 3, each so many of the tokens: while one promotes, the tensor
        core has the others' products to work on.
      ahead: starts a product before the one before it is promoted. It takes registers for two, and pays
        where a multiprocessor has one narrow tile.
    """

    tokens: int = 128
    rows: int = 128
    stages: int = 5
    slots: int = 2
    band: int = 8
    consumers: int = 2
    ahead: bool = False

    @property
    def shared_bytes(self) -> int:
        loaded = (self.tokens + self.rows) * BLOCK * self.stages
        return loaded + self.consumers * self.slots * HEIGHT * self.out_columns * 2

    @property
    def waves(self) -> int:
        """Of 64 tokens each, of a consumer."""
        return self.tokens // self.consumers // HEIGHT

    @property
    def width(self) -> int:
        """Columns of one tensor core product: its sums need registers beside those of the running ones."""
        most = 128 if self.ahead else 192
        return self.rows if self.rows <= most else next(n for n in (128, 96) if self.rows % n == 0)

    @property
    def out_columns(self) -> int:
        """Of a piece of the result on its way out."""
        return math.gcd(64, self.width)


# What the rule for many tokens chooses from, each as deep as shared memory allows.
TILES = (
    Many(128, 256, stages=3, slots=4),
    Many(256, 128, stages=3, slots=4),
    Many(128, 192, stages=4, slots=6, ahead=True),
    Many(128, 128, stages=6, ahead=True),
    Many(128, 64, stages=8),
)


@functools.cache
def tuned() -> dict[tuple[int, int], dict[int, Few | Many | None]]:
    """The fastest measured on an H200, by rows and columns of the weight, by the most tokens it is for.

    None stands where Triton's kernel is faster. `scripts/bench/block_matmul_mosaic.py` writes the table.
    """
    text = resources.files(__package__).joinpath("tuned_mosaic.json").read_text()
    kinds: dict[str, Any] = {"few": Few, "many": Many}

    def config(entry: dict[str, Any] | None) -> Few | Many | None:
        if entry is None:
            return None
        return kinds[entry["kernel"]](**{k: v for k, v in entry.items() if k != "kernel"})

    return {
        (int(rows), int(columns)): {int(tokens): config(entry) for tokens, entry in entries.items()}
        for shape, entries in json.loads(text).items()
        for rows, columns in [shape.split("x")]
    }


def chosen(shape: Shape) -> Few | Many | None:
    """What is fastest, as far as known; None is Triton's kernel."""
    entries = tuned().get(shape[1:])
    if entries:
        config = entries[min((most for most in entries if most >= shape.tokens), default=max(entries))]
        if not isinstance(config, Many) or config.tokens <= shape.tokens:
            return config
        return many_for(shape) if shape.tokens >= 128 else None
    if shape.tokens == 1 or (16 < shape.tokens <= 64 and shape.rows >= 2 * MULTIPROCESSORS * HEIGHT):
        return None  # Triton's programs start sooner, and with wide weights reading them is all there is
    return by_rule(shape)


def by_rule(shape: Shape) -> Few | Many:
    if shape.tokens < 128 or (shape.tokens == 128 and shape.rows < MULTIPROCESSORS * 128):
        return few_for(shape)
    return many_for(shape)


def few_for(shape: Shape) -> Few:
    """As many programs as multiprocessors, if K can be split so, with all of their shared memory in use."""
    tokens = min(max(8, 1 << (shape.tokens - 1).bit_length()), 128)
    tiles, steps = -(-shape.tokens // tokens) * -(-shape.rows // HEIGHT), shape.columns // BLOCK
    splits = max(n for n in (1, 2, 4) if n == 1 or (steps % n == 0 and tiles <= MOST_CLUSTERS[n]))
    resident = min(4, max(1, tiles // MULTIPROCESSORS))
    blocks = math.gcd(steps // splits, 1 if tokens >= 64 else 4 if resident == 1 else 2)
    beside = 2 if tokens == 128 else 1
    config = Few(tokens, HEIGHT, splits, beside=beside, blocks=blocks).deepest(shape, resident)
    enough = config.stages >= min(2, steps // splits // blocks)
    return config if enough else config._replace(blocks=1).deepest(shape)


def many_for(shape: Shape) -> Many:
    """The tiles that are done soonest; a round of programs takes as long as its tile is large, and a bit."""

    def cost(config: Many) -> float:
        tiles = -(-shape.tokens // config.tokens) * -(-shape.rows // config.rows)
        rounds = -(-tiles // MULTIPROCESSORS)
        return rounds * (config.tokens * config.rows + STEP_COST)

    possible = [each for each in TILES if each.tokens <= shape.tokens and each.rows <= max(shape.rows, 64)]
    return min(possible, key=cost)


def takes(x: Any, weight: Any, out_dtype: Any) -> bool:
    """Whether the kernels can do it: FP8 by FP8, in bfloat16."""
    if not isinstance(x, QuantArray) or not isinstance(weight, QuantArray):
        return False
    right_formats = x.format == "fp8_token128" and weight.format == "fp8_block128" and weight.ndim == 2
    if not right_formats or jnp.dtype(out_dtype) != jnp.bfloat16:
        return False
    shape = shape_of(x, weight)
    return shape.columns % BLOCK == 0 and shape.rows % 8 == 0 and min(shape) > 0


def shape_of(x: QuantArray, weight: QuantArray) -> Shape:
    rows, columns = weight.shape
    return Shape(math.prod(x.shape[:-1]), rows, columns)
