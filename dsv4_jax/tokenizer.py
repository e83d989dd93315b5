"""Text to token ids and back, by the tokenizer.json that comes with a checkpoint."""

import codecs
import functools
import json
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
          TokenizerError: the file is absent, not a byte-level tokenizer, or that of another vocabulary.
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
        if not isinstance(bpe.decoder, tokenizers.decoders.ByteLevel):
            raise TokenizerError(f"{path} is not a byte-level tokenizer, as DeepSeek-V4 has it", hint=_FETCH)
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
        text from someone you do not trust must not be pasted into one; `chat.encode_chat` keeps it apart.

        Raises:
          RequestError: `text` is not a str, or holds half of a UTF-16 surrogate pair.
        """
        return self._bpe.encode(check_text(text), add_special_tokens=False).ids

    def encode_plain(self, text: str) -> list[int]:
        """As `encode`, but text that spells a control token stays text.

        Raises:
          RequestError: as `encode`.
        """
        return self._plain.encode(check_text(text), add_special_tokens=False).ids

    def fewest_tokens(self, text: str) -> int:
        """A number of tokens that `text` has at least, known at once."""
        return -(-len(check_text(text).encode()) // self._longest)

    def control_id(self, token: str) -> int:
        """The id of a control token.

        Raises:
          TokenizerError: this tokenizer has no such token.
        """
        found = self._bpe.token_to_id(token)
        if found is None:
            raise TokenizerError(f"the tokenizer has no token {token}", hint="chat needs that of DeepSeek-V4")
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without begin-of-sentence, end-of-sentence and padding.

        Control tokens that shape an answer, such as `<think>`, stay. Bytes that are not yet a whole character
        give U+FFFD, and ids that the model has but the tokenizer does not name give nothing.

        Raises:
          RequestError: an id lies outside the model's vocabulary.
        """
        stream = self.stream()
        return stream.put(ids) + stream.end()

    def stream(self) -> "TextStream":
        """Decodes tokens as they come, and never gives half a character."""
        return TextStream(self)

    def bytes_of(self, ids: Sequence[int]) -> bytes:
        """The bytes that `ids` stand for, a part of a character perhaps; see `decode` for what is left out.

        Raises:
          RequestError: an id lies outside the model's vocabulary.
        """
        for place, token in enumerate(ids):
            if not 0 <= token < self.vocab_size:
                raise RequestError(f"token {place} is {token}, outside [0, {self.vocab_size})")
        return b"".join(map(self._bytes_of_one, ids))

    def to_json(self) -> str:
        """The tokenizer.json that says all of this."""
        return self._bpe.to_str()

    def _bytes_of_one(self, id: int) -> bytes:
        token = self._bpe.id_to_token(id)
        if token is None or id in self._left_out:
            return b""
        if all(character in _BYTE_OF for character in token):
            return bytes(_BYTE_OF[character] for character in token)
        return token.encode()  # an added token, spelled as it is

    @functools.cached_property
    def _longest(self) -> int:
        """Bytes of the longest token."""
        return max(map(len, map(str.encode, self._bpe.get_vocab(with_added_tokens=True))))

    @functools.cached_property
    def _left_out(self) -> frozenset[int]:
        added = self._bpe.get_added_tokens_decoder().items()
        return frozenset(id for id, token in added if token.special)

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same without the tokens that were added to the BPE."""
        return tokenizers.Tokenizer.from_str(json.dumps(json.loads(self.to_json()) | {"added_tokens": []}))


class TextStream:
    """Tokens in, text out, as far as it is certain; all of it together is what `decode` gives."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def put(self, ids: Sequence[int]) -> str:
        """The text that these tokens complete; bytes of a character that is not whole yet are kept."""
        return self._decoder.decode(self._tokenizer.bytes_of(ids))

    def end(self) -> str:
        """What is left: nothing, or U+FFFD for a character that never became whole."""
        return self._decoder.decode(b"", final=True)


def check_text(text: str) -> str:
    """`text`, if it is a str that has a UTF-8 form.

    Raises:
      RequestError: it is none, or holds half of a UTF-16 surrogate pair.
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
    return text


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level BPE: printable ones for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
