"""JSON from others: no surprise in parsing, and only values of the types that were asked for."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvp_edge.files.json_values import is_a, parse, require, shortened
from support import properties

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@properties.examples(50)
@given(JSON)
def test_what_json_can_say_is_parsed(value: Any) -> None:
    text = json.dumps(value)
    assert json.dumps(parse(text)) == text == json.dumps(parse(text.encode()))


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"a":' * 100_000, "9" * 5000, b"\xff"])
def test_what_is_no_json_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match="."):
        parse(text)


@pytest.mark.parametrize(
    ("hint", "right", "wrong"),
    [
        (int, [0, -1, 10**400], [True, 0.0, "0", None, []]),
        (float, [0, 0.5, -1e308, 10**308], [True, float("nan"), float("inf"), 10**309, "0", None]),
        (bool, [True, False], [0, 1, "true", None]),
        (str, ["", "a"], [0, None, ["a"], b"a"]),
        (str | None, ["", None], [0, False, []]),
        (list[int], [[], [0, 1]], [[0, True], [0.0], 0, {}, None, "01"]),
        (list[list[float]], [[], [[]], [[0, 0.5]]], [[0], [["a"]], None]),
        (dict[str, int], [{}, {"a": 1}], [{"a": "1"}, {"a": None}, [], None]),
        (Any, [None, True, 0, [], {}], []),
    ],
)
def test_a_value_is_of_its_type_only(hint: Any, right: list[Any], wrong: list[Any]) -> None:
    assert [value for value in right if not is_a(value, hint)] == []
    assert [value for value in wrong if is_a(value, hint)] == []


def test_what_an_object_lacks_is_named() -> None:
    assert require({"a": 1, "b": None}, {"a": int}) == {"a": 1, "b": None}
    with pytest.raises(ValueError, match="'b' is missing"):
        require({"a": 1}, {"a": int, "b": int})
    with pytest.raises(ValueError, match="'a' cannot be '1'"):
        require({"a": "1"}, {"a": int})
    with pytest.raises(ValueError, match="not a JSON object"):
        require([], {"a": int})


def test_a_value_in_a_message_is_short_and_printable() -> None:
    assert shortened("\x1b[2J") == r"'\x1b[2J'"
    assert len(shortened("x" * 1000)) == 63
    assert shortened(10**5000) == "<int>"
