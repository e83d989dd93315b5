"""Index queries as tensor cores take them, next to keys in `fp4_group32`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from pallas_kernels.formats import e4m3_encode

GROUP = 32  # channels that a scale of `fp4_group32` is for, and those of one product of Hopper's tensor core
HIGHEST = 7  # the exponent that the largest number of a head is brought to: below 2^8, and 448 is most
LOWEST = 8  # of a float32's exponent field; below, a head is not brought up all the way


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TiledQueries:
    """Queries in E4M3, each head divided by a power of two, which its weight has to make up for.

    `fp4_group32` numbers are held exactly where the scales of a head lie within 2^13 of each other; what is
    2^17 below the largest number of its head becomes 0.

    A thread of a tensor core's product has 4 channels here and 4 there of every 32. So that those are one
    word of packed keys, place p has channel `channel_order(J)[p]`.

    Attributes:
      values: [..., J] float8_e4m3fn.
    """

    values: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def size(self) -> int:
        return self.values.size


def channel_order(channels: int) -> np.ndarray:
    """The channel in each place of a head: word g of thread c is channels 8 * (words * c + g) and on."""
    words = channels // GROUP  # of a thread, which has a quarter of the channels
    return np.arange(channels).reshape(4, words, 2, 4).transpose(1, 2, 0, 3).reshape(-1)


def tile_queries(
    q: Float[Array, "*B I J"], weights: Float32[Array, "*B I"]
) -> tuple[TiledQueries, Float32[Array, "*B I"]]:
    """The queries of heads, and the weights that go with them.

    Raises:
      ValueError: J is not a multiple of 32.
    """
    if (channels := q.shape[-1]) % GROUP:
        raise ValueError(f"queries of {channels} channels have no order: not a multiple of {GROUP}")
    wide = q.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(jnp.abs(wide).max(-1), jnp.uint32)
    exponent = jnp.maximum(bits >> 23, LOWEST)
    inverse, power = (_power_of_two(each) for each in (254 + HIGHEST - exponent, exponent - HIGHEST))
    values = (wide * inverse[..., None])[..., channel_order(channels)]
    return TiledQueries(e4m3_encode(values)), weights * power


def untile_queries(q: TiledQueries) -> Float32[Array, "*B I J"]:
    """The numbers, in the order of the channels."""
    back = np.argsort(channel_order(q.shape[-1]))
    return q.values.astype(jnp.float32)[..., back]


def _power_of_two(field: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(field << 23, jnp.float32)
