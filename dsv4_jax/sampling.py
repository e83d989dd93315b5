"""How the next token is chosen: temperature, min-p, top-k, top-p, then one draw per row.

A row's draw follows from its own seed and step alone, so a request gives the same text whatever else
shares its batch.
"""

import dataclasses
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from dsv4_jax.errors import RequestError
from pallas_kernels.target import current_target

# Below the smallest normal float32 a division may flush to zero, so such a temperature counts as 0.
LOWEST_TEMPERATURE = float(np.finfo(np.float32).tiny)
HIGHEST_TEMPERATURE = float(np.finfo(np.float32).max)

# Field -> the type it must have, the range it must lie in, and both in words.
_RANGES: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "max_tokens": (Integral, lambda value: value >= 1, "an integer >= 1"),
    "temperature": (Real, lambda value: 0 <= value <= HIGHEST_TEMPERATURE, "a finite number >= 0"),
    "top_k": (Integral, lambda value: 0 <= value < 2**31, "an integer >= 0 (0 turns it off)"),
    "top_p": (Real, lambda value: 0 < value <= 1, "in (0, 1]"),
    "min_p": (Real, lambda value: 0 <= value <= 1, "in [0, 1]"),
    "repetition_penalty": (Real, lambda value: 0 < value <= 2, "in (0, 2]"),
    "presence_penalty": (Real, lambda value: -2 <= value <= 2, "in [-2, 2]"),
    "frequency_penalty": (Real, lambda value: -2 <= value <= 2, "in [-2, 2]"),
    "seed": (Integral, lambda value: 0 <= value < 2**32, "an integer in [0, 2**32)"),
    "ignore_eos": (bool, lambda _: True, "True or False"),
    "logprobs": (bool, lambda _: True, "True or False"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What one request asks of the sampler; the defaults sample from the model's own distribution.

    Raises:
      RequestError: a value has the wrong type or lies outside its range.
    """

    max_tokens: int = 256  # tokens to generate at most
    temperature: float = 1.0  # divides the logits; 0 is greedy
    top_k: int = 0  # keep the k most likely tokens; 0 is off
    top_p: float = 1.0  # keep the fewest tokens that together reach this probability; 1 is off
    min_p: float = 0.0  # keep tokens at least this fraction as likely as the best one; 0 is off
    repetition_penalty: float = 1.0  # for tokens of prompt and answer; 1 is off
    presence_penalty: float = 0.0  # subtracted from the logits of tokens of the answer; 0 is off
    frequency_penalty: float = 0.0  # the same, for each time that they are there; 0 is off
    seed: int = 0
    ignore_eos: bool = False  # go on to max_tokens past an end-of-sentence token
    logprobs: bool = False  # list the log-probability of each generated token in the output
    stop: tuple[str, ...] = ()  # texts that end the answer, which is cut before them

    def __post_init__(self):
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        for name, (kind, holds, wanted) in _RANGES.items():
            value = getattr(self, name)
            # bool is a subclass of int, but max_tokens=True is a mistake.
            right_kind = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
            if not right_kind or not holds(value):
                raise RequestError(f"{name} must be {wanted}, got {value!r}.")

    @property
    def penalises(self) -> bool:
        """Whether it asks for any penalty."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


def _stop_strings(stop: Any) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, list | tuple) or not all(isinstance(each, str) and each for each in strings):
        raise RequestError(f"stop must be texts that are not empty, got {stop!r}.")
    return tuple(strings)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
    """The parameters that `sample` reads, one value per row of a batch."""

    temperature: Float32[Array, "B"]
    top_k: Int32[Array, "B"]
    top_p: Float32[Array, "B"]
    min_p: Float32[Array, "B"]
    seed: UInt32[Array, "B"]

    @classmethod
    def stack(cls, params: Sequence[SamplingParams]) -> Self:
        """One row per request, in order."""

        def column(name: str, dtype: type) -> Array:
            return jnp.asarray(np.array([getattr(each, name) for each in params], dtype))

        return cls(
            temperature=column("temperature", np.float32),
            top_k=column("top_k", np.int32),
            top_p=column("top_p", np.float32),
            min_p=column("min_p", np.float32),
            seed=column("seed", np.uint32),
        )


