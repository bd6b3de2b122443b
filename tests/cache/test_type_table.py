"""The measured table of types: the shipped file is consistent, and what is not is refused."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest

from kvp_edge.cache.type_table import Choice, Row, Speed, TypeTable, parse_table, shipped_table
from kvp_edge.cache.types import CACHE_TYPES, KVTypes
from kvp_edge.errors import OptionError


def row(**changed: Any) -> dict[str, Any]:
    made = {"model": "m", "task": "prose", "tokens": 4096, "share": 0.25, "recall": True}
    made |= {"types": "q8_0", "items": 30, "loss_increase": 0.02, "low": 0.01, "high": 0.03}
    return made | changed


SOUND: dict[str, Any] = {
    "commands": ["python scripts/eval_memory.py"],
    "date": "2026-11-30",
    "rows": [row(), row(share=0.1, types="q8_0/q4_0", loss_increase=0)],
    "choice": [{"below_share": 0.1, "types": "q4_0"}, {"types": "q8_0"}],
    "choice_on_device": [{"types": "q5_1"}],
    "speeds": [
        {"model": "a", "types": "q8_0", "cells": 1024, "reads": 0.5, "writes": 0.75},
        {"model": "b", "types": "q8_0", "cells": 1024, "reads": 0.25, "writes": 1},
    ],
}


def test_the_shipped_table_is_consistent() -> None:
    """Parsing it checks form and order."""
    table = shipped_table()
    choices = [*table.choice, *table.choice_on_device]
    for types in (one.types for one in (*table.rows, *table.speeds, *choices)):
        assert set(types.split("/")) <= set(CACHE_TYPES)
    for r in table.rows:
        assert 0 < r.share <= 1
        assert r.items >= 1
        assert r.low <= r.loss_increase <= r.high
    assert bool(table.commands) == bool(table.rows)
    if table.rows:
        assert {c.types for c in choices} <= {r.types for r in table.rows}
        assert {r.types for r in table.rows} <= {s.types for s in table.speeds}
        # who has no device reads no slower for what was chosen unasked
        assert all(table.speed(c.types) > (0.9, 0.9) for c in table.choice)


def test_a_table_is_read() -> None:
    table = parse_table(json.dumps(SOUND))
    assert table.rows[0] == Row(**row())
    assert table.choice == [Choice("q4_0", 0.1), Choice("q8_0", math.inf)]
    assert table.choice_on_device == [Choice("q5_1", math.inf)]
    assert table.speeds[0] == Speed("a", "q8_0", 1024, 0.5, 0.75)
    assert table.speed("q8_0") == (0.375, 0.875)
    assert table.speed("q4_0") is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("rows"), "'rows' is missing"),
        (lambda t: t["rows"][0].pop("low"), "'low' is missing"),
        (lambda t: t["rows"][1].update(share="0.1"), "'share' cannot be '0.1'"),
        (lambda t: t["rows"].append(1), "not a JSON object"),
        (lambda t: t["rows"][0].update(types="q8_0/q8_0"), "are written 'q8_0'"),
        (lambda t: t["choice"].clear(), "the last choice must take any share"),
        (lambda t: t["choice"].pop(), "the last choice must take any share"),
        (lambda t: t["choice"].append({"types": "q8_0"}), "below_share must ascend"),
        (lambda t: t["choice"].reverse(), "the last choice must take any share"),
        (lambda t: t["choice"][0].update(below_share=0), "below_share must ascend"),
        (lambda t: t["choice"].insert(0, {"below_share": 0.1, "types": "q4_1"}), "must ascend"),
        (lambda t: t["choice"][0].update(types="q3_k"), "not 'q3_k'"),
        (lambda t: t["choice_on_device"].clear(), "the last choice must take any share"),
        (lambda t: t["speeds"][0].update(reads="fast"), "'reads' cannot be 'fast'"),
    ],
)
def test_what_is_no_table_is_refused(change: Any, said: str) -> None:
    table = copy.deepcopy(SOUND)
    change(table)
    with pytest.raises((ValueError, OptionError), match=said):
        parse_table(json.dumps(table))


@pytest.mark.parametrize(
    ("share", "types"),
    [(1e-6, "q4_0"), (0.0999, "q4_0"), (0.1, "q8_0"), (0.999, "q8_0"), (1, "f16")],
)
def test_the_choice_goes_by_the_share_of_bytes(share: float, types: str) -> None:
    assert parse_table(json.dumps(SOUND)).types_for(share) == KVTypes.parse("it", types)


def test_a_cache_on_a_device_has_a_choice_of_its_own() -> None:
    table = parse_table(json.dumps(SOUND))
    assert table.types_for(0.05, on_device=True) == KVTypes.parse("it", "q5_1")
    assert table.types_for(1, on_device=True) == KVTypes.parse("it", "f16")
    alike = TypeTable([], "", [], table.choice)
    assert alike.types_for(0.05, on_device=True) == KVTypes.parse("it", "q4_0")


def test_the_nearest_rows_are_those_of_the_nearest_share() -> None:
    rows = [Row(**row(share=s, task=t)) for s in (0.1, 0.4) for t in ("prose", "code")]
    rows.append(Row(**row(share=0.2, recall=False)))
    table = TypeTable([], "", rows, [Choice("q8_0")])
    assert [r.task for r in table.nearest("q8_0", 0.19, recall=True)] == ["prose", "code"]
    assert {r.share for r in table.nearest("q8_0", 0.19, recall=True)} == {0.1}
    assert {r.share for r in table.nearest("q8_0", 0.21, recall=True)} == {0.4}
    assert [r.share for r in table.nearest("q8_0", 0.9, recall=False)] == [0.2]
    assert table.nearest("q4_0", 0.2, recall=True) == []
