"""The programs of an engine. Its slots are rows of fixed arrays: requests come and go without a compile.

What they replace, caches above all, is donated: it changes in place.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from dsv4_jax.cache import Cache, LayerCache
from dsv4_jax.config import Config
from dsv4_jax.decode import (
    GRAPHS,
    Added,
    Models,
    Read,
    Requests,
    Sequences,
    first_step,
    read_out,
    steps,
)
from dsv4_jax.model import Params, bind
from dsv4_jax.mtp import bind_mtp
from dsv4_jax.numerics import Numerics
from dsv4_jax.parallel import on_all, put_row, take_row


@functools.partial(jax.jit, donate_argnums=0)
def set_row(tree: Any, row: Any, slot: Int32[Array, ""]) -> Any:
    """`tree` with row `slot` of each leaf replaced."""
    return put_row(tree, row, slot)


@functools.partial(jax.jit, donate_argnums=0)
def clear_row(tree: Any, slot: Int32[Array, ""]) -> Any:
    return set_row(tree, jax.tree.map(lambda leaf: jnp.zeros_like(leaf[:1]), tree), slot)


def _models(config: Config, numerics: Numerics, params: tuple[Params, Params | None]) -> Models:
    main, mtp = params
    return Models(bind(config, numerics, main), None if mtp is None else bind_mtp(config, numerics, mtp))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def read_piece(
    config: Config,
    numerics: Numerics,
    params: Params,
    cache: Cache,
    ids: Int32[Array, "1 T"],
    numbers: Int32[Array, "3"],
) -> tuple[Float[Array, "1 T X M"], Cache]:
    """Reads a piece of one slot's prompt: its streams, and the cache of all slots.

    Args:
      numbers: the slot, the piece's position, and its tokens.
    """
    slot = numbers[0]
    model = bind(config, numerics, params)
    streams, row = model(ids, numbers[1:2], numbers[2:3], take_row(cache, slot))
    return streams, set_row(cache, row, slot)


@functools.partial(jax.jit, static_argnums=(0, 1))
def read_out_slot(
    config: Config, numerics: Numerics, params: Params, last: Float[Array, "S X M"], slot: Int32[Array, ""]
) -> Read:
    """What the model says after the prompt of one slot."""
    return read_out(bind(config, numerics, params), take_row(last, slot)[:, None])


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def follow(
    config: Config,
    numerics: Numerics,
    params: tuple[Params, Params | None],
    behind: tuple[LayerCache | None, Float[Array, "S X M"]],
    streams: Float[Array, "1 T X M"],
    ids: Int32[Array, "1 T"],
    numbers: Int32[Array, "3"],
) -> tuple[LayerCache | None, Float[Array, "S X M"]]:
    """The MTP head's cache after a piece that the model has read, and the streams of its last token.

    Args:
      behind: both as they were before the piece; the head is one token behind the model.
      numbers: as in `read_piece`.
    """
    slot, position, here = numbers[0], numbers[1:2], numbers[2:3]
    models = _models(config, numerics, params)
    row, last = take_row(behind, slot)
    if models.head is not None:
        # The piece's tokens follow the last one before it and all of its own but the last.
        before = jnp.concatenate([last[:, None], streams[:, :-1]], axis=1)
        start = position == 0  # where none is before it
        before = jnp.where(start, streams, before)
        following = jnp.where(start, jnp.roll(ids, -1, axis=1), ids)
        _, row = models.head(models.main, before, following, jnp.maximum(position - 1, 0), here - start, row)
    last = jax.lax.dynamic_index_in_dim(streams, here[0] - 1, axis=1, keepdims=False)
    return set_row(behind, (row, last), slot)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def begin(
    config: Config,
    numerics: Numerics,
    draft_tokens: int,
    params: tuple[Params, Params | None],
    requests: Requests,
    sequences: Sequences,
    last: Read,
    forced: Int32[Array, " S"],
    place: Int32[Array, "2"],
) -> tuple[Added, Sequences]:
    """The first token of the slot `place[0]`, whose prompt of `place[1]` tokens has been read.

    What it adds is that of all slots, of which the others get nothing.
    """
    models, slot = _models(config, numerics, params), place[0]
    row, asked, told, said = take_row((sequences.caches, requests, forced, sequences.said), slot)
    eos = config.eos_token_id
    added, begun = first_step(models, asked, last, place[1:], row, draft_tokens, eos, said, told)
    slots = sequences.count.shape[0]
    nothing = jax.tree.map(lambda leaf: jnp.zeros((slots, *leaf.shape[1:]), leaf.dtype), added)
    return on_all(set_row(nothing, added, slot)), set_row(sequences, begun, slot)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5, compiler_options=GRAPHS)
def take_steps(
    config: Config,
    numerics: Numerics,
    invariant: bool,
    params: tuple[Params, Params | None],
    requests: Requests,
    sequences: Sequences,
    forced: Int32[Array, "n S"],
    most: Int32[Array, ""],
) -> tuple[Added, Sequences]:
    """Up to `most` decode steps; all it is given may change without a compile."""
    models = _models(config, numerics, params)
    eos = config.eos_token_id
    added, following = steps(models, requests, sequences, eos, forced, most, invariant=invariant)
    return on_all(added), following
