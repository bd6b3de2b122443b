"""tools, tool_choice and response_format of a request, and what the model writes then."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from kvp_edge import Llama
from kvp_edge.server.tools.calls import merge
from kvp_edge.server.tools.grammar import MAX_READINGS
from kvp_edge.server.tools.offered import (
    MAX_SHAPES,
    MAX_TOOLS,
    MAX_TOOLS_BYTES,
    BadRequest,
    Reply,
    check,
)


def tool(name: str = "f", parameters: Any = None, **more: Any) -> dict[str, Any]:
    function = {"name": name, **more}
    if parameters is not None:
        function["parameters"] = parameters
    return {"type": "function", "function": function}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def json_schema(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, **more}}


CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "unit": {"enum": ["celsius", "fahrenheit"]},
    },
    "required": ["city"],
}
TOOLS = [tool("get_weather", CITY, description="The weather"), tool("get_time"), tool("get-1")]


@pytest.fixture(scope="module")
def llm(bundled_model: str) -> Iterator[Llama]:
    with closing(Llama(bundled_model, n_ctx=1024, n_threads=1, verbose=False)) as llm:
        yield llm


def ask(llm: Llama, reply: Reply, seed: int = 0, n: int = 200) -> tuple[dict[str, Any], str]:
    """The message that the model writes, in the way in which it is streamed, and finish_reason."""
    parser, deltas, reason = reply.parser(), list[dict[str, Any]](), ""
    for chunk in llm.create_chat_completion(
        [{"role": "user", "content": "Hello!"}],
        stream=True,
        temperature=1.0,
        seed=seed,
        max_tokens=n,
        **reply.arguments(),
    ):
        choice = chunk["choices"][0]
        deltas += parser.feed(choice["delta"].get("content") or "")
        reason = choice["finish_reason"] or reason
    rest, reason = parser.finish(reason)
    return merge(deltas + rest), reason


@pytest.mark.parametrize("seed", range(5))
def test_a_required_call_is_one_of_the_tools(llm: Llama, seed: int) -> None:
    message, reason = ask(llm, check(TOOLS, "required"), seed)
    (call,) = message["tool_calls"]
    assert (message["content"], reason) == (None, "tool_calls")
    arguments = json.loads(call["function"]["arguments"])
    if call["function"]["name"] == "get_weather":
        assert set(arguments) <= {"city", "unit"}
        assert len(arguments["city"]) <= 8
        assert arguments.get("unit", "celsius") in ("celsius", "fahrenheit")
    else:
        assert arguments == {}


@pytest.mark.parametrize("name", ["get_weather", "get_time", "get-1"])
def test_a_named_tool_is_called(llm: Llama, name: str) -> None:
    message, reason = ask(llm, check(TOOLS, named(name)))
    assert [call["function"]["name"] for call in message["tool_calls"]] == [name]
    assert reason == "tool_calls"


def test_a_call_that_does_not_fit_into_the_tokens_is_content(llm: Llama) -> None:
    message, reason = ask(llm, check(TOOLS, named("get_weather")), n=5)
    assert message["content"].startswith('{"')
    assert "tool_calls" not in message
    assert reason == "length"


def test_a_response_format_is_kept(llm: Llama) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    message, reason = ask(llm, check(response_format=json_schema(schema, strict=True)))
    assert isinstance(json.loads(message["content"])["a"], int)
    assert reason == "stop"
    for seed in range(3):
        message, reason = ask(llm, check(response_format={"type": "json_object"}), seed)
        assert message["content"].startswith("{")
        assert reason == "length" or isinstance(json.loads(message["content"]), dict)


def test_with_a_response_format_a_reply_is_such_json_or_a_call(llm: Llama) -> None:
    schema = {"type": "object", "properties": {"name": {"const": "get_time"}}, "required": ["name"]}
    seen = set()
    for seed in range(12):
        reply = check(TOOLS, "auto", json_schema(schema))
        message, reason = ask(llm, reply, seed)
        if "tool_calls" in message:
            assert (message["content"], reason) == (None, "tool_calls")
        else:
            assert (json.loads(message["content"]), reason) == ({"name": "get_time"}, "stop")
        seen.add(reason)
    assert seen == {"stop", "tool_calls"}


def test_without_any_of_them_nothing_is_changed() -> None:
    for reply in (check(), check([]), check(None, "none"), check(None, "auto"), check([], "auto")):
        assert reply.arguments() == {}
    assert check(response_format={"type": "text"}).arguments() == {}


def test_the_template_is_shown_the_tools_unless_none_may_be_called() -> None:
    for choice in (None, "auto", "required", named("get_time")):
        shown = check(TOOLS, choice).arguments()["tools"]
        assert [one["function"]["name"] for one in shown] == ["get_weather", "get_time", "get-1"]
        assert shown[0] == TOOLS[0]
        assert shown[1]["function"]["parameters"] == {"type": "object", "properties": {}}
    assert check(TOOLS, "none").arguments() == {}
    assert check(TOOLS, "none").parser().feed('{"name"') == [{"content": '{"name"'}]
    assert "grammar" not in check(TOOLS).arguments()


def test_parallel_calls_can_be_switched_off() -> None:
    text = '[{"name": "get_time", "arguments": {}}, {"name": "get_time", "arguments": {}}]'
    for parallel, n in ((None, 2), (True, 2), (False, 1)):
        parser = check(TOOLS, None, None, parallel).parser()
        assert parser.feed(text) == []
        deltas, _ = parser.finish()
        assert len(merge(deltas)["tool_calls"]) == n


def test_what_is_checked_is_not_changed() -> None:
    tools, formats = copy.deepcopy(TOOLS), json_schema({"type": "object"})
    check(tools, "required", formats)
    assert tools == TOOLS
    assert formats == json_schema({"type": "object"})


OPTIONAL = {chr(0x4E00 + i): {} for i in range(2 * MAX_READINGS)}
WIDE = {"type": "object", "properties": {str(i): {} for i in range(250)}}
LONG = tool(parameters={"type": "object", "description": "x" * 50_000})


@pytest.mark.parametrize(
    ("request_", "param", "sentence"),
    [
        ({"tools": {}}, "tools", "must be a list"),
        ({"tools": [tool(f"t{i}") for i in range(MAX_TOOLS + 1)]}, "tools", "129 tools"),
        ({"tools": [1]}, "tools[0]", "type 'function'"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0]", "type 'function'"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "must be an object"),
        ({"tools": [tool("a b")]}, "tools[0].function.name", "unlike 'a b'"),
        ({"tools": [tool("")]}, "tools[0].function.name", "1 to 64"),
        ({"tools": [tool("x" * 65)]}, "tools[0].function.name", "1 to 64"),
        ({"tools": [tool("x\n")]}, "tools[0].function.name", "1 to 64"),
        ({"tools": [tool(), tool()]}, "tools[1].function.name", "two tools are called 'f'"),
        ({"tools": [tool(description=1)]}, "tools[0].function.description", "must be a text"),
        ({"tools": [tool(strict="yes")]}, "tools[0].function.strict", "true or false"),
        ({"tools": [tool(parameters=[])]}, "tools[0].function.parameters", "a JSON schema"),
        (
            {"tools": [tool(parameters={"type": "string"})]},
            "tools[0].function.parameters",
            "type 'object'",
        ),
        (
            {"tools": [tool(parameters={"enum": [1]})]},
            "tools[0].function.parameters",
            "type 'object'",
        ),
        (
            {"tools": [tool(parameters={"x": "y" * 70_000})]},
            "tools[0].function.parameters",
            "bytes",
        ),
        (
            {"tools": [tool(f"t{i}", LONG["function"]["parameters"]) for i in range(6)]},
            "tools",
            "bytes",
        ),
        ({"tools": [tool(description="\ud800")]}, "tools", "not JSON"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice", "not 'always'"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice", "no tool"),
        (
            {"tools": TOOLS, "tool_choice": named("other")},
            "tool_choice",
            "no tool that there is: 'other'",
        ),
        (
            {"tools": TOOLS, "tool_choice": {**named("get_time"), "type": "x"}},
            "tool_choice",
            "must be",
        ),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": named("f")}, "tool_choice", "needs tools"),
        ({"tools": TOOLS, "parallel_tool_calls": 1}, "parallel_tool_calls", "true or false"),
        (
            {"tools": [tool(parameters={"properties": OPTIONAL})], "tool_choice": "required"},
            "tools",
            "readings",
        ),
        (
            {"tools": [tool(f"t{i}", WIDE) for i in range(5)], "tool_choice": "required"},
            "tools",
            f"{MAX_SHAPES}",
        ),
        (
            {
                "tools": [tool(parameters={"required": ["a"], "minProperties": 1}, strict=True)],
                "tool_choice": named("f"),
            },
            "tools",
            "'minProperties' cannot be kept",
        ),
        ({"response_format": "json"}, "response_format", "must be an object"),
        ({"response_format": {"type": "xml"}}, "response_format", "'json_schema'"),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "a name and a schema",
        ),
        (
            {"response_format": json_schema({}, name="a b")},
            "response_format.json_schema.name",
            "unlike",
        ),
        (
            {"response_format": json_schema({}, strict=1)},
            "response_format.json_schema.strict",
            "true or false",
        ),
        (
            {"response_format": json_schema([])},
            "response_format.json_schema.schema",
            "is no schema",
        ),
        (
            {"response_format": json_schema({"minimum": 1}, strict=True)},
            "response_format.json_schema.schema",
            "'minimum' cannot be kept",
        ),
        (
            {"response_format": json_schema({"enum": [*OPTIONAL, "a"]})},
            "response_format",
            "readings",
        ),
    ],
)
def test_a_request_is_refused_with_a_sentence(
    request_: dict[str, Any], param: str, sentence: str
) -> None:
    with pytest.raises(BadRequest) as error:
        check(**request_)
    assert sentence in str(error.value)
    assert error.value.param == param
    assert isinstance(error.value, ValueError)


def test_as_many_tools_as_are_allowed_can_be_required(llm: Llama) -> None:
    tools = [tool(f"{i:064d}", CITY) for i in range(MAX_TOOLS)]
    assert len(json.dumps(tools)) < MAX_TOOLS_BYTES
    message, _ = ask(llm, check(tools, "required"))
    assert len(message["tool_calls"]) == 1


def test_a_schema_that_no_grammar_can_keep_may_be_shown() -> None:
    parameters = {"type": "object", "properties": OPTIONAL, "minProperties": 3}
    assert check([tool(parameters=parameters)], "auto").gbnf is None


def test_tools_are_text_only_where_the_template_does_not_show_them() -> None:
    chat = [{"role": "user", "content": "Hello"}]
    assert check(TOOLS).messages(chat, "{{ tools }}{{ messages }}") == chat
    assert check(TOOLS, "none").messages(chat, "") == chat
    system, hello = check(TOOLS).messages(chat, "{{ messages }}")
    assert "get_weather" in system["content"]
    assert hello == chat[0]
