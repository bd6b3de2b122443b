"""K-norm (Devoto et al., arXiv:2406.11430, section 3): keys of small norm attract attention."""

from __future__ import annotations

import numpy as np

from kvp_edge.arrays import FloatArray, IntArray
from kvp_edge.policies.base import Policy


class KNorm(Policy):
    """score = -||k||."""

    name = "knorm"
    inputs = "keys"
    native_scorer = "knorm"

    def score(self, keys: FloatArray, values: FloatArray, indices: IntArray) -> FloatArray:
        norm: FloatArray = np.linalg.norm(keys, axis=-1)
        return -norm
