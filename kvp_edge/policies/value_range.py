"""Value range (VaSE, arXiv:2606.03928): tokens whose values reach far matter whoever attends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvp_edge.arrays import FloatArray, IntArray
from kvp_edge.policies.base import Policy

if TYPE_CHECKING:
    from kvp_edge.binding.cache import NativeCache


class ValueRange(Policy):
    """score = max_c v_c - min_c v_c over the channels c of a token's value.

    It is the part of VaSE that looks at the token alone. The paper keeps a share of the budget by
    it and draws the others by recent attention; here the whole budget is ranked by it.
    """

    name = "value-range"
    inputs = "keys+values"
    scope = "token"

    def score(self, keys: FloatArray, values: FloatArray, indices: IntArray) -> FloatArray:
        score: FloatArray = values.max(axis=-1) - values.min(axis=-1)
        return score

    def score_in_place(self, cache: NativeCache, p0: int, p1: int, indices: IntArray) -> FloatArray:
        return cache.score_range(p0, p1, indices.shape[-1])
