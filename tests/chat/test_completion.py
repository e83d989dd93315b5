"""Answers taken apart, whole and at every place where a stream may be cut."""

import json

import pytest

from dsv4_jax.chat import Completion, CompletionStream, ToolCall, completion, parse_completion
from dsv4_jax.chat.wire import DSML, END_THINK, EOS
from dsv4_jax.tokenizer import Tokenizer

ANSWER = (
    f"Let me 思 👩‍👩‍👧 think.\n{END_THINK}\n\nHéllo 👋!\n\n<{DSML}tool_calls>\n"
    f'<{DSML}invoke name="get_weather">\n'
    f'<{DSML}parameter name="city" string="true">Pa"rís\n</{DSML}parameter>\n'
    f'<{DSML}parameter name="days" string="false">2</{DSML}parameter>\n'
    f'</{DSML}invoke>\n<{DSML}invoke name="now">\n</{DSML}invoke>\n</{DSML}tool_calls>'
)
PARSED = Completion(
    "Let me 思 👩‍👩‍👧 think.",
    "Héllo 👋!",
    (
        ToolCall(name="get_weather", arguments='{"city": "Pa\\"rís\\n", "days": 2}', id="call_0"),
        ToolCall(name="now", arguments="{}", id="call_1"),
    ),
)


@pytest.fixture(scope="module")
def answer(tokenizer: Tokenizer) -> list[int]:
    """The answer with a token for each byte, but for control tokens."""
    ids = []
    for part in ANSWER.replace(END_THINK, f"\0{END_THINK}\0").replace(DSML, f"\0{DSML}\0").split("\0"):
        if part in (END_THINK, DSML):
            ids.append(tokenizer.control_id(part))
        else:
            ids += [
                tokenizer.encode_plain(chr(byte))[-1] if byte < 128 else _byte(tokenizer, byte)
                for byte in part.encode()
            ]
    return ids


def _byte(tokenizer: Tokenizer, byte: int) -> int:
    return next(id for id in range(tokenizer.vocab_size) if tokenizer.bytes_of([id]) == bytes([byte]))


def parsed(tokenizer: Tokenizer, pieces: list[list[int]], **how) -> Completion:
    stream, found = CompletionStream(tokenizer, **{"thinking": True, **how}), Completion()
    for delta in [delta for piece in pieces for delta in stream.put(piece)] + stream.end():
        found = found.add(delta)
    return found


def test_an_answer_is_reasoning_content_and_calls(tokenizer, answer):
    assert parse_completion(tokenizer, answer, thinking=True) == PARSED
    assert parse_completion(tokenizer, [*answer, tokenizer.control_id(EOS)], thinking=True) == PARSED


def test_a_stream_cut_at_any_byte_is_the_whole(tokenizer, answer):
    assert len(answer) > 250
    for cut in range(len(answer) + 1):
        assert parsed(tokenizer, [answer[:cut], answer[cut:]]) == PARSED
    assert parsed(tokenizer, [[id] for id in answer]) == PARSED


def test_no_delta_holds_half_a_character(tokenizer, answer):
    stream = CompletionStream(tokenizer, thinking=True)

    for id in answer:
        for delta in stream.put([id]):
            assert "\ufffd" not in delta.text


def test_text_that_spells_the_end_of_thinking_does_not_end_it(tokenizer):
    ids = tokenizer.encode_plain("a</think>b")

    assert parse_completion(tokenizer, ids, thinking=True) == Completion("a</think>b")


@pytest.mark.parametrize(
    ("text", "thinking", "expected"),
    [
        ("just content", False, Completion(content="just content")),
        ("never ends", True, Completion(reasoning="never ends")),
        (f"why{END_THINK}", True, Completion(reasoning="why")),
        ("", True, Completion()),
        ("a\n\n<", False, Completion(content="a\n\n<")),
    ],
)
def test_answers_that_are_cut_short(tokenizer, text, thinking, expected):
    assert parse_completion(tokenizer, tokenizer.encode(text), thinking=thinking) == expected


@pytest.mark.parametrize(
    "tail",
    [f"<{DSML}inv", f'<{DSML}invoke name="g">\n<oops>', f"</{DSML}tool_calls>", f'<{DSML}invoke name="g">\n'],
)
def test_calls_that_are_malformed_raise_nothing(tokenizer, tail):
    text = f"x{END_THINK}y\n\n<{DSML}tool_calls>\n{tail}"

    found = parse_completion(tokenizer, tokenizer.encode(text), thinking=True)

    assert (found.reasoning, found.content) == ("x", "y")


def test_an_answer_becomes_the_next_message(tokenizer, answer):
    message = parse_completion(tokenizer, answer, thinking=True).to_message()

    assert message["content"] == "Héllo 👋!"
    assert message["reasoning_content"] == PARSED.reasoning
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"city": 'Pa"rís\n', "days": 2}


def test_without_the_package_reasoning_and_content_are_told_apart(tokenizer, monkeypatch):
    monkeypatch.setattr(completion, "deepseek_recipe", None)
    ids = tokenizer.encode(f"why 日{END_THINK}because 👋")

    assert parse_completion(tokenizer, ids, thinking=True) == Completion("why 日", "because 👋")
    assert parsed(tokenizer, [[id] for id in ids]) == Completion("why 日", "because 👋")
