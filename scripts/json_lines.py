"""Files of one JSON object on every line, which an interrupted run goes on with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read(path: Path, check: Callable[[Record], object]) -> list[Record]:
    """All records of a file, none if there is no file. A half-written last line does not count.

    Args:
        check: raises an error for what is no record; may complete one.

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
            check(record)
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
