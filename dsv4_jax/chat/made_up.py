"""A tokenizer for made-up checkpoints: bytes, strings of letters, and a conversation's control tokens."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from dsv4_jax.chat import wire
from dsv4_jax.errors import RequestError

_ENDS = (wire.BOS, wire.EOS, "<｜▁pad▁｜>")  # ids 0, 1 and 2, as released; left out of decoded text
_MARKS = (
    wire.USER,
    wire.ASSISTANT,
    wire.THINK,
    wire.END_THINK,
    wire.DSML,
    wire.LATEST_REMINDER,
    *wire.TASKS.values(),
)


# By how often English has them; "Ġ" is a space.
_LETTERS = "Ġetaoinshrdlcumwfgypbvk"


def made_up_tokenizer(vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE for a model of `vocab_size` tokens, all of them named; merges are pairs, triples...

    Raises:
      RequestError: so small a vocabulary does not hold the bytes and the control tokens.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    room = vocab_size - len(_ENDS) - len(alphabet) - len(_MARKS)
    if room < 0:
        raise RequestError(f"a tokenizer needs {vocab_size - room} tokens, the model has {vocab_size}")
    merges = list(itertools.islice(_merges(), room))
    tokens = [*map(str, _ENDS), *alphabet, *("".join(pair) for pair in merges)]
    bpe = tokenizers.Tokenizer(
        models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=merges)
    )
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([tokenizers.AddedToken(str(end), normalized=False) for end in _ENDS])
    bpe.add_tokens([tokenizers.AddedToken(str(mark), normalized=False) for mark in _MARKS])
    return bpe


def _merges() -> Iterator[tuple[str, str]]:
    """Each string of letters once, of a shorter one and a letter; a space comes first if at all."""
    shorter = list(_LETTERS)
    while True:
        pairs = list(itertools.product(shorter, _LETTERS[1:]))
        yield from pairs
        shorter = ["".join(pair) for pair in pairs]


def write_tokenizer(folder: str | Path, vocab_size: int) -> None:
    """Writes `folder`/tokenizer.json."""
    made_up_tokenizer(vocab_size).save(str(Path(folder) / "tokenizer.json"))
