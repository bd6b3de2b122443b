"""The parser of replies: what is a call, what is content, and that pieces make no difference."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvp_edge.server.tools.calls import MAX_DEPTH, ReplyParser, merge

NAMES = ("f", "get_weather")
CALL = '{"name": "f", "arguments": {"x": 1}}'
HERMES = f"<tool_call>\n{CALL}\n</tool_call>"


def parse(*pieces: str, reason: str = "stop", **options: Any) -> tuple[dict[str, Any], str]:
    """The message of a reply that came in these pieces, without ids, and finish_reason."""
    parser = ReplyParser(NAMES, **options)
    deltas = [delta for piece in pieces for delta in parser.feed(piece)]
    rest, reason = parser.finish(reason)
    message = merge(deltas + rest)
    for call in message.get("tool_calls", ()):
        assert call.pop("id").startswith("call_")
        assert call["type"] == "function"
    return message, reason


def calls(text: str, **options: Any) -> list[tuple[str, Any]]:
    """Name and arguments of all calls of a reply that is nothing but calls."""
    message, reason = parse(text, **options)
    assert (message["content"], reason) == (None, "tool_calls")
    functions = [call["function"] for call in message["tool_calls"]]
    return [(function["name"], json.loads(function["arguments"])) for function in functions]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HERMES, [("f", {"x": 1})]),
        (HERMES + HERMES, [("f", {"x": 1})] * 2),
        (f"\n{HERMES}\n\n{HERMES}\n", [("f", {"x": 1})] * 2),
        (f"<tool_call>{CALL}", [("f", {"x": 1})]),  # the end token came first
        ('<tool_call>{"arguments":{},"name":"f"}</tool_call>', [("f", {})]),
        (f"[TOOL_CALLS] [{CALL}, {CALL}]", [("f", {"x": 1})] * 2),
        (f" [{CALL}]", [("f", {"x": 1})]),  # the mark was a control token
        ('[{"name": "f", "arguments": {}, "id": "abc123"}]', [("f", {})]),
        ('{"name": "get_weather", "parameters": {"x": 2}}', [("get_weather", {"x": 2})]),
        ('<|python_tag|>{"type": "function", "name": "f", "parameters": {}}', [("f", {})]),
        (f"{CALL}; {CALL}\n{CALL}\n", [("f", {"x": 1})] * 3),
        ('{"name": "f", "arguments": "{\\"a\\": [\\"\\\\u00e9\\"]}"}', [("f", {"a": ["é"]})]),
        ('{"name": "f", "arguments": {"s": "</tool_call> \\" }", "n": -1.5e+3}}',
         [("f", {"s": '</tool_call> " }', "n": -1500})]),
    ],
)  # fmt: skip
def test_calls_are_read_in_the_forms_that_models_write(text: str, expected: list[Any]) -> None:
    assert calls(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n",
        "Hello.",
        "<",
        "a < b, a[0], {x}",
        "<tool_call>",
        "<tool_call>\n",
        '<tool_call>{"name": "f", "arguments": {"x": 1}',
        '<tool_call>{"name": "f", "arguments": {"x": 1}} or so</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": }}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": 1,}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": 01}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "[1]"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"\\\\ud800\\"}"}</tool_call>'.replace(
            "\\\\ud800", "\\ud800"
        ),
        '<tool_call>{"name": "f", "arguments": {"x": "a\nb"}}</tool_call>',
        '<tool_call>{"name": "f"}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "name": "f", "arguments": {}}</tool_call>',
        "<tool_call>{}</tool_call>",
        f"Like this: {CALL}",
        f"{CALL} is a call.",
        f"[{CALL}",
        f"[{CALL},]",
        f"[{CALL}] is a list",
        "[]",
        "[TOOL_CALLS] []",
        f"[TOOL_CALLS] {CALL}",
        "[TOOL_CALLS] [1]",
        '{"answer": 42}',
        '{"name": "Ann", "age": 7}',
        "<|python_tag|>print(1)",
        f"text <|python_tag|>{CALL}",
        '{"name": "f", "arguments": ' + '{"a":' * MAX_DEPTH + "{}" + "}" * MAX_DEPTH + "}",
    ],
)
def test_what_only_looks_like_a_call_stays_content(text: str) -> None:
    assert parse(text) == ({"role": "assistant", "content": text}, "stop")


def test_arguments_may_be_as_deep_as_the_limit() -> None:
    n = MAX_DEPTH - 1
    assert len(calls('{"name": "f", "arguments": ' + '{"a":' * n + "{}" + "}" * n + "}")) == 1


def test_text_around_calls_is_kept_and_white_space_beside_them_is_not() -> None:
    message, reason = parse(f"I look.\n{HERMES}\n {HERMES} \nDone. ")
    assert message["content"] == "I look.\n \nDone. "
    assert len(message["tool_calls"]) == 2
    assert reason == "stop"  # it did not end in a call


def test_a_broken_call_does_not_hide_the_next_one() -> None:
    broken = '<tool_call>{"name": "f", "arguments": {'
    message, _ = parse(broken + HERMES)
    assert (message["content"], len(message["tool_calls"])) == (broken, 1)
    assert parse("<tool_<tool_call>" + CALL)[0]["content"] == "<tool_"


def test_only_the_first_call_counts_if_calls_are_not_parallel() -> None:
    for text in (HERMES * 3, f"[{CALL},{CALL}]", f"{CALL};{CALL}"):
        assert calls(text, parallel=False) == [("f", {"x": 1})]


def test_a_bare_call_is_content_where_json_was_asked_for() -> None:
    assert parse(CALL, bare=False)[0]["content"] == CALL
    assert calls(HERMES, bare=False) == [("f", {"x": 1})]


def test_without_tools_all_is_content_at_once() -> None:
    parser = ReplyParser()
    assert parser.feed(HERMES) == [{"content": HERMES}]
    assert parser.feed("") == []
    assert parser.finish("length") == ([], "length")


def test_a_reply_that_was_cut_keeps_its_reason_unless_its_last_call_is_whole() -> None:
    assert parse(HERMES[:-20], reason="length")[1] == "length"
    assert parse(HERMES, reason="length")[1] == "tool_calls"
    assert parse(HERMES + HERMES[:30], reason="length")[1] == "length"


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("The weather <", "<"),
        ("The weather <tool_cal", "<tool_cal"),
        ("The weather <b", ""),
        ("a [TOOL", "[TOOL"),
        ("a [1", ""),
        ("a {", ""),
        ('{"na', '{"na'),
        ('{"nu', ""),
        ('{"name": "get_w', '{"name": "get_w'),
        ('{"name": "get_x', ""),
        (HERMES[:-17], HERMES[:-17]),
        ('<tool_call>{"name": "f", "arguments": {"x": 1 1', ""),
    ],
)  # fmt: skip
def test_nothing_is_held_back_but_what_may_become_a_call(text: str, held: str) -> None:
    parser = ReplyParser(NAMES)
    passed = "".join(delta["content"] for c in text for delta in parser.feed(c))
    assert passed + held == text


def test_calls_are_numbered_and_have_different_ids() -> None:
    parser = ReplyParser(NAMES)
    found = [delta["tool_calls"][0] for delta in parser.feed(HERMES * 3)]
    assert [call["index"] for call in found] == [0, 1, 2]
    assert len({call["id"] for call in found}) == 3


# -- any text ------------------------------------------------------------------------------------

FRAGMENTS = (
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "<", "[", "]", "{", "}"),
    *(CALL, HERMES, f"[{CALL}, {CALL}]", '{"name": "g", "arguments": {}}', ";", ",", " ", "\n"),
    *('{"name": "f", "arguments": {"x": "', '"', "\\", '"name"', ":", '"f"', "word", "1", "é"),
    *('{"name": "f", ', '"arguments": ', '{"y": [true, null]}', '"id": "7"'),
)
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)
#: What forms of calls consist of beside arguments.
FORM = (
    r'(?:\s|</?tool_call>|\[TOOL_CALLS\]|<\|python_tag\|>|[\[\]{},:;]'
    r'|"(?:name|arguments|f|id|7)")*'
)  # fmt: skip


@given(TEXTS, st.data())
def test_pieces_make_no_difference(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parse(text)
    assert parse(*pieces) == whole
    assert parse(*text) == whole


@given(TEXTS, st.booleans())
def test_no_text_is_lost(text: str, bare: bool) -> None:
    parser = ReplyParser(NAMES, bare=bare)
    deltas = parser.feed(text)
    rest, _ = parser.finish()
    pattern = ""
    for delta in deltas + rest:
        if "content" in delta:
            pattern += re.escape(delta["content"])
        for call in delta.get("tool_calls", ()):
            assert call["function"]["name"] in NAMES
            arguments = call["function"]["arguments"]
            assert isinstance(json.loads(arguments), dict)
            pattern += FORM + re.escape(arguments) + FORM
    assert re.fullmatch(pattern, text)
