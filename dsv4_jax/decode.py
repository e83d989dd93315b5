"""One step of sequences under way: the newest tokens and the drafts after them in, more of both out.

A step without drafts is the ordinary decode step. With k drafts the model reads k + 1 tokens at once, keeps
those that stand (`speculative.verify`), and its MTP head drafts the next k. Nothing is undone when a draft
falls: the sequence is simply that much shorter, and what the caches hold beyond its end is written anew when
it gets there (see `cache`).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from dsv4_jax.cache import Cache, LayerCache
from dsv4_jax.model import Transformer
from dsv4_jax.mtp import MTPHead
from dsv4_jax.sampling import SamplingArrays, logprobs_of
from dsv4_jax.speculative import propose, verify

FREE = -1  # in place of a token: the model chooses


class Models(NamedTuple):
    """The model and, where there are drafts, its MTP head; bound to parameters."""

    main: Transformer
    head: MTPHead | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Requests:
    """What each row asks for.

    Attributes:
      sampling: how it chooses its tokens.
      max_tokens: how many it gets; 0 for a row that only fills the batch.
      stop_at_eos: whether an EOS ends it.
      forced: its next token, whatever the model says, or FREE; None where no row is ever told.
    """

    sampling: SamplingArrays
    max_tokens: Int32[Array, " B"]
    stop_at_eos: Bool[Array, " B"]
    forced: Int32[Array, " B"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Caches:
    """What has been read: by the model, and by the MTP head where there is one."""

    main: Cache
    head: LayerCache | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sequences:
    """Sequences under way, one a row.

    Attributes:
      token: the newest token; nothing has read it yet.
      position: where it stands.
      drafts: what may come after it.
      drawn_from: logits of the distributions that the drafts were drawn from.
      count: how many tokens the row has generated.
      done: whether it gets no more.
      caches: of the tokens before the newest.
    """

    token: Int32[Array, " B"]
    position: Int32[Array, " B"]
    drafts: Int32[Array, "B k"]
    drawn_from: Float32[Array, "B k V"]
    count: Int32[Array, " B"]
    done: Bool[Array, " B"]
    caches: Caches


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Added:
    """What a step adds to each row.

    Attributes:
      tokens: of them the first `count` are real, an EOS among them the last.
      logprobs: of these under the model, before temperature.
      count: 0 for a row that was done.
      accepted: how many of the real ones were drafts.
      stopped: whether the row ended at an EOS.
      not_finite: whether it ended because its logits were not finite numbers.
    """

    tokens: Int32[Array, "B k+1"]
    logprobs: Float32[Array, "B k+1"]
    count: Int32[Array, " B"]
    accepted: Int32[Array, " B"]
    stopped: Bool[Array, " B"]
    not_finite: Bool[Array, " B"]


def first_step(
    models: Models,
    requests: Requests,
    streams: Float[Array, "B X M"],
    length: Int32[Array, " B"],
    caches: Caches,
    draft_tokens: int,
    eos_token_id: int,
) -> tuple[Added, Sequences]:
    """The first token of each row, from the streams of its prompt's last token.

    Args:
      length: tokens of each prompt.
      caches: of the whole prompt; the head's of all of it but the last token.
      draft_tokens: how many drafts each step is to have.
    """
    batch, vocab = length.shape[0], models.main.head.weight.shape[0]
    before = Sequences(
        token=jnp.zeros_like(length),
        position=length - 1,
        drafts=jnp.zeros((batch, 0), jnp.int32),
        drawn_from=jnp.zeros((batch, 0, vocab), jnp.float32),
        count=jnp.zeros_like(length),
        done=requests.max_tokens <= 0,
        caches=caches,
    )
    return _advance(models, requests, before, streams[:, None], draft_tokens, eos_token_id)


def step(
    models: Models, requests: Requests, sequences: Sequences, eos_token_id: int
) -> tuple[Added, Sequences]:
    """One to k + 1 more tokens for each row that is not done; a row that is writes nothing anywhere."""
    drafts, caches = sequences.drafts, sequences.caches
    ids = jnp.concatenate([sequences.token[:, None], drafts], axis=1)
    reads = jnp.where(sequences.done, 0, ids.shape[1])
    streams, main = models.main(ids, sequences.position, reads, caches.main)
    read = dataclasses.replace(sequences, caches=Caches(main, caches.head))
    return _advance(models, requests, read, streams, drafts.shape[1], eos_token_id)


def _advance(
    models: Models,
    requests: Requests,
    sequences: Sequences,
    streams: Float[Array, "B n X M"],
    draft_tokens: int,
    eos_token_id: int,
) -> tuple[Added, Sequences]:
    """What follows from the streams of the tokens just read: more tokens, and the next drafts."""
    logits = models.main.logits(streams)
    drafts, count = sequences.drafts, sequences.count
    standing, token = verify(logits, drafts, sequences.drawn_from, requests.sampling, count)

    if requests.forced is not None:
        told = requests.forced != FREE
        standing, token = jnp.where(told, 0, standing), jnp.where(told, requests.forced, token)

    # tokens[i] follows the i-th token read: drafts that stand, then the model's own.
    place = jnp.arange(streams.shape[1])
    padded = jnp.pad(drafts, ((0, 0), (0, 1)))
    tokens = jnp.where(place < standing[:, None], padded, token[:, None])
    added = _added(requests, sequences, logits, tokens, standing, eos_token_id)
    ended = added.stopped | added.not_finite | (count + added.count >= requests.max_tokens)
    done = sequences.done | ended

    reads = jnp.where(done, 0, standing + 1)
    drafted = _draft(models, requests, sequences, streams, tokens, reads, count + added.count, draft_tokens)
    drafts, drawn_from, head = drafted
    following = Sequences(
        token=jnp.where(done, sequences.token, token),
        position=sequences.position + reads,
        drafts=drafts,
        drawn_from=drawn_from,
        count=count + added.count,
        done=done,
        caches=Caches(sequences.caches.main, head),
    )
    return added, following


def _added(
    requests: Requests,
    sequences: Sequences,
    logits: Float32[Array, "B n V"],
    tokens: Int32[Array, "B n"],
    standing: Int32[Array, " B"],
    eos_token_id: int,
) -> Added:
    """The new tokens up to an EOS, to the row's maximum, or to logits that are no numbers."""
    place = jnp.arange(tokens.shape[1])
    finite = jnp.isfinite(logits).all(-1)
    fit = jnp.minimum(standing + 1, requests.max_tokens - sequences.count)
    fit = jnp.where(sequences.done, 0, fit)
    sound = jnp.cumprod(finite.astype(jnp.int32), axis=1).sum(1, dtype=jnp.int32)
    ends = (
        (tokens == eos_token_id) & requests.stop_at_eos[:, None] & (place < jnp.minimum(fit, sound)[:, None])
    )
    to_eos = jnp.where(ends.any(1), jnp.argmax(ends, axis=1) + 1, tokens.shape[1])
    count = jnp.minimum(jnp.minimum(fit, sound), to_eos).astype(jnp.int32)
    return Added(
        tokens=tokens,
        logprobs=logprobs_of(logits, tokens),
        count=count,
        accepted=jnp.minimum(standing, count),
        stopped=ends.any(1),
        not_finite=~sequences.done & ~ends.any(1) & (sound < fit),
    )


