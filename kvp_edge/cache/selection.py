"""Tokens that are kept or dropped together, and tokens that were dropped.

The work depends on how much is held, not on how long the conversation is.
"""

from __future__ import annotations

import numpy as np

from kvp_edge.arrays import BoolArray, IntArray, TokenIndices


def units(indices: TokenIndices, spans: IntArray) -> IntArray:
    """A number for each token, the same for the tokens of one span, ascending like the tokens.

    Args:
        indices: int32 [..., n].
        spans: int32 [k, 2], [start, end), start < end, ascending, disjoint.
    """
    if len(spans) == 0:
        return indices
    i, inside = _span_of(indices, spans)
    return np.where(inside, spans[i, 0], indices).astype(np.int32)


def several_held(indices: TokenIndices, spans: IntArray) -> BoolArray:
    """bool [k]: whether more than one of each span's tokens are held, all heads together.

    Args:
        indices: int32 [..., n], of tokens held.
        spans: int32 [k, 2 or more], [start, end), ascending, disjoint.
    """
    if len(spans) == 0:
        return np.zeros(0, np.bool_)
    i, inside = _span_of(indices, spans)
    oldest = np.full(len(spans), np.iinfo(np.int32).max, np.int32)
    newest = np.full(len(spans), -1, np.int32)
    np.minimum.at(oldest, i[inside], indices[inside])
    np.maximum.at(newest, i[inside], indices[inside])
    return oldest < newest


def _span_of(indices: TokenIndices, spans: IntArray) -> tuple[IntArray, BoolArray]:
    """The number of the span that each token may lie in, and whether it does."""
    i = np.minimum(np.searchsorted(spans[:, 1], indices, side="right"), len(spans) - 1)
    return i.astype(np.int32), (spans[i, 0] <= indices) & (indices < spans[i, 1])


def clipped(spans: IntArray, first: int, end: int) -> IntArray:
    """The parts of [start, end) spans between ``first`` and ``end``: int32 [k, 2]."""
    inside = np.clip(spans[:, :2], first, max(first, end))
    return inside[inside[:, 0] < inside[:, 1]]


def spans(indices: TokenIndices) -> tuple[tuple[int, int], ...]:
    """Ascending indices as [start, end) runs of consecutive numbers."""
    if len(indices) == 0:
        return ()
    cut = np.flatnonzero(np.diff(indices) != 1) + 1
    firsts = indices[np.concatenate(([0], cut))]
    lasts = indices[np.concatenate((cut - 1, [len(indices) - 1]))]
    return tuple((int(a), int(b) + 1) for a, b in zip(firsts, lasts, strict=True))


def no_longer_held(before: TokenIndices, after: TokenIndices) -> TokenIndices:
    """Tokens that some head kept before and no head keeps now, ascending."""
    return np.setdiff1d(before, after).astype(np.int32)
