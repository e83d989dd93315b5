"""How fast a step of the model can be on one GPU: what must be moved at the memory's rate, or computed.

An op's floor is the longer of moving every byte once (the weights it touches, what it reads of caches, its
activations in and out) and doing its arithmetic; a step's is the sum over its ops, which run one after the
other. Experts are taken as routed at random. The rates are those of the device that is there, or of an H200.
"""

import dataclasses
from collections.abc import Iterator

import jax

from dsv4_jax.config import Config

BYTES_PER_S = {"NVIDIA H200": 4.3e12, "NVIDIA H100 80GB HBM3": 3.35e12}
BF16, FP8, TF32 = 790e12, 1500e12, 395e12  # FLOP/s; bfloat16 measured, the others as the chip is sold

FP4_BYTES = 0.5 + 1 / 32  # of a weight, with its share of a scale
KEY_VALUE_BYTES = 448 + 2 * 64 + 8  # of an entry: FP8 numbers, rotated ones in bfloat16, scales
INDEX_KEY_BYTES = 128 + 4  # FP8 numbers and a scale


def bytes_per_s() -> float:
    """Of the memory of the GPU that is there; without one that is known, of an H200's."""
    return BYTES_PER_S.get(jax.devices()[0].device_kind, BYTES_PER_S["NVIDIA H200"])


@dataclasses.dataclass(frozen=True)
class Reads:
    """`sequences`, each of which reads `new` tokens after `before` others: a decode step, or a prefill."""

    sequences: int
    new: int
    before: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.new

    @property
    def context(self) -> float:
        """Tokens that a query sees, itself included, in the mean."""
        return self.before + (self.new + 1) / 2


@dataclasses.dataclass(frozen=True)
class Op:
    """Bytes moved, and FLOP at so many a second."""

    bytes: float
    flop: float = 0
    rate: float = BF16

    @property
    def us(self) -> float:
        return max(self.bytes / bytes_per_s(), self.flop / self.rate) * 1e6


def step_us(config: Config, reads: Reads, drafts: int = 0) -> float:
    """All layers and the head; a decode step with `drafts` verifies them and drafts as many again.

    A step gives logits of each new token, a prefill (more new tokens than drafts and one) of the last one.
    """
    wanted = reads.tokens if reads.new == 1 + drafts else reads.sequences
    layers = sum(layer_us(config, ratio, reads) for ratio in config.main_ratios)
    return layers + _head(config, wanted).us + _drafts_us(config, reads, drafts)


def layer_us(config: Config, ratio: int, reads: Reads) -> float:
    """One layer: `ratio` 0 is SWA, 4 CSA, 128 HCA."""
    return sum(op.us for op in _layer(config, ratio, reads))


def _drafts_us(config: Config, reads: Reads, drafts: int) -> float:
    """The MTP head reads the new tokens for the first draft, and one token more for each that follows."""
    if not drafts:
        return 0
    hidden, total = config.hidden_size, 0.0
    for number in range(drafts):
        new = reads if number == 0 else dataclasses.replace(reads, new=1)
        inputs = 2 * _linear(new.tokens, hidden, hidden).us
        total += inputs + layer_us(config, 0, new) + _head(config, reads.sequences).us
    return total


