"""The text of an answer as it comes, up to the first of the texts that are to end it."""

from collections.abc import Sequence

from dsv4_jax.tokenizer import Tokenizer


class AnswerText:
    """Tokens in, text out: never half a character, and nothing of a stop string.

    Attributes:
      found: the stop string that ended the answer; None as long as none did. Nothing follows it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._decoded, self._stop = tokenizer.stream(), stop
        self._kept = max(map(len, stop), default=1) - 1  # characters that may be the beginning of one
        self._held = ""
        self.found: str | None = None

    def put(self, ids: Sequence[int]) -> str:
        """The text that is certain now."""
        return self._take(self._decoded.put(ids), self._kept)

    def end(self) -> str:
        """What was held back."""
        return self._take(self._decoded.end(), 0)

    def _take(self, text: str, keep: int) -> str:
        if self.found is not None:
            return ""
        self._held += text
        # The one that is whole first; of two that end together the longer.
        ends = [
            (self._held.find(each) + len(each), -len(each), each) for each in self._stop if each in self._held
        ]
        if ends:
            end, _, self.found = min(ends)
            certain = self._held[: end - len(self.found)]
            self._held = ""
            return certain
        split = max(len(self._held) - keep, 0)
        certain, self._held = self._held[:split], self._held[split:]
        return certain
