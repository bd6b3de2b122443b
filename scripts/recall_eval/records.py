"""One line of JSON for every answer; what identifies an answer, and what is known of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
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
    """All records of a file, none if there is no file. A half-written last line does not count.

    Raises:
        ValueError: a damaged line.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    found = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            # older files have no mode: all of their caches are bounded while they read
            record.setdefault("mode", None if record["share"] is None else BOUNDED)
            key(record)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}, line {number} is no record ({error!r}): delete it") from None
        found.append(record)
    return found


def drop_unfinished_line(path: Path) -> None:
    """Remove what an interrupted run has left of its last line."""
    if path.exists():
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with path.open("r+b") as file:
                file.truncate(whole)


def append(path: Path, record: Record) -> None:
    with path.open("ab") as file:
        file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n")


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
