"""The whole of DeepSeek-V4: embed, blocks, head."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from dsv4_jax import parallel
from dsv4_jax.cache import Cache
from dsv4_jax.config import Config
from dsv4_jax.nn.block import Block
from dsv4_jax.nn.hyper_connection import HyperHead, Unwritten
from dsv4_jax.nn.linear import PlainLinear
from dsv4_jax.nn.norm import RMSNorm
from dsv4_jax.nn.parameter import parameter
from dsv4_jax.numerics import Numerics
from dsv4_jax.parallel import Along, spread

Params = dict[Any, Any]  # nested, keyed by attribute and layer; leaves are arrays and QuantArrays


class Embedding(nnx.Module):
    """Token ids to vectors."""

    def __init__(self, config: Config, numerics: Numerics):
        self.weight = parameter((config.vocab_size, config.hidden_size), jnp.bfloat16, "vocab", "hidden")
        self.dtype = numerics.dtype

    def __call__(self, ids: Int32[Array, "B *tokens"]) -> Float[Array, "B *tokens M"]:
        return spread(Embedding._look_up, (self,), ((ids, Along("batch")),), Along("batch"))

    def _look_up(self, ids: Int32[Array, "B *tokens"]) -> Float[Array, "B *tokens M"]:
        rows = self.weight.get_value()
        here = ids - parallel.part("vocab") * rows.shape[0]
        found = rows[here].astype(self.dtype)  # of an id that is not here: any row
        if parallel.parts("vocab") > 1:
            mine = (here >= 0) & (here < rows.shape[0])
            found = parallel.total(jnp.where(mine[..., None], found, 0), "vocab")
        return found


class Transformer(nnx.Module):
    """The main model. Its constructor declares parameters without numbers; `bind` puts them in."""

    def __init__(self, config: Config, numerics: Numerics):
        self.embed = Embedding(config, numerics)
        self.layers = nnx.List(
            [
                Block(config, numerics, ratio, hashed=layer < config.num_hash_layers)
                for layer, ratio in enumerate(config.main_ratios)
            ]
        )
        self.hc_head = HyperHead(config)
        self.norm = RMSNorm(config.hidden_size, "hidden", config.rms_norm_eps)
        # The head runs in float32: ties between tokens are decided here.
        self.head = PlainLinear((config.vocab_size, config.hidden_size), ("vocab", "hidden"), jnp.float32)
        self.hc_mult = config.hc_mult

    def __call__(
        self,
        ids: Int32[Array, "B T"],
        position: Int32[Array, " B"],
        length: Int32[Array, " B"],
        cache: Cache,
    ) -> tuple[Float[Array, "B T X M"], Cache]:
        """Runs new tokens through all layers; prefill, chunks and decode steps are this one call.

        Args:
          ids: the new tokens, padded at the end.
          position: where in its sequence each row's first new token stands; 0 starts a new sequence.
          length: how many of each row's tokens count. Padding leaves no trace in the cache.
          cache: of the `position` tokens before.

        Returns:
          The residual streams after the last layer (of padding: meaningless), and the new cache.
        """
        x = self.embed(ids)
        streams = jnp.broadcast_to(x[:, :, None], (*ids.shape, self.hc_mult, x.shape[-1]))
        return run_blocks(self.layers, streams, ids, position, length, cache)

    def logits(self, streams: Float[Array, "B *tokens X M"]) -> Float32[Array, "B *tokens V"]:
        """Next-token logits from the streams of `__call__`."""
        return logits(self.hc_head, self.norm, self.head, streams)


def logits(
    hc_head: HyperHead, norm: RMSNorm, head: PlainLinear, streams: Float[Array, "B *tokens X M"]
) -> Float32[Array, "B *tokens V"]:
    """Streams to logits; on a mesh each device has those of its own part of the vocabulary."""

    def read(hc_head, norm, head, streams):
        return head(norm(hc_head(streams)))

    out = Along("batch", *[None] * (streams.ndim - 3), "vocab")
    return spread(read, (hc_head, norm, head), ((streams, Along("batch")),), out)


@functools.partial(jax.jit, static_argnums=0)
def _run_block(graphdef, params, before, ids, position, length, cache):
    block, rows = nnx.merge(graphdef, params), Along("batch")
    arguments = (before, rows), (ids, rows), (position, rows), (length, rows), (cache, cache.axes)
    return spread(Block.__call__, (block,), arguments, (rows, cache.axes))


def run_blocks(
    blocks: Iterable[Block],
    streams: Float[Array, "B T X M"],
    ids: Int32[Array, "B T"],
    position: Int32[Array, " B"],
    length: Int32[Array, " B"],
    caches: Cache,
) -> tuple[Float[Array, "B T X M"], Cache]:
    """The streams after all the blocks, at least one, and their caches.

    A block is traced once for all layers of one kind: their graphs are equal.
    """
    before, after = streams, []
    for block, cache in zip(blocks, caches, strict=True):
        before, cache = _run_block(*nnx.split(block), before, ids, position, length, cache)
        after.append(cache)
    rows = Along("batch")
    return spread(Unwritten.written, (), ((before, rows),), rows), tuple(after)


@functools.cache
def declare(config: Config, numerics: Numerics) -> Transformer:
    """The model with shapes in place of numbers."""
    return Transformer(config, numerics)


@functools.cache
def _graphdef(config: Config, numerics: Numerics):
    return nnx.split(declare(config, numerics))[0]


def bind(config: Config, numerics: Numerics, params: Params) -> Transformer:
    """The model with `params` in it; to be called where they are traced, inside `jax.jit`."""
    return nnx.merge(_graphdef(config, numerics), params)
