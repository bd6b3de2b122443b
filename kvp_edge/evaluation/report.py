"""A Markdown report of an evaluation's records: every number with its interval and its items."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kvp_edge.evaluation import statistics
from kvp_edge.evaluation.grouping import (
    Cell,
    Group,
    Measure,
    count,
    full_caches,
    group,
    ordered,
    scores,
)
from kvp_edge.evaluation.loss_increase import by_parts, tasks_in_parts
from kvp_edge.evaluation.markdown import (
    capital,
    escape,
    estimate,
    nats,
    percent,
    plural,
    points,
    signed_nats,
    table,
)
from kvp_edge.evaluation.records import GOLDEN, ORACLE, Record
from kvp_edge.evaluation.statistics import GATE, RESAMPLES, Estimate, Scores

NOTHING = "There are no records: nothing has been evaluated yet."

_FEW = 10  # items of a task; with fewer, the bootstrap's intervals are too narrow
_OUT = "†"

_READING = """\
Every policy read the same items. Brackets are 95 % intervals: how far a number would move with
other items of the same tasks, for this seed and model. Averages give every task the same weight.
Intervals of averages, differences and ratios are bootstrapped over the items of each task
({resamples:,} resamples), with the items paired where two policies are compared. A task whose
answers are either right or wrong has Wilson's interval.

