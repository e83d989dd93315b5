"""Experts on several devices: each device answers for its own, and tokens come to them where they must.

Where all devices work on the same tokens, each computes what its experts add to them, and the sum over
devices is the answer. Where they have different tokens, a token travels to every device that has one of its
experts, once, and its share of the answer travels back. A device sends no other more than `CAPACITY` tokens
at a time; if it has more for it, there is another round. So buffers are small, and no token is ever dropped.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from dsv4_jax import parallel
from dsv4_jax.sharding import Axes

CAPACITY = 128  # at least: more where many tokens go to few devices

Run = Callable[[Array, Array, Array], Array]


def on_owners(
    run: Run,
    x: Float[Array, "N M"],
    experts: Int32[Array, "N A"],
    weights: Float32[Array, "N A"],
    experts_here: int,
) -> Float32[Array, "N M"]:
    """What these tokens' experts add: a term of a sum over the axes of "experts" that do not split tokens.

    Args:
      run: (x, experts, weights) to what this device's experts add; it numbers them from 0, and
        `experts_here` stands for none.
      experts_here: how many this device has.
    """
    owners = parallel.axes_of("experts")
    if not owners:
        return run(x, experts, weights)
    traversed = tuple(name for name in owners if name in parallel.axes_of("batch"))
    owner, first = experts // experts_here, parallel.part("experts") * experts_here

    def here(x: Array, experts: Array, weights: Array) -> Array:
        local = experts - first
        mine = (local >= 0) & (local < experts_here)
        return run(x, jnp.where(mine, local, experts_here), jnp.where(mine, weights, 0))

    if not traversed:
        return here(x, experts, weights)
    return _by_way(here, x, experts, weights, _along(owner, owners, traversed), traversed)


def _along(owner: Int32[Array, "N A"], owners: Axes, traversed: Axes) -> Int32[Array, "N A"]:
    """A device's number along some axes of the mesh, from that along all that split experts."""
    place, number = jnp.zeros_like(owner), owner
    coordinates = {}
    for name in reversed(owners):
        size = parallel.size_of((name,))
        coordinates[name], number = number % size, number // size
    for name in traversed:
        place = place * parallel.size_of((name,)) + coordinates[name]
    return place


def _by_way(
    run: Run,
    x: Float[Array, "N M"],
    experts: Int32[Array, "N A"],
    weights: Float32[Array, "N A"],
    destination: Int32[Array, "N A"],
    names: Axes,
) -> Float32[Array, "N M"]:
    """`run` where the tokens' experts are: on the devices `destination` along these axes of the mesh."""
    tokens, choices = experts.shape
    devices = parallel.size_of(names)
    capacity = min(tokens, max(CAPACITY, math.ceil(2 * tokens * min(choices, devices) / devices)))
    goes = (destination[:, :, None] == jnp.arange(devices)).any(1)  # [N, devices]
    place = jnp.cumsum(goes, axis=0, dtype=jnp.int32) - 1  # of a token among those that go there
    none = np.iinfo(np.int32).max  # no expert

    def one_round(number: Array | int, total: Float32[Array, "N M"]) -> Float32[Array, "N M"]:
        slot = jnp.where(goes, place - number * capacity, -1)
        fits = (slot >= 0) & (slot < capacity)
        # Which token lies in each slot of what goes to each device; `tokens` for none.
        token = jnp.full((devices, capacity), tokens, jnp.int32)
        token = token.at[jnp.arange(devices), jnp.where(fits, slot, capacity)].set(
            jnp.arange(tokens, dtype=jnp.int32)[:, None], mode="drop"
        )
        sent = jnp.take(x, token, axis=0, mode="fill", fill_value=0)
        chosen = jnp.take(experts, token, axis=0, mode="fill", fill_value=none)
        shares = jnp.take(weights, token, axis=0, mode="fill", fill_value=0)
        routing = jnp.concatenate([chosen, jax.lax.bitcast_convert_type(shares, jnp.int32)], axis=-1)
        sent, routing = (parallel.exchanged(each, names) for each in (sent, routing))
        sent, routing = sent.reshape(-1, x.shape[1]), routing.reshape(-1, 2 * choices)
        shares = jax.lax.bitcast_convert_type(routing[:, choices:], jnp.float32)
        answers = run(sent, routing[:, :choices], shares)
        answers = parallel.exchanged(answers.reshape(devices, capacity, -1), names)
        # In the order of a token's choices, each device once: always the same sum.
        for choice in range(choices):
            to = destination[:, choice]
            again = (destination[:, :choice] == to[:, None]).any(1)
            at = jnp.take_along_axis(slot, to[:, None], axis=1)[:, 0]
            counts = jnp.take_along_axis(fits, to[:, None], axis=1)[:, 0] & ~again
            total += jnp.where(counts[:, None], answers[to, jnp.clip(at, 0, capacity - 1)], 0)
        return total

    nothing = jnp.zeros(x.shape, jnp.float32)
    if capacity == tokens:
        return one_round(0, nothing)
    fullest = parallel.largest_along(goes.sum(0).max(), names)
    return jax.lax.fori_loop(0, -(-fullest // capacity), one_round, nothing)
