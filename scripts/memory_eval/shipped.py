"""The measurements as kvp_edge ships them: kvp_edge/data/kv_types.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from json_lines import Record
from memory_eval.records import SETTING
from memory_eval.table import of_each_length

#: Only caches with the defaults of everything but types are shipped.
_DEFAULTS = {"recent": 4, "sinks": 4, "log_type": "cache", "one_shot": False}


def write(path: Path, records: Sequence[Record], command: str, date: str) -> None:
    """Put the measurements into the file, of all models that it has. What it chooses stays: a
    person reads the tables and decides."""
    table = json.loads(path.read_text(encoding="utf-8"))
    rows = _rows(records)
    models = {row["model"] for row in rows}
    table["rows"] = [*(row for row in table["rows"] if row["model"] not in models), *rows]
    table["commands"] = list(dict.fromkeys([*table["commands"], command]))
    table["date"] = date
    save(path, table)


def save(path: Path, table: dict[str, Any]) -> None:
    """Write the file, one row of a list on every line."""
    fields = []
    for name, value in table.items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, list) and value:
            lines = (f"  {json.dumps(one, ensure_ascii=False)}" for one in value)
            text = "[\n" + ",\n".join(lines) + "\n ]"
        fields.append(f' "{name}": {text}')
    path.write_text("{\n" + ",\n".join(fields) + "\n}\n", encoding="utf-8")


def _rows(records: Sequence[Record]) -> Sequence[dict[str, Any]]:
    rows = []
    for model, _, found in of_each_length(records):
        for task in found.tasks:
            for row in found.rows:
                setting = dict(zip((n for n in SETTING if n != "share"), row, strict=True))
                changed = any(setting[name] != value for name, value in _DEFAULTS.items())
                if changed or not isinstance(setting["recall"], bool):
                    continue
                for share in found.shares:
                    increase = found.increase(row, task, share)
                    if increase is None or increase.n < 2:
                        continue
                    rows.append(
                        {
                            "model": model,
                            "task": task,
                            "tokens": found.tokens(task),
                            "share": 1 / share,
                            "recall": setting["recall"],
                            "types": setting["types"],
                            "items": increase.n,
                            "loss_increase": round(increase.value, 4),
                            "low": round(increase.low, 4),
                            "high": round(increase.high, 4),
                        }
                    )
    return rows
