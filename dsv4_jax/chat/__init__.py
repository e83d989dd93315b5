"""Conversations: messages in, token ids out; token ids in, reasoning, content and tool calls out."""

from dsv4_jax.chat.completion import Completion, CompletionStream, Delta, parse_completion
from dsv4_jax.chat.encoding import Effort, Release, encode_chat
from dsv4_jax.chat.messages import Message, ToolCall, read_messages

__all__ = [
    "Completion",
    "CompletionStream",
    "Delta",
    "Effort",
    "Message",
    "Release",
    "ToolCall",
    "encode_chat",
    "parse_completion",
    "read_messages",
]
