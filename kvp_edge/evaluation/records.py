"""Records of an evaluation: one JSON object per line, one line per setting and item.

A file of records grows while an evaluation runs, and is all that statistics and reports need. Every
line is written at once, so an interrupted run leaves at most one half-written line. It is ignored
on reading and removed before the next line is appended.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, TypeAlias, get_type_hints

from kvp_edge.cache.options import EVALUATED, OPTIONS
from kvp_edge.errors import RecordError
from kvp_edge.evaluation.setting import CHOICES
from kvp_edge.files import open_regular
from kvp_edge.files.json_values import is_a, parse, shortened

#: The policy of the full cache, which drops nothing; llama.cpp's own rule; true future attention,
#: by its sum and by its largest block.
FULL, SHIFT, ORACLE, GOLDEN = "none", "context-shift", "oracle", "golden"

#: How many parts of an ending have losses of their own.
PARTS = 8

#: The fields that identify a record; see Record.key.
Key: TypeAlias = tuple[str | int | bool | None, ...]

_CHOICES = {
    "mode": ("bounded", "one-shot"),
    "question": ("unseen", "seen"),
    "measure": ("accuracy", "loss"),
    **{name: choices for name, choices in CHOICES.items() if choices},
}


@dataclass(frozen=True)
class Record:
    """One item, read in one setting.

    Attributes:
        mode: "one-shot": read everything, drop once; "bounded": drop again and again.
        question: whether it was read before tokens were dropped: "seen" or "unseen".
        type_k, type_v: types of the cache, like "f16".
        length: requested tokens of a conversation (approximate).
        budget, share: tokens kept, and their share of ``length``; None for the full cache.
        policy: its name; "none" for the full cache.
        task, item, seed: which item. All policies read the same ones.
        protected: whether sinks and recent tokens were never dropped.
        prompt: first 16 hex digits of the SHA-256 of the prompt's tokens.
        n_prompt: tokens of the prompt.
        kept, dropped, evictions: of the cache.
        reply: what the model wrote, one reply after the other; "" for readings.
        measure: what ``score`` is. "accuracy": from 0 to 1; "loss" (of readings): mean in nats per
            token.
        score: see ``measure``.
        seconds: of this setting alone, on a machine that may have been busy. In bounded mode, and
            with "context-shift": reading and replying. In one-shot mode: only what settings do not
            share, that is dropping scored tokens, then reading and writing what follows. Reading
            and scoring the context, and tracing it for the oracles (in both modes), do not count,
            except in older files.
        kv_bytes: keys and values of the most tokens held at once.
        granularity, keep_whole, isolate_turns: see kvp_edge.cache.options.CacheOptions.
        losses: of a reading, the mean losses of PARTS consecutive parts of nearly equal length,
            which together are the tokens of ``score``; [] for items and for endings of fewer
            tokens.

    Older files lack the last three.

    Raises:
        RecordError: a value of the wrong type or range.
    """

    mode: str
    question: str
    granularity: str
    type_k: str
    type_v: str
    length: int
    budget: int | None
    share: float | None
    policy: str
    task: str
    item: int
    seed: int
    protected: bool
    prompt: str
    n_prompt: int
    kept: int
    dropped: int
    evictions: int
    reply: str
    measure: str
    score: float
    seconds: float
    kv_bytes: int
    keep_whole: str = OPTIONS["keep_whole"].default
    isolate_turns: bool = OPTIONS["isolate_turns"].default
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, hint in _HINTS.items():
            value = getattr(self, name)
            if not is_a(value, hint):
                raise RecordError(f"'{name}' cannot be {shortened(value)}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise RecordError(f"'{name}' must be {' or '.join(choices)}")
        if len({self.policy == FULL, self.budget is None, self.share is None}) > 1:
            raise RecordError(f"policy '{FULL}', and only that one, has no budget and no share")
        if len(self.losses) not in (0, PARTS):
            raise RecordError(f"'losses' has {len(self.losses)} parts, not {PARTS}")
        if self.measure == "accuracy" and not 0 <= self.score <= 1:
            raise RecordError(f"an accuracy of {self.score} is not between 0 and 1")

    @property
    def is_full(self) -> bool:
        """Whether nothing was dropped, because the cache held everything."""
        return self.policy == FULL

    def key(self) -> Key:
        """Equal for two records of the same setting and item, so that one of them is enough.

        The full cache drops nothing, so its key leaves out how tokens are dropped: one record
        serves all modes, granularities and budgets. The prompt is part of the key, so that a
        changed task is run again.
        """
        how = (
            self.mode,
            self.question,
            self.budget,
            self.protected,
            *(getattr(self, name) for name in EVALUATED),
        )
        return (
            self.policy,
            *(() if self.is_full else how),
            self.type_k,
            self.type_v,
            self.length,
            self.task,
            self.seed,
            self.item,
            self.prompt,
        )


_HINTS: dict[str, Any] = get_type_hints(Record)
_REQUIRED = tuple(
    one.name for one in fields(Record) if one.default is MISSING and one.default_factory is MISSING
)


def parse_record(line: str | bytes) -> Record:
    """A record from its line. Unknown names are ignored.

    Raises:
        RecordError: the line is not a record; the message says why.
    """
    try:
        found = parse(line)
    except ValueError as error:  # of JSON, or of UTF-8
        raise RecordError(f"this is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise RecordError("this is not a JSON object")
    missing = [name for name in _REQUIRED if name not in found]
    if missing:
        raise RecordError(f"{', '.join(missing)} missing")
    return Record(**{name: found[name] for name in _HINTS if name in found})


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """All records of a file, in order, without a half-written last line.

    Raises:
        RecordError: a damaged line; the message names the file and the line.
        OSError: the file cannot be read, or is no regular one.
    """
    with open_regular(path) as file:
        lines = file.read().split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            records.append(parse_record(line))
        except RecordError as error:
            if number == len(lines):  # no line end follows: it was being written
                break
            raise RecordError(
                f"{os.fspath(path)}, line {number}: {error}. Delete the line, and the same command "
                "makes its record again"
            ) from None
    return records


def append_record(path: str | os.PathLike[str], record: Record) -> None:
    """Add a line to a file, which is made if there is none.

    The line is one write to a file opened for appending, so that other processes' lines do not mix
    with it.
    """
    line = json.dumps(asdict(record), ensure_ascii=False, allow_nan=False) + "\n"
    # a lone surrogate in a reply has no UTF-8
    data = line.encode("utf-8", "replace")
    _finish_last_line(path)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags, 0o666)  # less what the umask takes away, as for any file
    try:
        written = os.write(handle, data)
    finally:
        os.close(handle)
    if written < len(data):
        raise OSError(f"{os.fspath(path)}: a record was not written whole (disk full?)")


def _finish_last_line(path: str | os.PathLike[str]) -> None:
    """Remove a half-written last line; complete one that only lacks its line end."""
    try:
        open_regular(path).close()
    except FileNotFoundError:
        return
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            return
        file.seek(size - 1)
        if file.read(1) == b"\n":
            return
        file.seek(0)
        start = file.read().rfind(b"\n") + 1
        file.seek(start)
        try:
            parse_record(file.read())
        except RecordError:
            file.truncate(start)
        else:
            file.write(b"\n")


def latest(records: Iterable[Record]) -> list[Record]:
    """One record for each key: where an item was read twice, the later record."""
    return list({record.key(): record for record in records}.values())
