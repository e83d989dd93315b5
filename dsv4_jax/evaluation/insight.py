"""A look inside: which experts the tokens of a text went to, and which compressed entries they attended to.

The model is the one that generates; its routers and indexers are wrapped while it is traced, so that what
they choose comes out beside what they do.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from dsv4_jax.cache import make_cache
from dsv4_jax.config import Config
from dsv4_jax.errors import RequestError
from dsv4_jax.llm import LLM
from dsv4_jax.model import Params, bind
from dsv4_jax.numerics import Numerics
from pallas_kernels.dispatch import choose


class Insight(NamedTuple):
    """What the model chose for each of T tokens.

    Attributes:
      experts: the routed experts of each layer.
      entries: by CSA layer, the compressed entries that a token attended to, -1 where there were fewer; an
        entry stands for the tokens around four times its number.
    """

    experts: Int32[np.ndarray, "layers T A"]
    entries: dict[int, Int32[np.ndarray, "T K"]]


def look(llm: LLM, ids: Sequence[int]) -> Insight:
    """Reads a text at once and tells what was chosen for each token.

    Raises:
      RequestError: the text is empty, or longer than `max_len`.
    """
    if not 0 < len(ids) <= llm.max_len:
        raise RequestError(f"a text of {len(ids)} tokens cannot be read, max_len is {llm.max_len}")
    room = 128
    while room < len(ids):
        room *= 2
    padded = np.zeros((1, room), np.int32)
    padded[0, : len(ids)] = ids
    with ExitStack() as stack:
        if llm.model.mesh:
            stack.enter_context(jax.set_mesh(llm.model.mesh))
        stack.enter_context(choose(llm.implementation))
        found = _look(llm.model.config, llm.numerics, llm.model.params, padded, np.int32(len(ids)))
    experts, entries = jax.device_get(found)
    kept = {layer: chosen[0, : len(ids)] for layer, chosen in entries.items()}
    return Insight(np.stack([each[: len(ids)] for each in experts]), kept)


def expert_load(insight: Insight, experts: int) -> Int32[np.ndarray, "layers experts"]:
    """How many tokens each expert of each layer got."""
    return np.stack([np.bincount(layer.reshape(-1), minlength=experts) for layer in insight.experts])


class _Watched:
    """A module that also tells its results."""

    def __init__(self, module: Any, tell: Callable[[Any], None]):
        self._module, self._tell = module, tell

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, *arguments: Any) -> Any:
        result = self._module(*arguments)
        self._tell(result)
        return result


@functools.partial(jax.jit, static_argnums=(0, 1))
def _look(
    config: Config,
    numerics: Numerics,
    params: Params,
    ids: Int32[Array, "1 T"],
    length: Int32[Array, ""],
) -> tuple[list[Array], dict[int, Array]]:
    model = bind(config, numerics, params)
    experts: list[Array] = []
    entries: dict[int, Array] = {}
    x = model.embed(ids)
    streams = jnp.broadcast_to(x[:, :, None], (*ids.shape, model.hc_mult, x.shape[-1]))
    cache = make_cache(config, numerics, batch=1, max_len=ids.shape[1])
    for layer, (block, layer_cache) in enumerate(zip(model.layers, cache, strict=True)):
        gate, attend = block.ffn.gate, block.attn
        object.__setattr__(block.ffn, "gate", _Watched(gate, lambda result: experts.append(result[0])))
        if attend.ratio == 4:
            tell = functools.partial(entries.__setitem__, layer)
            object.__setattr__(attend, "indexer", _Watched(attend.indexer, tell))
        streams, _ = block(streams, ids, jnp.zeros(1, jnp.int32), length[None], layer_cache)
    return experts, entries
