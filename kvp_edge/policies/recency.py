"""Keep the newest tokens: with the protected sinks this is StreamingLLM (arXiv:2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvp_edge.arrays import FloatArray
from kvp_edge.policies.base import Policy
from kvp_edge.policies.view import CacheView


@dataclass(frozen=True)
class Recency(Policy):
    """score = position."""

    name = "recency"

    def score(self, view: CacheView) -> FloatArray:
        # exact in f32 up to position 2^24
        return np.broadcast_to(view.indices.astype(np.float32), view.shape)
