"""The picture of the trade-off: loss against memory, one line for every type."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from json_lines import Record
from kvp_edge.evaluation.plots import COLOURS, load_matplotlib
from memory_eval.table import Increases, of_each_length

_MARKS = "osD^vP*X"


def draw(path: Path, records: Sequence[Record]) -> None:
    """One panel for each model and length, without recall and with it: the mean loss increase of
    all tasks against the MiB of the cells. A row counts where all tasks were measured.

    Raises:
        ValueError: nothing to draw.
        ImportError: there is no matplotlib.
    """
    found = list(of_each_length(records))
    panels = [
        (f"{model}\n{length:,} tokens, recall {'on' if recall else 'off'}", increases, recall)
        for model, length, increases in found
        for recall in (False, True)
    ]
    if not any(increases.rows for _, increases, _ in panels):
        raise ValueError("there is nothing to draw")
    _, pyplot = load_matplotlib()
    types = list(dict.fromkeys(row[0] for _, one, _ in panels for row in one.rows))
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(3.4 * len(panels), 3.6), squeeze=False, layout="constrained"
    )
    for panel, (title, increases, recall) in zip(axes.flat, panels, strict=True):
        for row in (row for row in increases.rows if row[-1] == recall):
            points = _points(increases, row)
            if points:
                number = types.index(row[0])
                panel.plot(
                    *zip(*points, strict=True),
                    marker=_MARKS[number % len(_MARKS)],
                    color=COLOURS[number % len(COLOURS)],
                    label=str(row[0]),
                )
        panel.set_title(title, fontsize=9)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set_xlabel("MiB of the cells")
        panel.set_ylabel("loss increase, nats per token")
        panel.grid(alpha=0.3)
    handles, names = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names))
    figure.savefig(path, dpi=120, format="png", metadata={"Software": None})
    pyplot.close(figure)


def _points(increases: Increases, row: tuple[object, ...]) -> list[tuple[float, float]]:
    """MiB and loss of each share but 1, the smallest first."""
    points = []
    for share in reversed([share for share in increases.shares if share > 1]):
        of_tasks = [increases.increase(row, task, share) for task in increases.tasks]
        known = [one.value for one in of_tasks if one is not None]
        if known and len(known) == len(of_tasks):
            points.append((increases.mean_bytes(row, share) / 2**20, fmean(known)))
    return points
