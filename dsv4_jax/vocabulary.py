"""Rows of numbers, one for each token of the vocabulary, of which a device may have its own part only.

The parts stay where they are: what devices tell each other is a few numbers a row. Elsewhere than in
`parallel.spread`, and without a mesh, the part is the whole.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from dsv4_jax import parallel
from dsv4_jax.parallel import Along

AXIS = "vocab"

# How rows are split: those of a batch, and those of several tokens for each row of it.
ROWS, ROWS_OF_TOKENS = Along("batch", AXIS), Along("batch", None, AXIS)

_DIGIT = 4  # bits that one exchange decides in `_smallest`


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
    """Which tokens min-p, top-k and top-p leave, in this order; 0, 0 and 1 turn them off.

    Each keeps the first tokens of the row in the order of their numbers, then of their ids. What is wanted is
    therefore a cut, and it is found digit by digit, from how many tokens lie before it and how likely these
    are together: nothing is sorted.

    Args:
      here: the largest of each row must be 0.
    """
    key, token = _descending(here), jnp.broadcast_to(ids(here).astype(jnp.uint32), here.shape)
    most = jnp.where(top_k > 0, top_k, here.shape[-1] * parallel.parts(AXIS)).astype(jnp.float32)
    keep = _first(key, token, jnp.ones_like(here), most[:, None]) & (here >= jnp.log(min_p)[:, None])
    mass = jnp.where(keep, jnp.exp(here), 0)
    reached = top_p[:, None] * parallel.total(mass.sum(-1, keepdims=True), AXIS)
    reached = jnp.maximum(reached, jnp.finfo(jnp.float32).tiny)  # the most likely token always stays
    # At 1 it is off by its own test: rounding in the sum must not cost such a row its tail.
    return keep & (_first(key, token, mass, reached) | (top_p >= 1)[:, None])


def _descending(here: Float32[Array, "B V"]) -> UInt32[Array, "B V"]:
    """Keys in the opposite order of the numbers."""
    bits = jax.lax.bitcast_convert_type(here + 0.0, jnp.uint32)  # no -0, which is equal to 0
    return jnp.where(bits >> 31, bits, ~bits & jnp.uint32(0x7FFFFFFF))


def _first(
    key: UInt32[Array, "B V"],
    token: UInt32[Array, "B V"],
    weight: Float32[Array, "B V"],
    reached: Float32[Array, "B 1"],
) -> Bool[Array, "B V"]:
    """The tokens before which the weights come to less than `reached`, in the order of keys, then of ids."""

    def come_to_less(holds: Bool[Array, "B n V"], ahead: Float32[Array, "B 1"] | float) -> Bool[Array, "B n"]:
        return parallel.total(jnp.where(holds, weight[:, None], 0).sum(-1), AXIS) + ahead < reached

    last = _largest(lambda bound: come_to_less(key[:, None] < bound[..., None], 0.0), 32, reached.shape)
    tied = key == last
    ahead = parallel.total(jnp.where(key < last, weight, 0).sum(-1, keepdims=True), AXIS)
    bits = (token.shape[-1] * parallel.parts(AXIS)).bit_length()
    last_token = _largest(
        lambda bound: come_to_less(tied[:, None] & (token[:, None] < bound[..., None]), ahead),
        -(-bits // _DIGIT) * _DIGIT,
        reached.shape,
    )
    return (key < last) | (tied & (token <= last_token))


def _largest(
    holds: Callable[[UInt32[Array, "B n"]], Bool[Array, "B n"]], bits: int, shape: tuple[int, int]
) -> UInt32[Array, "B 1"]:
    """The largest number of so many bits for which `holds`, which it does up to there and for 0."""
    steps = jnp.arange(1, 2**_DIGIT, dtype=jnp.uint32)

    def one_digit(number, found):
        shift = (bits - _DIGIT * (number + 1)).astype(jnp.uint32)
        digit = holds(found + (steps << shift)).sum(-1, keepdims=True, dtype=jnp.uint32)
        return found + (digit << shift)

    return jax.lax.fori_loop(0, bits // _DIGIT, one_digit, jnp.zeros(shape, jnp.uint32))
