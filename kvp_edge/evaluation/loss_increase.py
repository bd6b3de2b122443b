"""How the loss grows along an ending while tokens are dropped.

The loss of one policy minus that of the full cache, on the same tokens, as a mean over all tokens.
(ForesightKV's reward, arXiv:2602.03203, squares it and uses selected tokens only.)
"""

from __future__ import annotations

import numpy as np

from kvp_edge.evaluation.grouping import Cell, Group
from kvp_edge.evaluation.records import PARTS, Record
from kvp_edge.evaluation.statistics import Scores


def tasks_in_parts(found: Group) -> list[str]:
    """The readings for which the full cache's records have losses of parts of the ending."""
    full = found.full
    return [
        task for task in found.tasks("loss") if any(r.losses for r in full.get(task, {}).values())
    ]


def by_parts(cell: Cell, task: str, count: int) -> list[Scores]:
    """The losses of ``count`` consecutive parts of the endings, each as scores of the items; items
    without such losses are left out.

    Args:
        count: a divisor of PARTS.
    """
    items = {item: r.losses for item, r in sorted(cell.get(task, {}).items()) if r.losses}
    step = PARTS // count
    return [
        {task: {item: float(np.mean(part[at : at + step])) for item, part in items.items()}}
        for at in range(0, PARTS, step)
    ]


def ending_tokens(records: list[Record]) -> float:
    """The mean number of tokens in the endings."""
    return float(np.mean([r.n_prompt - r.kept - r.dropped for r in records]))
