"""One step of sequences under way: the newest tokens and the drafts after them in, more of both out.

A step without drafts is the ordinary decode step. With k drafts the model reads k + 1 tokens at once, keeps
those that stand (`speculative.verify`), and its MTP head drafts the next k. Nothing is undone when a draft
falls: the sequence is simply that much shorter, and what the caches hold beyond its end is written anew when
it gets there (see `cache`).

A step has two parts: to read tokens (`read`), and to choose what follows them (`advance`). `steps` takes
several in one program, so that the device need not wait for the host between them. With `invariant` a row's
tokens are read one at a time, drafts too: a product of one shape rounds in one way, so what the model says
does not depend on how many drafts there were. docs/numerics.md says what follows from that.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

from dsv4_jax import vocabulary
from dsv4_jax.cache import Cache, LayerCache
from dsv4_jax.model import Transformer
from dsv4_jax.mtp import MTPHead
from dsv4_jax.parallel import Along, rows_of, settled
from dsv4_jax.penalties import Penalties, Said, penalised
from dsv4_jax.sampling import SamplingArrays, SamplingParams
from dsv4_jax.speculative import propose, verify

FREE = -1  # in place of a token: the model chooses
MOST_DRAFTS = 4  # of one step: the head, trained for one, guesses worse with each
INVARIANT_PIECE = 512  # tokens of a prompt that `invariant` reads at once


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
      penalties: on what it has said; None where no row asks for any.
    """

    sampling: SamplingArrays
    max_tokens: Int32[Array, " B"]
    stop_at_eos: Bool[Array, " B"]
    penalties: Penalties | None = None

    @classmethod
    def stack(cls, params: Sequence[SamplingParams]) -> Self:
        """One row per request, in order."""
        limits = np.array([each.max_tokens for each in params], np.int32)
        stops = np.array([not each.ignore_eos for each in params])
        penalties = Penalties.stack(params) if any(each.penalises for each in params) else None
        columns = SamplingArrays.stack(params), jnp.asarray(limits), jnp.asarray(stops)
        return cls(*columns, penalties=penalties)


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
      said: in prompt and answer, where requests have penalties.
    """

    token: Int32[Array, " B"]
    position: Int32[Array, " B"]
    drafts: Int32[Array, "B k"]
    drawn_from: Float32[Array, "B k V"]
    count: Int32[Array, " B"]
    done: Bool[Array, " B"]
    caches: Caches
    said: Said | None = None

    @property
    def axes(self) -> Any:
        """How each array is split on a mesh, in a tree like this one."""
        return dataclasses.replace(
            jax.tree.map(lambda _: Along("batch"), self),
            drawn_from=vocabulary.ROWS_OF_TOKENS,
            caches=rows_of(self.caches),
            said=rows_of(self.said),
        )


class Read(NamedTuple):
    """What the model says after each of n tokens.

    Attributes:
      streams: for the MTP head.
      logits: of the token that follows.
      best: the largest logit.
      log_total: log of the sum of exp(logit - best). A log-probability is (logit - best) - log_total, and so
        has the bits of these three wherever it is computed.
    """

    streams: Float[Array, "B n X M"]
    logits: Float32[Array, "B n V"]
    best: Float32[Array, "B n"]
    log_total: Float32[Array, "B n"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Added:
    """What a step adds to each row; `steps` gives that of all its steps, one after the other.

    Attributes:
      tokens: of them the first `count` are real, an EOS among them the last.
      logprobs: of these under the model, before temperature.
      count: 0 for a row that was done.
      accepted: how many of the real ones were drafts.
      stopped: whether the row ended at an EOS.
      not_finite: whether it ended because its logits were not finite numbers.
    """

    tokens: Int32[Array, "*steps B k+1"]
    logprobs: Float32[Array, "*steps B k+1"]
    count: Int32[Array, "*steps B"]
    accepted: Int32[Array, "*steps B"]
    stopped: Bool[Array, "*steps B"]
    not_finite: Bool[Array, "*steps B"]


def read(
    model: Transformer,
    ids: Int32[Array, "B n"],
    position: Int32[Array, " B"],
    length: Int32[Array, " B"],
    cache: Cache,
) -> tuple[Read, Cache]:
    """What the model says after each token; arguments and cache as of `Transformer.__call__`."""
    streams, cache = model(ids, position, length, cache)
    return read_out(model, streams), cache


def read_out(model: Transformer, streams: Float[Array, "B n X M"]) -> Read:
    """What the model says after tokens that it has read already."""
    logits = model.logits(streams)
    best = logits.max(-1)
    return Read(streams, logits, best, jnp.log(jnp.exp(logits - best[..., None]).sum(-1)))


def read_one_by_one(
    model: Transformer,
    ids: Int32[Array, "B n"],
    position: Int32[Array, " B"],
    length: Int32[Array, " B"],
    cache: Cache,
) -> tuple[Read, Cache]:
    """As `read`, in a loop whose body does not depend on n.

    The compiler cannot know how often it turns. A loop of one turn it would dissolve, and could then join
    what is in it with what is around it, which may round otherwise.
    """

    def one(place, carry):
        found, cache = carry
        token = jax.lax.dynamic_slice_in_dim(ids, place, 1, axis=1)
        new, cache = read(model, token, position + place, (length > place).astype(jnp.int32), cache)
        write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=place, axis=1)
        return jax.tree.map(write, found, new), cache

    def empty(shape):
        return jnp.zeros((*ids.shape, *shape.shape[2:]), shape.dtype)

    shapes, _ = jax.eval_shape(lambda: read(model, ids[:, :1], position, length, cache))
    return jax.lax.fori_loop(0, length.max(), one, (jax.tree.map(empty, shapes), cache))


def first_step(
    models: Models,
    requests: Requests,
    last: Read,
    length: Int32[Array, " B"],
    caches: Caches,
    draft_tokens: int,
    eos_token_id: int,
    said: Said | None = None,
    forced: Int32[Array, " B"] | None = None,
) -> tuple[Added, Sequences]:
    """The first token of each row, from what the model says after its prompt's last token (n = 1).

    Args:
      length: tokens of each prompt.
      caches: of the whole prompt; the head's of all of it but the last token.
      draft_tokens: how many drafts each step is to have.
      said: the prompts, where requests have penalties.
      forced: as of `advance`.
    """
    batch, vocab = length.shape[0], last.logits.shape[-1]
    before = Sequences(
        token=jnp.zeros_like(length),
        position=length - 1,
        drafts=jnp.zeros((batch, 0), jnp.int32),
        drawn_from=jnp.zeros((batch, 0, vocab), jnp.float32),
        count=jnp.zeros_like(length),
        done=requests.max_tokens <= 0,
        caches=caches,
        said=said,
    )
    return advance(models, requests, before, last, draft_tokens, eos_token_id, forced)


def step(
    models: Models,
    requests: Requests,
    sequences: Sequences,
    eos_token_id: int,
    forced: Int32[Array, " B"] | None = None,
    *,
    invariant: bool = False,
) -> tuple[Added, Sequences]:
    """One to k + 1 more tokens for each row that is not done; a row that is writes nothing anywhere.

    Args:
      forced: as of `advance`.
      invariant: read each row's tokens one at a time.
    """
    ids = jnp.concatenate([sequences.token[:, None], sequences.drafts], axis=1)
    reads = jnp.where(sequences.done, 0, ids.shape[1])
    how = read_one_by_one if invariant else read
    found, main = how(models.main, ids, sequences.position, reads, sequences.caches.main)
    now = dataclasses.replace(sequences, caches=Caches(main, sequences.caches.head))
    return advance(models, requests, now, found, sequences.drafts.shape[1], eos_token_id, forced)


def _graphs() -> dict[str, str | int]:
    """Compiler options: a loop of steps is one graph of a GPU, whose kernels run side by side where they may.

    XLA's default asks the host at every turn whether to go on, which at small batches takes longer than the
    turn, and runs kernels one after the other, most of which fill a part of the chip only at small batches.
    What the user's XLA_FLAGS say of graphs stays.
    """
    if "xla_gpu_enable_command_buffer" in os.environ.get("XLA_FLAGS", ""):
        return {}
    # All of XLA's default, for an option of a program cannot add to it, and the loop.
    kinds = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
    return {
        "xla_gpu_enable_command_buffer": kinds,
        # A loop with little around it would be too small for a graph, however much is in it.
        "xla_gpu_graph_min_graph_size": 1,
        "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
    }


GRAPHS = _graphs()


def steps(
    models: Models,
    requests: Requests,
    sequences: Sequences,
    eos_token_id: int,
    forced: Int32[Array, "n B"],
    most: Int32[Array, ""],
    *,
    invariant: bool = False,
) -> tuple[Added, Sequences]:
    """Up to `most` steps, of n at most; fewer if all rows are done before.

    Args:
      forced: as of `advance`, for each step.
      invariant: as of `step`.

    Returns:
      What each of the n steps added, which is nothing in those that were not taken; and what follows.
    """

    def one(carry):
        number, added, sequences = carry
        told = jax.lax.dynamic_index_in_dim(forced, number, keepdims=False)
        new, sequences = step(models, requests, sequences, eos_token_id, told, invariant=invariant)
        write = functools.partial(jax.lax.dynamic_update_index_in_dim, index=number, axis=0)
        return number + 1, jax.tree.map(write, added, new), sequences

    def goes_on(carry) -> Bool[Array, ""]:
        number, _, sequences = carry
        return (number < most) & ~sequences.done.all()

    shapes, _ = jax.eval_shape(lambda: step(models, requests, sequences, eos_token_id, forced[0]))
    nothing = jax.tree.map(lambda leaf: jnp.zeros((len(forced), *leaf.shape), leaf.dtype), shapes)
    return jax.lax.while_loop(goes_on, one, (jnp.int32(0), nothing, sequences))[1:]


def advance(
    models: Models,
    requests: Requests,
    sequences: Sequences,
    found: Read,
    draft_tokens: int,
    eos_token_id: int,
    forced: Int32[Array, " B"] | None = None,
) -> tuple[Added, Sequences]:
    """What follows from what the model said of the tokens just read: more tokens, and the next drafts.

    Args:
      forced: each row's next token, whatever the model says, or FREE; None tells no row.
    """
    drafts, count = sequences.drafts, sequences.count
    logits, said = found.logits, sequences.said
    if requests.penalties is not None and said is not None:
        logits = penalised(logits, drafts, requests.penalties, said)
    standing, token = verify(logits, drafts, sequences.drawn_from, requests.sampling, count)

    if forced is not None:
        told = forced != FREE
        standing, token = jnp.where(told, 0, standing), jnp.where(told, forced, token)

    # tokens[i] follows the i-th token read: drafts that stand, then the model's own.
    place = jnp.arange(found.logits.shape[1])
    padded = jnp.pad(drafts, ((0, 0), (0, 1)))
    tokens = jnp.where(place < standing[:, None], padded, token[:, None])
    added = _added(requests, sequences, found, tokens, standing, eos_token_id)
    ended = added.stopped | added.not_finite | (count + added.count >= requests.max_tokens)
    done = sequences.done | ended

    reads = jnp.where(done, 0, standing + 1)
    new_count = count + added.count
    drafted = _draft(models, requests, sequences, found.streams, tokens, reads, new_count, draft_tokens)
    drafts, drawn_from, head = drafted
    following = Sequences(
        token=jnp.where(done, sequences.token, token),
        position=sequences.position + reads,
        drafts=drafts,
        drawn_from=drawn_from,
        count=new_count,
        done=done,
        caches=Caches(sequences.caches.main, head),
        said=None if said is None else said.and_then(tokens, added.count),
    )
    return added, settled(following)


def _added(
    requests: Requests,
    sequences: Sequences,
    found: Read,
    tokens: Int32[Array, "B n"],
    standing: Int32[Array, " B"],
    eos_token_id: int,
) -> Added:
    """The new tokens up to an EOS, to the row's maximum, or to logits that are no numbers."""
    place = jnp.arange(tokens.shape[1])
    finite = jnp.isfinite(found.logits).all(-1)
    chosen = vocabulary.pick(found.logits, tokens)
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
        logprobs=(chosen - found.best) - found.log_total,
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
