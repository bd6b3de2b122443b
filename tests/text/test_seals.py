"""Seals: behind the beginning of everything that spells a guarded token."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvp_edge.text.seals import Seals, new_seal, unsealed

SEAL = new_seal()
WORDS = ["<|end|>", "<|e", "aba", "ab", "é", "\n<x>", '"]', "b" * 70]


def sealed(text: str, words: list[str] = WORDS) -> str:
    texts = [word.encode() for word in words]
    (content,) = Seals(texts, texts, SEAL).on({"x": text}).values()
    assert isinstance(content, str)
    return content


PIECES = [*WORDS, *'<|endabé\n"]x> \\', "b" * 30]


@given(st.lists(st.sampled_from(PIECES), max_size=9).map("".join))
def test_seals_tell_where_a_guarded_token_may_begin(text: str) -> None:
    plain, closed = unsealed(sealed(text).encode(), SEAL.encode())
    assert plain.decode() == text

    def may_begin(rest: str) -> bool:  # of long ones so much is compared
        return any(rest.startswith(word[:64]) or word[:64].startswith(rest) for word in WORDS)

    assert closed == {len(text[:i].encode()) for i in range(len(text)) if may_begin(text[i:])}


@pytest.mark.parametrize(
    "value", ["", "a harmless text", 7, None, [], {"role": "user", "x": ["y", {"z": 1.5}]}]
)
def test_what_spells_nothing_is_given_on_as_it_is(value: Any) -> None:
    arguments = {"messages": [{"role": "user", "content": value}], "other": value}
    assert Seals([b"<|end|>"], [], SEAL).on(arguments) is arguments


def test_nothing_is_sealed_without_special_tokens() -> None:
    arguments = {"x": "<|end|>"}
    assert Seals([], [], SEAL).on(arguments) is arguments


def test_all_that_a_template_may_show_is_sealed_and_nothing_given_is_changed() -> None:
    message = {
        "role": "tool",
        "content": [{"type": "text", "text": "a<|end|>"}, "<|end|>"],
        "<|end|>": ("<|end|>", {"type": "<|end|>"}),
        "n": 3,
    }
    arguments = {"messages": [message], "tools": {"x": "<|end|>"}}
    before = json.dumps(arguments)
    s = f"<{SEAL}|end|>"
    assert Seals([b"<|end|>", b"tool"], [], SEAL).on(arguments) == {
        "messages": [
            {
                "role": "tool",
                "content": [{"type": "text", "text": "a" + s}, s],
                s: [s, {"type": s}],
                "n": 3,
            }
        ],
        "tools": {"x": s},
    }
    assert json.dumps(arguments) == before


def test_the_assistant_may_spell_what_others_may_not() -> None:
    seals = Seals([b"<a>", b"<b>"], [b"<b>"], SEAL)
    messages = [{"role": role, "content": "<a><b>"} for role in ("assistant", "user")]
    got = [message["content"] for message in seals.on({"messages": messages})["messages"]]
    assert got == [f"<a><{SEAL}b>", f"<{SEAL}a><{SEAL}b>"]


def test_what_json_cannot_hold_is_sealed_too() -> None:
    odd = object()
    got = Seals([b"<a>"], [], SEAL).on({"x": [odd, "<a>", {odd: "<a>"}]})
    assert got == {"x": [odd, f"<{SEAL}a>", {odd: f"<{SEAL}a>"}]}


def test_seals_of_two_models_differ() -> None:
    assert new_seal() != new_seal()
    assert new_seal().isdigit()
