"""Keep the newest tokens: with the protected sinks this is StreamingLLM (arXiv:2309.17453)."""

from __future__ import annotations

import numpy as np

from kvp_edge.arrays import FloatArray, IntArray
from kvp_edge.policies.base import Policy


class Recency(Policy):
    """score = position."""

    name = "recency"
    inputs = "indices"

    def score(self, keys: FloatArray, values: FloatArray, indices: IntArray) -> FloatArray:
        # exact in f32 up to position 2^24
        return np.broadcast_to(indices.astype(np.float32), (*keys.shape[:2], len(indices)))
