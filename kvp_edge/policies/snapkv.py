"""SnapKV (Li et al., arXiv:2404.14469): keep what the newest queries attend to, and around it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvp_edge.arrays import FloatArray
from kvp_edge.errors import PolicyError
from kvp_edge.policies.base import Policy
from kvp_edge.policies.view import CacheView


@dataclass(frozen=True)
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
    scope = "cache"
    window: int = 32
    kernel: int = 5

    def __post_init__(self) -> None:
        if self.window < 1 or self.kernel % 2 == 0:
            raise PolicyError(
                f"SnapKV needs window >= 1 and an odd kernel, not {self.window}, {self.kernel}"
            )

    @property
    def n_queries(self) -> int:
        return self.window

    def score(self, view: CacheView) -> FloatArray:
        queries = view.queries(self.window)
        if len(queries) == 0:
            return np.zeros(view.shape, np.float32)
        score = view.attention(queries) / np.float32(len(queries))
        # the window's tokens are none of the pooled ones' neighbours
        inside = np.broadcast_to(view.indices, view.shape) >= queries.indices[0]
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
