"""How the Mosaic kernel of the experts is cut into tiles, and which cut is for how many tokens."""

import functools
from typing import Any, Literal, NamedTuple

import jax

from pallas_kernels.expert_mlp.tiles import COLUMNS, ROWS, TILE_BYTES

HEIGHT = ROWS  # of a weight in one tensor core product
BLOCK = COLUMNS  # that share an activation's scale
GATED_ROWS = 2 * BLOCK  # of gate and up: a block of inner columns, which is quantised once it is whole
PART_SLOTS = 2  # of sums of 64 rows that wait to be finished
SHARED_BYTES = 232448 - 2048  # what a program may have on Hopper, less room for barriers


def multiprocessors() -> int:
    """How many programs run at a time; where there is no GPU to ask, those of an H100 or H200."""
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else 132


class Config(NamedTuple):
    """How a product is cut into tiles, and how a program works through one.

    Attributes:
      widths: tokens of each tensor core product; together they are the tokens of a tile, at most 256. All are
        multiples of 16. Products under way need registers beside the running sums.
      shorter: other widths, the narrowest first, for tiles with few tokens. A tile is worked on in the
        narrowest that hold its tokens.
      waves: times 64 rows of the weight that each consumer multiplies by those tokens: 1 or 2.
      stages: how many are under way or in use.
      blocks: of 128 columns in a stage. More mean fewer waits and copies, and the second's decoding beside
        the first's product.
      consumers: warpgroups that multiply, 2 or 4: more hide each other's waiting, fewer have more registers.
      room: tokens of a tile as they lie in shared memory; those of `widths` if 0.
      without: work to leave out, for measuring what it costs; the result is wrong then. "products" leaves
        one of four to the tensor core.
    """

    widths: tuple[int, ...]
    shorter: tuple[tuple[int, ...], ...] = ()
    waves: int = 1
    stages: int = 2
    blocks: int = 1
    consumers: int = 2
    room: int = 0
    without: Literal["", "decoding", "promotion", "products"] = ""

    @property
    def tokens(self) -> int:
        return sum(self.widths)

    @property
    def places(self) -> int:
        """Tokens of a tile as they lie in shared memory."""
        return self.room or self.tokens

    @property
    def sums(self) -> int:
        """Columns of all products by a tile."""
        return self.tokens

    def cut(self, widths: tuple[int, ...]) -> "Config":
        """For tiles of fewer tokens, which lie where more might."""
        return self._replace(widths=widths, shorter=(), room=self.places)

    @property
    def all_widths(self) -> tuple[tuple[int, ...], ...]:
        """The narrowest first."""
        return (*self.shorter, self.widths)

    @property
    def parts(self) -> int:
        """Products under way at a time: with four consumers the others' keep the tensor core busy."""
        return 2 if self.consumers == 2 else 1

    @property
    def scales(self) -> int:
        """Scales of a tile as stored: padded, since copies start at multiples of 128 bytes."""
        return -(-self.places // 32) * 32

    @property
    def rows(self) -> int:
        """Rows of the weight that the consumers multiply at a time."""
        return self.consumers * self.waves * HEIGHT

    def passes(self, gated: bool) -> int:
        """Times `rows` that a program takes before it writes."""
        return GATED_ROWS // self.rows if gated else 1

    def out_bytes(self, gated: bool) -> int:
        """Bytes of a token in shared memory on its way out: a block of inner columns in bfloat16, of all
        consumers together; or a consumer's rows.
        """
        return 2 * BLOCK if gated else self.waves * HEIGHT * 2

    def shared_bytes(self, gated: bool) -> int:
        weights = self.rows // ROWS * TILE_BYTES
        stage = self.blocks * (weights + self.tokens * BLOCK + self.scales * 4)
        return self.stages * stage + (1 if gated else self.consumers) * self.tokens * self.out_bytes(gated)


class FewConfig(NamedTuple):
    """How the kernel for few tokens is cut: four consumers share 64 rows of a weight and divide its columns.

    Attributes:
      tokens: of a tile, a multiple of 8, at most 32.
      terms: E4M3 numbers that a token's activations are the sum of: 1 as `fp8_token128` rounds them, 2 for
        what bfloat16 holds.
      blocks: of 128 columns of each consumer in a stage.
      stages: how many are under way or in use.
      ahead: how many are under way at most, if not 0: more only queue up in front of all else that is read,
        which then takes five microseconds. What is finished next is read early, too, and for a single token
        nothing is read to know where its activations are.
    """

    tokens: int
    terms: int = 1
    blocks: int = 1
    stages: int = 2
    ahead: int = 0

    consumers = 4
    waves = 1
    parts = 1
    without = ""

    @property
    def places(self) -> int:
        """Columns of a tensor core product."""
        return self.tokens * self.terms

    @property
    def sums(self) -> int:
        return self.places

    @property
    def scales(self) -> int:
        """Of a block, as they lie in shared memory."""
        return self.places

    @property
    def columns(self) -> int:
        """Of a stage."""
        return self.consumers * self.blocks * BLOCK

    def blocks_each(self, columns: int) -> int:
        """Blocks of columns that a consumer has of so many."""
        return columns // BLOCK // self.consumers

    def shared_bytes(self, columns: int) -> int:
        """Where the wider of both products has so many columns."""
        stage = self.consumers * self.blocks * TILE_BYTES
        x = columns // BLOCK * self.places * (BLOCK + 4)
        return self.stages * stage + x + PART_SLOTS * self.consumers * HEIGHT * self.tokens * 4


class Configs(NamedTuple):
    """Of both products; their tiles of tokens are the same."""

    gate_up: Config
    down: Config


def deepest(widths: tuple[int, ...], **more: Any) -> Configs:
    """Those with as many stages as shared memory has room for, up to eight blocks of columns."""

    def one(gated: bool) -> Config:
        config = Config(widths, **more)
        possible = [config._replace(stages=stages) for stages in range(2, 8 // config.blocks + 1)]
        return max(each for each in possible if each.shared_bytes(gated) <= SHARED_BYTES)

    return Configs(one(True), one(False))


# By the tokens that an expert has on average, up to which they are meant.
_four = functools.partial(deepest, consumers=4)
CONFIGS = (
    (14, _four((16,), blocks=2)),
    (26, _four((32,), blocks=2)),
    (58, _four((64,))),
    (100, deepest((64, 48), blocks=2)),
    (116, deepest((64, 64), blocks=2)),
    (146, deepest((80, 80), blocks=2)),
    (2**31, deepest((80, 80, 64))),
)


def configs_for(rows: int, n_routed_experts: int) -> Configs:
    """For so many (token, choice) rows: most experts' rows fit a tile."""
    return next(configs for most, configs in CONFIGS if rows <= most * n_routed_experts)


def deepest_few(columns: int, tokens: int, **more: Any) -> FewConfig:
    """With as many stages as shared memory has room for, where the wider product has so many columns."""
    config = FewConfig(tokens, **more)
    fixed, stage = (config._replace(stages=n).shared_bytes(columns) for n in (0, 1))
    stages = min(16, (SHARED_BYTES - fixed) // (stage - fixed))
    return config._replace(stages=stages, ahead=min(config.ahead, stages))


# Tokens of a tile, by the (token, choice) rows that an expert has on average up to which they are meant; for
# activations of one term and of two.
FEW_TOKENS = {1: ((4, 8), (9, 16), (14, 24)), 2: ((4, 8), (14, 16))}


def few_config_for(rows: int, shape: tuple[int, ...], activation: str | None) -> FewConfig | None:
    """For so many (token, choice) rows and gate and up of such a shape; None: they are too many, or a
    consumer's share of the columns is no whole number of blocks.
    """
    (count, both, hidden), terms = shape, 1 if activation else 2
    tokens = next((tokens for most, tokens in FEW_TOKENS[terms] if rows <= most * count), None)
    if tokens is None or hidden % (4 * BLOCK) or both // 2 % (4 * BLOCK):
        return None
    config = deepest_few(max(hidden, both // 2), tokens, terms=terms, ahead=3)
    return config if config.stages >= 3 else None
