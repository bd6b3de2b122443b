"""TOVA (Oren et al., arXiv:2401.06104): keep what the newest query attends to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvp_edge.arrays import FloatArray
from kvp_edge.policies.base import Policy
from kvp_edge.policies.view import CacheView


@dataclass(frozen=True)
class TOVA(Policy):
    """score = mean over ALL query heads of the layer of the newest query's attention (section 3.2).

    All KV heads of a layer get the same scores, so they keep the same tokens, also at head
    granularity. The paper drops one token for each that is read; here evictions come in batches.
    """

    name = "tova"
    scope = "cache"
    n_queries = 1

    def score(self, view: CacheView) -> FloatArray:
        score = np.zeros(view.shape, np.float32)
        newest = view.queries(1)
        if len(newest):
            score[:] = view.attention(newest).mean(axis=1, keepdims=True)
        return score
