"""Ageing: in some heads recent tokens are worth more than old ones like them.

A learned score depends on a token and its neighbours, whenever it is asked for. Attention does not:
most heads look at what was said lately more often. A head's rate says how much of a score fades
while the age of a token doubles; 0: nothing.
"""

from __future__ import annotations

import numpy as np

from kvp_edge.arrays import FloatArray, IntArray

#: The age at which one doubling has passed. Younger tokens hardly age; they are protected anyway.
YOUNG = 32


def faded(scores: FloatArray, ages: IntArray, rates: FloatArray) -> FloatArray:
    """The worth of tokens: scores - rate * log2(1 + age / YOUNG).

    Args:
        scores: f32 [n_layer, n_head_kv, n].
        ages: int32, broadcast to that: tokens read since, the token itself included.
        rates: f32 [n_layer, n_head_kv].
    """
    doublings = np.log2(1 + ages.astype(np.float32) / np.float32(YOUNG))
    worth: FloatArray = scores - rates[:, :, None] * doublings
    return worth
