"""Keep tokens at random: the control that any other policy has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvp_edge.arrays import FloatArray
from kvp_edge.policies.base import Policy
from kvp_edge.policies.view import CacheView


@dataclass(frozen=True)
class Random(Policy):
    """A score drawn once for each position, the same in all heads, from ``seed``.

    It is a hash of (seed, position) rather than a stream of random numbers, so that a token has the
    same score however often and in whatever order tokens are scored: rewinding repeats itself.
    """

    name = "random"
    seed: int = 0

    def score(self, view: CacheView) -> FloatArray:
        # SplitMix64 (Steele, Lea, Flood 2014), wrapping on purpose
        with np.errstate(over="ignore"):
            x = view.indices.astype(np.uint64) + np.uint64(self.seed % 2**32) * np.uint64(2**32)
            x += np.uint64(0x9E3779B97F4A7C15)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x ^= x >> np.uint64(31)
        uniform = (x >> np.uint64(40)).astype(np.float32) / np.float32(2**24)
        return np.broadcast_to(uniform, view.shape)
