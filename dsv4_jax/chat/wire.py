"""The control tokens and fixed texts of DeepSeek-V4's prompts, byte for byte.

A control token is a `Control`, a str of its own type: what a user wrote is never one, whatever it spells.
Source: the encoder in the released checkpoints (`encoding/encoding_dsv4.py`); docs/chat.md has the format.
"""

import re


class Control(str):
    """The spelling of a token that text cannot become."""


BOS, EOS = Control("<｜begin▁of▁sentence｜>"), Control("<｜end▁of▁sentence｜>")
USER, ASSISTANT = Control("<｜User｜>"), Control("<｜Assistant｜>")
THINK, END_THINK = Control("<think>"), Control("</think>")
DSML = Control("｜DSML｜")
LATEST_REMINDER = Control("<｜latest_reminder｜>")
# What a user message's "task" asks for in place of an answer: one token that opens it.
TASKS = {
    "action": Control("<｜action｜>"),
    "query": Control("<｜query｜>"),
    "authority": Control("<｜authority｜>"),
    "domain": Control("<｜domain｜>"),
    "title": Control("<｜title｜>"),
    "read_url": Control("<｜read_url｜>"),
}

ABSOLUTE_MAXIMUM = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root"
    " cause, rigorously stress-testing your logic against all potential paths, edge cases, and adversarial"
    " scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered"
    " alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)
BEYOND_MAXIMUM = (
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively"
    " decompose the problem into its most fundamental components, trace every causal chain to its root, and"
    " resolve the underlying cause rather than any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from multiple angles and are"
    " certain that no assumption remains unchecked and no error remains undiscovered.\n\n"
)

_TOOLS = """## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
"<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, \
arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside \
<think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

"""
_AFTER_SCHEMAS = (
    "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n"
)


def tools_block(schemas: list[str]) -> list[str]:
    """What tells the model of its tools: text, and the control tokens that the released text spells."""
    known: dict[str, str] = {each: each for each in (DSML, THINK, END_THINK)}
    parts = re.split("(" + "|".join(map(re.escape, known)) + ")", _TOOLS)
    return [*(known.get(part, part) for part in parts), "\n".join(schemas), _AFTER_SCHEMAS]
