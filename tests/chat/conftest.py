"""A tokenizer with DeepSeek's control tokens, as made-up checkpoints have it."""

import pytest

from dsv4_jax.chat.made_up import made_up_tokenizer
from dsv4_jax.tokenizer import Tokenizer

VOCAB_SIZE = 2048


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(made_up_tokenizer(VOCAB_SIZE), VOCAB_SIZE)
