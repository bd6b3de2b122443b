"""KeyDiff (Park et al., arXiv:2504.15364, section 3): keep the keys least like the average key."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvp_edge.arrays import FloatArray
from kvp_edge.binding import rules
from kvp_edge.policies.base import Policy
from kvp_edge.policies.view import CacheView

_TINY = 1e-12  # a zero key has no direction


@dataclass(frozen=True)
class KeyDiff(Policy):
    """score = -cos(k_i, mean_j k_j / ||k_j||), the mean over all tokens held."""

    name = "keydiff"
    scope = "cache"

    def score(self, view: CacheView) -> FloatArray:
        return view.apply(rules.KeyDiff(), _score)


def _score(view: CacheView) -> FloatArray:
    keys = view.keys()
    unit = keys / np.maximum(np.linalg.norm(keys, axis=-1, keepdims=True), _TINY)
    anchor = unit.mean(axis=2, keepdims=True)
    cosine = (unit * anchor).sum(-1) / np.maximum(np.linalg.norm(anchor, axis=-1), _TINY)
    score: FloatArray = -cosine.astype(np.float32)
    return score
