"""Tokens that are kept or dropped together, and tokens that were dropped."""

from __future__ import annotations

import numpy as np

from kvp_edge.arrays import IntArray


def units(tokens: IntArray, spans: IntArray) -> IntArray:
    """A number for each token, the same for the tokens of one span, ascending like the tokens.

    Args:
        tokens: int32 [..., n].
        spans: int32 [k, 2], [start, end), start < end, ascending, disjoint.
    """
    if len(spans) == 0:
        return tokens
    n = max(int(tokens.max()) + 1, int(spans[-1, 1]))
    step = np.zeros(n + 1, np.int32)
    step[spans[:, 0] + 1] += 1
    step[spans[:, 1]] -= 1
    behind_a_first = np.cumsum(step[:n]) > 0
    first = np.where(behind_a_first, 0, np.arange(n, dtype=np.int32))
    return np.maximum.accumulate(first)[tokens]


def clipped(spans: IntArray, first: int, end: int) -> IntArray:
    """The parts of [start, end) spans between ``first`` and ``end``: int32 [k, 2]."""
    inside = np.clip(spans[:, :2], first, max(first, end))
    return inside[inside[:, 0] < inside[:, 1]]


def spans(indices: IntArray) -> tuple[tuple[int, int], ...]:
    """Ascending indices as [start, end) runs of consecutive numbers."""
    if len(indices) == 0:
        return ()
    cut = np.flatnonzero(np.diff(indices) != 1) + 1
    firsts = indices[np.concatenate(([0], cut))]
    lasts = indices[np.concatenate((cut - 1, [len(indices) - 1]))]
    return tuple((int(a), int(b) + 1) for a, b in zip(firsts, lasts, strict=True))


def no_longer_held(before: IntArray, after: IntArray, seen: int) -> IntArray:
    """Tokens that some head kept before and no head keeps now, ascending."""
    held = np.zeros(seen, np.bool_)
    held[before] = True
    held[after] = False
    return np.flatnonzero(held).astype(np.int32)
