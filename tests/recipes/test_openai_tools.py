"""Tools and JSON schemas as OpenAI's client sends them and reads what comes of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from support.one_chat import assert_one_chat, opening, turn
from support.packages import needs
from support.server import Server

openai = needs("openai", "dev")
pydantic = needs("pydantic", "server")

MODEL = "bookworm-4m-f16"
HOW = {"model": MODEL, "temperature": 0.0, "max_tokens": 200}


class Code(pydantic.BaseModel):  # type: ignore[misc, name-defined]
    """Look up the code for a place."""

    place: Literal["harbour", "lighthouse"]
    whole: bool


class Boat(pydantic.BaseModel):  # type: ignore[misc, name-defined]
    """Call a boat."""

    people: Literal[1, 2, 3]


TOOLS = [openai.pydantic_function_tool(Code), openai.pydantic_function_tool(Boat)]


def told() -> list[dict[str, Any]]:
    return [{"role": "user", "content": opening()[0]}]


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=server.v1, api_key=server.key, max_retries=0) as made:
        yield made


# -- tools ----------------------------------------------------------------------------------------


def test_a_call_that_is_required_is_one_of_the_tools_and_its_answer_goes_on(
    client: Any, server: Server
) -> None:
    messages: list[Any] = told()
    first = messages[0]["content"]
    called = client.chat.completions.create(
        messages=messages, tools=TOOLS, tool_choice="required", **HOW
    )
    (choice,) = called.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert {"Code": Code, "Boat": Boat}[call.function.name](**json.loads(call.function.arguments))
    messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "4711"}]
    reply = client.chat.completions.create(messages=messages, tools=TOOLS, **HOW)
    assert reply.chat_id == called.chat_id == assert_one_chat(server, first, 4)
    assert turn(reply.usage).cached >= turn(called.usage).prompt - 8


@pytest.mark.parametrize("tool", [Code, Boat])
def test_a_named_tool_is_the_one_that_is_called(client: Any, tool: Any) -> None:
    choose = {"type": "function", "function": {"name": tool.__name__}}
    parsed = client.chat.completions.parse(messages=told(), tools=TOOLS, tool_choice=choose, **HOW)
    (call,) = parsed.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, tool)


def test_a_streamed_call_is_told_once_and_is_that_of_the_whole_reply(client: Any) -> None:
    ask = {"messages": told(), "tools": TOOLS, "tool_choice": "required", **HOW}
    (whole,) = client.chat.completions.create(**ask).choices[0].message.tool_calls
    with client.chat.completions.stream(**ask) as stream:
        events = list(stream)
    (done,) = (e for e in events if e.type == "tool_calls.function.arguments.done")
    assert (done.name, json.loads(done.arguments)) == (
        whole.function.name,
        json.loads(whole.function.arguments),
    )
    assert not [event for event in events if event.type == "content.delta" and event.delta]
    (choice,) = stream.get_final_completion().choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls[0].id.startswith("call_")


@pytest.mark.parametrize("choose", ["auto", "none"])
def test_who_need_not_call_may_just_reply(client: Any, choose: str) -> None:
    reply = client.chat.completions.create(messages=told(), tools=TOOLS, tool_choice=choose, **HOW)
    (choice,) = reply.choices
    assert choice.message.content
    assert choice.message.tool_calls is None
    assert choice.finish_reason == "stop"


# -- JSON -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [False, True])
def test_a_schema_is_filled_in_and_parsed(client: Any, server: Server, streams: bool) -> None:
    messages = told()
    ask = {"messages": messages, "response_format": Code, **HOW}
    if streams:
        with client.chat.completions.stream(**ask) as stream:
            for _ in stream:
                pass
        reply = stream.get_final_completion()
    else:
        reply = client.chat.completions.parse(**ask)
    message = reply.choices[0].message
    assert message.parsed == Code(**json.loads(message.content))
    messages.append({"role": "assistant", "content": message.content})
    messages.append({"role": "user", "content": "Thank you."})
    went_on = client.chat.completions.create(messages=messages, **HOW)
    assert went_on.chat_id == assert_one_chat(server, messages[0]["content"], 4)


def test_a_json_object_begins_as_one_and_as_a_stream_too(client: Any) -> None:
    ask = {"messages": told(), "response_format": {"type": "json_object"}, **HOW, "max_tokens": 30}
    whole = client.chat.completions.create(**ask).choices[0].message.content
    chunks = client.chat.completions.create(stream=True, **ask)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    assert whole.lstrip().startswith("{")
    assert len(whole) > 30


# -- what is wrong --------------------------------------------------------------------------------


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return {"type": "json_schema", "json_schema": {"name": "deep", "schema": schema}}


@pytest.mark.parametrize(
    ("param", "wrong"),
    [
        ("tool_choice", {"tool_choice": {"type": "function", "function": {"name": "Nobody"}}}),
        ("tools", {"tools": [{"type": "function", "function": {"name": "no spaces"}}]}),
        ("response_format", {"response_format": {"type": "poem"}}),
        ("response_format", {"response_format": deep(100)}),
    ],
)
def test_what_cannot_be_kept_is_refused_with_the_field_that_is_wrong(
    client: Any, param: str, wrong: dict[str, Any]
) -> None:
    ask = {"messages": told(), "tools": TOOLS, **HOW, **wrong}
    for streams in (False, True):
        with pytest.raises(openai.BadRequestError) as found:
            client.chat.completions.create(stream=streams, **ask)
        assert found.value.param.startswith(param)
        assert len(found.value.message) > 20
