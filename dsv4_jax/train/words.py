"""The vocabulary of the small model: bytes, and whole words that are one token each."""

import itertools
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from dsv4_jax.chat import wire

# fmt: off
ADJECTIVES = (
    "red", "blue", "green", "black", "white", "brown", "grey", "pink", "old", "new", "big", "small", "hot",
    "cold", "dry", "wet", "fast", "slow", "soft", "hard", "thin", "thick", "long", "short", "wide", "narrow",
    "deep", "flat", "round", "square", "bright", "dark", "loud", "quiet", "sweet", "sour", "clean", "dusty",
    "empty", "full", "heavy", "light", "rich", "poor", "sharp", "blunt", "smooth", "rough", "strong", "weak",
    "tall", "tiny", "warm", "cool", "young", "wild", "tame", "calm", "bold", "shy", "kind", "proud", "plain",
    "rare",
)
NOUNS = (
    "river", "lamp", "stone", "garden", "window", "letter", "bridge", "morning", "paper", "silver", "engine",
    "harbour", "winter", "copper", "field", "button", "candle", "forest", "mirror", "ladder", "basket",
    "thunder", "pocket", "island", "feather", "kettle", "market", "saddle", "velvet", "anchor", "barrel",
    "cotton", "dragon", "ember", "falcon", "glacier", "hammer", "ivory", "jungle", "apple", "bottle",
    "carpet", "desert", "eagle", "finger", "guitar", "helmet", "insect", "jacket", "kitchen", "lemon",
    "mountain", "needle", "orange", "pencil", "quarry", "rabbit", "shovel", "table", "umbrella", "valley",
    "wagon", "yacht", "zebra", "arrow", "bell", "castle", "door", "egg", "fence", "glass", "horse", "ice",
    "jewel", "key", "leaf", "moon", "nest", "oak", "pearl", "queen", "rope", "ship", "tower", "urn", "violin",
    "wheel", "yarn", "acorn", "bread", "cloud", "drum", "elbow", "flute", "gate", "hill", "ink", "jar",
    "kite", "lake", "mask", "nail", "owl", "pipe", "quill", "ring", "sand", "tree", "uncle", "vase", "wolf",
    "yard", "axe", "boat", "crown", "desk", "ear", "frog", "goat", "hat", "iron", "judge", "knot", "lion",
    "mouse", "net", "ocean", "plate",
)
VERBS = ("follows", "paints", "mends", "finds")
PLACES = ("above", "behind", "near", "under")
# fmt: on
BRACKETS = ("(", "[", "{", ")", "]", "}")  # each closing one is three after its opening one
COMMANDS = ("copy", "sort", "close", "set", "get", "the")  # they begin a line

_ENDS = (wire.BOS, wire.EOS, "<｜▁pad▁｜>")  # ids 0, 1 and 2, as released; left out of decoded text
_MARKS = (wire.USER, wire.ASSISTANT, wire.THINK, wire.END_THINK)
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
_SPACED = (*ADJECTIVES, *NOUNS, *VERBS, *PLACES, *BRACKETS, *"0123456789", "=", "the")
TOKENS = (*map(str, _ENDS), *_BYTES, *COMMANDS, *(f"Ġ{word}" for word in _SPACED), *map(str, _MARKS))
ID = {token: id for id, token in enumerate(TOKENS)}  # "Ġ" is a space, "Ċ" the end of a line
VOCAB_SIZE = 512


def write_tokenizer(folder: str | Path) -> None:
    """Writes `folder`/tokenizer.json: a word of the vocabulary is one token, all else bytes."""
    vocabulary = dict(itertools.islice(ID.items(), len(TOKENS) - len(_MARKS)))
    bpe = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([tokenizers.AddedToken(str(end), normalized=False) for end in _ENDS])
    bpe.add_tokens([tokenizers.AddedToken(str(mark), normalized=False) for mark in _MARKS])
    bpe.save(str(Path(folder) / "tokenizer.json"))
