"""Value range (VaSE, arXiv:2606.03928): tokens whose values reach far matter whoever attends."""

from __future__ import annotations

from kvp_edge.policies.base import FloatArray, IntArray, Policy


class ValueRange(Policy):
    """score = max_c v_c - min_c v_c over the channels c of a token's value.

    It is the part of VaSE that looks at the token alone. The paper keeps a share of the budget by
    it and draws the others by recent attention; here the whole budget is ranked by it.
    """

    name = "value-range"
    inputs = "keys+values"
    scope = "token"

    def score(self, keys: FloatArray, values: FloatArray, positions: IntArray) -> FloatArray:
        score: FloatArray = values.max(axis=-1) - values.min(axis=-1)
        return score
