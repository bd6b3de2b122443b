"""One line of JSON for every measurement; what identifies it, and what is known of it.

``recall`` is False, True, or the settings that were changed, like "after=4,floor=0.25".

Beside the fields of ``KEY``: ``loss`` in nats per token, ``policy`` (weights of policy files
included), ``context``, ``cells`` and ``budget`` in tokens, ``bytes`` of these cells, ``log_bytes``.
Of the full cache of f16 also ``score`` (whether the reply is right) and ``reply``, the tokens that
are measured everywhere else.
"""

from __future__ import annotations

from pathlib import Path

import json_lines
from json_lines import Record

#: These fields say how a cache was made.
SETTING = ("types", "share", "recent", "sinks", "log_type", "one_shot", "recall")

#: These fields identify a measurement.
KEY = ("model", "seed", "length", "facts", "task", "item", "question", *SETTING)

_OTHERS = ("loss", "policy", "context", "cells", "budget", "bytes", "log_bytes")

#: The type that everything is compared with.
F16 = "f16"


def is_reference(record: Record) -> bool:
    """Of the full cache of f16, with which everything is compared."""
    return record["share"] == 1 and record["types"] == F16


def key(record: Record) -> tuple[object, ...]:
    return tuple(record[name] for name in KEY)


def asked(record: Record) -> tuple[object, ...]:
    """What was measured, in whatever cache."""
    return tuple(record[name] for name in KEY if name not in SETTING)


def read(path: Path) -> list[Record]:
    """All records of a file, see ``json_lines.read``.

    Raises:
        ValueError: a damaged line.
    """
    return json_lines.read(path, _check)


def _check(record: Record) -> None:
    record.setdefault("one_shot", False)
    key(record)
    for name in (*_OTHERS, *(("score", "reply") if is_reference(record) else ())):
        record[name]
