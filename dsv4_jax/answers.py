"""An answer as its events bring it, and as it is handed out."""

import dataclasses
from collections.abc import Sequence

from dsv4_jax.chat import Completion
from dsv4_jax.engine import Event, FinishReason
from dsv4_jax.stops import AnswerText


@dataclasses.dataclass(frozen=True)
class Timings:
    """How long a batch took, so far or as a whole; the requests of one batch share one of these.

    Attributes:
      seconds: from the first prompt in to the last token out.
      compile_seconds: of these, spent on tracing and compiling.
      compiles: programs compiled.
      tokens: generated in the whole batch.
    """

    seconds: float
    compile_seconds: float
    compiles: int
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Of the whole batch, prefill included and compiling left out."""
        return self.tokens / max(self.seconds - self.compile_seconds, 1e-9)


@dataclasses.dataclass(frozen=True)
class GenerationOutput:
    """The answer to one prompt.

    Attributes:
      prompt_token_ids: the prompt as the model read it.
      token_ids: the answer, with the EOS that ended it.
      text: the answer as text, without EOS and stop string; None if the folder has no tokenizer.
      logprobs: of each token of the answer under the model; None if not asked for.
      logprob_sum: of the whole answer.
      finish_reason: "stop" at an EOS or a stop string, "length" at max_tokens, "error" where logits were not
        finite.
      stop_string: the one that ended it; its tokens are in `token_ids`.
      accepted_at: in how many steps the first draft stood, the second, and so on; empty without drafts.
      draft_steps: steps that had drafts.
      first_token_seconds: from when it got a slot to its first token; compiling left out.
      seconds: from when it got a slot to its last token, likewise.
      timings: of the batch it was in.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str | None
    logprobs: list[float] | None
    logprob_sum: float
    finish_reason: FinishReason
    stop_string: str | None
    accepted_at: tuple[int, ...]
    draft_steps: int
    first_token_seconds: float
    seconds: float
    timings: Timings

    @property
    def drafted(self) -> int:
        """Tokens that the MTP head drafted for it."""
        return self.draft_steps * len(self.accepted_at)

    @property
    def accepted(self) -> int:
        """Tokens of the answer that were such drafts."""
        return sum(self.accepted_at)


@dataclasses.dataclass(frozen=True)
class ChatOutput:
    """The answer to a conversation: what was said, and how it was generated."""

    completion: Completion
    generation: GenerationOutput


@dataclasses.dataclass
class Collected:
    """What the events of one request brought so far."""

    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None
    stood: list[int] = dataclasses.field(default_factory=list)  # of each step's drafts
    first_at: float = 0.0
    last_at: float = 0.0

    def take(self, event: Event, now: float) -> None:
        """Adds an event, which came at `now`."""
        self.last_at = now
        self.first_at = self.first_at or now
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs
        self.finish_reason = event.finish_reason
        self.stood += event.stood


def until(text: AnswerText, ids: Sequence[int]) -> int | None:
    """How many of these tokens an answer has, if one of them completes a stop string; else None."""
    for place, id in enumerate(ids):
        text.put([id])
        if text.found is not None:
            return place + 1
    return None


def ended(event: Event, count: int) -> Event:
    """The event, ended after so many of its tokens; steps behind them do not count."""
    stood, left = [], count
    for each in event.stood:  # a step brings what stood and one token more
        if left > 0:
            stood.append(min(each, left))
        left -= each + 1
    return dataclasses.replace(
        event,
        stood=tuple(stood),
        token_ids=event.token_ids[:count],
        logprobs=event.logprobs[:count],
        finish_reason="stop",
    )
