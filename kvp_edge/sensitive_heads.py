"""What the relative sensitivities of a model's heads say (kvp_edge.training.sensitivity measures
them, and policy files hold them)."""

from __future__ import annotations

import numpy as np

from kvp_edge.arrays import FloatArray


def heads_with_half(weights: FloatArray) -> int:
    """How many heads, the heaviest first, carry half of the loss together.

    Args:
        weights: f32 [n_layer, n_head_kv], at least 0, not all 0.
    """
    heaviest = np.sort(weights, axis=None)[::-1].astype(np.float64)
    return int(np.searchsorted(heaviest.cumsum(), heaviest.sum() / 2) + 1)


def in_words(weights: FloatArray) -> str:
    """How uneven they are, and which head is the heaviest.

    Args:
        weights: f32 [n_layer, n_head_kv], at least 0, with mean 1.
    """
    layer, head = np.unravel_index(int(weights.argmax()), weights.shape)
    return (
        f"{heads_with_half(weights)} of {weights.size} carry half of the loss; most is head {head} "
        f"of layer {layer}, {weights.max():.1f} times the mean"
    )


def by_layer(weights: FloatArray) -> str:
    """The mean of every layer, from the first on."""
    return " ".join(f"{mean:.1f}" for mean in weights.mean(axis=1))
