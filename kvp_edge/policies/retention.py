"""Geometric retention: what a gate's score says about a token that came in some time ago.

A gate (TRIM-KV, arXiv:2512.03324; Make Each Token Count, arXiv:2605.09649) gives a token, once and
for all, the share beta of its use that is left after every later token. What is left over the
tokens to come, the mean of beta ** age, stands for how much the token will still be used, and is
comparable across layers and heads: gates are trained together, for one global capacity.
"""

from __future__ import annotations

import numpy as np

from kvp_edge.arrays import FloatArray, IntArray

#: log beta = log sigmoid(score + BIAS), so that a gate that has learned nothing keeps half of a
#: token's use for about 280 tokens. (2512.03324 starts near "for ever" and finds 0 far too short.)
BIAS = 6.0


def log_future_use(scores: FloatArray, ages: IntArray, horizon: int) -> FloatArray:
    """log of the mean of beta ** s over s = age, age + 1, ..., age + horizon - 1.

    The code of 2605.09649 looks one token ahead, which counts a token that came in just now and
    fades soon as much as one that will last; the paper's sum tells them apart. (The mean orders
    like the sum, and near 0 float32 still tells apart tokens that hardly fade at all.)

    Args:
        scores: f32 [..., n], the gates' raw scores.
        ages: int32, broadcast to that: tokens read since, the token itself included (1 for the
            newest).
        horizon: tokens to come, at least 1.

    Returns:
        f32 [..., n], at most 0.
    """
    log_beta = -np.logaddexp(0.0, -(scores.astype(np.float64) + BIAS))
    log_beta = np.minimum(log_beta, -1e-12)  # the geometric sum divides by 1 - beta
    mean = np.log(np.expm1(log_beta * horizon) / np.expm1(log_beta) / horizon)
    out: FloatArray = (log_beta * ages + mean).astype(np.float32)
    return out


def log_total(log_use: FloatArray) -> FloatArray:
    """Of whole tokens: log of the sum over all heads, f32 [n] from [..., n]."""
    flat = log_use.reshape(-1, log_use.shape[-1]).astype(np.float64)
    total: FloatArray = np.logaddexp.reduce(flat, axis=0).astype(np.float32)
    return total
