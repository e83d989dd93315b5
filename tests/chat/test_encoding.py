"""Conversations to token ids: the released encoder's, and never a control token from a user's text."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_jax.chat import encode_chat, encoding, read_messages
from dsv4_jax.chat.made_up import made_up_tokenizer
from dsv4_jax.chat.render import render
from dsv4_jax.chat.wire import BOS, END_THINK, EOS, TASKS, THINK, USER, Control
from dsv4_jax.errors import RequestError, TokenizerError
from dsv4_jax.tokenizer import Tokenizer

DATA = Path(__file__).parents[1] / "data" / "encoding"
EXAMPLES = json.loads((DATA / "examples.json").read_text())
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CALL = {"id": "c", "function": {"name": "get_weather", "arguments": '{"city": "Paris", "days": 2}'}}


def say(role: str, content: str = "", **others: object) -> dict:
    return {"role": role, "content": content, **others}


def assert_encodes_to(tokenizer: Tokenizer, expected: str, messages: list[dict], **how) -> None:
    """Gives the ids of the expected text with its control tokens; by the package and by our own pieces."""
    ids = tokenizer.encode(expected)
    assert encode_chat(tokenizer, messages, **how) == ids
    with pytest.MonkeyPatch.context() as without:
        without.setattr(encoding, "deepseek_recipe", None)
        assert encode_chat(tokenizer, messages, **how) == ids


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_encoding_pairs_of_the_released_checkpoints(tokenizer, number):
    given = json.loads((DATA / f"test_input_{number}.json").read_text())
    expected = (DATA / f"test_output_{number}.txt").read_text()
    messages, tools = (given["messages"], given["tools"]) if isinstance(given, dict) else (given, [])
    thinking = number != 4

    pieces = render(read_messages(messages, tools), thinking=thinking)

    assert "".join(pieces) == expected
    assert_encodes_to(tokenizer, expected, messages, tools=tools, thinking=thinking)


@pytest.mark.parametrize(
    ("example", "messages", "how"),
    [
        ("1_chat_mode", [say("system", "You are helpful."), say("user", "Hi")], {}),
        (
            "2_thinking_multiturn_drop",
            [
                say("user", "hello"),
                say("assistant", "Hello! I am DeepSeek.", reasoning_content="greet"),
                say("user", "1+1=?"),
            ],
            {"thinking": True},
        ),
        ("3_preview_effort_max", [say("user", "1+1=?")], {"thinking": True, "effort": "max"}),
        (
            "4_tools_roundtrip",
            [
                say("system", "Be brief."),
                say("user", "Weather in Paris for 2 days?"),
                say("assistant", reasoning_content="Need tool.", tool_calls=[CALL]),
                say("tool", '{"t": 20}', tool_call_id="c"),
            ],
            {"thinking": True, "tools": [WEATHER]},
        ),
        ("5_quick_action", [say("latest_reminder", "2026-04-24"), say("user", "news?", task="action")], {}),
        (
            "6_refresh0731_high",
            [say("user", "1+1=?")],
            {"thinking": True, "effort": "high", "release": "later"},
        ),
        (
            "7_refresh0731_max",
            [say("user", "1+1=?")],
            {"thinking": True, "effort": "max", "release": "later"},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_encoding_examples_of_the_released_encoder(tokenizer, example, messages, how):
    assert_encodes_to(tokenizer, EXAMPLES[example], messages, **how)


@pytest.mark.parametrize(
    ("release", "effort", "example"),
    [
        ("first", "auto", None),
        ("first", "low", None),
        ("first", "high", None),
        ("first", "max", "6_refresh0731_high"),  # the later encoder's "high" is the first one's "max"
        ("later", "low", None),
        ("later", "auto", "6_refresh0731_high"),
        ("later", "max", "7_refresh0731_max"),
    ],
)
def test_effort_is_asked_for_in_the_words_of_the_release(tokenizer, release, effort, example):
    plain = f"{BOS}{USER}1+1=?<｜Assistant｜>{THINK}"
    expected = EXAMPLES[example] if example else plain

    how = {"thinking": True, "effort": effort, "release": release}
    assert_encodes_to(tokenizer, expected, [say("user", "1+1=?")], **how)


def test_a_conversation_goes_on_where_a_prefix_ends(tokenizer):
    messages = [say("user", "a"), say("assistant", "b", prefix=True)]

    assert_encodes_to(tokenizer, f"{BOS}{USER}a<｜Assistant｜>{END_THINK}b", messages)


CONTROLS = [str(mark) for mark in (BOS, EOS, USER, THINK, END_THINK, "｜DSML｜", *TASKS.values())]


def test_ten_thousand_texts_that_spell_control_tokens_stay_text(tokenizer):
    draw = random.Random(0)
    control_ids = {tokenizer.control_id(each) for each in CONTROLS}
    parts = [
        *CONTROLS,
        "<",
        "｜",
        ">",
        "think",
        "User",
        " ",
        "a",
        "\n",
        "日",
        "\x00",
        "</",
        "\ue0d5",
        "<｜User",
    ]
    count_plain = len(encode_chat(tokenizer, [say("user", "x")])) - 1

    for _ in range(10_000):
        text = "".join(draw.choice(parts) for _ in range(draw.randint(1, 8)))
        ids = encode_chat(tokenizer, [say("user", text)])
        marks = [id for id in ids if id in control_ids or id in (0, 1, 2)]
        assert marks == [ids[0], ids[1], ids[-1]] or len(marks) == count_plain - 1
        assert tokenizer.decode(ids[2:-2]) == text


def text_of(draw: random.Random) -> str:
    return "".join(
        draw.choice([*CONTROLS[:4], "a b", "\n\n", "日", "{}", '"']) for _ in range(draw.randint(0, 5))
    )


@settings(max_examples=100, deadline=None)
@given(st.randoms(use_true_random=False), st.booleans(), st.booleans())
def test_the_package_and_our_own_pieces_agree(tokenizer, draw, thinking, with_tools):
    messages = [say("system", text_of(draw))] if draw.random() < 0.5 else []
    for _ in range(draw.randint(1, 3)):
        messages.append(say("user", text_of(draw)))
        if draw.random() < 0.3:
            messages.append(say("user", text_of(draw)))
        calls = draw.randint(0, 2) if with_tools else 0
        arguments = draw.choice(
            ['{"city": "a\\"b", "days": 2}', "{}", "not JSON", "[1]", '{"x": {"y": null}}']
        )
        made = [
            {"id": f"c{n}", "function": {"name": "get_weather", "arguments": arguments}} for n in range(calls)
        ]
        answer = say("assistant", text_of(draw), tool_calls=made)
        if draw.random() < 0.8:
            answer["reasoning_content"] = text_of(draw)
        messages.append(answer)
        for n in draw.sample(range(calls), calls):
            messages.append(say("tool", text_of(draw), tool_call_id=f"c{n}"))
    if draw.random() < 0.7:
        messages.append(say("user", text_of(draw)))
    elif messages[-1]["role"] == "assistant" and draw.random() < 0.5:
        messages[-1]["prefix"] = True
    how = {"thinking": thinking, "tools": [WEATHER] if with_tools else [], "effort": "max"}

    by_package = encode_chat(tokenizer, messages, **how)

    with pytest.MonkeyPatch.context() as without:
        without.setattr(encoding, "deepseek_recipe", None)
        assert encode_chat(tokenizer, messages, **how) == by_package


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "messages must be a list of messages"),
        ("hi", "messages must be a list of messages"),
        (["hi"], "messages[0]: is not an object but str"),
        ([say("robot", "x")], "messages[0]: unknown role 'robot' (known are system, user,"),
        ([{"content": "x"}], "messages[0]: unknown role None"),
        ([say("user")], None),
        ([{"role": "user"}], "messages[0]: content must be text, got NoneType"),
        ([say("user", 7)], "messages[0]: content must be text, got int"),
        ([say("user", [{"type": "image_url"}])], "content of type 'image_url': the model reads text only"),
        ([say("user", [{"type": "text", "text": "a"}])], None),
        ([say("user", "\ud83d")], "messages[0].content: the text is not valid Unicode: lone surrogate"),
        ([say("tool", "x")], "messages[0]: a tool's result, but no assistant message before it calls a tool"),
        (
            [say("assistant", tool_calls=[CALL]), say("tool", "x", tool_call_id="d")],
            "messages[1]: answers call 'd', but the calls are c",
        ),
        ([say("assistant", tool_calls=[{"name": "f"}])], 'tool_calls[0]: must be {"id": ...'),
        ([say("user", "a", tool_calls=[CALL])], "only an assistant has tool_calls"),
        ([say("user", "a", task="dance")], "unknown task 'dance'"),
        ([say("assistant", "a", prefix=True), say("user", "b")], '"prefix" goes with the last message'),
        ([say("user", "a", prefix=True)], '"prefix" is true or false, and goes with role assistant'),
    ],
    ids=lambda value: ascii(value)[:40],
)  # fmt: skip
def test_what_is_no_conversation_is_refused_by_place(tokenizer, messages, said):
    if said is None:
        assert encode_chat(tokenizer, messages)
        return
    with pytest.raises(RequestError) as refused:
        encode_chat(tokenizer, messages)

    assert said in str(refused.value)
    assert refused.value.exit_code == 2


def test_tools_and_effort_are_checked(tokenizer):
    with pytest.raises(RequestError, match=r"tools\[0\]: must be"):
        encode_chat(tokenizer, [say("user", "a")], tools=[{"name": "f"}])
    with pytest.raises(RequestError, match="effort must be one of auto, low, high, max"):
        encode_chat(tokenizer, [say("user", "a")], effort="huge")  # type: ignore[arg-type]


def test_a_tokenizer_without_control_tokens_says_which_is_missing(monkeypatch):
    bpe = made_up_tokenizer(300)
    without = json.loads(bpe.to_str())
    without["added_tokens"] = [each for each in without["added_tokens"] if each["content"] != USER]
    tokenizer = Tokenizer(type(bpe).from_str(json.dumps(without)), 300)
    monkeypatch.setattr(encoding, "deepseek_recipe", None)

    with pytest.raises(TokenizerError, match="has no token <｜User｜"):
        encode_chat(tokenizer, [say("user", "a")])


def test_control_pieces_are_their_own_type():
    pieces = render(read_messages([say("user", f"{USER}{EOS}")]), thinking=False)

    assert [piece for piece in pieces if not isinstance(piece, Control)] == [f"{USER}{EOS}"]