def _draft(
    models: Models,
    requests: Requests,
    sequences: Sequences,
    streams: Float[Array, "B n X M"],
    tokens: Int32[Array, "B n"],
    reads: Int32[Array, " B"],
    count: Int32[Array, " B"],
    draft_tokens: int,
) -> tuple[Int32[Array, "B k"], Float32[Array, "B k V"], LayerCache | None]:
    """The next drafts of each row, and the head's cache with the first `reads` of the new tokens in it.

    The head reads the model's streams wherever there are any; for the second draft and on it reads its own.
    What it wrote into its cache from those is written anew by the next step, from the model's.
    """
    main, head = models
    if head is None or draft_tokens == 0:
        return (
            jnp.zeros((tokens.shape[0], 0), jnp.int32),
            jnp.zeros((tokens.shape[0], 0, main.head.weight.shape[0]), jnp.float32),
            sequences.caches.head,
        )
    cache, position = sequences.caches.head, sequences.position
    assert cache is not None
    own, cache = head(main, streams, tokens, position, reads, cache)
    last = jnp.maximum(reads - 1, 0)[:, None, None, None]
    own, position = jnp.take_along_axis(own, last, axis=1), position + reads
    drafts, drawn_from = [], []
    for number in range(draft_tokens):
        if number:
            one = jnp.minimum(reads, 1)
            own, cache = head(main, own, drafts[-1][:, None], position + number - 1, one, cache)
        draft, logits = propose(head.logits(main, own[:, 0]), requests.sampling, count + number)
        drafts.append(draft)
        drawn_from.append(logits)
    return jnp.stack(drafts, 1), jnp.stack(drawn_from, 1), cache
