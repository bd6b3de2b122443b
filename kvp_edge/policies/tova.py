"""TOVA (Oren et al., arXiv:2401.06104): keep what the newest query attends to."""

from __future__ import annotations

import numpy as np

from kvp_edge.policies.attention import attention
from kvp_edge.policies.base import FloatArray, IntArray, Policy


class TOVA(Policy):
    """score = mean over ALL query heads of the layer of the newest query's attention (section 3.2).

    All KV heads of a layer get the same scores, so they keep the same tokens, also at head
    granularity. The paper drops one token for each that is read; here evictions come in batches.
    """

    name = "tova"
    inputs = "keys"
    scope = "cache"
    queries = 1

    def score(self, keys: FloatArray, values: FloatArray, positions: IntArray) -> FloatArray:
        score = np.zeros(keys.shape[:3], np.float32)
        logged = self.logged()
        if len(logged):
            for layer, paid in enumerate(attention(logged, keys, positions)):
                score[layer] = paid[:, :, -1].mean(axis=(0, 1))
        return score