def sample(
    logits: Float32[Array, "B V"], sampling: SamplingArrays, step: Int32[Array, "B"]
) -> tuple[Int32[Array, "B"], Float32[Array, "B"]]:
    """Chooses one token per row.

    Rows at temperature 0 take the most likely token, the smaller id of a tie. The others draw from
    `truncated_logits`. Pure and jittable; a batch that is all greedy draws nothing, and one that asks for
    no truncation searches for no cut.

    Args:
      logits: as the model gives them. A row with a NaN gives some token and a NaN; no error is raised.
      sampling: the rows' parameters.
      step: how many tokens each row has generated so far. With the row's seed it fixes the draw.

    Returns:
      tokens, and their log-probabilities in nats under the untempered, untruncated model.
    """
    tokens = jax.lax.cond(
        all_greedy(sampling),
        lambda: most_likely(logits),
        lambda: draw(truncated_logits(logits, sampling), sampling.seed, step),
    )
    return tokens, logprobs_of(logits, tokens)


def logprobs_of(logits: Float32[Array, "*rows V"], tokens: Int32[Array, "*rows"]) -> Float32[Array, "*rows"]:
    """Log-probabilities of tokens, in nats, under the untempered, untruncated model."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]


def truncated_logits(logits: Float32[Array, "B V"], sampling: SamplingArrays) -> Float32[Array, "B V"]:
    """Logits of the distribution each row draws from; -inf where a token cannot be drawn.

    In this order: divide by the temperature; min-p, against the most likely token; top-k; top-p, on what
    those two kept, renormalised. Where equal tokens straddle a cut the smaller ids stay, and the most
    likely token always stays. A row at temperature 0 keeps that one alone.
    """
    greedy = _is_greedy(sampling)
    # Against the best logit, so that a small temperature reaches -inf at worst, never inf - inf.
    below_best = logits - jnp.max(logits, axis=-1, keepdims=True)
    tempered = below_best / jnp.where(greedy, 1.0, sampling.temperature)[:, None]
    truncates = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
    truncated = jax.lax.cond(
        jnp.any(truncates & ~greedy),
        lambda: jnp.where(_kept(tempered, sampling), tempered, -jnp.inf),
        lambda: tempered,
    )
    is_best = jnp.arange(logits.shape[-1]) == most_likely(logits)[:, None]
    return jnp.where(greedy[:, None], jnp.where(is_best, 0.0, -jnp.inf), truncated)


def all_greedy(sampling: SamplingArrays) -> Bool[Array, ""]:
    """Whether no row draws anything."""
    return jnp.all(_is_greedy(sampling))


def _is_greedy(sampling: SamplingArrays) -> Bool[Array, "B"]:
    return sampling.temperature < LOWEST_TEMPERATURE


def most_likely(logits: Float32[Array, "*rows V"]) -> Int32[Array, "*rows"]:
    """The best token of each row, the smaller id of a tie."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)  # the first, hence the smaller id, of equals


def _kept(logits: Float32[Array, "B V"], sampling: SamplingArrays) -> Bool[Array, "B V"]:
    """Which tokens min-p, top-k and top-p leave. Expects the best logit of each row to be 0."""
    few = jnp.where(sampling.top_k > 0, sampling.top_k, logits.shape[-1]).astype(jnp.float32)
    kept = _leading(logits, jnp.ones_like(logits), few) & (logits >= jnp.log(sampling.min_p)[:, None])
    mass = jnp.where(kept, jnp.exp(logits), 0)
    wanted = jnp.maximum(
        sampling.top_p * mass.sum(-1), LOWEST_TEMPERATURE
    )  # the best one has nothing before it
    # At 1 it is off by its own test: rounding in the sum must not cost such a row its tail.
    return kept & (_leading(logits, mass, wanted) | (sampling.top_p >= 1)[:, None])


_DIGIT = 4  # bits of a number that `_smallest` finds in one pass


