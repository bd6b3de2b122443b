"""OpenAI's messages as chat templates want them: calls of tools, and what tools returned."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kvp_edge.files import json_values
from kvp_edge.server.tools.grammar import json_text
from kvp_edge.server.tools.json_schema import check_size

#: Larger arguments stay text.
MAX_ARGUMENTS_BYTES = 256 * 1024

_EXPLANATION = """\
You can call these tools:
{tools}

To call one, write only
<tool_call>
{{"name": "NAME", "arguments": {{...}}}}
</tool_call>
with arguments that fit its parameters. What it returns comes in <tool_response></tool_response>."""


def shows_tools(template: str) -> bool:
    """Whether a chat template does anything with tools."""
    return re.search(r"\btools\b", template) is not None


def for_template(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Messages for a chat template. Those given are not changed.

    Arguments of calls become objects, where OpenAI has JSON in a string; no content becomes "".

    Args:
        tools: the template knows of none (``shows_tools``): the system message says which there
            are, and calls and what they returned are written as text.
    """
    changed = [_with_objects(message) for message in messages]
    return changed if tools is None else _as_text(changed, tools)


def _with_objects(message: Mapping[str, Any]) -> dict[str, Any]:
    changed = dict(message)
    if changed.get("content", "") is None:
        changed["content"] = ""
    calls = changed.get("tool_calls")
    if isinstance(calls, list):
        changed["tool_calls"] = [_with_object(call) for call in calls]
    return changed


def _with_object(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json_values.parse(function["arguments"])
        check_size(arguments, "arguments", MAX_ARGUMENTS_BYTES)
    except ValueError:
        return call
    if not isinstance(arguments, dict):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _as_text(
    messages: Sequence[dict[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    changed: list[dict[str, Any]] = []
    after_tool = False
    for message in messages:
        role, content = message.get("role"), message.get("content", "")
        if role == "tool":
            text = f"<tool_response>\n{content}\n</tool_response>"
            if after_tool:  # templates want a reply between two messages of the user
                changed[-1]["content"] += f"\n{text}"
            else:
                changed.append({"role": "user", "content": text})
        else:
            calls = message.get("tool_calls") or []
            texts = ([content] if content else []) + [_call_as_text(call) for call in calls]
            rest = {key: value for key, value in message.items() if key != "tool_calls"}
            changed.append({**rest, "content": "\n".join(texts)} if calls else rest)
        after_tool = role == "tool"
    if tools:
        text = _EXPLANATION.format(tools="\n".join(json_text(one["function"]) for one in tools))
        first = changed[0] if changed else {}
        if first.get("role") == "system" and isinstance(first.get("content"), str):
            changed[0] = {**first, "content": f"{first['content']}\n\n{text}"}
        else:
            changed.insert(0, {"role": "system", "content": text})
    return changed


def _call_as_text(call: Any) -> str:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        function = {}
    written = {"name": function.get("name"), "arguments": function.get("arguments")}
    return f"<tool_call>\n{json_text(written)}\n</tool_call>"
