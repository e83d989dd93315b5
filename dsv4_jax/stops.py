"""Where an answer ends because of what it says: the first of some texts that it holds."""

from collections.abc import Sequence

from dsv4_jax.tokenizer import Tokenizer


class StopStrings:
    """Reads an answer token by token, and finds where one of its stop strings is complete.

    Attributes:
      found: the stop string that ended it; None as long as none did.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self._text, self._stop = tokenizer.stream(), stop
        self._kept = max(map(len, stop)) - 1  # characters that may be the beginning of one
        self._tail = ""
        self.found: str | None = None

    def read(self, ids: Sequence[int]) -> int | None:
        """How many of these tokens the answer has, if one of them completes a stop string; else None."""
        for place, id in enumerate(ids):
            self._tail += self._text.put([id])
            ends = {self._tail.find(each) + len(each): each for each in self._stop if each in self._tail}
            if ends:
                self.found = ends[min(ends)]
                return place + 1
            self._tail = self._tail[-self._kept :] if self._kept else ""
        return None


def cut(text: str, stop: str) -> str:
    """`text` without a stop string and what follows it."""
    return text[: text.find(stop)] if stop in text else text
