"""Policies with random weights, of any shape."""

from __future__ import annotations

import numpy as np

from kvp_edge.policy_file import PolicyInfo, PolicyWeights, weight_shapes


def random_weights(info: PolicyInfo, seed: int = 0) -> PolicyWeights:
    """Weights as a policy file may hold them: without context there is no convolution."""
    rng = np.random.default_rng(seed)
    shapes = weight_shapes(info)
    arrays = {k: rng.normal(size=s).astype(np.float32) * 0.3 for k, s in shapes.items()}
    if info.context == 1:
        arrays["conv"][:] = 1
    return PolicyWeights(**{**arrays, "aggregate": np.abs(arrays["aggregate"])})
