"""Prefill, decode steps and whole generations: pure functions of parameters, tokens and caches.

All of them are jitted with the model's config and numerics static, so they can be called as they are or
inside a larger `jax.jit`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from dsv4_jax.cache import Cache, make_cache
from dsv4_jax.config import Config
from dsv4_jax.model import Params, Transformer, bind
from dsv4_jax.numerics import Numerics
from dsv4_jax.sampling import SamplingArrays, sample

NO_TOKEN = -1  # fills a row of tokens after its end


@functools.partial(jax.jit, static_argnames=("config", "numerics", "chunk"), donate_argnames="cache")
def prefill(
    config: Config,
    numerics: Numerics,
    params: Params,
    ids: Int32[Array, "B T"],
    position: Int32[Array, " B"],
    length: Int32[Array, " B"],
    cache: Cache,
    *,
    chunk: int = 2048,
) -> tuple[Float32[Array, "B V"], Cache]:
    """Reads prompts, or further pieces of them, and gives the logits after each row's last token.

    Args:
      ids: tokens, padded at the end to one length.
      position: where each row's first token stands; 0 for a new sequence.
      length: tokens of each row that count, at least 1.
      cache: of the tokens before; its buffers are reused for the one returned.
      chunk: tokens that run through the model at once, which bounds the memory of activations.
    """
    model = bind(config, numerics, params)
    streams, cache = read_prompt(model, ids, position, length, cache, chunk)
    return model.logits(streams), cache


@functools.partial(jax.jit, static_argnames=("config", "numerics"), donate_argnames="cache")
def decode_step(
    config: Config,
    numerics: Numerics,
    params: Params,
    token: Int32[Array, " B"],
    position: Int32[Array, " B"],
    cache: Cache,
) -> tuple[Float32[Array, "B V"], Cache]:
    """Logits after one more token per row, which stands at `position`."""
    model = bind(config, numerics, params)
    streams, cache = model(token[:, None], position, jnp.ones_like(position), cache)
    return model.logits(streams[:, 0]), cache


def read_prompt(
    model: Transformer,
    ids: Int32[Array, "B T"],
    position: Int32[Array, " B"],
    length: Int32[Array, " B"],
    cache: Cache,
    chunk: int,
) -> tuple[Float[Array, "B X M"], Cache]:
    """The streams of each row's last token, and the cache with all tokens in it."""
    batch, tokens = ids.shape

    def at(streams, token):
        return jnp.take_along_axis(streams, token[:, None, None, None], axis=1)[:, 0]

    if tokens <= chunk:
        streams, cache = model(ids, position, length, cache)
        return at(streams, length - 1), cache

    def one_chunk(carry, piece):
        cache, last = carry
        piece_ids, start = piece
        here = jnp.clip(length - start, 0, chunk)  # rows that ended in an earlier chunk have none
        streams, cache = model(piece_ids, position + start, here, cache)
        newest = at(streams, jnp.maximum(here - 1, 0))
        return (cache, jnp.where(here[:, None, None] > 0, newest, last)), None

    count = -(-tokens // chunk)
    padded = jnp.pad(ids, ((0, 0), (0, count * chunk - tokens)))
    pieces = padded.reshape(batch, count, chunk).swapaxes(0, 1)
    nothing = jnp.zeros((batch, model.hc_mult, model.embed.weight.shape[1]), model.embed.dtype)
    (cache, last), _ = jax.lax.scan(one_chunk, (cache, nothing), (pieces, jnp.arange(count) * chunk))
    return last, cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns, one row per prompt.

    Attributes:
      tokens: the generated tokens, an EOS included; NO_TOKEN after the end.
      logprobs: of these tokens under the model, before temperature; 0 after the end.
      count: how many tokens there are.
      stopped: whether the row ended at an EOS, and not at its maximum.
      not_finite: whether the row ended because its logits were not finite numbers.
    """

    tokens: Int32[Array, "B max_new"]
    logprobs: Float32[Array, "B max_new"]
    count: Int32[Array, " B"]
    stopped: Bool[Array, " B"]
    not_finite: Bool[Array, " B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _DecodeState:
    written: Generation
    done: Bool[Array, " B"]
    position: Int32[Array, " B"]  # of the token that the next step reads
    cache: Cache


@functools.partial(jax.jit, static_argnames=("config", "numerics", "max_new", "max_len", "chunk"))
def generate(
    config: Config,
    numerics: Numerics,
    params: Params,
    ids: Int32[Array, "B T"],
    length: Int32[Array, " B"],
    sampling: SamplingArrays,
    max_tokens: Int32[Array, " B"],
    stop_at_eos: Bool[Array, " B"],
    *,
    max_new: int,
    max_len: int,
    chunk: int = 2048,
) -> Generation:
    """Continues prompts, the whole token loop on the device.

    Compiles once per shape of `ids`, `max_new` and `max_len`; everything else may change freely.

    Args:
      ids: prompts, padded at the end.
      length: tokens of each prompt, at least 1.
      sampling: how each row chooses its tokens.
      max_tokens: tokens to generate for each row, from 0 (a row that only fills the batch) to `max_new`.
      stop_at_eos: whether `config.eos_token_id` ends the row.
      max_new: room for generated tokens.
      max_len: room in the caches, at least the longest prompt plus its `max_tokens`.
      chunk: as in `prefill`.
    """
    batch = ids.shape[0]
    model = bind(config, numerics, params)
    cache = make_cache(config, numerics, batch=batch, max_len=max_len)
    streams, cache = read_prompt(model, ids, jnp.zeros_like(length), length, cache, chunk)

    def choose(state: _DecodeState, streams: Float[Array, "B X M"]) -> _DecodeState:
        """Adds a token to each row that is not done."""
        logits, written = model.logits(streams), state.written
        token, logprob = sample(logits, sampling, written.count)
        finite = jnp.isfinite(logits).all(-1)
        adds = ~state.done & finite
        rows, column = jnp.arange(batch), jnp.where(adds, written.count, max_new)
        count = written.count + adds
        stopped = adds & stop_at_eos & (token == config.eos_token_id)
        written = Generation(
            written.tokens.at[rows, column].set(token, mode="drop"),
            written.logprobs.at[rows, column].set(logprob, mode="drop"),
            count,
            written.stopped | stopped,
            written.not_finite | (~state.done & ~finite),
        )
        done = state.done | ~finite | stopped | (count >= max_tokens)
        return _DecodeState(written, done, state.position, state.cache)

    def step(state: _DecodeState) -> _DecodeState:
        newest = jnp.maximum(state.written.count - 1, 0)
        token = jnp.take_along_axis(state.written.tokens, newest[:, None], axis=1)
        reads = (~state.done).astype(jnp.int32)  # a row that is done writes nothing into its cache
        streams, cache = model(jnp.maximum(token, 0), state.position, reads, state.cache)
        return choose(_DecodeState(state.written, state.done, state.position + reads, cache), streams[:, 0])

    nothing = Generation(
        jnp.full((batch, max_new), NO_TOKEN, jnp.int32),
        jnp.zeros((batch, max_new), jnp.float32),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros(batch, bool),
        jnp.zeros(batch, bool),
    )
    state = choose(_DecodeState(nothing, max_tokens <= 0, length, cache), streams)
    return jax.lax.while_loop(lambda state: ~state.done.all(), step, state).written
