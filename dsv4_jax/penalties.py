"""Penalties on what has been said: they change the logits before a token is chosen, and need to remember.

The three are those that other servers have. Repetition divides a positive logit by its factor and multiplies
a negative one by it, for every token of the prompt and the answer. Presence is subtracted for every token of
the answer, frequency for each time that it was said there.
"""

import dataclasses
from collections.abc import Sequence
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from dsv4_jax.sampling import SamplingParams


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Penalties:
    """What each row asks for; 1, 0 and 0 change nothing, to the bit."""

    repetition: Float32[Array, " B"]
    presence: Float32[Array, " B"]
    frequency: Float32[Array, " B"]

    @classmethod
    def stack(cls, params: Sequence[SamplingParams]) -> Self:
        """One row per request, in order."""
        names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
        return cls(*(jnp.array([getattr(each, name) for each in params], jnp.float32) for name in names))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Said:
    """What has been said in each row.

    Attributes:
      prompt: which tokens are in the prompt.
      answer: how often each is in the answer.
    """

    prompt: Bool[Array, "B V"]
    answer: Int32[Array, "B V"]

    @classmethod
    def nothing(cls, batch: int, vocab_size: int) -> Self:
        return cls(jnp.zeros((batch, vocab_size), bool), jnp.zeros((batch, vocab_size), jnp.int32))

    @classmethod
    def prompt_of(cls, ids: Sequence[int], vocab_size: int) -> Self:
        """One row, on the host: a prompt, and no answer yet."""
        prompt = np.zeros((1, vocab_size), bool)
        prompt[0, list(ids)] = True
        return cls(prompt, np.zeros((1, vocab_size), np.int32))  # type: ignore[arg-type]

    @classmethod
    def prompts_of(cls, ids: Int32[Array, "B T"], length: Int32[Array, " B"], vocab_size: int) -> Self:
        """Prompts that are padded at the end, and no answers yet."""
        counts = jnp.arange(ids.shape[1]) < length[:, None]
        empty = cls.nothing(ids.shape[0], vocab_size)
        return cls(empty.prompt.at[jnp.arange(ids.shape[0])[:, None], ids].max(counts), empty.answer)

    def and_then(self, tokens: Int32[Array, "B n"], count: Int32[Array, " B"]) -> Self:
        """With the first `count` of some tokens in the answer."""
        real = jnp.arange(tokens.shape[1]) < count[:, None]
        rows = jnp.arange(tokens.shape[0])[:, None]
        return dataclasses.replace(self, answer=self.answer.at[rows, tokens].add(real.astype(jnp.int32)))


def penalised(
    logits: Float32[Array, "B n V"], drafts: Int32[Array, "B n-1"], penalties: Penalties, said: Said
) -> Float32[Array, "B n V"]:
    """The logits to choose from: after what was said, and after each draft should those up to it stand."""
    everyone = jnp.ones(logits.shape[0], jnp.int32)
    changed = []
    for place in range(logits.shape[1]):
        if place:
            said = said.and_then(drafts[:, place - 1 : place], everyone)
        changed.append(_penalised(logits[:, place], penalties, said))
    return jnp.stack(changed, axis=1)


def _penalised(logits: Float32[Array, "B V"], penalties: Penalties, said: Said) -> Float32[Array, "B V"]:
    repetition, presence, frequency = (
        each[:, None] for each in (penalties.repetition, penalties.presence, penalties.frequency)
    )
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(said.prompt | (said.answer > 0), repeated, logits)
    return logits - frequency * said.answer - presence * (said.answer > 0)
