"""SnapKV (Li et al., arXiv:2404.14469): keep what the newest queries attend to, and around it."""

from __future__ import annotations

import numpy as np

from kvp_edge.policies.attention import attention
from kvp_edge.policies.base import FloatArray, IntArray, Policy


class SnapKV(Policy):
    """The attention of the newest ``window`` queries, pooled over neighbours (section 4):

        score = mean over the group's query heads of avg_pool(mean over the window of attention)

    The window's own tokens score above all others. As in the originals' pooling, the two ends are
    averaged with zeros. The paper chooses once, after the prompt; here every eviction does, with
    the queries that came last before it.

    A window reaches back over the last eviction if fewer tokens were read since; its older queries
    then attend to what is left of what they saw. Right after going back further than the window
    there is no query, and the newest tokens stay.
    """

    name = "snapkv"
    inputs = "keys"
    scope = "cache"
    queries = 32

    def __init__(self, window: int = queries, kernel: int = 5) -> None:
        if window < 1 or kernel % 2 == 0:
            raise ValueError(f"SnapKV needs a window >= 1 and an odd kernel: {window}, {kernel}")
        self.queries = window
        self.kernel = kernel

    def identity(self) -> str:
        return f"{self.name}(window={self.queries}, kernel={self.kernel})"

    def score(self, keys: FloatArray, values: FloatArray, positions: IntArray) -> FloatArray:
        score = np.zeros(keys.shape[:3], np.float32)
        logged = self.logged()
        if len(logged) == 0:
            return score
        for layer, paid in enumerate(attention(logged, keys, positions)):
            score[layer] = paid.mean(axis=(1, 2))
        # the window's tokens are none of the pooled ones' neighbours
        inside = np.broadcast_to(positions >= logged.positions[0], score.shape)
        pooled = _avg_pool(np.where(inside, 0, score), self.kernel)
        pooled[inside] = pooled.max(initial=0) + 1
        return pooled


def _avg_pool(x: FloatArray, kernel: int) -> FloatArray:
    """The mean of ``kernel`` neighbours along the last axis, zeros beyond the ends."""
    half = kernel // 2
    n = x.shape[-1]
    padded = np.pad(x, [*[(0, 0)] * (x.ndim - 1), (half, half)])
    pooled: FloatArray = np.zeros_like(x)
    for i in range(kernel):
        pooled += padded[..., i : i + n]
    return pooled / np.float32(kernel)
