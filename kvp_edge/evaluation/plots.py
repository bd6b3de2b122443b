"""Plots of an evaluation, as PNG: accuracy against the budget, the loss increase along endings, and
a cost for every head.

matplotlib is optional: pip install 'kvp_edge[train]' brings it.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvp_edge.evaluation import statistics
from kvp_edge.evaluation.grouping import Group, group, ordered, scores
from kvp_edge.evaluation.loss_increase import by_parts, ending_tokens, tasks_in_parts
from kvp_edge.evaluation.records import PARTS, Record
from kvp_edge.evaluation.statistics import GATE, RESAMPLES

#: Colours that people with any colour vision tell apart (Okabe and Ito, 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
_MARKS = "osD^vP*X"

_HEADS_PER_ROW = 32
_PANELS_PER_ROW = 3


def load_matplotlib() -> tuple[Any, Any]:
    """matplotlib and its pyplot, drawing into files.

    Raises:
        ImportError: with the command that installs it.
    """
    try:
        matplotlib = importlib.import_module("matplotlib")
        matplotlib.use("Agg")
        return matplotlib, importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ImportError(
            "plots need the package matplotlib: pip install 'kvp_edge[train]'"
        ) from error


def accuracy_plot(
    records: Iterable[Record],
    path: str | os.PathLike[str],
    *,
    policy: str = "learned",
    threshold: float = GATE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> None:
    """Accuracy against the budget: one panel per setting, one line per policy in a band that is
    its 95 % interval. Tasks that the full cache fails are left out, as in the report.

    Raises:
        ValueError: no accuracies to draw.
        ImportError: there is no matplotlib.
    """
    groups = [found for found in group(records) if found.gated(threshold)[0]]
    if not groups:
        raise ValueError(
            "there is nothing to plot: no policy has records of a task that the full cache does "
            f"with an accuracy of {threshold:.0%}"
        )
    _, pyplot = load_matplotlib()
    looks = _looks(groups, policy)
    figure, panels = _panels(pyplot, len(groups), sharey=True)
    for panel, found in zip(panels, groups, strict=True):
        _panel(panel, found, looks, threshold, resamples, seed)
    _legend(figure, panels)
    _save(figure, path, pyplot)


def loss_increase_plot(
    records: Iterable[Record],
    path: str | os.PathLike[str],
    *,
    policy: str = "learned",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> None:
    """The loss over the full cache's along the endings of readings: one panel per setting, reading
    and budget, one line per policy in a band that is its paired 95 % interval.

    Raises:
        ValueError: no losses along an ending, of a policy and of the full cache.
        ImportError: there is no matplotlib.
    """
    groups = group(records)
    shown = [
        (found, task, budget)
        for found in groups
        for task in tasks_in_parts(found)
        for budget in found.budgets
    ]
    if not shown:
        raise ValueError(
            "there is nothing to plot: no policy and full cache have losses along the ending of "
            "the same reading"
        )
    _, pyplot = load_matplotlib()
    looks = _looks(groups, policy)
    figure, panels = _panels(pyplot, len(shown), sharey=False)
    for panel, (found, task, budget) in zip(panels, shown, strict=True):
        full = by_parts(found.full, task, PARTS)
        tokens = ending_tokens(list(found.full[task].values()))
        x = (np.arange(PARTS) + 0.5) * tokens / PARTS
        for name in looks:
            mine = by_parts(found.cells.get((name, budget), {}), task, PARTS)
            if not statistics.paired_items(mine[0], full[0]):
                continue
            gaps = [
                statistics.difference(*pair, resamples, seed)
                for pair in zip(mine, full, strict=True)
            ]
            panel.plot(x, [e.value for e in gaps], label=name, markersize=4, **looks[name])
            low, high = [e.low for e in gaps], [e.high for e in gaps]
            panel.fill_between(x, low, high, color=looks[name]["color"], alpha=0.12, linewidth=0)
        panel.axhline(0, color="#555555", linestyle="--", linewidth=1)
        s = found.setting
        panel.set_title(
            f"{task}, {budget:,} of {s.length:,} tokens\n{s.mode}, {s.granularity}, cache "
            f"{s.type_k}/{s.type_v}{'' if s.protected else ', no tokens protected'}",
            fontsize=10,
        )
        panel.set_xlabel("tokens of the ending")
        panel.set_ylabel("loss increase in nats per token")
        panel.grid(alpha=0.3)
    _legend(figure, panels)
    _save(figure, path, pyplot)


def _looks(groups: Sequence[Group], first: str) -> dict[str, dict[str, str]]:
    """Each policy's style, the same in all panels."""
    names = ordered((name for found in groups for name in found.policies()), first)
    return {
        name: {
            "color": COLOURS[i % len(COLOURS)],
            "marker": _MARKS[i % len(_MARKS)],
            "linestyle": "-" if i < len(COLOURS) else ":",  # the second time round
        }
        for i, name in enumerate(names)
    }


def _panels(pyplot: Any, count: int, *, sharey: bool) -> tuple[Any, list[Any]]:
    """A figure and its ``count`` panels."""
    rows = math.ceil(count / _PANELS_PER_ROW)
    columns = math.ceil(count / rows)
    figure, axes = pyplot.subplots(
        rows,
        columns,
        figsize=(1 + 5 * columns, 0.8 + 3.8 * rows),
        squeeze=False,
        sharey=sharey,
        layout="constrained",
    )
    for panel in axes.flat[count:]:
        panel.set_axis_off()
    return figure, list(axes.flat[:count])


