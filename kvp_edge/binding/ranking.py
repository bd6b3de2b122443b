"""Which tokens or rows stay, by their scores."""

from __future__ import annotations

import numpy as np

from kvp_edge.arrays import BoolArray, FloatArray, IntArray, Rows
from kvp_edge.binding.library import call


def choose_tokens(
    scores: FloatArray, unit: IntArray, protected: BoolArray, budget: int
) -> BoolArray:
    """Which tokens stay: all protected ones, then the best by score until ``budget`` are kept.

    A token's score is the mean over layers and heads of its z-scores, each head standardised over
    the tokens that compete. See kvp_choose_tokens in native/kvp_edge.h.

    Args:
        scores: f32 [n_layer, n_head_kv, n], larger = keep; what is not finite is dropped first.
        unit: int32 [n]; neighbours with the same number stay or go together.
        protected: bool [n].
        budget: tokens to keep; more stay only if the protected units alone are more.

    Returns:
        bool [n].
    """
    n = scores.shape[2]
    if len(unit) != n or len(protected) != n:
        raise ValueError(f"{n} scores, but {len(unit)} units and {len(protected)} protected flags")
    scores = np.ascontiguousarray(scores, np.float32)
    unit = np.ascontiguousarray(unit, np.int32)
    protected = np.ascontiguousarray(protected, np.bool_)
    keep = np.empty(n, np.bool_)
    call(
        "kvp_choose_tokens",
        scores,
        scores.shape[0] * scores.shape[1],
        unit,
        protected,
        n,
        budget,
        keep,
    )
    return keep


def choose_rows(scores: FloatArray, unit: IntArray, protected: BoolArray, n_keep: int) -> Rows:
    """Which rows each head keeps, the same number in all (see kvp_choose_rows).

    Args:
        scores: f32 [..., n], one leading index per head; larger = keep; what is not finite
            is dropped first.
        unit: int32 [..., n], ascending; rows with one number stay or go together. Only where
            nothing but units too large for the last rows is left is one of them cut.
        protected: bool [..., n]; a unit with a protected row stays.
        n_keep: rows to keep.

    Returns:
        int32 [..., n_keep], ascending. Equal scores favour the newer row.

    Raises:
        ValueError: more rows are protected than ``n_keep``, or ``n_keep`` exceeds n.
    """
    *heads, n = scores.shape
    scores = np.ascontiguousarray(scores, np.float32)
    unit = np.ascontiguousarray(unit, np.int32)
    flags = np.ascontiguousarray(protected, np.uint8)
    if unit.shape != scores.shape or flags.shape != scores.shape:
        raise ValueError(f"scores {scores.shape}, unit {unit.shape}, protected {flags.shape}")
    keep = np.empty((*heads, n_keep), np.int32)
    call(
        "kvp_choose_rows",
        scores,
        unit,
        flags,
        int(np.prod(heads)),
        n,
        n_keep,
        keep,
    )
    return keep
