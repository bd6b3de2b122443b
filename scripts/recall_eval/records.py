"""One line of JSON for every answer; what identifies an answer, and what is known of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import json_lines
from json_lines import Record

Key = tuple[Any, ...]

#: When the tokens of a conversation go: while it is read, or all at its end.
BOUNDED, ONE_SHOT = "bounded", "one-shot"

#: These fields identify an answer. Of the full cache, share, mode, reserve and recent are None.
KEY = (
    *("model", "seed", "conversation", "kind", "length", "facts"),
    *("share", "mode", "reserve", "recent", "policy", "way", "task", "question"),
)


def key(record: Record) -> Key:
    return tuple(record[name] for name in KEY)


def read(path: Path) -> list[Record]:
    """All records of a file, see ``json_lines.read``.

    Raises:
        ValueError: a damaged line.
    """
    return json_lines.read(path, _complete)


def _complete(record: Record) -> None:
    # older files have no mode: all of their caches are bounded while they read
    record.setdefault("mode", None if record["share"] is None else BOUNDED)
    key(record)


def require_same_settings(records: Sequence[Record], settings: dict[str, Any]) -> None:
    """Refuse a file in which a way of the same name recalled with other settings.

    Args:
        settings: of each way, by its name; None: it recalls nothing.

    Raises:
        ValueError: there is such a record.
    """
    for record in records:
        name = record["way"]
        if name in settings and record["settings"] != settings[name]:
            raise ValueError(
                f"'{name}' was measured with {record['settings']}, and is {settings[name]} now: "
                "write to another file, or choose another name"
            )
