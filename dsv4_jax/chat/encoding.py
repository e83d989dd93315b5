"""A conversation to token ids, so that what users wrote can never become a control token.

Text is never rendered into one string and tokenised as a whole: control tokens are put in by their ids, and
what stands between them is encoded without the tokenizer's added tokens. DeepSeek's own package does that
for the conversations that it knows; `render` does it for the rest (tasks and developer messages of the
released encoder) and where the package is not installed.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from dsv4_jax.chat.messages import Message, read_messages
from dsv4_jax.chat.render import render
from dsv4_jax.chat.wire import ABSOLUTE_MAXIMUM, BEYOND_MAXIMUM, EOS, Control
from dsv4_jax.errors import RequestError
from dsv4_jax.tokenizer import Tokenizer

try:
    import deepseek_recipe
except ImportError:  # no wheel for this platform
    deepseek_recipe = None

# The first checkpoints (V4-Flash, V4-Pro) and the later ones (those with a DSpark draft) ask for effort in
# different words. An effort is named here as the later encoder, and the package, name it.
Release = Literal["first", "later"]
Effort = Literal["auto", "low", "high", "max"]
_EFFORTS: dict[Release, dict[str, Literal["low", "high", "max"]]] = {
    "first": {"auto": "low", "low": "low", "high": "low", "max": "high"},
    "later": {"auto": "high", "low": "low", "high": "high", "max": "max"},
}
_PREAMBLES = {"low": "", "high": ABSOLUTE_MAXIMUM, "max": BEYOND_MAXIMUM}


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    thinking: bool = False,
    effort: Effort = "auto",
    release: Release = "first",
    where: str = "messages",
) -> list[int]:
    """Token ids of a conversation, ready for the assistant's answer.

    If the last message is the assistant's own, it is closed by EOS, and nothing is to follow; with
    `"prefix": true` the answer goes on where it ends.

    Args:
      messages: `{"role": ..., "content": ...}`; see `messages.Message`.
      tools: offered to the model, `{"type": "function", "function": {...}}`.
      thinking: whether the model is to think before it answers.
      effort: how hard; "auto" is what the release was trained to take for granted.
      release: which encoder the checkpoint came with.
      where: how an error speaks of the conversation.

    Raises:
      RequestError: a message is not one; it is named.
      TokenizerError: the tokenizer lacks a control token.
    """
    if effort not in get_args(Effort):
        raise RequestError(f"effort must be one of {', '.join(get_args(Effort))}, got {effort!r}.")
    read = read_messages(messages, tools, where)
    effort_asked = _EFFORTS[release][effort]
    if deepseek_recipe is not None and _is_known_to_the_package(read):
        return _by_package(tokenizer, read, thinking, effort_asked)
    return _by_pieces(tokenizer, read, thinking, effort_asked)


def _by_pieces(tokenizer: Tokenizer, messages: Sequence[Message], thinking: bool, effort: str) -> list[int]:
    ids, text = [], ""
    preamble = _PREAMBLES[effort] if thinking else ""
    for piece in [*render(messages, thinking=thinking, preamble=preamble), Control("")]:
        if not isinstance(piece, Control):
            text += piece  # pieces that touch are one text to the BPE
            continue
        ids += tokenizer.encode_plain(text) if text else []
        ids += [tokenizer.control_id(piece)] if piece else []
        text = ""
    return ids


# --- by DeepSeek's package


def _is_known_to_the_package(messages: Sequence[Message]) -> bool:
    last = messages[-1]
    # It would answer after a whole answer: such a one is given as a prefix, which needs content to be whole.
    whole = last.role != "assistant" or last.prefix or last.content
    plain = all(message.role != "developer" and message.task is None for message in messages)
    # Where a system message stands later than first, the package would move it.
    return bool(whole) and plain and all(message.role != "system" for message in messages[1:])


def _by_package(tokenizer: Tokenizer, messages: Sequence[Message], thinking: bool, effort: str) -> list[int]:
    assert deepseek_recipe is not None
    whole = messages[-1].role == "assistant" and not messages[-1].prefix
    tools = [
        deepseek_recipe.ToolDefinition(tool["name"], tool.get("description"), tool.get("parameters"))
        for message in messages
        for tool in message.tools
    ]
    conversation = deepseek_recipe.Conversation(
        [_message(message, thinking, last=message is messages[-1]) for message in messages],
        thinking_mode=thinking,
        tools=tools,
        reasoning_effort=effort,  # type: ignore[arg-type]
    )
    ids = _package_encoding(tokenizer).encode(conversation)
    return [*ids, tokenizer.control_id(EOS)] if whole else ids


def _message(message: Message, thinking: bool, *, last: bool) -> Any:
    assert deepseek_recipe is not None
    if message.role == "system":
        return deepseek_recipe.SystemMessage(message.content)
    if message.role == "user":
        return deepseek_recipe.UserMessage(message.content)
    if message.role == "latest_reminder":
        return deepseek_recipe.LatestReminderMessage(message.content)
    if message.role == "tool":
        return deepseek_recipe.ToolMessage(message.content, message.tool_call_id or None)
    calls = [deepseek_recipe.ToolCall(call.id, call.name, call.arguments) for call in message.tool_calls]
    reasoning = message.reasoning if thinking else None
    return deepseek_recipe.AssistantMessage(message.content, reasoning, calls or None, prefix=last)


@functools.lru_cache(maxsize=4)
def package_tokenizer(tokenizer: Tokenizer) -> Any:
    """The package's own view of a tokenizer."""
    assert deepseek_recipe is not None
    return deepseek_recipe.Tokenizer.from_str(tokenizer.to_json())


@functools.lru_cache(maxsize=4)
def _package_encoding(tokenizer: Tokenizer) -> Any:
    assert deepseek_recipe is not None
    return deepseek_recipe.DeepseekV4Encoding().with_tokenizer(package_tokenizer(tokenizer))
