"""Tables: lined up, as wide as a terminal, and of nothing but text."""

from __future__ import annotations

import sys

import pytest

from kvp_edge.cli.tables import named, table

LONG = "many words " * 20


def test_columns_line_up_and_nothing_is_cut() -> None:
    head, rule, *rows = table(
        (("cache", 6), ("right", 7)), [("a long name", "1/2"), ("b", "10/20")]
    )
    assert head == "cache        right"
    assert rule == "-" * len(head)
    assert rows == ["a long name    1/2", "b            10/20"]
    assert table((("cache", 6), ("right", 7)), [])[0] == "cache   right"


def test_what_is_said_stays_beside_its_name_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    first, *rest = named("name", LONG, 10, indent=2).splitlines()
    assert first.startswith("  name      many words")
    assert len(rest) >= 4
    assert all(line.startswith(" " * 12 + "m") or line.startswith(" " * 12 + "w") for line in rest)
    assert all(len(line) <= 60 for line in (first, *rest))


def test_what_is_said_is_one_line_in_a_pipe() -> None:
    assert named("name", LONG, 10) == f"name      {LONG.strip()}"
    assert named("a name that is long", "x", 10) == "a name that is longx"


@pytest.mark.parametrize("text", ["[red]x[/red]", "[/]", "a [link=file:///etc]b", ":smile:", "[1]"])
def test_texts_are_no_markup(text: str) -> None:
    assert named("name", text, 10) == f"name      {text}"
    assert table((("", 10), ("n", 8)), [(text, "1")])[2].startswith(text)


def test_control_characters_are_shown() -> None:
    assert named("name", "a\x1b[31mb\r\nc", 5) == "name a␛[31mb␍␊c"
