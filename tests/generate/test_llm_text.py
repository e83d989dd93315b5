"""`LLM` on texts and conversations."""

import dataclasses

import pytest

from dsv4_jax.answers import ended
from dsv4_jax.engine import Event
from dsv4_jax.errors import RequestError
from dsv4_jax.llm import LLM
from dsv4_jax.numerics import PLAIN
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.stops import AnswerText

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=True)
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def llm(text_checkpoint) -> LLM:
    """Invariant: one size of engine for all tests."""
    return LLM.from_pretrained(text_checkpoint, numerics=PLAIN, max_len=128, max_batch=2, invariant=True)


def test_a_conversation_is_a_prompt_like_any_other(llm):
    ids = llm.encode_chat(HELLO)

    chatted, listed, plain = llm.chat(HELLO, GREEDY), llm.generate(HELLO, GREEDY), llm.generate(ids, GREEDY)

    assert listed[0].prompt_token_ids == plain[0].prompt_token_ids == ids
    assert chatted.generation.token_ids == listed[0].token_ids == plain[0].token_ids
    assert chatted.completion.content == plain[0].text
    assert len(llm.generate([HELLO, "hello"], GREEDY)) == 2


def test_thinking_is_reasoning_until_it_ends(llm):
    answer = llm.chat(HELLO, GREEDY, thinking=True)

    assert answer.generation.prompt_token_ids[-1] != llm.encode_chat(HELLO)[-1]
    assert answer.completion.reasoning or answer.completion.content


def test_what_needs_no_answer_is_refused(llm):
    said = [*HELLO, {"role": "assistant", "content": "hi"}]

    with pytest.raises(
        RequestError, match="the last message is the assistant's, so there is nothing to answer"
    ):
        llm.chat(said, GREEDY)
    said[-1]["prefix"] = True
    assert llm.chat(said, GREEDY).generation.token_ids


def test_a_stop_string_ends_an_answer_and_its_neighbours_go_on(llm):
    whole = llm.generate("the house", GREEDY)[0]
    assert whole.text is not None
    stopping = dataclasses.replace(GREEDY, stop=(whole.text[3:5],))

    stopped, other = llm.generate(["the house", "a man"], [stopping, GREEDY])

    assert stopped.text == whole.text[: whole.text.find(stopping.stop[0])]
    assert (stopped.finish_reason, stopped.stop_string) == ("stop", stopping.stop[0])
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]
    assert stopped.logprobs is not None
    assert whole.logprobs is not None
    assert stopped.logprobs == whole.logprobs[: len(stopped.token_ids)]
    assert other.token_ids == llm.generate("a man", GREEDY)[0].token_ids
    assert llm.generate("the house", GREEDY)[0].token_ids == whole.token_ids


@pytest.mark.parametrize(
    ("count", "expected"), [(1, (1,)), (2, (2,)), (3, (2,)), (4, (2, 0)), (6, (2, 0, 2)), (7, (2, 0, 3))]
)
def test_steps_behind_a_stop_string_count_for_no_draft(count, expected):
    tokens = list(range(8))  # of steps of which two, none and three drafts stood, and a token more each
    event = Event(0, tokens, [0.0] * 8, None, (2, 0, 3))

    found = ended(event, count)

    assert found.token_ids == tokens[:count]
    assert found.stood == expected
    assert found.finish_reason == "stop"


def test_a_text_is_scored_like_its_tokens(llm):
    assert llm.tokenizer is not None

    assert llm.score("the house") == llm.score(llm.tokenizer.encode("the house"))


def test_a_request_knows_how_long_it_took(llm):
    output = llm.generate("the house", GREEDY)[0]

    assert 0 < output.first_token_seconds <= output.seconds
    assert output.seconds <= output.timings.seconds


@pytest.mark.parametrize("stop", [("", "a"), 7, [None]])
def test_what_is_no_stop_string_is_refused(stop):
    with pytest.raises(RequestError, match="stop must be texts that are not empty"):
        SamplingParams(stop=stop)


def test_stop_strings_need_a_tokenizer(llm):
    without = LLM(llm.model, numerics=PLAIN)

    with pytest.raises(RequestError, match="prompt 0 has stop strings, and the checkpoint has no tokenizer"):
        without.generate([[5, 6]], SamplingParams(stop=("a",)))
    with pytest.raises(RequestError, match="messages: chat needs a tokenizer"):
        without.chat(HELLO)


def read(llm: LLM, text: str, stop: tuple[str, ...], step: int) -> tuple[str, str | None]:
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode_plain(text)
    answer = AnswerText(llm.tokenizer, stop)
    shown = "".join(answer.put(ids[place : place + step]) for place in range(0, len(ids), step))
    return shown + answer.end(), answer.found


@pytest.mark.parametrize("step", [1, 2, 100])
@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("abcdef", (), ("abcdef", None)),
        ("abcdef", ("cd",), ("ab", "cd")),
        ("abcdef", ("f", "cd"), ("ab", "cd")),
        ("abcdef", ("abcdef",), ("", "abcdef")),
        ("abcdef", ("defg", "x"), ("abcdef", None)),
        ("aaab", ("aab",), ("a", "aab")),
        ("x日y👩z", ("👩",), ("x日y", "👩")),
        ("one two two", ("two",), ("one ", "two")),
        ("abcd", ("d", "bcd"), ("a", "bcd")),
    ],
)
def test_nothing_of_a_stop_string_is_ever_shown(llm, text, stop, expected, step):
    assert read(llm, text, stop, step) == expected
