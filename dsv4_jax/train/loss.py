"""What training makes small."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsv4_jax.checkpoint.names import nest, parameters
from dsv4_jax.config import Config
from dsv4_jax.train.data import TASKS
from dsv4_jax.train.forward import Setting, Weights, forward
from dsv4_jax.train.straight_through import as_stored

MTP_SHARE = 0.3
OTHER_TOKENS = 0.03  # what a token that is no answer weighs beside one that is; most cannot be known


class Losses(NamedTuple):
    """Parts of the loss, nats per token.

    Attributes:
      answers: of the next token, by task, where it is an answer.
      others: of the next token where it is none.
      mtp: of the token after, weighed as the main loss.
      alignment: of the indexers.
      exact: the share of answer tokens that are the likeliest, by task.
      loads: by layer, the share of tokens of each expert; absent in layers routed by id.
    """

    answers: dict[str, jax.Array]
    others: jax.Array
    mtp: jax.Array
    alignment: jax.Array
    exact: dict[str, jax.Array]
    loads: dict[str, jax.Array]


def simulated(config: Config, masters: Weights) -> Weights:
    """Master weights as the checkpoint will store them."""

    def at(path: tuple[str | int, ...]) -> Any:
        value: Any = masters
        for key in path:
            value = value[key]
        return value

    return nest({each.path: as_stored(each, at(each.path)) for each in parameters(config, mtp=True)})


def loss(
    masters: Weights, ids: jax.Array, task: jax.Array, setting: Setting, *, remat: bool = False
) -> tuple[jax.Array, Losses]:
    """The loss of texts [B, T] whose tokens are answers to tasks or to none (`data.batch`), and its parts."""
    weights = simulated(setting.config, masters)
    logits, drafts, reports = forward(ids, weights, setting, remat=remat)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])
    right = logits[:, :-1].argmax(-1) == ids[:, 1:]
    draft_nats = optax.softmax_cross_entropy_with_integer_labels(drafts[:, :-2], ids[:, 2:])

    def mean(values, weight):
        return (values * weight).sum() / jnp.maximum(weight.sum(), 1)

    def by_task(values):
        return {name: mean(values, task[:, 1:] == 1 + number) for number, name in enumerate(TASKS)}

    weight = jnp.where(task > 0, 1.0, OTHER_TOKENS)
    mtp = mean(draft_nats, weight[:, 2:])
    alignment = jnp.asarray(sum(each.alignment for each in reports))
    names = [*map(str, range(len(reports) - 1)), "mtp"]
    loads = {name: each.load for name, each in zip(names, reports, strict=True) if each.load is not None}
    parts = Losses(by_task(nats), mean(nats, task[:, 1:] == 0), mtp, alignment, by_task(right), loads)
    return mean(nats, weight[:, 1:]) + MTP_SHARE * mtp + alignment, parts
