"""Which numbers of a trace count as the importance of its tokens (Settings.importance)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kvp_edge.arrays import FloatArray, IntArray
from kvp_edge.errors import TrainingError
from kvp_edge.traces.labels import NEAR
from kvp_edge.training.data import Protected, TraceLike, TraceSetLike
from kvp_edge.training.settings import LABELLED, importance_parts

_TINY = 1e-12


@dataclass(frozen=True)
class _Judged:
    """A trace (kvp_edge.traces.format.Trace) whose importance is that of its ``parts``."""

    trace: Any
    parts: tuple[str, ...]
    protected: Protected

    def __getattr__(self, name: str) -> Any:
        return getattr(self.trace, name)

    @property
    def splits(self) -> IntArray:
        """Labels do not depend on the cut, so that a trace that needs nothing else can be cut
        anywhere; where the rest of the text asks, at the borders of its pieces."""
        if not set(self.parts) <= LABELLED.keys():
            splits: IntArray = self.trace.splits
            return splits
        n = self.trace.keys.shape[2]
        if "later" in self.parts:
            return np.arange(NEAR, n, NEAR, dtype=np.int32)
        return np.arange(1, n + 1, dtype=np.int32)

    def importance(self, n: int) -> FloatArray:
        if len(self.parts) == 1:
            return self._part(self.parts[0], n)
        first, end = self.protected.competing(n)
        total = np.zeros((*self.trace.keys.shape[:2], n), np.float32)
        for name in self.parts:
            part = self._part(name, n)
            mean = part[:, :, first:end].mean(axis=-1, keepdims=True)
            # no mean is 0 unless all are
            total += part / np.maximum(mean, _TINY)
        return total

    def _part(self, name: str, n: int) -> FloatArray:
        if name in LABELLED:
            label = getattr(self.trace, name, None)
            if label is None:
                raise TrainingError(
                    f"the traces do not say which tokens are {name}: record them with kvp-edge "
                    f"trace --future {LABELLED[name]}, or choose --importance sum or peak"
                )
            found: FloatArray = self.trace.asked_later(n) if name == "later" else label[:, :, :n]
            norms = np.linalg.norm(self.trace.values[:, :, :n].astype(np.float32), axis=-1)
            found = found.astype(np.float32) * norms
            return found
        part: FloatArray = self.trace.importance(n) if name == "sum" else self.trace.peak(n)
        return part


class Judged:
    """Traces by another importance than the attention of all later queries.

    Args:
        importance: see Settings.
        protected: the tokens that do not compete; only the others count where several importances
            are brought to one scale.

    Raises:
        TrainingError: (on access) a trace lacks a label.
    """

    def __init__(self, traces: TraceSetLike, importance: str, protected: Protected) -> None:
        self._traces = traces
        self._parts, self._protected = importance_parts(importance), protected
        self.model = getattr(traces, "model", None)

    def __len__(self) -> int:
        return len(self._traces)

    def __getitem__(self, index: int, /) -> TraceLike:
        trace: TraceLike = _Judged(self._traces[index], self._parts, self._protected)
        return trace


def loss_unit(trace: TraceLike, n: int, protected: Protected) -> int:
    """What a loss of importance, summed over tokens, is divided by to compare states: the later
    queries, which pay a sum or a peak; the competing tokens, where labels are part of it."""
    if isinstance(trace, _Judged) and set(trace.parts) & LABELLED.keys():
        first, end = protected.competing(n)
        return max(1, end - first)
    return int(trace.keys.shape[2]) - n
