"""What lower precision of keys and values costs, as measured: kvp_edge/data/kv_types.json.

``kv_type="auto"`` follows its choices, and ``kvp-edge plan`` shows its rows and speeds.
scripts/eval_memory.py and scripts/bench_types.py measure and write these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from kvp_edge.cache.types import KVTypes
from kvp_edge.files.json_values import parse, require


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        model, task: what was read, and by whom.
        tokens: of a text.
        share: bytes of the cells, as a share of a full f16 cache of ``tokens``.
        recall: whether dropped tokens could come back.
        types: of keys and values, as ``KVTypes`` writes them.
        items: texts.
        loss_increase: mean over the texts, in nats per token, against a full f16 cache.
        low, high: its 95 % interval.
    """

    model: str
    task: str
    tokens: int
    share: float
    recall: bool
    types: str
    items: int
    loss_increase: float
    low: float
    high: float


@dataclass(frozen=True)
class Speed:
    """How fast a model reads and writes on a CPU with a full cache of these types.

    Attributes:
        model: which.
        cells: of the cache.
        reads, writes: tokens a second, relative to an f16 cache of as many bytes without flash
            attention.
    """

    model: str
    types: str
    cells: int
    reads: float
    writes: float


@dataclass(frozen=True)
class Choice:
    """Take ``types`` where the share of the bytes is below ``below_share``."""

    types: str
    below_share: float = math.inf


@dataclass(frozen=True)
class TypeTable:
    """
    Attributes:
        commands: that made the rows.
        date: on which.
        rows: may be none.
        choice: for a cache on the CPU, ascending by ``below_share``; the last one takes any share.
            Types that are read slowly there are left out.
        choice_on_device: for one on a device, likewise; (): the same.
        speeds: on a CPU; may be none.
    """

    commands: Sequence[str]
    date: str
    rows: Sequence[Row]
    choice: Sequence[Choice]
    choice_on_device: Sequence[Choice] = ()
    speeds: Sequence[Speed] = ()

    def choices(self, *, on_device: bool) -> Sequence[Choice]:
        """Those for a cache on the CPU, or for one on a device."""
        return (on_device and self.choice_on_device) or self.choice

    def types_for(self, share: float, *, on_device: bool = False) -> KVTypes:
        """The types for a cache of this share of the bytes of a full f16 cache.

        What fits whole in f16 stays f16: nothing is dropped then, so smaller types gain nothing.

        Args:
            on_device: whether the cache is on one.
        """
        if share >= 1:
            return KVTypes.parse("types", "f16")
        found = next(one for one in self.choices(on_device=on_device) if share < one.below_share)
        return KVTypes.parse("types", found.types)

    def speed(self, types: str) -> tuple[float, float] | None:
        """How fast they are read and written on a CPU, the mean over models: see ``Speed``; None:
        it was not measured."""
        found = [one for one in self.speeds if one.types == types]
        if not found:
            return None
        reads, writes = (
            math.fsum(n) / len(found)
            for n in zip(*((s.reads, s.writes) for s in found), strict=True)
        )
        return reads, writes

    def nearest(self, types: str, share: float, *, recall: bool) -> list[Row]:
        """The rows of these types whose share is nearest (by its logarithm), of every model and
        task that was measured there; []: there are none."""
        rows = [r for r in self.rows if r.types == types and r.recall == recall and r.share > 0]
        if not rows or share <= 0:
            return []

        def distance(row: Row) -> float:
            return abs(math.log(row.share / share))

        least = min(map(distance, rows))
        return [row for row in rows if distance(row) <= least + 1e-9]


def parse_table(text: str | bytes) -> TypeTable:
    """
    Raises:
        ValueError: it is not of the form that TypeTable describes; the message says what is wrong.
    """
    top = require(
        parse(text),
        {
            **{"commands": list[str], "date": str, "rows": list[Any], "speeds": list[Any]},
            **{"choice": list[Any], "choice_on_device": list[Any]},
        },
    )
    row = {
        **{"model": str, "task": str, "tokens": int, "share": float, "recall": bool},
        **{"types": str, "items": int, "loss_increase": float, "low": float, "high": float},
    }
    speed = {"model": str, "types": str, "cells": int, "reads": float, "writes": float}
    rows = [Row(**_only(one, row)) for one in top["rows"]]
    speeds = [Speed(**_only(one, speed)) for one in top["speeds"]]
    choice, on_device = _ascending(top["choice"]), _ascending(top["choice_on_device"])
    named = [*(r.types for r in rows), *(s.types for s in speeds)]
    named += [c.types for c in (*choice, *on_device)]
    for types in named:
        if str(KVTypes.parse("types", types)) != types:
            raise ValueError(f"the types '{types}' are written '{KVTypes.parse('types', types)}'")
    return TypeTable(top["commands"], top["date"], rows, choice, on_device, speeds)


def _ascending(said: Sequence[Any]) -> list[Choice]:
    choice = [_choice(one) for one in said]
    shares = [one.below_share for one in choice]
    if not choice or not math.isinf(shares[-1]):
        raise ValueError("the last choice must take any share: leave out its below_share")
    if shares != sorted(set(shares)) or shares[0] <= 0:
        raise ValueError(f"below_share must ascend from one choice to the next: {shares}")
    return choice


def _choice(said: Any) -> Choice:
    hints: dict[str, Any] = {"types": str}
    if isinstance(said, dict) and "below_share" in said:
        hints["below_share"] = float
    return Choice(**_only(said, hints))


def _only(said: Any, hints: dict[str, Any]) -> dict[str, Any]:
    values = require(said, hints)
    return {name: values[name] for name in hints}


@cache
def shipped_table() -> TypeTable:
    """The one that comes with the package."""
    return parse_table((resources.files("kvp_edge") / "data" / "kv_types.json").read_bytes())
