"""Steps of training: many in one program, with data made inside of it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from dsv4_jax.train import data
from dsv4_jax.train.forward import Setting, Weights
from dsv4_jax.train.loss import Losses, loss

BIAS_STEP = 1e-3  # by which a router's bias moves towards experts with few tokens
WARM_UP = 100  # steps
COOL_DOWN = 0.4  # the share of the steps in which the learning rate falls
REMAT_FROM = 2048  # tokens of a text, from which on a backward pass computes blocks anew


class Phase(NamedTuple):
    """A stretch of training.

    Attributes:
      share: of the time of a run.
      rows, tokens: of a batch.
      recall: the share of its rows that are facts and questions.
      level: of its short lines.
      choose: whether attention is over the entries that indexers choose, as in use; else over all.
    """

    share: float
    rows: int
    tokens: int
    recall: float
    level: data.Level
    choose: bool


class State(NamedTuple):
    """All that a run needs to go on."""

    step: jax.Array
    masters: Weights
    optimizer: optax.OptState


def _kept(path: tuple) -> bool:
    """Whether gradients leave a parameter alone: what tokens go by, and what `balance` moves."""
    return path[-1].key in ("tid2eid", "bias")


def _matrices(learning: Any) -> Any:
    """How Muon sees parameters: matrices, stacks of them; None for what is Adam's."""
    by_adam = "embed", "head", "hc_", "ape", "norm", "gate']"

    def seen(name: str, leaf: jax.Array) -> MuonDimensionNumbers | None:
        adam = getattr(leaf, "ndim", 0) < 2 or any(each in name for each in by_adam)  # optax masks leaves
        return None if adam else MuonDimensionNumbers(-1, -2)

    return {name: seen(name, leaf) for name, leaf in learning.items()}


_OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(1.0),
    muon(1.0, consistent_rms=0.2, adam_b1=0.9, adam_b2=0.98, muon_weight_dimension_numbers=_matrices),
)


def begin(masters: Weights) -> State:
    """The state before the first step."""
    return State(jnp.int32(0), masters, _OPTIMIZER.init(_learning(masters)))


def _learning(weights: Weights) -> Weights:
    """The parameters that gradients move, by name."""
    leaves = jax.tree_util.tree_leaves_with_path(weights)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves if not _kept(path)}


def rate(step: jax.Array, total: float, peak: float) -> jax.Array:
    """The learning rate: up, level, and down to a fiftieth in a line."""
    left = (total - step) / (COOL_DOWN * total)
    return peak * jnp.minimum(jnp.minimum((step + 1) / WARM_UP, 1.0), jnp.clip(left, 0.02, 1.0))


def balance(masters: Weights, loads: dict[str, jax.Array]) -> Weights:
    """Router biases moved towards even loads; no gradient does it."""

    def moved(path, leaf):
        keys = [each.key for each in path]
        if keys[-1] != "bias":
            return leaf
        load = loads["mtp" if keys[0] == "mtp" else str(keys[1])]
        return leaf + BIAS_STEP * jnp.sign(load.mean() - load)

    return jax.tree_util.tree_map_with_path(moved, masters)


@functools.partial(jax.jit, static_argnames=("count", "phase", "setting"), donate_argnames="state")
def run_steps(
    state: State, total: float, peak: float, seed: int, *, count: int, phase: Phase, setting: Setting
) -> tuple[State, Losses]:
    """`count` of `total` steps, and the mean losses of them.

    The data of a step hangs on `seed` and its number alone; `peak` is the largest learning rate.
    """
    setting = setting._replace(choose=phase.choose)

    def one(state: State, _) -> tuple[State, Losses]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        ids, task = data.batch(key, phase.rows, phase.tokens, phase.recall, phase.level)
        learning = _learning(state.masters)

        def of(learning):
            masters = _with(state.masters, learning)
            return loss(masters, ids, task, setting, remat=phase.tokens >= REMAT_FROM)

        gradients, parts = jax.grad(of, has_aux=True)(learning)
        updates, optimizer = _OPTIMIZER.update(gradients, state.optimizer, learning)
        now = rate(state.step, total, peak)
        learning = jax.tree.map(lambda each, update: each + now * update, learning, updates)
        masters = balance(_with(state.masters, learning), parts.loads)
        return State(state.step + 1, masters, optimizer), parts._replace(loads={})

    state, losses = jax.lax.scan(one, state, length=count)
    return state, jax.tree.map(lambda each: each.mean(0), losses)


def _with(weights: Weights, learning: Weights) -> Weights:
    """`weights` with those of `learning` in their place."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: learning.get(jax.tree_util.keystr(path), leaf), weights
    )
