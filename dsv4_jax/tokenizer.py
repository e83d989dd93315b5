"""Text to token ids and back, by the tokenizer.json that comes with a checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import tokenizers

from dsv4_jax.errors import RequestError, TokenizerError

_FILE = "tokenizer.json"
_FETCH = "download it from where the checkpoint came from"


class Tokenizer:
    """A byte-level BPE that has been checked against the model it feeds."""

    def __init__(self, bpe: tokenizers.Tokenizer, vocab_size: int):
        """Takes a loaded tokenizer and the number of rows in the model's embedding."""
        self._bpe = bpe
        self.vocab_size = vocab_size

    @classmethod
    def from_pretrained(cls, folder: str | Path, vocab_size: int) -> Self:
        """Reads `folder`/tokenizer.json for a model of `vocab_size` token ids.

        Raises:
          TokenizerError: the file is absent, not a tokenizer, or of a model with another vocabulary.
        """
        path = Path(folder) / _FILE
        try:
            data = path.read_bytes()
        except OSError as error:
            raise TokenizerError(f"{path} cannot be read: {error.strerror}", hint=_FETCH) from error
        if data.startswith(b"version https://git-lfs"):
            raise TokenizerError(f"{path} is a Git LFS pointer, not the file itself", hint="run git lfs pull")
        try:
            bpe = tokenizers.Tokenizer.from_str(data.decode())
        except Exception as error:  # the package raises Exception itself, whatever is wrong
            raise TokenizerError(f"{path} is not a tokenizer: {error}", hint=_FETCH) from error
        # Such settings may be saved in the file; they would shorten or pad prompts without a word.
        bpe.no_truncation()
        bpe.no_padding()

        ids = bpe.get_vocab(with_added_tokens=True).values()
        largest = max(ids, default=-1)
        # A model pads its vocabulary by some ids, so it may have more than the file; it does not double it.
        if largest >= vocab_size or len(ids) < vocab_size // 2:
            raise TokenizerError(
                f"{path} has {len(ids)} tokens with ids up to {largest}, but the model has {vocab_size}",
                hint="take the tokenizer.json of the same checkpoint",
            )
        return cls(bpe, vocab_size)

    @staticmethod
    def exists(folder: str | Path) -> bool:
        """Whether `folder` has a tokenizer.json. Without one a model still runs on token ids."""
        return (Path(folder) / _FILE).is_file()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` as it stands: nothing is put before or after it.

        A raw prompt may spell control tokens such as `<｜User｜>`, and they become the tokens they name. So
        text from someone you do not trust must not be pasted into one.

        Raises:
          RequestError: `text` is not a str, or holds half of a UTF-16 surrogate pair.
        """
        if not isinstance(text, str):
            raise RequestError(f"a prompt must be text or a list of token ids, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = f"lone surrogate {text[error.start]!a} at character {error.start}"
            raise RequestError(
                f"the text is not valid Unicode: {found}", hint="decode its source with the right encoding"
            ) from error
        return self._bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without begin-of-sentence, end-of-sentence and padding.

        Control tokens that shape an answer, such as `<think>`, stay. Bytes that are not yet a whole character
        give U+FFFD, and ids that the model has but the tokenizer does not name give nothing.

        Raises:
          RequestError: an id lies outside the model's vocabulary.
        """
        for place, token in enumerate(ids):
            if not 0 <= token < self.vocab_size:
                raise RequestError(f"token {place} is {token}, outside [0, {self.vocab_size})")
        return self._bpe.decode(list(ids), skip_special_tokens=True)
