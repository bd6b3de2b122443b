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


class NotedNoise(CacheNoise):
    """The same, and of every token its index in the conversation and how often it was scored: what
    it finds of a token at the next eviction must be that token's.

    Attributes:
        carried: of how many tokens something was found, at every scoring.
        most: how often one was scored.
    """

    scope = "history"
    score_shape = (3,)

    def __init__(self) -> None:
        self.carried: list[int] = []
        self.most = 0

    def score(self, view: CacheView) -> Any:
        held, m = np.broadcast_to(view.indices, view.shape), view.previous.shape[2]
        assert view.previous.shape == (*view.shape[:2], m, 3)
        np.testing.assert_array_equal(view.previous[..., 1], held[:, :, :m])
        times = np.ones(view.shape, np.float32)
        times[:, :, :m] += view.previous[..., 2]
        self.carried.append(m)
        self.most = max(self.most, int(times.max()))
        return np.stack((super().score(view), held, times), axis=-1).astype(np.float32)

    def worth(self, scores: Any, ages: Any) -> Any:
        assert scores.shape[3:] == (3,)
        return scores[..., 0]
