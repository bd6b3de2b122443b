"""LazyEviction (Zhang et al., arXiv:2506.15969): keep what comes back, as long as it may."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from kvp_edge.arrays import BoolArray, FloatArray, IntArray
from kvp_edge.errors import PolicyError
from kvp_edge.policies.base import EVERY_QUERY, Policy
from kvp_edge.policies.query_attention import largest_attention
from kvp_edge.policies.view import CacheView

_LAST, _LONGEST = 0, 1  # of the numbers that a token has


@dataclass(frozen=True)
class LazyEviction(Policy):
    """A token that was looked at again after a while may be looked at again after as long.

    Two numbers are kept of every token: ``last``, the query that last paid it at least
    ``threshold`` attention (before any did, the token itself), and ``longest``, the
    largest number of queries from one such to the next, 0 before the second. At an eviction, the
    newest query being number t,

        h1 = 2 sigmoid(-(t - last) / longest)     it is not overdue yet
        h2 = 2 sigmoid(-1 / longest)              it comes back after long pauses
        score = h1 * h2, or h1 + h2

    and both are 0 with ``longest`` = 0. So tokens that never came back rank last, and among
    themselves by age, as equal scores favour the newer.

    What the paper leaves open, or does differently:

    - How h1 and h2 go together was not found. "product", the default, lets go of what is long
      overdue; with "sum" a single long pause keeps a token for good.
    - The paper's window W, which says how often tokens are dropped and how many of the newest stay,
      is ``reserve`` and ``recent`` here. Between two evictions nothing is dropped and every query
      is counted, those of the prompt too.
    - Of a KV head's query heads the largest attention counts. The paper lets every query head keep
      its own tokens, which takes as many times the memory.
    - 1e-4 is for caches of thousands of tokens. Of 100 tokens nearly all get that much from every
      query, and all come back after 1; a threshold near the mean, 1 / tokens held, tells more.

    Going back forgets no pause; a token that was last looked at by a query that is withdrawn counts
    as looked at by the last one that stays. Queries that were not logged (of more tokens than the
    cache has cells, or from before positions were compacted) are not counted.

    Args:
        threshold: attention, as a share of a query's.
        combine: see above.
    """

    name = "lazy-eviction"
    scope = "history"
    score_shape = (2,)
    n_queries = EVERY_QUERY
    threshold: float = 1e-4
    combine: Literal["product", "sum"] = "product"

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise PolicyError(
                f"LazyEviction's threshold is more than 0 and at most 1, not {self.threshold}"
            )
        if self.combine not in ("product", "sum"):
            raise PolicyError(f"LazyEviction's combine is product or sum, not {self.combine!r}")

    def score(self, view: CacheView) -> FloatArray:
        """f32 [n_layer, n_head_kv, n, 2]: how many tokens after the token itself ``last`` is, and
        ``longest``."""
        held = np.broadcast_to(view.indices, view.shape)
        noted = view.noted(self.score_shape).astype(np.int32)
        last, longest = held + noted[..., _LAST], noted[..., _LONGEST]
        queries = view.queries(view.shape[2] - view.previous.shape[2])
        if len(queries):
            stays = queries.indices[0] - 1
            np.minimum(last, np.maximum(held, stays), out=last)  # others were withdrawn
            for layer, some, paid in largest_attention(queries, view.keys(), view.indices):
                last[layer], longest[layer] = came_back(
                    last[layer], longest[layer], some, paid >= np.float32(self.threshold)
                )
        return np.stack((last - held, longest), axis=-1).astype(np.float32)

    def worth(self, scores: FloatArray, ages: IntArray) -> FloatArray:
        longest = scores[..., _LONGEST]
        since: FloatArray = np.maximum(ages.astype(np.float32) - 1 - scores[..., _LAST], 0)
        comes = longest > 0
        pause: FloatArray = np.where(comes, longest, np.float32(1))
        h1, h2 = _twice_sigmoid(since / pause), _twice_sigmoid(np.float32(1) / pause)
        both = h1 * h2 if self.combine == "product" else h1 + h2
        return np.where(comes, both, 0).astype(np.float32)


def came_back(
    last: IntArray, longest: IntArray, queries: IntArray, looked: BoolArray
) -> tuple[IntArray, IntArray]:
    """``last`` and ``longest`` after some more queries.

    Args:
        last, longest: int32 [..., n].
        queries: int32 [m], their indices, ascending.
        looked: bool [..., m, n], which of them paid a token enough.
    """
    when = np.where(looked, queries[:, None], -1)
    latest = np.maximum.accumulate(np.concatenate((last[..., None, :], when), axis=-2), axis=-2)
    pauses = np.where(looked, queries[:, None] - latest[..., :-1, :], 0)
    return latest[..., -1, :], np.maximum(longest, pauses.max(axis=-2))


def _twice_sigmoid(x: FloatArray) -> FloatArray:
    """2 sigmoid(-x) for x >= 0: from 1 down to 0."""
    e = np.exp(-x)
    twice: FloatArray = 2 * e / (1 + e)
    return twice
