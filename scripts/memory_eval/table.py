"""The Markdown tables of a file of records.

Questions of one conversation share what was dropped, so they are not independent: the bootstrap
draws items, of which each is the mean of its questions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean

from json_lines import Record
from kvp_edge.evaluation import markdown
from kvp_edge.evaluation.statistics import Estimate, difference
from label_eval.table import by_item
from memory_eval.records import F16, SETTING, asked, is_reference

Row = tuple[object, ...]  # a setting but for its share

_ABOUT = (
    "Loss beyond the full f16 cache's, in nats per token, of a text that was read through a cache "
    "of 1/N of the bytes that all its tokens take in f16. Of questions: the loss of the beginning "
    "of the full cache's own reply, where that is right. Of texts: the loss of the 128 tokens "
    "after them. One-shot: read into cells for all of it, then cut. Share 1 holds all tokens, in "
    "whatever type. Intervals: a paired bootstrap of items, 95 %."
)


def render(records: Sequence[Record]) -> Iterator[str]:
    """The lines of all tables."""
    for model, length, found in of_each_length(records):
        yield from (f"## {model}, {length:,} tokens", "", _ABOUT, "")
        yield from found.lines()


def of_each_length(records: Sequence[Record]) -> Iterator[tuple[str, int, Increases]]:
    """Model, length, and what was measured there."""
    for model, length in dict.fromkeys((r["model"], r["length"]) for r in records):
        found = [r for r in records if (r["model"], r["length"]) == (model, length)]
        yield model, length, Increases(found)


class Increases:
    """By how much more than the full f16 cache each setting loses, of one model and length.

    Attributes:
        tasks, rows, shares: those there are.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self._full = {asked(r): r for r in records if is_reference(r)}
        valid = {what for what, r in self._full.items() if r["score"] == 1}
        self._cells: dict[tuple[Row, str, int], list[Record]] = defaultdict(list)
        for record in records:
            if asked(record) in valid and not is_reference(record):
                self._cells[_row(record), record["task"], record["share"]].append(record)
        self.tasks = list(dict.fromkeys(r["task"] for r in records))
        self.rows = list(dict.fromkeys(row for row, _, _ in self._cells))
        self.shares = sorted({share for _, _, share in self._cells})

    def lines(self) -> Iterator[str]:
        for task in self.tasks:
            yield from (f"### {task}", "", self._about(task), "")
            yield from markdown.table(
                ["types", "recall", *(_name(s) for s in self.shares)],
                [
                    [*_title(row), *(self._cell(row, task, share) for share in self.shares)]
                    for row in self.rows
                    if any((row, task, s) in self._cells for s in self.shares)
                ],
            )
            yield ""
            for title, base in (("more than f16", _as_f16), ("more than by default", _by_default)):
                yield from self._compared(title, base, task)

    def _compared(self, title: str, base: Callable[[Row], Row], task: str) -> Iterator[str]:
        """By how much more rows lose than others; nothing where there are none of these.

        Args:
            base: which row one is compared with.
        """
        shares = [share for share in self.shares if share > 1]
        rows = []
        for row in self.rows:
            cells = [self._against(row, base(row), task, share) for share in shares]
            if row != base(row) and any(cells):
                rows.append([*_title(row), *cells])
        if rows:
            yield from markdown.table([title, "recall", *map(_name, shares)], rows)
            yield ""

    def _about(self, task: str) -> str:
        full = [r for r in self._full.values() if r["task"] == task]
        right = [r for r in full if r["score"] == 1]
        items = len({r["item"] for r in right})
        sizes = [r["context"] for r in full]
        size = f"{min(sizes):,} to {max(sizes):,} tokens are read."
        if len(full) == len({r["item"] for r in full}):
            return f"{items} {markdown.plural('text', items)}. {size}"
        return (
            f"The full cache answers {len(right)} of {len(full)} questions rightly, in {items} "
            f"{markdown.plural('conversation', items)}. {size}"
        )

    def increase(self, row: Row, task: str, share: int) -> Estimate | None:
        """Of the loss beyond the full f16 cache's; None: it was not measured."""
        found = self._cells.get((row, task, share))
        if not found:
            return None
        return difference(by_item(found), by_item([self._full[asked(r)] for r in found]))

    def mean_bytes(self, row: Row, share: int) -> float:
        """Of the cells, over all that was read."""
        return fmean(r["bytes"] for t in self.tasks for r in self._cells.get((row, t, share), ()))

    def tokens(self, task: str) -> int:
        """The mean number of tokens that were read."""
        return round(fmean(r["context"] for r in self._full.values() if r["task"] == task))

    def _cell(self, row: Row, task: str, share: int) -> str:
        found = self.increase(row, task, share)
        return "" if found is None else markdown.signed_nats(found)

    def _against(self, row: Row, base: Row, task: str, share: int) -> str:
        """By how much more it loses than another row, on what both were measured on."""
        own, other = (
            {asked(r): r for r in self._cells.get((one, task, share), ())} for one in (row, base)
        )
        both = [what for what in own if what in other]
        if not both:
            return ""
        return markdown.signed_nats(
            difference(by_item(own[w] for w in both), by_item(other[w] for w in both))
        )


def _row(record: Record) -> Row:
    return tuple(record[name] for name in SETTING if name != "share")


def _as_f16(row: Row) -> Row:
    """The row of f16 with the same other settings."""
    return (F16, *row[1:])


def _by_default(row: Row) -> Row:
    """The row of the same types with the defaults of all other settings."""
    types, _, _, _, one_shot, recall = row
    return (types, 4, 4, "cache", one_shot, bool(recall))


def _title(row: Row) -> list[str]:
    types, recent, sinks, log_type, one_shot, recall = row
    told = [str(types)]
    if recent != 4:
        told.append(f"recent 1/{recent}")
    if sinks != 4:
        told.append(f"{sinks} sinks")
    if log_type != "cache":
        told.append(f"log {log_type}")
    if one_shot:
        told.append("one-shot")
    return [", ".join(told), recall if isinstance(recall, str) else "on" if recall else "off"]


def _name(share: int) -> str:
    return "all tokens" if share == 1 else f"1/{share}"
