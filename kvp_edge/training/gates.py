"""Retention gates, trained from traces (TRIM-KV, arXiv:2512.03324; DBTrimKV, arXiv:2605.09649).

A gate is the share beta of a token's use that remains after every later token
(kvp_edge.policies.retention). Attention a, multiplied by what remains, loses the mass a * (1 - beta
** age). Training minimises its upper bound a * -log(beta ** age), whose optimal beta ** age is
proportional to a; that of the mass itself is all or nothing. The hinge of 2605.09649 works against
it: it penalises what all gates of all heads together retain beyond ``capacity`` tokens per head.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kvp_edge.arrays import FloatArray
from kvp_edge.errors import TrainingError
from kvp_edge.policies.retention import BIAS
from kvp_edge.training.data import Protected, TraceLike, gather
from kvp_edge.training.settings import Importance

_TIMES = 12  # moments of a trace at which a step looks at what is retained


@dataclass(frozen=True)
class Lesson:
    """One trace of T tokens and N heads, for A agents.

    Attributes:
        features: f32 [A, 1, T, F], not standardised.
        wanted: f32 [N, T], see ``wanted``.
        times: int64 [M], tokens read at some moments, ascending.
    """

    features: Tensor
    wanted: Tensor
    times: Tensor

    def to(self, device: torch.device) -> Lesson:
        return Lesson(self.features.to(device), self.wanted.to(device), self.times.to(device))


def lesson(
    trace: TraceLike,
    index: int,
    importance: Importance,
    protected: Protected,
    rng: np.random.Generator,
    heads_each: int = 1,
) -> Lesson:
    """The training input of one trace; ``index`` names it in errors."""
    n_heads = trace.keys.shape[0] * trace.keys.shape[1]
    n = trace.keys.shape[2]
    agents = np.arange(n_heads // heads_each)
    features = gather(trace, np.arange(n), agents, index, heads_each)[:, None]
    least = protected.sinks + protected.recent + 1
    times = np.sort(rng.choice(np.arange(least, n), min(_TIMES, n - least), replace=False))
    paid = wanted(trace, index, importance, protected)
    return Lesson(torch.from_numpy(features), torch.from_numpy(paid), torch.from_numpy(times))


def wanted(
    trace: TraceLike, index: int, importance: Importance, protected: Protected
) -> FloatArray:
    """Attention that tokens receive when they are no longer protected, times their age then: f32
    [N, T]. Attention is brought to a sum of 1 per head, mean over heads: its scale is that of no
    head in particular, so that heads which receive more may retain more.

    Raises:
        TrainingError: the trace holds attention that is negative or not a number.
    """
    n_heads = trace.keys.shape[0] * trace.keys.shape[1]
    n = trace.keys.shape[2]
    total, aged = (np.zeros((n_heads, n), np.float32) for _ in range(2))
    for begin, paid in trace.payments():
        first, end = protected.competing(begin)
        if end <= first:
            continue
        flat = paid.reshape(n_heads, begin)[:, first:end]
        if not np.isfinite(flat).all() or (flat < 0).any():
            raise TrainingError(
                f"trace {index} has attention that is negative or not finite: record it again"
            )
        age = (begin - np.arange(first, end)).astype(np.float32)
        if importance == "sum":
            total[:, first:end] += flat
            aged[:, first:end] += flat * age
        else:  # the block that attends to a token most decides how long it must last
            most = flat > total[:, first:end]
            np.copyto(total[:, first:end], flat, where=most)
            np.copyto(aged[:, first:end], flat * age, where=most)
    aged *= n_heads / max(float(total.sum()), 1e-12)
    return aged


def log_beta(scores: Tensor) -> Tensor:
    """log of the share that is left after one token, from the gates' raw scores."""
    return F.logsigmoid(scores + BIAS)


def retention_loss(
    scores: Tensor,
    wanted: Tensor,
    times: Tensor,
    protected: Protected,
    capacity: float,
    weight: float,
) -> Tensor:
    """The loss: attention lost to decay, plus what is retained beyond the capacity.

    Args:
        scores: f32 [N, T], raw.
        wanted: f32 [N, T], see ``wanted``.
        times: int64 [M], numbers of tokens read.
        capacity: tokens per head that all heads together may retain, the protected ones included.
        weight: of the second part.

    Returns:
        f32 [].
    """
    n_heads, n = scores.shape
    decay = log_beta(scores)
    lost = -(decay * wanted).sum() / n_heads
    at = torch.arange(n, device=scores.device)
    excess = scores.new_zeros(())
    for t in times.tolist():
        first, end = protected.competing(t)
        left = (decay[:, first:end] * (t - at[first:end])).exp().sum() / n_heads
        excess = excess + F.relu(left + first + (t - end) - capacity) / t
    return lost + weight * excess / max(len(times), 1)
