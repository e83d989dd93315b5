"""Faults planted in the model, to see which scores fall: a score that no fault moves shows nothing.

Each is a context in which programs are traced with the fault in them; what was compiled before is forgotten.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.checkpoint.load import LoadedModel
from dsv4_jax.nn import attention, compressor, context, hyper_connection
from pallas_kernels import QuantArray


@contextlib.contextmanager
def replaced(module: ModuleType, **fakes: Callable[[Any], Any]) -> Iterator[None]:
    """Names of a module stand for what the fakes make of the real things."""
    real = {name: getattr(module, name) for name in fakes}
    jax.clear_caches()
    try:
        for name, fake in fakes.items():
            setattr(module, name, fake(real[name]))
        yield
    finally:
        for name, each in real.items():
            setattr(module, name, each)
        jax.clear_caches()


def random_choice() -> contextlib.AbstractContextManager[None]:
    """In place of the indexer's choice as many visible entries, drawn at random."""

    def select(_):
        def drawn(q, keys, weights, visible, top_k):
            slots = keys.shape[1]
            scores = jax.random.uniform(jax.random.key(0), (*visible.shape, slots))
            scores = jnp.where(jnp.arange(slots) < visible[..., None], scores, -1)
            best, found = jax.lax.top_k(scores, min(top_k, slots))
            found = jnp.sort(jnp.where(best < 0, slots, found), axis=-1)
            return jnp.where(found == slots, -1, found)

        return drawn

    return replaced(context, select=select)


def rope_turns_backwards() -> contextlib.AbstractContextManager[None]:
    """Queries and keys of attention turn the other way."""
    return replaced(
        attention, rotation=lambda real: lambda *at: (turns := real(*at))._replace(sin=-turns.sin)
    )


def comb_transposed() -> contextlib.AbstractContextManager[None]:
    """Streams mix by the transpose of the matrix that is to mix them."""

    def transposing(real):
        def fake(*operands, **settings):
            *others, comb = real(*operands, **settings)
            return *others, jnp.swapaxes(comb, -1, -2)

        return fake

    return replaced(hyper_connection, hc_pre=transposing, hc_post_pre=transposing)


def window_off_by_one() -> contextlib.AbstractContextManager[None]:
    """A query sees the rows before its own, and not its own."""

    def blind(real):
        return lambda q, kv, index, *others, **settings: real(
            q, kv, index.at[..., -1].set(-1), *others, **settings
        )

    return replaced(attention, sparse_attention=blind)


def overlap_swapped() -> contextlib.AbstractContextManager[None]:
    """With ratio 4, the window before takes the half of the channels that is the window's own."""

    def swapping(real):
        def fake(projected, ape, *others, column, **settings):
            if ape.shape[0] == 4:
                channels = ape.shape[1]
                ape = jnp.roll(ape, channels // 2, axis=1)
                columns = slice(column, column + 2 * channels)
                halves = projected[..., columns].reshape(*projected.shape[:-1], 2, 2, channels // 2)
                swapped = halves[..., ::-1, :].reshape(*projected.shape[:-1], 2 * channels)
                projected = projected.at[..., columns].set(swapped)
            return real(projected, ape, *others, column=column, **settings)

        return fake

    return replaced(compressor, compressed_entries=swapping)


PLANTED = {
    "RoPE backwards": rope_turns_backwards,
    "comb transposed": comb_transposed,
    "window off by one": window_off_by_one,
    "ratio-4 overlap swapped": overlap_swapped,
}


def scale_bytes_shifted(model: LoadedModel) -> LoadedModel:
    """The scale bytes of FP4 experts, each in its neighbour's place."""

    def shifted(leaf):
        if isinstance(leaf, QuantArray) and leaf.format == "fp4_group32":
            return dataclasses.replace(leaf, scale=jnp.roll(leaf.scale, 1, axis=-1))
        return leaf

    is_whole = lambda leaf: isinstance(leaf, QuantArray)  # noqa: E731
    return dataclasses.replace(model, params=jax.tree.map(shifted, model.params, is_leaf=is_whole))
