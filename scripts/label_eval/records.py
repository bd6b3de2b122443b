"""One line of JSON for every measurement; what identifies it, and what is known of it.

Beside the fields of ``KEY``: ``measure`` ("reply" or "text"), ``loss`` in nats per token, ``same``
(whether a reply's tokens are still the likeliest; None of a text), ``policy`` (what the row is,
weights of policy files included), ``context`` and ``budget`` in tokens. Of the full cache also
``score`` (whether the reply is right) and ``reply``, the tokens that are measured everywhere else.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import json_lines
from json_lines import Record

Key = tuple[Any, ...]

#: The row that everything is compared with. Its share is None.
FULL = "full cache"

#: Files without "measured", the tokens of a reply or text that are, had these.
_REPLY, _ENDING = 14, 128

#: These fields identify a measurement.
KEY = ("model", "seed", "length", "facts", "measured", "task", "item", "question", "row", "share")

_OTHERS = ("measure", "loss", "same", "policy", "context", "budget")


def key(record: Record) -> Key:
    return tuple(record[name] for name in KEY)


def read(path: Path) -> list[Record]:
    """All records of a file, see ``json_lines.read``.

    Raises:
        ValueError: a damaged line.
    """
    return json_lines.read(path, _check)


def _check(record: Record) -> None:
    record.setdefault("measured", _REPLY if record["measure"] == "reply" else _ENDING)
    key(record)
    for name in (*_OTHERS, *(("score", "reply") if record["row"] == FULL else ())):
        record[name]


def require_same_policies(records: Iterable[Record], policies: dict[str, str]) -> None:
    """Refuse a file in which a row of the same name was another policy.

    Args:
        policies: what each row is, by its name.

    Raises:
        ValueError: there is such a record.
    """
    for record in records:
        row = record["row"]
        if row in policies and record["policy"] != policies[row]:
            raise ValueError(
                f"'{row}' was measured as {record['policy']}, and is {policies[row]} now: write to "
                "another file, or rename the policy's"
            )
