"""Groups records that may be compared: a setting, its policies and budgets, its full cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from kvp_edge.cache.options import OPTIONS
from kvp_edge.errors import RecordError
from kvp_edge.evaluation.records import GOLDEN, ORACLE, SHIFT, Record, latest
from kvp_edge.evaluation.statistics import GATE, ItemId, Scores, gate

Measure = Literal["accuracy", "loss"]

#: Records of one policy at one budget: of each task, of each item.
Cell: TypeAlias = dict[str, dict[ItemId, Record]]

#: Policies that come last in a table: llama.cpp's own rule, and the oracles.
_LAST = (SHIFT, ORACLE, GOLDEN)


#: How an option of the cache is told that has not its default value, but for the granularity, which
#: is always told.
_UNUSUAL = {"keep_whole": "whole {}", "isolate_turns": "turns isolated"}


class Setting(NamedTuple):
    """What all compared records share, in the order in which groups are sorted."""

    mode: str
    question: str
    granularity: str
    type_k: str
    type_v: str
    length: int
    protected: bool
    keep_whole: str
    isolate_turns: bool

    @property
    def unusual(self) -> str:
        """Settings that differ from the defaults, for a description."""
        found = [] if self.protected else [", no tokens protected"]
        for name, words in _UNUSUAL.items():
            value = getattr(self, name)
            if value != OPTIONS[name].default:
                found.append(f", {words.format(value)}")
        return "".join(found)

    def __str__(self) -> str:
        return (
            f"{self.mode}, question {self.question}, granularity {self.granularity}, cache "
            f"{self.type_k}/{self.type_v}, {self.length:,} tokens{self.unusual}"
        )


@dataclass
class Group:
    """All records of one setting.

    Attributes:
        setting: see Setting.
        full: the full cache's records of the setting's tasks; it was read once for all settings.
        cells: the policies' records, at (policy, budget).
    """

    setting: Setting
    full: Cell = field(default_factory=dict)
    cells: dict[tuple[str, int], Cell] = field(default_factory=dict)

    @property
    def budgets(self) -> list[int]:
        """In tokens, ascending."""
        return sorted({budget for _, budget in self.cells})

    def policies(self, first: str = "") -> list[str]:
        """By name, with ``first`` first and the special ones last."""
        return ordered((policy for policy, _ in self.cells), first)

    def tasks(self, measure: Measure) -> list[str]:
        """Names of the tasks that any policy has read, sorted."""
        return sorted({task for cell in self.cells.values() for task in scores(cell, measure)})

    def gated(self, threshold: float = GATE) -> tuple[list[str], list[str]]:
        """Tasks to average over, and tasks left out, because the full cache's accuracy is below
        ``threshold`` or not known. Without any full cache no task is left out."""
        tasks = self.tasks("accuracy")
        if not self.full:
            return tasks, []
        passed, _ = gate(scores(self.full, "accuracy"), threshold)
        return [t for t in tasks if t in passed], [t for t in tasks if t not in passed]


def group(records: Iterable[Record]) -> list[Group]:
    """One group for each setting, sorted. There are none if all records are of the full cache.

    Raises:
        RecordError: one item was made of two different prompts, so that its records cannot be
            compared.
    """
    records = latest(records)
    full = [record for record in records if record.is_full]
    groups: dict[Setting, Group] = {}
    for r in records:
        if r.budget is None:
            continue
        setting = Setting(**{name: getattr(r, name) for name in Setting._fields})
        found = groups.setdefault(setting, Group(setting))
        _add(found.cells.setdefault((r.policy, r.budget), {}), r)
    for found in groups.values():
        s = found.setting
        read = {task for cell in found.cells.values() for task in cell}
        for r in full:
            if (r.type_k, r.type_v, r.length) == (s.type_k, s.type_v, s.length) and r.task in read:
                _add(found.full, r)
        _check_prompts(found)
    return [groups[setting] for setting in sorted(groups)]


def full_caches(records: Iterable[Record]) -> dict[tuple[str, str, int], Cell]:
    """All records of full caches, at (type_k, type_v, length), sorted."""
    found: dict[tuple[str, str, int], Cell] = {}
    for r in latest(records):
        if r.is_full:
            _add(found.setdefault((r.type_k, r.type_v, r.length), {}), r)
    return dict(sorted(found.items()))


def scores(cell: Cell, measure: Measure, tasks: Sequence[str] | None = None) -> Scores:
    """The scores of a cell, of all tasks with that measure or of those given. Sorted, so that the
    order of records does not change the resamples."""
    return {
        task: {item: items[item].score for item in sorted(items)}
        for task, items in sorted(cell.items())
        if (tasks is None or task in tasks)
        and all(record.measure == measure for record in items.values())
    }


def count(found: Scores) -> int:
    """Items, of all tasks together."""
    return sum(map(len, found.values()))


def ordered(policies: Iterable[str], first: str = "") -> list[str]:
    """Names without repetitions: ``first``, the others by name, llama.cpp's rule, the oracles."""
    return sorted(
        set(policies),
        key=lambda name: (name != first, _LAST.index(name) + 1 if name in _LAST else 0, name),
    )


def _add(cell: Cell, record: Record) -> None:
    items = cell.setdefault(record.task, {})
    known = items.setdefault((record.seed, record.item), record)
    _check_same_prompt(known, record)


def _check_prompts(found: Group) -> None:
    known: dict[tuple[str, ItemId], Record] = {}
    for cell in (found.full, *found.cells.values()):
        for task, items in cell.items():
            for item, record in items.items():
                _check_same_prompt(known.setdefault((task, item), record), record)


def _check_same_prompt(one: Record, other: Record) -> None:
    if one.prompt != other.prompt:
        raise RecordError(
            f"item {one.item} of {one.task} (seed {one.seed}, {one.length} tokens) has different "
            f"prompts in the records of '{one.policy}' and '{other.policy}': they are of different "
            "models or versions of the task, and cannot be compared"
        )