def _legend(figure: Any, panels: Sequence[Any]) -> None:
    """One legend for all panels."""
    entries = {
        label: handle
        for panel in panels
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    columns = min(len(panels), _PANELS_PER_ROW)
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside upper center",
        ncols=min(4 * columns, len(entries)),
    )


def _panel(
    panel: Any,
    found: Group,
    looks: Mapping[str, Mapping[str, str]],
    threshold: float,
    resamples: int,
    seed: int,
) -> None:
    tasks, _ = found.gated(threshold)
    for policy in (name for name in looks if name in found.policies()):
        points = []
        for budget in found.budgets:
            mine = scores(found.cells.get((policy, budget), {}), "accuracy", tasks)
            if mine:
                points.append((budget, statistics.mean(mine, resamples, seed)))
        x = [budget for budget, _ in points]
        panel.plot(x, [e.value for _, e in points], label=policy, markersize=5, **looks[policy])
        low, high = [e.low for _, e in points], [e.high for _, e in points]
        colour = looks[policy]["color"]
        # a single budget shows no band, so draw a bar
        panel.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        panel.vlines(x, low, high, color=colour, alpha=0.4, linewidth=1)
    full = scores(found.full, "accuracy", tasks)
    if full:
        whole = statistics.mean(full, resamples, seed)
        panel.axhline(whole.value, color="#555555", linestyle="--", label="full cache")
        panel.axhspan(whole.low, whole.high, color="#555555", alpha=0.1, linewidth=0)
    s = found.setting
    panel.set_title(
        f"{s.mode}, question {s.question}, {s.granularity}, {s.length:,} tokens\n"
        f"cache {s.type_k}/{s.type_v}, {len(tasks)} tasks{s.unusual}",
        fontsize=10,
    )
    panel.set_xscale("log", base=2)
    panel.set_xticks(found.budgets, [f"{budget:,}" for budget in found.budgets])
    panel.minorticks_off()
    panel.set_xlabel("budget in tokens")
    panel.set_ylabel("accuracy")
    panel.tick_params(labelleft=True)
    panel.set_ylim(-0.02, 1.02)
    panel.grid(alpha=0.3)


def cost_per_head_plot(
    costs: Mapping[str, npt.ArrayLike],
    path: str | os.PathLike[str],
    *,
    label: str = "cost (the best ranking = 1)",
    best: float | None = 1.0,
    log: bool = True,
) -> None:
    """Bars for every (layer, KV head), one colour per policy.

    Args:
        costs: of each policy, [n_layer, n_head_kv], all of the same shape.
        path: PNG.
        label: what a cost is.
        best: drawn as a line; bars of a logarithmic axis begin there.
        log: logarithmic axis.

    Raises:
        ValueError: no costs, or of different shapes.
        ImportError: there is no matplotlib.
    """
    arrays = {name: np.asarray(cost, np.float64) for name, cost in costs.items()}
    shapes = {cost.shape for cost in arrays.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise ValueError(
            "costs per head must be [n_layer, n_head_kv], the same for all policies, not "
            f"{', '.join(map(str, sorted(shapes))) or 'none at all'}"
        )
    _, pyplot = load_matplotlib()
    n_layer, n_head_kv = next(iter(shapes))
    n = n_layer * n_head_kv
    per_row = min(n, _HEADS_PER_ROW)
    rows = math.ceil(n / per_row)
    figure, axes = pyplot.subplots(
        rows,
        1,
        figsize=(max(6.0, 2 + 0.4 * per_row), 0.8 + 2.6 * rows),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    width = 0.8 / len(arrays)
    bottom = best if log and best is not None else 0.0
    for row, panel in enumerate(axes.flat):
        heads = np.arange(row * per_row, min(n, (row + 1) * per_row))
        for i, (name, cost) in enumerate(arrays.items()):
            panel.bar(
                heads + (i - (len(arrays) - 1) / 2) * width,
                cost.reshape(-1)[heads] - bottom,
                width,
                bottom=bottom,
                label=name,
                color=COLOURS[i % len(COLOURS)],
            )
        if log:
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter("{x:g}")
        if best is not None:
            panel.axhline(best, color="grey", linewidth=0.8)
        for head in heads[heads % n_head_kv == 0][1:]:  # between layers
            panel.axvline(head - 0.5, color="grey", linewidth=0.5, alpha=0.5)
        panel.set_xticks(heads, [f"{h // n_head_kv},{h % n_head_kv}" for h in heads], fontsize=8)
        panel.set_xlim(row * per_row - 0.6, (row + 1) * per_row - 0.4)
        panel.set_ylabel(label)
    axes.flat[-1].set_xlabel("layer, KV head")
    handles, names = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=min(6, len(names)))
    _save(figure, path, pyplot)


def _save(figure: Any, path: str | os.PathLike[str], pyplot: Any) -> None:
    # without the software's name, the same numbers give the same file everywhere
    figure.savefig(path, dpi=120, format="png", metadata={"Software": None})
    pyplot.close(figure)
