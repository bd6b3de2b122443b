"""Messages with calls, as chat templates want them."""

from __future__ import annotations

import copy
from contextlib import closing
from typing import Any

from kvp_edge import Llama
from kvp_edge.server.tools.messages import for_template, shows_tools

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def call(arguments: Any) -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": arguments}}


def test_templates_get_arguments_as_objects() -> None:
    deep = '{"a":' * 40 + "1" + "}" * 40
    kept = ["", "no JSON", "[1]", "1", "NaN", '{"a": NaN}', deep, "[" * 100_000, {"a": 1}, None]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Hello"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [call('{"a": [1, "é"]}'), *map(call, kept)],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "{}"},
        {"role": "assistant", "tool_calls": [{"function": 1}, 1]},
    ]
    before = copy.deepcopy(messages)
    changed = for_template(messages)
    assert messages == before
    assert changed[0] == messages[0]
    assert changed[2:] == messages[2:]
    assert changed[1]["content"] == ""
    arguments = [one["function"]["arguments"] for one in changed[1]["tool_calls"]]
    assert arguments == [{"a": [1, "é"]}, *kept]


CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Well.", "tool_calls": [call('{"a": 1}'), call("no JSON")]},
    {"role": "tool", "tool_call_id": "call_1", "content": "one"},
    {"role": "tool", "tool_call_id": "call_2", "content": "two"},
    {"role": "assistant", "content": "Done."},
]


def test_a_template_without_tools_is_shown_them_as_text() -> None:
    system, *rest = for_template(CHAT, TOOLS)
    assert system["role"] == "system"
    assert '{"name": "f", "parameters": {"type": "object"}}' in system["content"]
    assert rest == [
        CHAT[0],
        {
            "role": "assistant",
            "content": 'Well.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
            '<tool_call>\n{"name": "f", "arguments": "no JSON"}\n</tool_call>',
        },
        {
            "role": "user",
            "content": "<tool_response>\none\n</tool_response>\n"
            "<tool_response>\ntwo\n</tool_response>",
        },
        CHAT[4],
    ]


def test_a_system_message_keeps_its_place_and_its_words() -> None:
    system = {"role": "system", "content": "Be kind."}
    first, second = for_template([system, CHAT[0]], TOOLS)
    assert first["content"].startswith("Be kind.\n\nYou can call these tools:")
    assert second == CHAT[0]
    assert system["content"] == "Be kind."


def test_calls_become_text_even_if_none_may_be_made_now() -> None:
    changed = for_template(CHAT, [])
    assert [message["role"] for message in changed] == ["user", "assistant", "user", "assistant"]
    assert for_template([], []) == []


def test_the_bundled_template_takes_a_chat_with_calls(bundled_model: str) -> None:
    with closing(Llama(bundled_model, n_ctx=1024, n_threads=1, verbose=False)) as llm:
        template = llm.metadata["tokenizer.chat_template"]
        assert not shows_tools(template)
        reply = llm.create_chat_completion(for_template(CHAT, TOOLS), max_tokens=4)
        assert reply["choices"][0]["message"]["content"]


def test_templates_are_known_to_show_tools_by_the_word() -> None:
    assert shows_tools("{% if tools %}{{ tools | tojson }}{% endif %}")
    assert not shows_tools("{{ my_tools_list }}{{ message.content }}")
