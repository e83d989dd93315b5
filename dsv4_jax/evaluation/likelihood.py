"""How likely given texts are: whole pieces of them through the model at once, which is how prompts are read.

`LLM.score` gives the bits that generation reported, one token a step; this is for the many tokens of an
evaluation. What a text gets depends on its own length alone: texts of one class of lengths run in programs of
one shape, so it is the same in any order and any company.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from dsv4_jax.cache import Cache, make_cache
from dsv4_jax.config import Config
from dsv4_jax.decode import read
from dsv4_jax.errors import NumericError, RequestError
from dsv4_jax.llm import LLM
from dsv4_jax.model import Params, bind
from dsv4_jax.numerics import Numerics
from pallas_kernels.dispatch import choose

_PIECES = (32, 128, 512)  # tokens of one text that are read at once
_AT_ONCE = 1024  # tokens of all texts together


class Likelihood(NamedTuple):
    """Of the tokens of a text from some place on.

    Attributes:
      logprobs: of each, in nats, after all tokens before it.
      greedy: whether each is the most likely one.
    """

    logprobs: list[float]
    greedy: list[bool]


def likelihoods(
    llm: LLM, texts: Sequence[tuple[Sequence[int], int]], names: Sequence[str] | None = None
) -> Iterator[tuple[int, Likelihood]]:
    """For each (ids, start) its place and the likelihood of `ids[start:]`, some texts at a time.

    Args:
      texts: token ids, of which at least one lies before `start` and one after.
      names: how an error speaks of them.

    Raises:
      RequestError: a text is too long or too short, or not made of the model's tokens. Nothing has run then.
      NumericError: logits were not finite numbers.
    """
    names = names or [f"text {number}" for number in range(len(texts))]
    for (ids, start), name in zip(texts, names, strict=True):
        _check(llm, ids, start, name)
    classes: dict[tuple[int, int], list[int]] = {}
    for place, (ids, _) in enumerate(texts):
        classes.setdefault(_shape(len(ids) - 1), []).append(place)
    for (piece, room), places in sorted(classes.items()):
        together = max(_AT_ONCE // piece, 1)
        for first in range(0, len(places), together):
            group = places[first : first + together]
            found = _read_group(llm, [texts[place] for place in group], piece, room, together)
            for place, likelihood in zip(group, found, strict=True):
                if not np.isfinite(likelihood.logprobs).all():
                    raise NumericError(f"logits of {names[place]} were not finite numbers")
                yield place, likelihood


def _check(llm: LLM, ids: Sequence[int], start: int, name: str) -> None:
    if not 1 <= start < len(ids):
        raise RequestError(
            f"{name}: {len(ids)} tokens, scored from token {start} on",
            hint="one must lie before and one after; a text without a beginning gets the BOS token",
        )
    if len(ids) > llm.max_len:
        raise RequestError(
            f"{name} has {len(ids)} tokens, and max_len is {llm.max_len}", hint="raise max_len"
        )
    vocab_size = llm.model.config.vocab_size
    if not all(0 <= id < vocab_size for id in ids):
        raise RequestError(f"{name}: token ids lie in [0, {vocab_size})")


def _shape(tokens: int) -> tuple[int, int]:
    """The piece that so many tokens are read in, and the room that they get in the caches."""
    piece = next((each for each in _PIECES if tokens <= each), _PIECES[-1])
    room = max(piece, 128)
    while room < tokens:
        room *= 2
    return piece, room


def _read_group(
    llm: LLM, group: Sequence[tuple[Sequence[int], int]], piece: int, room: int, batch: int
) -> list[Likelihood]:
    config, params = llm.model.config, llm.model.params
    longest = max(len(ids) for ids, _ in group) - 1
    whole = -(-longest // piece) * piece
    padded = np.zeros((batch, whole + 1), np.int32)
    length = np.zeros(batch, np.int32)
    for row, (ids, _) in enumerate(group):
        padded[row, : len(ids)] = ids
        length[row] = len(ids) - 1  # nothing follows the last token
    logprobs, greedy = np.zeros((2, batch, whole), np.float32)
    with ExitStack() as stack:
        if llm.model.mesh:
            stack.enter_context(jax.set_mesh(llm.model.mesh))
        stack.enter_context(choose(llm.implementation))
        cache = _empty_cache(config, llm.numerics, batch, room)
        for start in range(0, whole, piece):
            ids, following = padded[:, start : start + piece], padded[:, start + 1 : start + piece + 1]
            here = np.clip(length - start, 0, piece)
            position = np.full(batch, start, np.int32)
            found, cache = _read_piece(config, llm.numerics, params, ids, following, position, here, cache)
            logprobs[:, start : start + piece], greedy[:, start : start + piece] = jax.device_get(found)
    return [
        Likelihood(logprobs[row, start - 1 : end].tolist(), (greedy[row, start - 1 : end] > 0).tolist())
        for row, (start, end) in enumerate((start, len(ids) - 1) for ids, start in group)
    ]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty_cache(config: Config, numerics: Numerics, batch: int, room: int) -> Cache:
    return make_cache(config, numerics, batch=batch, max_len=room)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=7)
def _read_piece(
    config: Config,
    numerics: Numerics,
    params: Params,
    ids: Int32[Array, "B T"],
    following: Int32[Array, "B T"],
    position: Int32[Array, " B"],
    length: Int32[Array, " B"],
    cache: Cache,
) -> tuple[tuple[Float32[Array, "B T"], Bool[Array, "B T"]], Cache]:
    """Log-probability of the token that follows each one, and whether it is the most likely."""
    found, cache = read(bind(config, numerics, params), ids, position, length, cache)
    chosen = jnp.take_along_axis(found.logits, following[..., None], axis=-1)[..., 0]
    likeliest = jnp.argmax(found.logits, axis=-1) == following
    return ((chosen - found.best) - found.log_total, likeliest), cache
