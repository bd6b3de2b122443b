"""How close two rows of logits are, and have to be."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

EXACT = 3e-4
"""f32 without flash attention; measured: below 1e-4."""
HALF = 0.02
"""f16, and f32 under flash attention, which attends in f16; measured: below 0.01."""
GPU = 0.05
"""f32 on a GPU, which rounds the factors of matrix products to f16; measured: below 0.03."""


def difference(got: NDArray[np.float32], want: NDArray[np.float32]) -> float:
    return float(np.abs(got - want).max() / want.std())
