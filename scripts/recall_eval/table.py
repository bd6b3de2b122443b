"""The Markdown tables of a file of records.

Questions of one conversation share what was evicted while it was read, so they are not independent:
the bootstrap draws conversations. Wilson's intervals, of right answers, count answers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean, median

from kvp_edge.evaluation import markdown
from kvp_edge.evaluation.statistics import ItemId, Scores, mean, ratio, wilson
from recall_eval.records import ONE_SHOT, Record

FULL = "full cache"
_NONE = "none"

_TASKS = {
    "fact": "Facts, each question by itself",
    "dialogue": "Facts, one question after the other in one conversation",
    "count": "How often a word occurs in the text",
    "all": "All facts in one list: share of the values named",
}

Column = tuple[int, int]  # length, share
Row = tuple[str, str, str, int, int]  # policy, way, mode, reserve, recent


def render(records: Sequence[Record]) -> Iterator[str]:
    """The lines of all tables."""
    for model in dict.fromkeys(r["model"] for r in records):
        of_model = [r for r in records if r["model"] == model]
        yield from (f"## {model}", "", _about(of_model), "")
        for task, title in _TASKS.items():
            of_task = [r for r in of_model if r["task"] == task]
            if of_task:
                yield from (f"### {title}", "")
                yield from _task(task, of_task)


def _about(records: Sequence[Record]) -> str:
    conversations = {(r["seed"], r["conversation"], r["length"]) for r in records}
    sizes = defaultdict(set)
    for record in records:
        if record["task"] != "dialogue":
            sizes[record["length"]].add(record["n_prompt"])
    read = "; ".join(
        f"{n:,}: {min(found):,} to {max(found):,} tokens with the question"
        for n, found in sorted(sizes.items())
    )
    return (
        f"{len(conversations)} {markdown.plural('conversation', len(conversations))}, "
        f"{_list(r['facts'] for r in records)} facts in each. By the length asked for: {read}. "
        "Right answers: Wilson's 95 % interval. Shares: a bootstrap of conversations, paired with "
        "the full cache's."
    )


def _list(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(set(numbers))))


def _task(task: str, records: Sequence[Record]) -> Iterator[str]:
    bounded = [r for r in records if r["share"] is not None]
    columns = sorted({(r["length"], r["share"]) for r in bounded})
    full = {
        length: [r for r in records if r["share"] is None and r["length"] == length]
        for length in dict.fromkeys(length for length, _ in columns)
    }
    rows = list(dict.fromkeys(map(_row, bounded)))
    limits = len({row[3:] for row in rows}) > 1  # rows must be told apart by them, too
    names = {row: _name(row, limits) for row in rows}
    cells = {
        (row, column): [
            r for r in bounded if _row(r) == row and (r["length"], r["share"]) == column
        ]
        for row in rows
        for column in columns
    }
    heads = [f"{length:,} tokens, 1/{share}" for length, share in columns]
    yield from markdown.table(
        ["named" if task == "all" else "right", *heads],
        [
            [FULL, *(_right(task, full[length]) for length, _ in columns)],
            *([names[row], *(_right(task, cells[row, c]) for c in columns)] for row in rows),
        ],
    )
    yield ""
    yield from markdown.table(
        ["% of the full cache's", *heads],
        (
            [names[row], *(_share(cells[row, column], full[column[0]]) for column in columns)]
            for row in rows
        ),
    )
    yield ""
    yield from markdown.table(
        ["median: first token after; recall took; tokens (rows of all heads) recalled", *heads],
        [
            [FULL, *(_time(full[length]) for length, _ in columns)],
            *([names[row], *(_time(cells[row, c]) for c in columns)] for row in rows),
        ],
    )
    yield ""


def _row(record: Record) -> Row:
    # reserve and recent grow with the budget, so the names of a row are those asked for
    r = record
    return r["policy"], r["way"], r["mode"], r["reserve"], r["recent"]


def _name(row: Row, limits: bool) -> str:
    policy, way, mode, reserve, recent = row
    name = f"{policy}, {way}" + (f", {ONE_SHOT}" if mode == ONE_SHOT else "")
    return markdown.escape(f"{name} (reserve {reserve}, recent {recent})" if limits else name)


def by_conversation(records: Iterable[Record]) -> Scores:
    """The mean score of each conversation's answers, by kind."""
    found: dict[str, dict[ItemId, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        found[record["kind"]][record["seed"], record["conversation"]].append(record["score"])
    return {
        kind: {item: fmean(scores) for item, scores in items.items()}
        for kind, items in found.items()
    }


def _right(task: str, records: Sequence[Record]) -> str:
    if not records:
        return _NONE
    if task == "all":
        return markdown.percent(mean(by_conversation(records)))
    right = sum(r["score"] for r in records)
    return f"{right:.0f} of {len(records)}: {markdown.percent(wilson(right, len(records)))}"


def _share(records: Sequence[Record], full: Sequence[Record]) -> str:
    """Over the answers that both have."""
    item = ("seed", "conversation", "kind", "question")
    keys = [{tuple(r[name] for name in item) for r in group} for group in (records, full)]
    both = keys[0] & keys[1]
    if not both:
        return _NONE
    shared = [[r for r in group if tuple(r[n] for n in item) in both] for group in (records, full)]
    return markdown.percent(ratio(by_conversation(shared[0]), by_conversation(shared[1])))


def _time(records: Sequence[Record]) -> str:
    if not records:
        return _NONE
    parts = [f"{median(r['first_ms'] for r in records):,.0f} ms"]
    took = [r["recall_ms"] for r in records if r["recall_ms"] is not None]
    if took:
        parts.append(f"{median(took):,.0f} ms")
    if any(r["settings"] for r in records):
        tokens, rows = (median(r[name] for r in records) for name in ("recalled", "recalled_rows"))
        parts.append(f"{tokens:,.0f} ({rows:,.0f})")
    return "; ".join(parts)
