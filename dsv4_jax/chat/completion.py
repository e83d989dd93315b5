"""What the model said, taken apart: reasoning, content and tool calls, whole or as it comes.

DeepSeek's own parser does it where it is installed, on token ids, so that text which spells a control token
is not taken for one. Without it reasoning and content are told apart, and calls stay in the content as text.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Literal

from dsv4_jax.chat.encoding import deepseek_recipe, package_tokenizer
from dsv4_jax.chat.messages import ToolCall
from dsv4_jax.chat.wire import BOS, END_THINK, EOS
from dsv4_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Delta:
    """What some tokens add to a completion.

    Attributes:
      kind: what `text` is more of; for "tool_call" it is JSON text of the arguments.
      text: perhaps empty, at the beginning of a call.
      call: which tool call, from 0.
      name: of the tool, at the beginning of a call.
    """

    kind: Literal["reasoning", "content", "tool_call"]
    text: str
    call: int = 0
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Completion:
    """An assistant's answer.

    Attributes:
      reasoning: what it thought first; empty outside of thinking.
      content: what it says.
      tool_calls: what it wants called, with ids `call_0` and so on.
    """

    reasoning: str = ""
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()

    def add(self, delta: Delta) -> "Completion":
        """This and what came after it."""
        if delta.kind == "tool_call":
            calls = list(self.tool_calls)
            if delta.call == len(calls):
                calls.append(ToolCall(name=delta.name, arguments="", id=f"call_{delta.call}"))
            now = calls[delta.call]
            calls[delta.call] = dataclasses.replace(now, arguments=now.arguments + delta.text)
            return dataclasses.replace(self, tool_calls=tuple(calls))
        return dataclasses.replace(self, **{delta.kind: getattr(self, delta.kind) + delta.text})

    def to_message(self) -> dict[str, Any]:
        """As the next message of the conversation, in the form that `encode_chat` takes."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.to_dict() for call in self.tool_calls]
        return message


def parse_completion(
    tokenizer: Tokenizer, ids: Sequence[int], *, thinking: bool, stage: "Stage | None" = None
) -> Completion:
    """The answer that these tokens are; what is malformed stays in it as text.

    Args:
      ids: what the model generated, with or without the EOS at its end.
      thinking: whether the prompt asked for thinking.
      stage: as in `CompletionStream`.
    """
    stream = CompletionStream(tokenizer, thinking=thinking, stage=stage)
    completion = Completion()
    for delta in [*stream.put(ids), *stream.end()]:
        completion = completion.add(delta)
    return completion


# Where an answer begins: with thoughts, or within thoughts or content that the prompt began.
Stage = Literal["start", "reasoning", "content"]


class CompletionStream:
    """Takes tokens as they come, and gives what is certain of them; together that is `parse_completion`."""

    def __init__(self, tokenizer: Tokenizer, *, thinking: bool, stage: Stage | None = None):
        """`stage`: where the answer begins; by default with thoughts if `thinking`, else with content."""
        self._left_out = {tokenizer.control_id(EOS), tokenizer.control_id(BOS)}
        stage = stage or "start"
        package = deepseek_recipe is not None
        self._parser = (_ByPackage if package else _ByToken)(tokenizer, thinking, stage)

    def put(self, ids: Sequence[int]) -> list[Delta]:
        """What these tokens add."""
        kept = [id for id in ids if id not in self._left_out]
        return self._parser.put(kept) if kept else []

    def end(self) -> list[Delta]:
        """What was held back because it might have become something else."""
        return self._parser.end()


class _ByPackage:
    def __init__(self, tokenizer: Tokenizer, thinking: bool, stage: Stage):
        assert deepseek_recipe is not None
        stages = deepseek_recipe.ThinkingInitialStage
        begins = {
            "start": stages.ReasoningStart,
            "reasoning": stages.ReasoningContinuation,
            "content": stages.ContentContinuation,
        }
        conversation = deepseek_recipe.Conversation([], thinking_mode=thinking)
        version = deepseek_recipe.ModelVersion.DeepseekV4Pro
        request = deepseek_recipe.ConversationRequest(conversation, version)
        generator = deepseek_recipe.ChatCompletionRequest.chunk_generator(request, "", "")
        options = deepseek_recipe.ParsingOptions(thinking_initial_stage=begins[stage] if thinking else None)
        self._stream = deepseek_recipe.StreamProcessor(generator, options, package_tokenizer(tokenizer))
        self._stream.push(deepseek_recipe.InferenceChunk.ready())

    def put(self, ids: Sequence[int]) -> list[Delta]:
        assert deepseek_recipe is not None
        return _deltas(self._stream.push(deepseek_recipe.InferenceChunk.tokens(ids)))

    def end(self) -> list[Delta]:
        assert deepseek_recipe is not None
        reason = deepseek_recipe.InferenceFinishReason.Stop
        chunks = self._stream.push(deepseek_recipe.InferenceChunk.finish(reason))
        return _deltas([*chunks, *self._stream.finish()])


def _deltas(chunks: Sequence[Any]) -> list[Delta]:
    found = []
    for chunk in chunks:
        for choice in json.loads(chunk.to_json())["choices"]:
            delta = choice["delta"]
            if delta.get("reasoning_content"):
                found.append(Delta("reasoning", delta["reasoning_content"]))
            if delta.get("content"):
                found.append(Delta("content", delta["content"]))
            for call in delta.get("tool_calls") or ():
                function = call["function"]
                text, name = function.get("arguments") or "", function.get("name") or ""
                found.append(Delta("tool_call", text, call["index"], name))
    return found


class _ByToken:
    """Reasoning up to `</think>`, then content."""

    def __init__(self, tokenizer: Tokenizer, thinking: bool, stage: Stage):
        self._end_think = tokenizer.control_id(END_THINK)
        self._text = tokenizer.stream()
        thinks = thinking and stage != "content"
        self._kind: Literal["reasoning", "content"] = "reasoning" if thinks else "content"

    def put(self, ids: Sequence[int]) -> list[Delta]:
        found = []
        for id in ids:
            if id == self._end_think and self._kind == "reasoning":
                found += self.end()
                self._kind = "content"
            elif text := self._text.put([id]):
                found.append(Delta(self._kind, text))
        return found

    def end(self) -> list[Delta]:
        left = self._text.end()
        return [Delta(self._kind, left)] if left else []