def _layer(config: Config, ratio: int, reads: Reads) -> Iterator[Op]:
    tokens, hidden, streams = reads.tokens, config.hidden_size, config.hc_mult
    heads, head_dim, groups = config.num_attention_heads, config.head_dim, config.o_groups

    # Hyper-connections, two: streams in and out and the sub-layer's, one small product each.
    mixes = (2 + streams) * streams
    moved = mixes * streams * hidden * 4 + tokens * 2 * (2 * streams + 2) * hidden
    yield Op(2 * moved, 2 * 2 * tokens * streams * hidden * mixes, TF32)

    yield _linear(tokens, config.q_lora_rank + head_dim, hidden)  # wq_a and wkv
    yield _linear(tokens, heads * head_dim, config.q_lora_rank)  # wq_b
    yield _linear(tokens, config.o_lora_rank, heads * head_dim // groups, groups)  # wo_a
    yield _linear(tokens, hidden, groups * config.o_lora_rank)  # wo_b
    if ratio:
        yield _compressor(config, ratio, tokens)
    if ratio == 4:
        yield from _indexer(config, reads)
    yield _attention(config, ratio, reads)

    experts, inner = config.n_routed_experts, config.moe_intermediate_size
    yield Op(experts * hidden * 4 + tokens * (2 * hidden + 4 * experts), 2 * tokens * hidden * experts, TF32)
    yield _experts(config, tokens)
    yield _linear(tokens, 2 * inner, hidden)  # the shared expert
    yield _linear(tokens, hidden, inner)


def _linear(tokens: int, rows: int, columns: int, groups: int = 1) -> Op:
    """FP8 weights and activations, bfloat16 out."""
    moved = rows * columns + tokens * (columns + 2 * rows)
    return Op(groups * moved, groups * 2 * tokens * rows * columns, FP8)


def _experts(config: Config, tokens: int) -> Op:
    """FP4 weights of the experts that some token chose; in between one round trip in bfloat16."""
    experts, chosen = config.n_routed_experts, config.num_experts_per_tok
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    touched = experts * (1 - (1 - chosen / experts) ** tokens)
    each = 3 * hidden * inner
    moved = touched * each * FP4_BYTES + tokens * (4 * hidden + chosen * 4 * inner)
    return Op(moved, 2 * tokens * chosen * each, FP8)


def _compressor(config: Config, ratio: int, tokens: int) -> Op:
    """Two projections in bfloat16; rows and scores to the rings in float32, entries out."""
    channels = config.head_dim * (2 if ratio == 4 else 1)
    weights = 2 * config.hidden_size * channels
    moved = 2 * weights + tokens * (2 * config.hidden_size + 8 * channels + KEY_VALUE_BYTES / ratio)
    return Op(moved, 2 * tokens * weights)


def _indexer(config: Config, reads: Reads) -> Iterator[Op]:
    """Queries; weights of heads and keys of the index; scores; the choice."""
    tokens, hidden = reads.tokens, config.hidden_size
    heads, head_dim = config.index_n_heads, config.index_head_dim
    yield _linear(tokens, heads * head_dim, config.q_lora_rank)
    rows = heads + 4 * head_dim
    yield Op(2 * hidden * rows + tokens * (2 * hidden + 16 * head_dim), 2 * tokens * hidden * rows)

    scores = tokens * reads.context / 4
    keys = reads.sequences * (reads.before + reads.new) / 4
    moved = keys * INDEX_KEY_BYTES + tokens * heads * head_dim + 4 * scores
    yield Op(moved, 2 * scores * heads * head_dim, FP8)
    yield Op(4 * (scores + tokens * config.index_topk))


def _attention(config: Config, ratio: int, reads: Reads) -> Op:
    """Keys that queries see: each is read once, and none is read that no query sees."""
    seen = min(reads.context, config.sliding_window)
    if ratio == 4:
        seen += min(reads.context / 4, config.index_topk)
    elif ratio:
        seen += reads.context / ratio
    there = (reads.before + reads.new) * (1 + (1 / ratio if ratio else 0))
    width = config.num_attention_heads * config.head_dim
    moved = reads.sequences * min(reads.new * seen, there) * KEY_VALUE_BYTES + reads.tokens * 4 * width
    return Op(moved, 4 * reads.tokens * seen * width)


def _head(config: Config, tokens: int) -> Op:
    """Logits in float32 from bfloat16 weights."""
    vocab, hidden = config.vocab_size, config.hidden_size
    return Op(2 * vocab * hidden + tokens * (2 * hidden + 4 * vocab), 2 * tokens * hidden * vocab)
