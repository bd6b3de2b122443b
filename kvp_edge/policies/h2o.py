"""H2O (Zhang et al., arXiv:2306.14048): keep the heavy hitters, much attended to so far."""

from __future__ import annotations

from dataclasses import dataclass

from kvp_edge.arrays import FloatArray
from kvp_edge.policies.base import EVERY_QUERY, Policy
from kvp_edge.policies.view import CacheView


@dataclass(frozen=True)
class H2O(Policy):
    """score = sum over all queries so far of the attention they paid to the token (section 4),
    mean over the group's query heads.

    Nothing is dropped between two evictions, so the queries since the last one saw exactly the
    tokens that are held: at each eviction their attention is added to the scores of before. A query
    counts once, with the tokens that were there in its time, as in the paper, which adds it up
    while it is computed. Older tokens have been seen by more queries; the recent window that the
    paper adds against that is the one that every policy has here.

    A conversation that goes back keeps what the withdrawn queries had paid before the last eviction
    to tokens that stay.
    """

    name = "h2o"
    scope = "history"
    n_queries = EVERY_QUERY

    def score(self, view: CacheView) -> FloatArray:
        score = view.noted()
        new = view.queries(view.shape[2] - view.previous.shape[2])
        return score + view.attention(new) if len(new) else score