def _leading(
    logits: Float32[Array, "B V"], weight: Float32[Array, "B V"], limit: Float32[Array, "B"]
) -> Bool[Array, "B V"]:
    """The tokens before which there is less than `limit`, the most likely first, the smaller id of a tie.

    Sorts nothing: to sort the vocabulary of many rows takes longer than to find the last of these tokens,
    digit by digit, and on a GPU a sort cannot be part of a graph.
    """
    bits = jax.lax.bitcast_convert_type(logits + 0.0, jnp.uint32)  # + 0.0: the two zeros are one
    key = jnp.where(bits >> 31 == 1, ~bits, bits | np.uint32(1 << 31))  # in the order of the numbers
    last = _smallest(key, weight, limit, bits=32)[:, None]
    # Of the tokens that are as likely as the last one it is again so many, by their ids.
    place = jnp.arange(logits.shape[-1], 0, -1, dtype=jnp.uint32)
    tied = jnp.where(key == last, place, jnp.where(key > last, np.uint32(2**32 - 1), 0))
    return tied >= _smallest(tied, weight, limit, bits=logits.shape[-1].bit_length())[:, None]


def _smallest(
    key: UInt32[Array, "B V"], weight: Float32[Array, "B V"], limit: Float32[Array, "B"], bits: int
) -> UInt32[Array, "B"]:
    """The smallest number, of so many bits, above which keys weigh less than `limit`."""

    def above(*numbers: UInt32[Array, "B"]) -> tuple[Float32[Array, "B"], ...]:
        """What the keys above each of them weigh, in one pass."""
        heavy = tuple(jnp.where(key > number[:, None], weight, 0) for number in numbers)
        return jax.lax.reduce(heavy, (np.float32(0),) * len(heavy), _add, (1,))

    def next_digit(number, found: UInt32[Array, "B"]) -> UInt32[Array, "B"]:
        """Of the largest number above which they do not. However rounded, fewer weights are never more."""
        shift = jnp.uint32(_DIGIT * (digits - 1 - number))
        sums = above(*(found + (jnp.uint32(digit) << shift) for digit in range(1, 2**_DIGIT)))
        return found + (sum((each >= limit).astype(jnp.uint32) for each in sums) << shift)

    none, digits = jnp.zeros(key.shape[:1], jnp.uint32), -(-bits // _DIGIT)
    # On a GPU each turn of a loop costs as much as its work; on a CPU only compiling it would.
    found = jax.lax.fori_loop(0, digits, next_digit, none, unroll=current_target().vendor != "cpu")
    return jnp.where(above(none)[0] >= limit, found + 1, 0)


def _add(sums, more):
    return tuple(map(jnp.add, sums, more))


# What a row's random numbers are for; each purpose has a stream of its own.
_PURPOSES = {"token": None, "draft": 1, "verdict": 2}


def _key(seed, step, purpose: str):
    # Named, because JAX's other generators give a row other bits when its batch changes.
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
    number = _PURPOSES[purpose]
    return key if number is None else jax.random.fold_in(key, number)


def draw(
    logits: Float32[Array, "B V"],
    seed: UInt32[Array, "B"],
    step: Int32[Array, "B"],
    purpose: Literal["token", "draft"] = "token",
) -> Int32[Array, "B"]:
    """Gumbel-max: the argmax of logits plus Gumbel noise is a draw from their softmax."""

    def noise(seed, step) -> Float32[Array, "V"]:
        # "high": the default's 23 bits are too few to rank the likely winners among 129280 tokens.
        return jax.random.gumbel(_key(seed, step, purpose), logits.shape[-1:], jnp.float32, mode="high")

    return most_likely(logits + jax.vmap(noise)(seed, step))


def uniform(seed: UInt32[Array, "B"], step: Int32[Array, "B n"]) -> Float32[Array, "B n"]:
    """Numbers in [0, 1), one for each step of each row, that decide whether a draft stands."""

    def one(seed, step):
        return jax.random.uniform(_key(seed, step, "verdict"))

    return jax.vmap(jax.vmap(one, (None, 0)))(seed, step)
