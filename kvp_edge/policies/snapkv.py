"""SnapKV (Li et al., arXiv:2404.14469): keep what the newest queries attend to, and around it."""

from __future__ import annotations

import numpy as np

from kvp_edge.arrays import FloatArray, IntArray
from kvp_edge.policies.attention import ByAttention, Pays


class SnapKV(ByAttention):
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
    queries = 32

    def __init__(self, window: int = queries, kernel: int = 5) -> None:
        if window < 1 or kernel % 2 == 0:
            raise ValueError(f"SnapKV needs a window >= 1 and an odd kernel: {window}, {kernel}")
        self.queries = window
        self.kernel = kernel

    def identity(self) -> str:
        return f"{self.name}(window={self.queries}, kernel={self.kernel})"

    def score_paid(self, pays: Pays, indices: IntArray) -> FloatArray:
        logged = self.logged()
        if len(logged) == 0:
            return np.zeros(indices.shape, np.float32)
        score = pays(logged) / np.float32(len(logged))
        # the window's tokens are none of the pooled ones' neighbours
        inside = indices >= logged.indices[0]
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
