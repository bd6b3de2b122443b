"""Oracles: policies that have read the question and the reply and know the tokens these need."""

from __future__ import annotations

import numpy as np

from kvp_edge.arrays import FloatArray
from kvp_edge.policies import CacheView, Policy
from kvp_edge.traces.format import Trace


class Oracle(Policy):
    """Keeps what the rest of the conversation will attend to, by a trace of all of it.

    score = trace.importance(n), for an eviction after n tokens: the attention mass that the token
    receives from all later queries of the traced run, the largest of the group's query heads
    (arXiv:2602.10238). Nothing was evicted in the traced run. With ``peak`` it is trace.peak(n),
    the largest mass from one block of those queries: golden eviction in ForesightKV
    (arXiv:2602.03203, section 3), but with the trace's blocks instead of 256 queries, and the
    largest of a group instead of its mean.

    A trace is exact at the borders between its blocks. n is rounded up to the next border, which
    leaves out up to a block of queries. After the last border it is rounded down, and the tokens
    from there on, being the newest, score above all others, like those beyond the trace's end. If
    the replies differ from the trace's (a smaller cache may write others), later tokens and queries
    are matched by index, and are a few tokens off if the lengths differ. Text before the first
    question is not affected.

    Args:
        trace: the whole conversation, the replies included, by the model that will read it.
        peak: see above.

    Raises:
        ValueError: the trace has one block, with no queries after it.
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
