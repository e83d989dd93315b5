"""Messages as chat APIs write them, checked: `{"role": "user", "content": "Hello"}` and so on."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn, get_args

from dsv4_jax.chat.wire import TASKS
from dsv4_jax.errors import RequestError
from dsv4_jax.tokenizer import check_text

Role = Literal["system", "user", "assistant", "tool", "latest_reminder", "developer"]
ROLES: tuple[Role, ...] = get_args(Role)
_EXAMPLE = '{"role": "user", "content": "Hi"}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A call that the model made; `arguments` is JSON text, an object if the model kept to the rules."""

    name: str
    arguments: str
    id: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As chat APIs write it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
    """One message of a conversation.

    Attributes:
      role: "developer" is a user's turn that may bring tools, "latest_reminder" a note to the model.
      content: its text.
      reasoning: what an assistant thought before it answered.
      tool_calls: of an assistant.
      tool_call_id: which call a tool answers.
      tools: schemas that a system or developer message brings, each the `function` object of a tool.
      task: of a user: what is wanted in place of an answer, a key of `wire.TASKS`.
      prefix: of an assistant: the model is to go on where this ends.
    """

    role: Role
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()
    task: str | None = None
    prefix: bool = False


def read_messages(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), where: str = "messages"
) -> list[Message]:
    """The messages in our own words. Keys that mean nothing here are left aside.

    Args:
      tools: offered to the model by the first system message, or by an empty one put in front.
      where: how an error speaks of the conversation.

    Raises:
      RequestError: a role or content that there is not, a tool's result that answers no call, or text that is
        not Unicode; it names the message.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise RequestError(
            f"{where} must be a list of messages, not empty",
            hint=f"such as [{_EXAMPLE}]",
        )
    read: list[Message] = []
    calls: tuple[ToolCall, ...] = ()  # of the last assistant message
    for place, raw in enumerate(messages):
        message = _message(raw, f"{where}[{place}]")
        if message.prefix and place < len(messages) - 1:
            _refuse(f"{where}[{place}]", '"prefix" goes with the last message')
        if message.role == "tool":
            _check_answers(message, calls, f"{where}[{place}]")
        elif message.role == "assistant":
            calls = message.tool_calls
        read.append(message)
    if not tools:
        return read
    offered = _tools(tools, "tools")
    for place, message in enumerate(read):
        if message.role == "system":
            read[place] = dataclasses.replace(message, tools=message.tools + offered)
            return read
    return [Message(role="system", tools=offered), *read]


def _message(raw: Any, where: str) -> Message:
    if not isinstance(raw, Mapping):
        _refuse(where, f"is not an object but {type(raw).__name__}", f"such as {_EXAMPLE}")
    role = raw.get("role")
    if role is None or role not in ROLES:
        _refuse(where, f"unknown role {role!r}", f"known are {', '.join(ROLES)}")
    prefix, task = raw.get("prefix", False), raw.get("task")
    if not isinstance(prefix, bool) or (prefix and role != "assistant"):
        _refuse(where, '"prefix" is true or false, and goes with role assistant')
    if task is not None and (task not in TASKS or role not in ("user", "developer")):
        _refuse(where, f"unknown task {task!r} for role {role}", f"known for users are {', '.join(TASKS)}")
    calls = _list(raw.get("tool_calls") or (), f"{where}.tool_calls")
    if calls and role != "assistant":
        _refuse(where, f"only an assistant has tool_calls, not role {role}")
    return Message(
        role=role,
        content=_content(raw.get("content"), role, where),
        reasoning=_text(raw.get("reasoning_content") or "", f"{where}.reasoning_content"),
        tool_calls=tuple(_call(call, f"{where}.tool_calls[{n}]") for n, call in enumerate(calls)),
        tool_call_id=_text(raw.get("tool_call_id") or "", f"{where}.tool_call_id"),
        tools=_tools(raw.get("tools") or (), f"{where}.tools"),
        task=task,
        prefix=prefix,
    )


def _content(content: Any, role: str, where: str) -> str:
    """Text, or a list of parts; only a tool may send what the model cannot read."""
    if content is None and role == "assistant":
        return ""
    if isinstance(content, str):
        return _text(content, f"{where}.content")
    if not isinstance(content, list):
        _refuse(where, f"content must be text, got {type(content).__name__}")
    parts = []
    for part in content:
        if isinstance(part, Mapping) and part.get("type") == "text":
            parts.append(_text(part.get("text"), f"{where}.content"))
        elif role == "tool":
            parts.append("[Unsupported type]")
        else:
            kind = part.get("type") if isinstance(part, Mapping) else part
            _refuse(where, f"content of type {kind!r}: the model reads text only")
    return "\n\n".join(parts)


def _call(raw: Any, where: str) -> ToolCall:
    function = raw.get("function") if isinstance(raw, Mapping) else None
    if not isinstance(function, Mapping):
        _refuse(where, 'must be {"id": ..., "function": {"name": ..., "arguments": "JSON text"}}')
    arguments = function.get("arguments")
    if isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(
        name=_text(function.get("name"), f"{where}.function.name"),
        arguments=_text(arguments, f"{where}.function.arguments"),
        id=_text(raw.get("id") or "", f"{where}.id"),
    )


def _tools(raw: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    """The `function` objects of tools."""
    found = []
    for place, tool in enumerate(_list(raw, where)):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            _refuse(f"{where}[{place}]", 'must be {"type": "function", "function": {"name": ..., ...}}')
        try:
            _text(json.dumps(function, ensure_ascii=False), f"{where}[{place}]")
        except (TypeError, ValueError, RecursionError) as error:
            _refuse(f"{where}[{place}]", f"is not JSON: {error}")
        found.append(function)
    return tuple(found)


def _check_answers(message: Message, calls: tuple[ToolCall, ...], where: str) -> None:
    if not calls:
        _refuse(where, "a tool's result, but no assistant message before it calls a tool")
    known = [call.id for call in calls if call.id]
    if message.tool_call_id and known and message.tool_call_id not in known:
        _refuse(where, f"answers call {message.tool_call_id!r}, but the calls are {', '.join(known)}")


def _list(value: Any, where: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        _refuse(where, f"expected a list, got {type(value).__name__}")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        _refuse(where, f"must be text, got {type(value).__name__}")
    try:
        return check_text(value)
    except RequestError as error:
        _refuse(where, error.message, error.hint)


def _refuse(where: str, message: str, hint: str = "") -> NoReturn:
    raise RequestError(f"{where}: {message}", hint=hint)
