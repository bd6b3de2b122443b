"""The ceiling: policies that have read what will be asked and know which tokens the reply needs."""

from __future__ import annotations

import numpy as np

from kvp_edge.arrays import FloatArray
from kvp_edge.policies import CacheView, Policy
from kvp_edge.traces.format import Trace


class Oracle(Policy):
    """Keeps what the rest of the conversation will attend to, taken from a trace of all of it.

    score = trace.importance(n): the attention that every later query of the traced run paid to the
    token, the largest of the group's query heads (arXiv:2602.10238), where n tokens have been read
    at the moment of the eviction. The trace was made with nothing evicted. With ``peak`` it is
    trace.peak(n), the most that any one block of those queries paid: the golden eviction of
    ForesightKV (arXiv:2602.03203, section 3), but with the trace's blocks instead of 256 queries,
    and with the largest of a group instead of its mean.

    A trace answers for the borders between its blocks. n is rounded up to the next one, so up to a
    block of queries is left out; after the last border it is rounded down to it, and the tokens
    from there on, newer than all others, score above them. So do those behind its end. Where the
    replies read are not those of the trace (a smaller cache may write others), tokens and queries
    behind them are matched by their positions, and are a few tokens off if the lengths differ; what
    was told before the first question is not touched by that.

    Args:
        trace: the whole conversation, the replies included, by the model that will read it.
        peak: see above.

    Raises:
        ValueError: a trace of one block, which no query comes after.
    """

    name = "oracle"
    scope = "cache"

    def __init__(self, trace: Trace, *, peak: bool = False) -> None:
        if len(trace.splits) == 0:
            raise ValueError(
                f"a trace of {len(trace)} tokens in one block of queries does not say what came "
                "after an eviction: trace with smaller blocks"
            )
        self._trace = trace
        self._wanted = trace.peak if peak else trace.importance
        self._measure = "peak" if peak else "sum"

    def identity(self) -> str:
        return f"{self.name}({self._trace.source}, {self._measure})"

    def score(self, view: CacheView) -> FloatArray:
        held = np.broadcast_to(view.indices, view.shape).astype(np.int64)
        newest = int(held.max())
        n = min(newest + 1, int(self._trace.splits[-1]))
        importance = self._wanted(n)
        unknown = np.full((*importance.shape[:2], newest + 1 - n), importance.max() + 1)
        known = np.concatenate((importance, unknown), axis=2).astype(np.float32)
        score: FloatArray = np.take_along_axis(known, held, axis=2)
        return score
