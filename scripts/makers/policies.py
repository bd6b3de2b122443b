"""Policies with random weights, of any shape."""

from __future__ import annotations

import numpy as np

from kvp_edge.arrays import FloatArray
from kvp_edge.policy_file import PolicyInfo, PolicyWeights, weight_shapes


def random_weights(info: PolicyInfo, seed: int = 0) -> PolicyWeights:
    """Weights as a policy file may hold them: without context there is no convolution."""
    rng = np.random.default_rng(seed)
    shapes = weight_shapes(info)
    arrays = {k: rng.normal(size=s).astype(np.float32) * 0.3 for k, s in shapes.items()}
    if info.context == 1:
        arrays["conv"][:] = 1
    # of as many numbers as the network of one head has, or scores would grow with the heads
    seen = np.float32((info.n_networks / info.n_head_kv) ** 0.5)
    arrays["key"], arrays["value"] = arrays["key"] * seen, arrays["value"] * seen
    return PolicyWeights(**{**arrays, "aggregate": np.abs(arrays["aggregate"])})


def random_sensitivity(info: PolicyInfo, seed: int = 0) -> FloatArray:
    """As a policy file may hold it beside its weights."""
    found = np.random.default_rng(seed).random((info.n_layer, info.n_head_kv), np.float32)
    return found / found.mean()
