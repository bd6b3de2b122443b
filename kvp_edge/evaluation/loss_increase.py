"""How the loss grows along an ending while tokens are dropped.

The loss of one policy minus that of the full cache, on the same tokens: what ForesightKV
(arXiv:2602.03203) rewards evictions by, there squared and for surprising tokens alone, here the
plain mean of all.
"""

from __future__ import annotations

import numpy as np

from kvp_edge.evaluation.grouping import Cell, Group
from kvp_edge.evaluation.records import PARTS, Record
from kvp_edge.evaluation.statistics import Scores


def tasks_in_parts(found: Group) -> list[str]:
    """The readings whose full cache's records have losses for the parts of their endings."""
    full = found.full
    return [
        task for task in found.tasks("loss") if any(r.losses for r in full.get(task, {}).values())
    ]


def by_parts(cell: Cell, task: str, count: int) -> list[Scores]:
    """The losses of ``count`` parts of the endings in a row, for each of them as scores of the
    items; an item without such losses is left out.

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
    """How many tokens the endings have, on the average."""
    return float(np.mean([r.n_prompt - r.kept - r.dropped for r in records]))
