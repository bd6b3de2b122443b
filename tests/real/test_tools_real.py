"""A model that was trained to call tools calls them, and goes on from what they return."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from kvp_edge import Llama
from kvp_edge.server.tools import Reply, check
from kvp_edge.server.tools.calls import merge
from kvp_edge.server.tools.messages import shows_tools

pytestmark = pytest.mark.real


def tool(name: str, description: str) -> dict[str, Any]:
    city = {"type": "string", "description": "Name of the city"}
    parameters = {"type": "object", "properties": {"city": city}, "required": ["city"]}
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [
    tool("get_weather", "The weather in a city now"),
    tool("get_time", "What time it is in a city"),
]
QUESTION = {"role": "user", "content": "What is the weather in Paris right now?"}


@pytest.fixture(scope="module")
def qwen(real_model: Callable[[str], str]) -> Iterator[Llama]:
    with closing(Llama(real_model("qwen"), kv_budget=1024, n_ctx=4096, verbose=False)) as llm:
        yield llm


def ask(llm: Llama, messages: Any, reply: Reply) -> tuple[dict[str, Any], str]:
    messages = reply.messages(messages, llm.metadata["tokenizer.chat_template"])
    parser, deltas, reason = reply.parser(), list[dict[str, Any]](), ""
    for chunk in llm.create_chat_completion(
        messages, stream=True, temperature=0.0, max_tokens=80, **reply.arguments()
    ):
        choice = chunk["choices"][0]
        deltas += parser.feed(choice["delta"].get("content") or "")
        reason = choice["finish_reason"] or reason
    rest, reason = parser.finish(reason)
    return merge(deltas + rest), reason


@pytest.mark.parametrize(
    ("choice", "name"),
    [
        ("auto", "get_weather"),
        ("required", "get_weather"),
        ({"type": "function", "function": {"name": "get_time"}}, "get_time"),
    ],
)
def test_qwen_calls_a_tool(qwen: Llama, choice: Any, name: str) -> None:
    message, reason = ask(qwen, [QUESTION], check(TOOLS, choice))
    (call,) = message["tool_calls"]
    assert call["function"]["name"] == name
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    assert (message["content"], reason) == (None, "tool_calls")


def test_qwen_writes_text_where_no_tool_may_be_called(qwen: Llama) -> None:
    message, _ = ask(qwen, [QUESTION], check(TOOLS, "none"))
    assert "tool_calls" not in message
    assert "Paris" in message["content"]


def test_the_template_of_qwen_shows_tools(qwen: Llama) -> None:
    assert shows_tools(qwen.metadata["tokenizer.chat_template"])


def test_qwen_is_shown_what_a_tool_returned(qwen: Llama) -> None:
    call = {"id": "call_1", "type": "function"}
    call["function"] = {"name": "get_weather", "arguments": '{"city": "Paris"}'}  # type: ignore[assignment]
    messages = [
        QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "17 degrees, heavy snow"},
    ]
    message, _ = ask(qwen, messages, check(TOOLS, "none"))
    assert "snow" in message["content"]


def test_qwen_keeps_a_schema(qwen: Llama) -> None:
    schema = {
        "type": "object",
        "properties": {"fruit": {"type": "string"}, "colour": {"enum": ["red", "green", "yellow"]}},
        "required": ["fruit", "colour"],
        "additionalProperties": False,
    }
    form = {"name": "fruit", "strict": True, "schema": schema}
    reply = check(response_format={"type": "json_schema", "json_schema": form})
    message, reason = ask(
        qwen, [{"role": "user", "content": "Name a fruit and its colour."}], reply
    )
    assert reason == "stop"
    assert json.loads(message["content"]).keys() == {"fruit", "colour"}
