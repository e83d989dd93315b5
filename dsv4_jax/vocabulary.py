"""Rows of numbers, one for each token of the vocabulary, of which a device may have its own part only.

The parts stay where they are: what devices tell each other is a few numbers a row. Elsewhere than in
`parallel.spread`, and without a mesh, the part is the whole.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from dsv4_jax import parallel
from dsv4_jax.parallel import Along

AXIS = "vocab"

# How rows are split: those of a batch, and those of several tokens for each row of it.
ROWS, ROWS_OF_TOKENS = Along("batch", AXIS), Along("batch", None, AXIS)

_DIGIT = 4  # bits of a number that `_smallest` finds in one pass


def ids(here: Float32[Array, "*rows V"]) -> Int32[Array, " V"]:
    """The tokens whose numbers this device has."""
    return jnp.arange(here.shape[-1], dtype=jnp.int32) + parallel.part(AXIS) * here.shape[-1]


def own_part(whole: Float32[Array, "*rows V"]) -> Float32[Array, "*rows part"]:
    """Of numbers for the whole vocabulary, which all devices have alike, this device's part."""
    width = whole.shape[-1] // parallel.parts(AXIS)
    return jax.lax.dynamic_slice_in_dim(whole, parallel.part(AXIS) * width, width, axis=-1)


def most_likely(here: Float32[Array, "*rows V"]) -> Int32[Array, "*rows"]:
    """The token with the largest number of each row, the smaller id of a tie."""
    place = jnp.argmax(here, axis=-1, keepdims=True)  # the first, hence the smaller id, of equals
    if parallel.parts(AXIS) == 1:
        return place[..., 0].astype(jnp.int32)
    best = jnp.take_along_axis(here, place, axis=-1)
    best, token = (
        parallel.gathered(each, AXIS, dimension=place.ndim - 1)
        for each in (best, ids(here)[place].astype(jnp.int32))
    )
    return jnp.take_along_axis(token, jnp.argmax(best, axis=-1, keepdims=True), axis=-1)[..., 0]


def largest(here: Float32[Array, "*rows V"]) -> Float32[Array, "*rows 1"]:
    """The largest number of each row."""
    return parallel.largest(here.max(-1, keepdims=True), AXIS)


def place_of(tokens: Int32[Array, "*rows"], here: Array) -> Int32[Array, "*rows"]:
    """Where tokens are in the rows of `here`; past the end where they are not."""
    place = tokens - parallel.part(AXIS) * here.shape[-1]
    return place if parallel.parts(AXIS) == 1 else jnp.where(place >= 0, place, here.shape[-1])


def at(here: Float32[Array, "*rows V"], tokens: Int32[Array, "*rows"]) -> Float32[Array, "*rows"]:
    """The number of one token in each row."""
    place = tokens - parallel.part(AXIS) * here.shape[-1]
    found = jnp.take_along_axis(here, jnp.clip(place, 0, here.shape[-1] - 1)[..., None], axis=-1)[..., 0]
    if parallel.parts(AXIS) == 1:
        return found
    return parallel.total(jnp.where((place >= 0) & (place < here.shape[-1]), found, 0), AXIS)


def pick(logits: Float32[Array, "B n V"], tokens: Int32[Array, "B n"]) -> Float32[Array, "B n"]:
    """As `at`, of numbers for the whole vocabulary."""
    return parallel.spread(at, (), ((logits, ROWS_OF_TOKENS), (tokens, Along("batch"))), Along("batch"))


def softmax(here: Float32[Array, "*rows V"]) -> Float32[Array, "*rows V"]:
    """Probabilities of this device's tokens."""
    weight = jnp.exp(here - largest(here))
    return weight / parallel.total(weight.sum(-1, keepdims=True), AXIS)


def kept(
    here: Float32[Array, "B V"],
    top_k: Int32[Array, " B"],
    top_p: Float32[Array, " B"],
    min_p: Float32[Array, " B"],
) -> Bool[Array, "B V"]:
    """Which tokens min-p, top-k and top-p leave; 0, 0 and 1 turn them off.

    Args:
      here: the largest of each row must be 0.
    """
    few = jnp.where(top_k > 0, top_k, here.shape[-1] * parallel.parts(AXIS)).astype(jnp.float32)
    kept = _leading(here, jnp.ones_like(here), few) & (here >= jnp.log(min_p)[:, None])
    mass = jnp.where(kept, jnp.exp(here), 0)
    wanted = top_p * parallel.total(mass.sum(-1), AXIS)
    wanted = jnp.maximum(wanted, jnp.finfo(jnp.float32).tiny)  # the best one has nothing before it
    # At 1 it is off by its own test: rounding in the sum must not cost such a row its tail.
    return kept & (_leading(here, mass, wanted) | (top_p >= 1)[:, None])


def _leading(
    here: Float32[Array, "B V"], weight: Float32[Array, "B V"], limit: Float32[Array, " B"]
) -> Bool[Array, "B V"]:
    """The tokens before which there is less than `limit`, the most likely first, the smaller id of a tie.

    Sorts nothing: to sort the vocabulary of many rows takes longer than to find the last of these tokens,
    digit by digit, and on a GPU a sort cannot be part of a graph.
    """
    bits = jax.lax.bitcast_convert_type(here + 0.0, jnp.uint32)  # + 0.0: the two zeros are one
    key = jnp.where(bits >> 31 == 1, ~bits, bits | np.uint32(1 << 31))  # in the order of the numbers
    last = _smallest(key, weight, limit, bits=32)[:, None]
    # Of the tokens that are as likely as the last one it is again so many, by their ids.
    size = here.shape[-1] * parallel.parts(AXIS)
    place = (size - ids(here)).astype(jnp.uint32)
    tied = jnp.where(key == last, place, jnp.where(key > last, np.uint32(2**32 - 1), 0))
    return tied >= _smallest(tied, weight, limit, bits=size.bit_length())[:, None]


def _smallest(
    key: UInt32[Array, "B V"], weight: Float32[Array, "B V"], limit: Float32[Array, " B"], bits: int
) -> UInt32[Array, " B"]:
    """The smallest number, of so many bits, above which keys weigh less than `limit`."""

    def above(*numbers: UInt32[Array, " B"]) -> tuple[Float32[Array, " B"], ...]:
        """What the keys above each of them weigh, in one pass."""
        heavy = tuple(jnp.where(key > number[:, None], weight, 0) for number in numbers)
        sums = jax.lax.reduce(heavy, (np.float32(0),) * len(heavy), _add, (1,))
        return sums if parallel.parts(AXIS) == 1 else tuple(parallel.total(jnp.stack(sums), AXIS))

    def next_digit(number, found: UInt32[Array, " B"]) -> UInt32[Array, " B"]:
        """Of the largest number above which they do not. However rounded, fewer weights are never more."""
        shift = jnp.uint32(_DIGIT * (digits - 1 - number))
        sums = above(*(found + (jnp.uint32(digit) << shift) for digit in range(1, 2**_DIGIT)))
        return found + (sum((each >= limit).astype(jnp.uint32) for each in sums) << shift)

    key, weight = jax.lax.optimization_barrier((key, weight))  # else each turn makes them anew
    none, digits = jnp.zeros(key.shape[:1], jnp.uint32), -(-bits // _DIGIT)
    # A loop, although on a GPU a turn costs as much as its work: written out, it compiles 13 s longer.
    found = jax.lax.fori_loop(0, digits, next_digit, none)
    return jnp.where(above(none)[0] >= limit, found + 1, 0)


def _add(sums, more):
    return tuple(map(jnp.add, sums, more))
