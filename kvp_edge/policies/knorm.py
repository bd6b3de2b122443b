"""K-norm (Devoto et al., arXiv:2406.11430, section 3): keys of small norm attract attention."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvp_edge.arrays import FloatArray
from kvp_edge.binding import rules
from kvp_edge.policies.base import Policy
from kvp_edge.policies.view import CacheView


@dataclass(frozen=True)
class KNorm(Policy):
    """score = -||k||."""

    name = "knorm"

    def score(self, view: CacheView) -> FloatArray:
        return view.apply(rules.KNorm(), _score)


def _score(view: CacheView) -> FloatArray:
    norm: FloatArray = np.linalg.norm(view.keys(), axis=-1)
    return -norm
