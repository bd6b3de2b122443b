"""TOVA (Oren et al., arXiv:2401.06104): keep what the newest query attends to."""

from __future__ import annotations

import numpy as np

from kvp_edge.arrays import FloatArray, IntArray
from kvp_edge.policies.attention import ByAttention, Pays


class TOVA(ByAttention):
    """score = mean over ALL query heads of the layer of the newest query's attention (section 3.2).

    All KV heads of a layer get the same scores, so they keep the same tokens, also at head
    granularity. The paper drops one token for each that is read; here evictions come in batches.
    """

    name = "tova"
    queries = 1

    def score_paid(self, pays: Pays, indices: IntArray) -> FloatArray:
        score = np.zeros(indices.shape, np.float32)
        newest = self.logged()[-1:]
        if len(newest):
            score[:] = pays(newest).mean(axis=1, keepdims=True)
        return score
