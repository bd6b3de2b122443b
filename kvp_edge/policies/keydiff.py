"""KeyDiff (Park et al., arXiv:2504.15364, section 3): keep the keys least like the average key."""

from __future__ import annotations

import numpy as np

from kvp_edge.arrays import FloatArray, IntArray
from kvp_edge.policies.base import Policy

_TINY = 1e-12  # a zero key has no direction


class KeyDiff(Policy):
    """score = -cos(k_i, mean_j k_j / ||k_j||), the mean over all tokens held."""

    name = "keydiff"
    inputs = "keys"
    scope = "cache"
    native_scorer = "keydiff"

    def score(self, keys: FloatArray, values: FloatArray, indices: IntArray) -> FloatArray:
        unit = keys / np.maximum(np.linalg.norm(keys, axis=-1, keepdims=True), _TINY)
        anchor = unit.mean(axis=2, keepdims=True)
        cosine = (unit * anchor).sum(-1) / np.maximum(np.linalg.norm(anchor, axis=-1), _TINY)
        score: FloatArray = -cosine.astype(np.float32)
        return score
