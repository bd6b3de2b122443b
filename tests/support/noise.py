"""Policies whose scores are noise: of the seed, or of the cache's own numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvp_edge import Policy
from kvp_edge.policies import CacheView


class Noise(Policy):
    """Scores that differ in every head and at every token, so that heads choose differently."""

    name = "noise"

    def score(self, view: CacheView) -> Any:
        rng = [np.random.default_rng(int(p)) for p in view.indices]
        scores = np.stack([r.random(view.shape[:2]) for r in rng], axis=-1)
        return scores.astype(np.float32)


class CacheNoise(Noise):
    """The same from true positions by head, asked anew at every eviction."""

    scope = "cache"

    def score(self, view: CacheView) -> Any:
        by_head = np.broadcast_to(view.indices, view.shape)
        heads = np.arange(view.shape[0] * view.shape[1]).reshape(*view.shape[:2], 1)
        x = by_head.astype(np.uint64) * np.uint64(2654435761) + heads.astype(np.uint64) * 40503
        return ((x >> np.uint64(7)) % 1009).astype(np.float32)
