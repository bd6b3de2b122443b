"""The Markdown tables of a file of records.

Questions of one conversation share what was dropped, so they are not independent: the bootstrap
draws items, of which each is the mean of its questions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean

from json_lines import Record
from kvp_edge.evaluation import markdown
from kvp_edge.evaluation.statistics import ItemId, Scores, difference, point
from label_eval.records import FULL

_NONE = "none"

Column = tuple[str, int]  # task, share


def render(records: Sequence[Record], against: str | None = None) -> Iterator[str]:
    """The lines of all tables.

    Args:
        against: a row: it is compared with every other one instead.

    Raises:
        ValueError: there is no such row.
    """
    if against is not None and against not in (known := {r["row"] for r in records} - {FULL}):
        raise ValueError(f"there is no row '{against}': there are {', '.join(sorted(known))}")
    for model, length in dict.fromkeys((r["model"], r["length"]) for r in records):
        found = [r for r in records if (r["model"], r["length"]) == (model, length)]
        yield from (f"## {model}, {length:,} tokens", "", _ABOUT, "")
        tables = _OneLength(found)
        yield from tables.lines() if against is None else tables.against(against)


_ABOUT = (
    "Loss beyond the full cache's, in nats per token, after one cut of the context to a share of "
    "its tokens, equal in all heads. Of questions: the loss of the beginning of the full cache's "
    "own reply, where that is right, and (in brackets) replies of which every token is still the "
    "likeliest. Of texts: the loss of the beginning of their ending. Intervals: a paired bootstrap "
    "of items, 95 %."
)


class _OneLength:
    """The tables of one model and length."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._full = {_asked(r): r for r in records if r["row"] == FULL}
        #: right ones, or texts
        self._valid = {asked for asked, r in self._full.items() if r["score"] == 1}
        self._cells: dict[tuple[str, Column], list[Record]] = defaultdict(list)
        for record in records:
            if record["row"] != FULL and _asked(record) in self._valid:
                self._cells[record["row"], (record["task"], record["share"])].append(record)
        self._tasks = list(dict.fromkeys(r["task"] for r in records))
        self._rows = list(dict.fromkeys(row for row, _ in self._cells))
        self._shares = sorted({share for _, (_, share) in self._cells})

    def lines(self) -> Iterator[str]:
        columns = [(task, share) for task in self._tasks for share in self._shares]
        if columns and self._rows:
            yield from markdown.table(
                ["mean increase", *(f"{task}, 1/{share}" for task, share in columns)],
                [
                    [markdown.escape(row), *(self._mean(row, column) for column in columns)]
                    for row in self._rows
                ],
            )
            yield ""
        for task in self._tasks:
            yield from (f"### {task}", "", self._about(task), "")
            if any((row, (task, s)) in self._cells for row in self._rows for s in self._shares):
                yield from markdown.table(
                    ["loss increase", *(f"1/{share}" for share in self._shares)],
                    [
                        [
                            markdown.escape(row),
                            *(self._interval(row, (task, share)) for share in self._shares),
                        ]
                        for row in self._rows
                    ],
                )
                yield ""

    def against(self, own: str) -> Iterator[str]:
        """By how much more a row loses than each other one, on what both were measured on."""
        others = [row for row in self._rows if row != own]
        for task in self._tasks:
            columns = [
                (task, share) for share in self._shares if (own, (task, share)) in self._cells
            ]
            if not columns:
                continue
            yield from (f"### {task}", "", self._about(task), "")
            yield from markdown.table(
                [f"{markdown.escape(own)} loses more than", *(f"1/{s}" for _, s in columns)],
                [
                    [markdown.escape(row), *(self._differs(own, row, column) for column in columns)]
                    for row in others
                ],
            )
            yield ""

    def _differs(self, own: str, other: str, column: Column) -> str:
        of_own, of_other = (
            {_asked(r): r for r in self._cells.get((row, column), ())} for row in (own, other)
        )
        both = [asked for asked in of_own if asked in of_other]
        if not both:
            return _NONE
        pair = (by_item(of[asked] for asked in both) for of in (of_own, of_other))
        return markdown.signed_nats(difference(*pair))

    def _about(self, task: str) -> str:
        asked = [r for r in self._full.values() if r["task"] == task]
        valid = [r for r in asked if _asked(r) in self._valid]
        sizes = [r["context"] for r in asked]
        size = f"{min(sizes):,} to {max(sizes):,} tokens are read."
        if asked[0]["measure"] == "text":
            loss = f" The full cache's loss is {fmean(r['loss'] for r in valid):.3f}."
            return f"{len(asked)} {markdown.plural('text', len(asked))}. {size}{loss}"
        questions = f"{len(asked)} {markdown.plural('question', len(asked))}"
        return f"The full cache answers {len(valid)} of {questions} rightly. {size}"

    def _increase(self, row: str, column: Column) -> tuple[Scores, Scores, list[Record]] | None:
        found = self._cells.get((row, column))
        if not found:
            return None
        full = [self._full[_asked(record)] for record in found]
        return by_item(found), by_item(full), found

    def _mean(self, row: str, column: Column) -> str:
        pair = self._increase(row, column)
        return _NONE if pair is None else f"{point(pair[0]) - point(pair[1]):+.3f}"

    def _interval(self, row: str, column: Column) -> str:
        pair = self._increase(row, column)
        if pair is None:
            return _NONE
        cell = markdown.signed_nats(difference(pair[0], pair[1]))
        found = pair[2]
        if found[0]["same"] is None:
            return cell
        return f"{cell} ({sum(r['same'] for r in found)} of {len(found)})"


def _asked(record: Record) -> tuple[object, ...]:
    return tuple(record[name] for name in ("seed", "facts", "measured", "task", "item", "question"))


def by_item(records: Iterable[Record]) -> Scores:
    """The mean loss of each item, by task."""
    found: dict[str, dict[ItemId, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        found[record["task"]][record["seed"], record["item"]].append(record["loss"])
    return {
        task: {item: fmean(losses) for item, losses in items.items()}
        for task, items in found.items()
    }
