"""What the newest queries paid to each token, as inputs of a learned scorer.

ForesightKV (arXiv:2602.03203, section 3) gives its scorer, beside key and value, statistics of the
attention of several windows of queries, for every query head. Here they are of the largest
attention in a KV head's query group, as everywhere in training, and of two windows: docs/
policy-format.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvp_edge.arrays import FloatArray, IntArray
from kvp_edge.policies.attention import attention
from kvp_edge.policy_file import N_STATISTICS

if TYPE_CHECKING:
    from kvp_edge.binding.queries import Queries

_FLOOR = 1e-4  # less attention than this is none


def windows(window: int) -> tuple[int, int]:
    """How many of the newest queries each statistic is of: all of the window, and half of it."""
    return window, window // 2


def log_attention(paid: npt.NDArray[np.floating[Any]]) -> FloatArray:
    """The statistic made of the mean over queries of the largest attention in the group."""
    out: FloatArray = np.log(np.float32(_FLOOR) + paid.astype(np.float32))
    return out


def attention_statistics(
    queries: Queries, keys: FloatArray, indices: IntArray, window: int
) -> FloatArray:
    """The statistics of the tokens held now, from logged queries.

    Where there are fewer queries than in a window, the mean is over those; without any, no token
    was paid anything.

    Args:
        queries: the newest, up to ``window``.
        keys: f32 [n_layer, n_head_kv, n, head_size_k], RoPE included.
        indices: int32 [n] or [n_layer, n_head_kv, n].

    Returns:
        f32 [n_layer, n_head_kv, n, 2].
    """
    paid = np.zeros((*keys.shape[:3], N_STATISTICS), np.float32)
    if len(queries):
        for layer, of_group in enumerate(attention(queries, keys, indices)):
            largest = of_group.max(axis=1)
            for i, newest in enumerate(windows(window)):
                paid[layer, :, :, i] = largest[:, -newest:].mean(axis=1)
    return log_attention(paid)
