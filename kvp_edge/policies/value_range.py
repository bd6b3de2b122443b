"""Value range (VaSE, arXiv:2606.03928): tokens whose values reach far matter whoever attends."""

from __future__ import annotations

from dataclasses import dataclass

from kvp_edge.arrays import FloatArray
from kvp_edge.binding import rules
from kvp_edge.policies.base import Policy
from kvp_edge.policies.view import CacheView


@dataclass(frozen=True)
class ValueRange(Policy):
    """score = max_c v_c - min_c v_c over the channels c of a token's value.

    It is the part of VaSE that looks at the token alone. The paper keeps a share of the budget by
    it and draws the others by recent attention; here the whole budget is ranked by it.
    """

    name = "value-range"

    def score(self, view: CacheView) -> FloatArray:
        return view.apply(rules.Range(), _score)


def _score(view: CacheView) -> FloatArray:
    values = view.values()
    score: FloatArray = values.max(axis=-1) - values.min(axis=-1)
    return score