Where the full cache answers less than {threshold:.0%} of a task's items, the task does not show
what a policy loses. Such tasks are marked {mark} and left out of averages and comparisons."""


@dataclass(frozen=True)
class _How:
    """What applies to the whole report."""

    policy: str
    threshold: float
    resamples: int
    seed: int

    def mean(self, found: Scores) -> Estimate:
        return statistics.mean(found, self.resamples, self.seed)

    def difference(self, first: Scores, second: Scores) -> Estimate:
        return statistics.difference(first, second, self.resamples, self.seed)

    def ratio(self, first: Scores, second: Scores) -> Estimate:
        return statistics.ratio(first, second, self.resamples, self.seed)


def report(
    records: Iterable[Record],
    *,
    title: str = "What a bounded cache costs",
    policy: str = "learned",
    threshold: float = GATE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> str:
    """The report, as Markdown.

    Args:
        records: of one model; see read_records.
        title: its first line.
        policy: the one that is compared to each of the others.
        threshold: the retrieval gate: accuracy of the full cache from which a task counts.
        resamples, seed: of the bootstrap.

    Raises:
        RecordError: the records do not fit together.
    """
    records = list(records)
    if not records:
        return f"# {title}\n\n{NOTHING}\n"
    how = _How(policy, threshold, resamples, seed)
    lines = [f"# {title}", "", *_about(records, how), ""]
    lines += _full_section(records, how)
    groups = group(records)
    if not groups:
        lines += ["There are no records of a bounded cache yet.", ""]
    for found in groups:
        lines += [f"## {capital(str(found.setting))}", ""]
        lines += _accuracy_section(found, how)
        lines += _reading_section(found, how)
        lines += _effort_section(found, how)
    return "\n".join(lines).rstrip("\n") + "\n"


def _about(records: Sequence[Record], how: _How) -> list[str]:
    per_task: dict[str, set[tuple[int, int]]] = {}
    for r in records:
        per_task.setdefault(r.task, set()).add((r.seed, r.item))
    counts = sorted({len(items) for items in per_task.values()})
    seeds = sorted({r.seed for r in records})
    items = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    text = [
        f"{len(records):,} records of {len(per_task)} {plural('task', len(per_task))}, {items} "
        f"{plural('item', counts[-1])} in each, drawn with "
        f"{plural('seed', len(seeds))} {', '.join(map(str, seeds))}. Policies: "
        f"{', '.join(map(escape, ordered({r.policy for r in records} - {'none'}, how.policy)))}.",
        "",
        _READING.format(resamples=how.resamples, threshold=how.threshold, mark=_OUT),
    ]
    if counts[0] < _FEW:
        text += [
            "",
            f"**Some tasks have fewer than {_FEW} items: their intervals are too narrow, and no "
            "decision should rest on them.**",
        ]
    policies = {r.policy for r in records}
    for policy, how_much in ((ORACLE, "the attention"), (GOLDEN, "the largest block of attention")):
        if policy in policies:
            text += [
                "",
                f"`{policy}` ranks tokens by {how_much} that they will receive. It is not a "
                "baseline, because no policy can know that; it shows what could still be gained.",
            ]
    return text


def _full_section(records: Sequence[Record], how: _How) -> list[str]:
    caches = full_caches(records)
    if not caches:
        return [
            "**There are no records of the full cache (policy `none`), so no task can be left out "
            "and no loss be measured against it.**",
            "",
        ]
    lines = ["## Full cache", ""]
    units: dict[Measure, str] = {"accuracy": "accuracy in %", "loss": "loss in nats per token"}
    for measure, unit in units.items():
        columns = {key: scores(cell, measure) for key, cell in caches.items()}
        tasks = sorted({task for column in columns.values() for task in column})
        if not tasks:
            continue
        header = [f"{length:,} tokens, {k}/{v}" for k, v, length in columns]
        rows = []
        for task in tasks:
            row = [escape(task)]
            for column in columns.values():
                if task not in column:
                    row.append("")
                    continue
                found = how.mean({task: column[task]})
                out = (
                    measure == "accuracy"
                    and not statistics.gate({task: column[task]}, how.threshold)[0]
                )
                show = percent if measure == "accuracy" else nats
                row.append(f"{show(found)}{f' {_OUT}' if out else ''}")
            rows.append(row)
        lines += [*table([f"task: {unit}", *header], rows), ""]
    return lines


def _accuracy_section(found: Group, how: _How) -> list[str]:
    tasks = found.tasks("accuracy")
    if not tasks:
        return []
    kept, out = found.gated(how.threshold)
    lines = []
    if kept:
        lines += _averages(found, how, kept)
        lines += _comparisons(found, how, "accuracy", kept)
    else:
        lines += [
            f"No task has an accuracy of {how.threshold:.0%} with the full cache: there is nothing "
            "to average or compare.",
            "",
        ]
    lines += _task_tables(found, how, tasks, out)
    return lines


def _averages(found: Group, how: _How, tasks: list[str]) -> list[str]:
    """Accuracy and retained share, policies x budgets, over the tasks that count."""
    full = scores(found.full, "accuracy", tasks)
    lines = [
        f"### Accuracy in %, mean over {len(tasks)} {plural('task', len(tasks))}",
        "",
        f"{', '.join(map(escape, tasks))}."
        + (f" Full cache: {percent(how.mean(full))}." if full else ""),
        "",
        *_by_budget(found, how, "accuracy", tasks, lambda mine: percent(how.mean(mine))),
    ]
    if full:
        lines += [
            "### Retained share of the full cache's accuracy, in %",
            "",
            *_by_budget(
                found, how, "accuracy", tasks, lambda mine: percent(how.ratio(mine, full)), full
            ),
        ]
    return lines


def _by_budget(
    found: Group,
    how: _How,
    measure: Measure,
    tasks: list[str],
    show: Callable[[Scores], str],
    against: Scores | None = None,
) -> list[str]:
    """A table, policies x budgets. Cells with fewer items than the largest say so; with
    ``against``, a cell needs items that it shares with these scores."""
    cells = {key: scores(cell, measure, tasks) for key, cell in found.cells.items()}
    if against is not None:
        cells = {
            key: {
                task: {item: mine[task][item] for item in items}
                for task, items in statistics.paired_items(mine, against).items()
            }
            for key, mine in cells.items()
        }
    most = max(map(count, cells.values()))
    rows = []
    for policy in found.policies(how.policy):
        row = [escape(policy)]
        for budget in found.budgets:
            mine = cells.get((policy, budget), {})
            n = count(mine)
            row.append("" if n == 0 else show(mine) + ("" if n == most else f" ({n}/{most} items)"))
        rows.append(row)
    return [*table(["policy", *_budget_names(found)], rows), ""]


def _comparisons(found: Group, how: _How, measure: Measure, tasks: list[str]) -> list[str]:
    """The chosen policy minus each baseline, at every budget."""
    unit = "percentage points" if measure == "accuracy" else "nats per token, less is better"
    heading = [f"### {escape(how.policy)} against each baseline: {measure}, in {unit}", ""]
    show = points if measure == "accuracy" else signed_nats
    sign = 1 if measure == "accuracy" else -1
    rows = []
    for budget, name in zip(found.budgets, _budget_names(found), strict=True):
        cells = {
            policy: scores(cell, measure, tasks)
            for (policy, at), cell in found.cells.items()
            if at == budget and policy not in (ORACLE, GOLDEN)
        }
        compared = statistics.compare(
            how.policy,
            {policy: cells[policy] for policy in ordered(cells)},
            better="higher" if measure == "accuracy" else "lower",
            resamples=how.resamples,
            seed=how.seed,
        )
        if compared is None:
            continue
        for policy, gap in compared.against.items():
            best = policy == compared.best
            share = compared.items[policy]
            rows.append(
                [
                    name,
                    f"**{escape(policy)}** (best)" if best else escape(policy),
                    show(gap),
                    f"{gap.n}" + ("" if share == 1 else f" ({share:.0%} of the policy's)"),
                    _verdict(gap, sign),
                ]
            )
    if not rows:
        return [*heading, f"There are no records of '{escape(how.policy)}' and a baseline.", ""]
    return [
        *heading,
        *table(
            ["budget", "baseline", f"{how.policy} minus baseline", "items", "reading"],
            rows,
        ),
        "",
        f"If the policies were equal, about {_expected(len(rows))} of {len(rows)} such intervals "
        "would exclude 0 by chance. The best baseline was chosen on the same items, which favours "
        "it.",
        "",
    ]


def _expected(n: int) -> str:
    """How many of n 95 % intervals miss."""
    return f"{n / 20:.0f}" if n >= 20 else f"{n / 20:.1g}"


def _verdict(gap: Estimate, sign: int) -> str:
    if math.isnan(gap.low):
        return "too few items"
    if not gap.excludes(0):
        return "cannot be told apart"
    return "better" if sign * gap.value > 0 else "worse"


def _task_tables(found: Group, how: _How, tasks: list[str], out: list[str]) -> list[str]:
    lines = ["### Task by task: accuracy in %", ""]
    full = scores(found.full, "accuracy")
    policies = found.policies(how.policy)
    for budget, name in zip(found.budgets, _budget_names(found), strict=True):
        rows = []
        for task in tasks:
            cells = [
                full,
                *(scores(found.cells.get((p, budget), {}), "accuracy") for p in policies),
            ]
            known = [{task: cell[task]} if task in cell else None for cell in cells]
            items = {count(one) for one in known if one}
            rows.append(
                [
                    f"{escape(task)}{f' {_OUT}' if task in out else ''}",
                    " to ".join(map(str, sorted({min(items), max(items)}))) if items else "",
                    *("" if one is None else percent(how.mean(one)) for one in known),
                ]
            )
        header = ["task", "items", "full cache", *map(escape, policies)]
        lines += [f"Budget {name}:", "", *table(header, rows), ""]
    if out:
        unknown = [task for task in out if task not in full]
        lines += [
            f"{_OUT} Left out of averages: the full cache itself is below {how.threshold:.0%}"
            + (f", or unknown ({', '.join(map(escape, unknown))})" if unknown else "")
            + ".",
            "",
        ]
    return lines


def _reading_section(found: Group, how: _How) -> list[str]:
    tasks = found.tasks("loss")
    full = scores(found.full, "loss", tasks)
    if not tasks:
        return []
    lines = ["### Readings: loss over the full cache's, in nats per token", ""]
    if not full:
        return [*lines, "There are no records of the full cache to compare with.", ""]
    # each text on its own, then all of them together
    for part in [[task] for task in tasks] + ([tasks] if len(tasks) > 1 else []):
        base = {task: full[task] for task in part if task in full}
        if not base:
            lines += [f"{escape(part[0])}: no records of the full cache.", ""]
            continue
        name = escape(part[0]) if len(part) == 1 else f"Mean over {len(base)} tasks"
        lines += [f"{name}; full cache: {nats(how.mean(base))}, {count(base)} items.", ""]
        lines += _increases(found, how, base)
        if len(part) == 1 and part[0] in tasks_in_parts(found):
            lines += _along(found, how, part[0])
    return [*lines, *_comparisons(found, how, "loss", tasks)]


def _increases(found: Group, how: _How, full: Scores) -> list[str]:
    """Loss minus the full cache's, policies x budgets."""

    def show(mine: Scores) -> str:
        return signed_nats(how.difference(mine, full))

    return _by_budget(found, how, "loss", list(full), show, full)


