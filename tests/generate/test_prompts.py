"""Prompts of token ids, files of prompts, and the rows written for them."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.errors import RequestError
from dsv4_jax.prompts import check_prompt, read_prompts
from dsv4_jax.sampling import SamplingParams


def check(ids, *, max_len=10, max_tokens=4):
    return check_prompt(ids, vocab_size=100, max_len=max_len, max_tokens=max_tokens, name="prompt 3")


@pytest.mark.parametrize(
    "ids",
    [[0, 99], (0, 99), np.array([0, 99], np.uint8), [np.int64(0), np.int32(99)], jnp.array([0, 99])],
    ids=["list", "tuple", "numpy array", "numpy integers", "jax array"],
)
def test_token_ids_come_back_as_plain_ints(ids):
    checked = check(ids)

    assert checked == [0, 99]
    assert [type(token) for token in checked] == [int, int]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "prompt 3 is empty (give at least one token)"),
        ([5, -1], "prompt 3: token 1 is -1, outside [0, 100)"),
        ([100], "prompt 3: token 0 is 100, outside [0, 100)"),
        ([2**70], f"prompt 3: token 0 is {2**70}, outside [0, 100)"),
        ([1.0], "prompt 3: token 0 must be an integer, got 1.0"),
        (np.array([1.0]), "prompt 3: token 0 must be an integer, got 1.0"),
        ([float("nan")], "prompt 3: token 0 must be an integer, got nan"),
        ([True], "prompt 3: token 0 must be an integer, got True"),
        (np.array([False]), "prompt 3: token 0 must be an integer, got False"),
        (["5"], "prompt 3: token 0 must be an integer, got '5'"),
        ([None], "prompt 3: token 0 must be an integer, got None"),
        (np.zeros((2, 2), int), "prompt 3: token 0 must be an integer, got [0, 0]"),
        ("hi", "prompt 3 must be a list of token ids, got str"),
        (b"hi", "prompt 3 must be a list of token ids, got bytes"),
        (7, "prompt 3 must be a list of token ids, got int"),
        (np.int32(7), "prompt 3 must be a list of token ids, got int"),
        ({1: 2}, "prompt 3 must be a list of token ids, got dict"),
        (None, "prompt 3 must be a list of token ids, got NoneType"),
    ],
    ids=repr,
)
def test_what_is_not_a_prompt_is_refused(ids, message):
    with pytest.raises(RequestError) as caught:
        check(ids)

    assert str(caught.value) == message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("count", [10, 11], ids=["as long as max_len", "longer"])
def test_a_prompt_that_leaves_no_room_is_refused(count):
    with pytest.raises(RequestError, match=f"has {count} tokens and leaves no room .* max_len 10"):
        check([1] * count, max_tokens=1)


def test_a_prompt_and_answer_that_exceed_max_len_are_refused_with_both_numbers():
    with pytest.raises(
        RequestError, match=r"has 7 tokens, and max_tokens 4 more exceed max_len 10"
    ) as caught:
        check([1] * 7)

    assert caught.value.hint == "lower max_tokens to 3 or raise max_len"


def test_a_prompt_and_answer_that_just_fit_are_taken():
    assert check([1] * 6) == [1] * 6


@pytest.fixture
def path(tmp_path):
    return tmp_path / "prompts.jsonl"


def test_rows_hold_text_or_ids_and_their_own_sampling(path):
    sampled = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
    lines = [{"id": "a", "prompt": "日本 👩"}, {"id": 7, "tokens": [0, 5], **sampled}]
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")

    text, ids = read_prompts(path)

    defaults = SamplingParams(temperature=0.5, top_p=0.9)
    assert (text.id, text.prompt, text.where) == ("a", "日本 👩", f"{path}:1")
    assert text.sampling(defaults) == defaults
    assert (ids.id, ids.prompt, ids.where) == (7, [0, 5], f"{path}:2")
    assert ids.sampling(defaults) == SamplingParams(top_p=0.9, **sampled)


def test_every_sampling_key_reaches_the_parameters(path):
    overrides = {"max_tokens": 3, "temperature": 0.5, "top_k": 4, "top_p": 0.5, "min_p": 0.1, "seed": 9}
    path.write_text(json.dumps({"prompt": "hi", **overrides}))

    (row,) = read_prompts(str(path))

    assert row.sampling(SamplingParams()) == SamplingParams(**overrides)


def test_a_row_may_be_a_conversation(path):
    messages = [{"role": "user", "content": "hi"}]
    path.write_text(json.dumps({"messages": messages, "thinking": True, "stop": ["a", "b"]}))

    (row,) = read_prompts(path)

    assert row.prompt == messages
    assert row.chat == {"thinking": True}
    assert row.sampling(SamplingParams()).stop == ("a", "b")


def test_bad_lines_may_be_left_aside(path):
    path.write_text('{"prompt": "a"}\nnot JSON\n{"prompt": ""}\n{"id": 1, "prompt": "c"}\n{"prompt": "d"}\n')
    told = []

    rows = read_prompts(path, told.append)

    assert [row.prompt for row in rows] == ["a", "d"]
    assert [str(error).partition(" ")[0] for error in told] == [f"{path}:{line}:" for line in (2, 3, 4)]


def test_byte_order_mark_windows_line_ends_and_blank_lines_are_accepted(path):
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "one"}\r\n\r\n  \n{"prompt": "three\\n"}\r\n\n')

    assert [(row.id, row.prompt) for row in read_prompts(path)] == [(1, "one"), (4, "three\n")]


def test_a_line_separator_inside_a_prompt_does_not_split_the_line(path):
    path.write_text('{"prompt": "a\u2028b\u0085c"}\n', encoding="utf-8")

    assert [row.prompt for row in read_prompts(path)] == ["a\u2028b\u0085c"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "cut', "is not JSON: Unterminated string starting at, column 12"),
        (b"hello", "is not JSON: Expecting value, column 1"),
        (b'{"prompt": "a"} {"prompt": "b"}', "is not JSON: Extra data, column 17"),
        (b"[" * 100_000, "is not JSON: maximum recursion depth exceeded"),
        (b'{"tokens": [' + b"9" * 5000 + b"]}", "is not JSON: Exceeds the limit"),
        (b'{"prompt": "caf\xe9"}', "is not UTF-8 text: 'utf-8' codec can't decode byte 0xe9"),
        (b'{"prompt": "\\ud83d"}', "is not UTF-8 text: 'utf-8' codec can't encode character '\\ud83d'"),
        (b'{"id": "\\udc00", "prompt": "a"}', "is not UTF-8 text"),
        (b'["a"]', 'is not an object but list (such as {"prompt": "Hello"})'),
        (
            b'{"prompt": "a", "max_token": 3}',
            "unknown key 'max_token' (known are id, prompt, tokens, messages, max_tokens,",
        ),
        (b'{"id": "a"}', 'must have either "prompt" or "tokens" or "messages"'),
        (b'{"prompt": "a", "tokens": [1]}', 'must have either "prompt" or "tokens" or "messages"'),
        (b'{"prompt": ""}', "prompt is empty"),
        (b'{"prompt": [1, 2]}', 'prompt must be text, got list (ids go under "tokens")'),
        (b'{"tokens": []}', "tokens is empty"),
        (b'{"tokens": "abc"}', "tokens must be a list of token ids, got str"),
        (b'{"tokens": [1, 2.5]}', "tokens: token 1 must be an integer, got 2.5"),
        (b'{"tokens": [true]}', "tokens: token 0 must be an integer, got True"),
        (b'{"prompt": "a", "top_p": 1.5}', "top_p must be in (0, 1], got 1.5."),
        (b'{"prompt": "a", "temperature": NaN}', "temperature must be a finite number >= 0, got nan."),
        (b'{"prompt": "a", "seed": null}', "seed must be an integer in [0, 2**32), got None."),
        (b'{"messages": []}', "messages must be a list of messages, not empty"),
        (b'{"messages": [{"role": "robot"}]}', "messages[0]: unknown role 'robot'"),
        (
            b'{"messages": [{"role": "user", "content": "a"}], "thinking": 1}',
            "thinking must be true or false",
        ),
        (b'{"messages": [{"role": "user", "content": "a"}], "effort": "x"}', "effort must be one of auto,"),
        (b'{"prompt": "a", "thinking": true}', "'thinking' goes with \"messages\""),
        (b'{"prompt": "a", "stop": ""}', "stop must be texts that are not empty, got ''."),
        (b'{"id": 1.5, "prompt": "a"}', "id must be text or an integer, got float"),
        (b'{"id": true, "prompt": "a"}', "id must be text or an integer, got bool"),
        (b'{"id": null, "prompt": "a"}', "id must be text or an integer, got NoneType"),
    ],
    ids=lambda value: ascii(value[:40]) if isinstance(value, bytes) else "",
)
def test_a_bad_line_is_named_by_its_number(path, line, message):
    path.write_bytes(b'{"prompt": "good"}\n' + line + b'\n{"prompt": "good"}\n')

    with pytest.raises(RequestError) as caught:
        read_prompts(path)

    assert str(caught.value).startswith(f"{path}:2: {message}")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 65


@pytest.mark.parametrize(
    ("first", "third", "message"),
    [
        ('{"id": "a", "prompt": "x"}', '{"id": "a", "prompt": "y"}', "id 'a' is already that of line 1"),
        ('{"id": 3, "prompt": "x"}', '{"prompt": "y"}', "id 3 is already that of line 1"),
    ],
    ids=["named twice", "named as a line number"],
)
def test_a_duplicate_id_is_refused_with_both_lines(path, first, third, message):
    path.write_text(f'{first}\n{{"prompt": "between"}}\n{third}\n')

    with pytest.raises(RequestError) as caught:
        read_prompts(path)

    assert str(caught.value) == f"{path}:3: {message}"
    assert caught.value.exit_code == 65


@pytest.mark.parametrize("content", ["", "\n\r\n", "\ufeff"], ids=["empty", "blank lines", "mark only"])
def test_a_file_without_prompts_is_refused(path, content):
    path.write_text(content, encoding="utf-8")

    with pytest.raises(RequestError, match="holds no prompts") as caught:
        read_prompts(path)

    assert caught.value.exit_code == 65


@pytest.mark.parametrize(("name", "reason"), [("nowhere.jsonl", "No such file"), (".", "Is a directory")])
def test_a_prompt_file_that_cannot_be_read_is_named(tmp_path, name, reason):
    with pytest.raises(RequestError, match=f"cannot be read: {reason}") as caught:
        read_prompts(tmp_path / name)

    assert str(tmp_path) in caught.value.message
    assert caught.value.exit_code == 66
