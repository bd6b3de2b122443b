"""Policies whose scores are noise: of the seed, or of the cache's own numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvp_edge import Policy


class Noise(Policy):
    """Scores that differ in every head and at every token, so that heads choose differently."""

    name = "noise"
    inputs = "indices"

    def score(self, keys: Any, values: Any, positions: Any) -> Any:
        rng = [np.random.default_rng(int(p)) for p in positions]
        scores = np.stack([r.random(keys.shape[:2]) for r in rng], axis=-1)
        return scores.astype(np.float32)


class CacheNoise(Noise):
    """The same from true positions by head, asked anew at every eviction."""

    scope = "cache"

    def score(self, keys: Any, values: Any, positions: Any) -> Any:
        by_head = np.broadcast_to(positions, keys.shape[:3])
        heads = np.arange(keys.shape[0] * keys.shape[1]).reshape(*keys.shape[:2], 1)
        x = by_head.astype(np.uint64) * np.uint64(2654435761) + heads.astype(np.uint64) * 40503
        return ((x >> np.uint64(7)) % 1009).astype(np.float32)