def _along(found: Group, how: _How, task: str) -> list[str]:
    """Loss minus the full cache's in every quarter of the ending, policies x quarters."""
    quarters = ("first", "second", "third", "last")
    full = by_parts(found.full, task, len(quarters))
    lines = []
    for budget, name in zip(found.budgets, _budget_names(found), strict=True):
        rows = []
        for policy in found.policies(how.policy):
            mine = by_parts(found.cells.get((policy, budget), {}), task, len(quarters))
            if statistics.paired_items(mine[0], full[0]):
                gaps = [how.difference(*pair) for pair in zip(mine, full, strict=True)]
                rows.append([escape(policy), *map(signed_nats, gaps)])
        if rows:
            header = ["policy", *(f"{quarter} quarter" for quarter in quarters)]
            lines += [f"Along the ending, budget {name}:", "", *table(header, rows), ""]
    return lines


def _effort_section(found: Group, how: _How) -> list[str]:
    """Time, memory and what the cache did, over all tasks."""
    rows = []
    cells: list[tuple[str, str, Cell]] = [("", "full cache", found.full)] if found.full else []
    for budget, name in zip(found.budgets, _budget_names(found), strict=True):
        cells += [
            (name, policy, found.cells[policy, budget])
            for policy in found.policies(how.policy)
            if (policy, budget) in found.cells
        ]
    for name, policy, cell in cells:
        seconds = how.mean(_of_all(cell, lambda r: r.seconds))
        rows.append(
            [
                name,
                escape(policy),
                estimate(seconds, 1, "{:.2f}"),
                f"{statistics.point(_of_all(cell, lambda r: r.kv_bytes / 2**20)):.2f}",
                f"{statistics.point(_of_all(cell, lambda r: float(r.kept))):.0f}",
                f"{statistics.point(_of_all(cell, lambda r: float(r.dropped))):.0f}",
                f"{statistics.point(_of_all(cell, lambda r: float(r.evictions))):.1f}",
            ]
        )
    return [
        "### Time and memory per item",
        "",
        "Means over all tasks. Seconds count reading and replying (in one-shot mode only what "
        "comes after the context, whose reading and scoring are shared), and depend on what "
        "else ran on the machine. MiB are the keys and values of the most tokens held at once. "
        "Kept and dropped are tokens before the question or ending.",
        "",
        *table(["budget", "policy", "seconds", "MiB", "kept", "dropped", "evictions"], rows),
        "",
    ]


def _of_all(cell: Cell, value: Callable[[Record], float]) -> Scores:
    return {
        task: {item: value(items[item]) for item in sorted(items)}
        for task, items in sorted(cell.items())
    }


def _budget_names(found: Group) -> list[str]:
    return [f"{budget} ({budget / found.setting.length:.3g})" for budget in found.budgets]
