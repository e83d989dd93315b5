"""Prefill, decode steps and whole generations: pure functions of parameters, tokens and caches.

All of them are jitted with the model's config and numerics static, so they can be called as they are or
inside a larger `jax.jit`.
"""

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from dsv4_jax.cache import Cache, make_cache
from dsv4_jax.config import Config
from dsv4_jax.decode import (
    INVARIANT_PIECE,
    MOST_DRAFTS,
    Added,
    Caches,
    Models,
    Requests,
    Sequences,
    first_step,
    read_one_by_one,
    read_out,
    step,
)
from dsv4_jax.model import Params, bind
from dsv4_jax.mtp import bind_mtp, make_mtp_cache
from dsv4_jax.numerics import Numerics
from dsv4_jax.penalties import Said

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
    models = Models(bind(config, numerics, params))
    streams, caches = read_prompt(models, ids, position, length, Caches(cache), chunk)
    return models.main.logits(streams), caches.main


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
    models: Models,
    ids: Int32[Array, "B T"],
    position: Int32[Array, " B"],
    length: Int32[Array, " B"],
    caches: Caches,
    chunk: int,
) -> tuple[Float[Array, "B X M"], Caches]:
    """The streams of each row's last token, and the caches with all tokens in them.

    The MTP head, where there is one, reads all but the last: its input at a position needs the next token.
    """
    batch, tokens = ids.shape
    model, head = models

    def at(streams, token):
        return jnp.take_along_axis(streams, token[:, None, None, None], axis=1)[:, 0]

    def read(caches: Caches, ids, next_ids, start, here, there):
        streams, main = model(ids, position + start, here, caches.main)
        if head is None or caches.head is None:
            return streams, Caches(main, caches.head)
        return streams, Caches(main, head(model, streams, next_ids, position + start, there, caches.head)[1])

    following = jnp.pad(ids[:, 1:], ((0, 0), (0, 1)))
    if tokens <= chunk:
        streams, caches = read(caches, ids, following, 0, length, jnp.maximum(length - 1, 0))
        return at(streams, length - 1), caches

    def one_chunk(carry, piece):
        caches, last = carry
        piece_ids, next_ids, start = piece
        # Rows that ended in an earlier chunk have nothing here.
        here, there = jnp.clip(length - start, 0, chunk), jnp.clip(length - 1 - start, 0, chunk)
        streams, caches = read(caches, piece_ids, next_ids, start, here, there)
        newest = at(streams, jnp.maximum(here - 1, 0))
        return (caches, jnp.where(here[:, None, None] > 0, newest, last)), None

    count = -(-tokens // chunk)

    def pieces(ids):
        padded = jnp.pad(ids, ((0, 0), (0, count * chunk - tokens)))
        return padded.reshape(batch, count, chunk).swapaxes(0, 1)

    nothing = jnp.zeros((batch, model.hc_mult, model.embed.weight.shape[1]), model.embed.dtype)
    each = pieces(ids), pieces(following), jnp.arange(count) * chunk
    (caches, last), _ = jax.lax.scan(one_chunk, (caches, nothing), each)
    return last, caches


def _read_invariant(
    models: Models, ids: Int32[Array, "B T"], length: Int32[Array, " B"], caches: Caches
) -> Caches:
    """The caches with all tokens of each row in them but the last.

    Pieces of one length start at its multiples, and are read in a loop that the compiler does not dissolve
    (see `decode.read_one_by_one`): so neither T nor the other rows' lengths change how a token is read.
    """
    model, head = models
    batch, tokens = ids.shape
    whole = -(-tokens // INVARIANT_PIECE) * INVARIANT_PIECE
    padded = jnp.pad(ids, ((0, 0), (0, whole + 1 - tokens)))

    def one(number, caches: Caches) -> Caches:
        start = number * INVARIANT_PIECE
        piece, following = (
            jax.lax.dynamic_slice(padded, (0, first), (batch, INVARIANT_PIECE))
            for first in (start, start + 1)
        )
        position, here = jnp.full(batch, start), jnp.clip(length - 1 - start, 0, INVARIANT_PIECE)
        streams, main = model(piece, position, here, caches.main)
        if head is None or caches.head is None:
            return Caches(main, caches.head)
        return Caches(main, head(model, streams, following, position, here, caches.head)[1])

    count = (length.max() - 1 + INVARIANT_PIECE - 1) // INVARIANT_PIECE
    return jax.lax.fori_loop(0, count, one, caches)


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
      drafted: how many tokens the MTP head drafted for the row.
      accepted: how many of the row's tokens are such drafts.
    """

    tokens: Int32[Array, "B max_new"]
    logprobs: Float32[Array, "B max_new"]
    count: Int32[Array, " B"]
    stopped: Bool[Array, " B"]
    not_finite: Bool[Array, " B"]
    drafted: Int32[Array, " B"]
    accepted: Int32[Array, " B"]

    @classmethod
    def nothing(cls, batch: int, max_new: int) -> Self:
        none, no = jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool)
        tokens = jnp.full((batch, max_new), NO_TOKEN, jnp.int32)
        return cls(tokens, jnp.zeros((batch, max_new), jnp.float32), none, no, no, none, none)

    def extended(self, added: Added, drafted: Int32[Array, " B"]) -> Self:
        """With the tokens of a step, for which so many were drafted, at each row's end."""
        rows, place = jnp.arange(self.count.shape[0])[:, None], jnp.arange(added.tokens.shape[1])
        real = place < added.count[:, None]
        column = jnp.where(real, self.count[:, None] + place, self.tokens.shape[1])
        return type(self)(
            self.tokens.at[rows, column].set(added.tokens, mode="drop"),
            self.logprobs.at[rows, column].set(added.logprobs, mode="drop"),
            self.count + added.count,
            self.stopped | added.stopped,
            self.not_finite | added.not_finite,
            self.drafted + drafted,
            self.accepted + added.accepted,
        )


@functools.partial(
    jax.jit,
    static_argnames=("config", "numerics", "max_new", "max_len", "draft_tokens", "chunk", "invariant"),
)
def generate(
    config: Config,
    numerics: Numerics,
    params: Params,
    ids: Int32[Array, "B T"],
    length: Int32[Array, " B"],
    requests: Requests,
    *,
    max_new: int,
    max_len: int,
    mtp_params: Params | None = None,
    draft_tokens: int = 0,
    chunk: int = 2048,
    invariant: bool = False,
) -> Generation:
    """Continues prompts, the whole token loop on the device.

    Compiles once per shape of `ids`, `max_new`, `max_len` and `draft_tokens`; everything else may change.

    Args:
      ids: prompts, padded at the end.
      length: tokens of each prompt, at least 1.
      requests: what each row asks for; `max_tokens` is at most `max_new`.
      max_new: room for generated tokens.
      max_len: room in the caches, at least the longest prompt plus its `max_tokens`.
      mtp_params: of the MTP head, which drafts.
      draft_tokens: tokens it drafts for each step of a row; 0 for none. Greedy rows get the same tokens with
        any number, others the same distribution.
      chunk: as in `prefill`; `invariant` has a length of its own.
      invariant: with the same B and `max_len` a row's tokens and logprobs have the same bits whatever the
        other rows and the padding are and, where it is greedy, with any number of drafts. docs/numerics.md
        says what that costs.

    Raises:
      ValueError: drafts without the head's parameters, or more than MOST_DRAFTS of them with `invariant`.
    """
    batch, head, head_cache = ids.shape[0], None, None
    if invariant and draft_tokens > MOST_DRAFTS:
        raise ValueError(f"draft_tokens={draft_tokens}: invariant allows {MOST_DRAFTS} at most")
    # Caches of one size for any number of drafts, so that what takes them is compiled the same.
    sizes = {"batch": batch, "max_len": max_len, "max_draft": MOST_DRAFTS if invariant else draft_tokens}
    if draft_tokens:
        if mtp_params is None:
            raise ValueError(f"draft_tokens={draft_tokens} needs mtp_params")
        head, head_cache = bind_mtp(config, numerics, mtp_params), make_mtp_cache(config, numerics, **sizes)
    models = Models(bind(config, numerics, params), head)
    caches = Caches(make_cache(config, numerics, **sizes), head_cache)
    eos = config.eos_token_id
    if invariant:
        caches = _read_invariant(models, ids, length, caches)
        token = jnp.take_along_axis(ids, length[:, None] - 1, axis=1)
        last, main = read_one_by_one(models.main, token, length - 1, jnp.ones_like(length), caches.main)
        caches = Caches(main, caches.head)
    else:
        streams, caches = read_prompt(models, ids, jnp.zeros_like(length), length, caches, chunk)
        last = read_out(models.main, streams[:, None])
    said = Said.prompts_of(ids, length, config.vocab_size) if requests.penalties is not None else None
    added, sequences = first_step(models, requests, last, length, caches, draft_tokens, eos, said)

    def one_step(carry: tuple[Generation, Sequences]) -> tuple[Generation, Sequences]:
        written, sequences = carry
        drafted = jnp.where(sequences.done, 0, draft_tokens)
        added, sequences = step(models, requests, sequences, eos, invariant=invariant)
        return written.extended(added, drafted), sequences

    written = Generation.nothing(batch, max_new).extended(added, jnp.zeros(batch, jnp.int32))
    return jax.lax.while_loop(lambda carry: ~carry[1].done.all(), one_step, (written, sequences))[0]
