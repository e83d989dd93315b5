"""The tokenizer: round trips through a small BPE with DeepSeek's control tokens, and every error."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_jax.errors import RequestError, TokenizerError
from dsv4_jax.tokenizer import Tokenizer

VOCAB_SIZE = 320
BEGIN, END, USER, THINK = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<think>"
SENTENCES = [
    "The cache keeps the last tokens and forgets the rest.",
    "A router sends each token to a few experts, and the experts to a few tokens.",
    "def add(a, b):\n    return a + b\n",
]


@pytest.fixture(scope="module")
def bpe() -> tokenizers.Tokenizer:
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[BEGIN, END, "<｜▁pad▁｜>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    # Named in the file, but not `special` in its sense.
    bpe.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in (USER, THINK)])
    return bpe


@pytest.fixture
def folder(bpe, tmp_path):
    bpe.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.fixture
def tokenizer(folder):
    return Tokenizer.from_pretrained(folder, VOCAB_SIZE)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "The cache keeps tokens.",
        *SENTENCES,
        "日本語と中文，混ぜて。",
        "👩‍👩‍👧 and 🇫🇷, e\u0301",
        "\x00\r\n\t",
    ],
    ids=ascii,
)
def test_text_comes_back_as_it_was(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_nothing_is_put_around_a_prompt(bpe, tmp_path):
    tokens = [(BEGIN, 0), (END, 1)]
    bpe = tokenizers.Tokenizer.from_str(bpe.to_str())
    bpe.post_processor = tokenizers.processors.TemplateProcessing(f"{BEGIN} $A {END}", special_tokens=tokens)
    bpe.enable_truncation(3)
    bpe.enable_padding(length=50)
    bpe.save(str(tmp_path / "tokenizer.json"))

    ids = Tokenizer.from_pretrained(tmp_path, VOCAB_SIZE).encode("a\n+b")

    assert not {0, 1, 2} & set(ids)
    assert len(ids) == 4


def test_control_tokens_in_a_raw_prompt_are_the_tokens_they_name(tokenizer):
    ids = tokenizer.encode(f"{BEGIN}{USER}a{END}")

    assert ids[0] == 0
    assert ids[-1] == 1
    assert len(ids) == 4


def test_decoding_leaves_out_the_ends_and_keeps_the_marks_between(tokenizer):
    assert tokenizer.decode(tokenizer.encode(f"{BEGIN}{THINK}yes{END}")) == f"{THINK}yes"


def test_half_a_character_gives_a_replacement_character(tokenizer):
    ids = tokenizer.encode("日")

    assert len(ids) > 1
    assert tokenizer.decode(ids[:1]) == "\ufffd"


def test_ids_the_tokenizer_does_not_name_give_nothing(tokenizer):
    assert tokenizer.decode([VOCAB_SIZE - 1]) == ""


@pytest.mark.parametrize("wrong", [-1, VOCAB_SIZE, 2**40], ids=str)
def test_ids_outside_the_vocabulary_are_refused(tokenizer, wrong):
    with pytest.raises(RequestError, match=rf"token 1 is {wrong}, outside \[0, 320\)$"):
        tokenizer.decode([5, wrong])


def test_a_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(RequestError, match=r"lone surrogate '\\ud83d' at character 3") as caught:
        tokenizer.encode("hi \ud83d")

    assert caught.value.exit_code == 2


def test_a_prompt_that_is_not_text_is_refused(tokenizer):
    with pytest.raises(RequestError, match="got bytes"):
        tokenizer.encode(b"hi")


def test_exists_looks_for_the_file(folder):
    assert Tokenizer.exists(folder)
    assert Tokenizer.exists(str(folder))
    assert not Tokenizer.exists(folder / "nowhere")


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:97d2\nsize 7\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS_POINTER, "run git lfs pull"),
        ("", "is not a tokenizer: EOF"),
        ("<html>", "is not a tokenizer: expected value at line 1 column 1"),
        ("[]", "is not a tokenizer"),
        (json.dumps({"model": {"type": "BPE"}}), "is not a tokenizer"),
        ('{"model": ' + "[" * 10_000, "is not a tokenizer"),
        (b"\xff\xfe{", "is not a tokenizer: 'utf-8' codec"),
    ],
    ids=["LFS pointer", "empty", "HTML", "array", "no vocabulary", "deeply nested", "not UTF-8"],
)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path, content, message):
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "tokenizer.json").write_bytes(data)

    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.from_pretrained(tmp_path, VOCAB_SIZE)

    assert str(tmp_path / "tokenizer.json") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 65


@pytest.mark.parametrize("missing", [".", "nowhere"], ids=["no file", "no folder"])
def test_a_missing_file_is_named(tmp_path, missing):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read: No such file") as caught:
        Tokenizer.from_pretrained(tmp_path / missing, VOCAB_SIZE)

    assert caught.value.exit_code == 65


@pytest.mark.parametrize("vocab_size", [301, 129280], ids=["smaller model", "larger model"])
def test_a_tokenizer_of_another_model_is_refused(folder, vocab_size):
    with pytest.raises(
        TokenizerError, match=rf"302 tokens with ids up to 301, but the model has {vocab_size}"
    ):
        Tokenizer.from_pretrained(folder, vocab_size)


@pytest.mark.parametrize("vocab_size", [302, 320, 600], ids=["exact", "padded", "padded a lot"])
def test_a_model_may_pad_its_vocabulary(folder, vocab_size):
    assert Tokenizer.from_pretrained(folder, vocab_size).vocab_size == vocab_size


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 310), max_size=40), st.randoms(use_true_random=False))
def test_a_stream_gives_what_decoding_all_of_it_gives(bpe, ids, draw):
    tokenizer = Tokenizer(bpe, VOCAB_SIZE)
    stream, text, place = tokenizer.stream(), "", 0

    while place < len(ids):
        end = place + draw.randint(1, 3)
        text += stream.put(ids[place:end])
        place = end
    text += stream.end()

    assert text == tokenizer.decode(ids) == bpe.decode(ids, skip_special_tokens=True)


def test_a_stream_holds_half_a_character_back(tokenizer):
    stream = tokenizer.stream()
    ids = tokenizer.encode("a日👩")

    pieces = [stream.put([id]) for id in ids]

    assert "".join(pieces) == "a日👩"
    assert stream.end() == ""
    assert not any("\ufffd" in piece for piece in pieces)
    stream.put(ids[:-1])
    assert stream.end() == "\ufffd"


def test_plain_text_never_becomes_a_control_token(tokenizer):
    ids = tokenizer.encode_plain(f"{BEGIN}{USER}a{END}")

    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode(ids) == f"{BEGIN}{USER}a{END}"
    assert tokenizer.encode_plain("hello") == tokenizer.encode("hello")


def test_a_text_has_no_fewer_tokens_than_said_at_once(tokenizer):
    for text in ("", "a", "日" * 100, THINK * 50, " " * 1000):
        assert tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text))
    assert tokenizer.fewest_tokens("a" * 10_000) > 100


def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path):
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"w{n}": n for n in range(300)}, unk_token="w0")
    )
    words.save(str(tmp_path / "tokenizer.json"))

    with pytest.raises(TokenizerError, match="is not a byte-level tokenizer"):
        Tokenizer.from_pretrained(tmp_path, VOCAB_SIZE)
