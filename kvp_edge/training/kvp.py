"""The KVP objective (Moschella et al., arXiv:2602.10238, sections 3.1 and 3.1.1).

A policy is a Plackett-Luce distribution over rankings of the competing tokens. The cost of a
ranking is the future attention lost when only its first b tokens are kept, summed over every budget
b, relative to that of the best ranking. REINFORCE over K sampled rankings of the same state lowers
it.

Shapes: ``...`` stands for any leading axes (heads, states); K rankings come before the last axis,
of m competing tokens. Everything is f32. Tokens that only fill up a batch have the score
``PADDING`` and importance 0: they are ranked last and count for nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvp_edge.training.settings import Advantage, RankWeights

#: The score of a token that is not there. Finite, so that no gradient becomes NaN.
PADDING = -1e9

_CLAMP = 2.0
_TINY = 1e-8
_WORST = -200.0  # without attention, a ratio of costs has no meaning


def sample_rankings(scores: Tensor, k: int, generator: torch.Generator | None = None) -> Tensor:
    """K rankings drawn from ``scores`` [..., m] (Plackett-Luce): Gumbel noise, then sort.

    Returns:
        int64 [..., K, m]: token indices, best first.
    """
    shape = (*scores.shape[:-1], k, scores.shape[-1])
    uniform = torch.rand(shape, generator=generator, device=scores.device)
    # away from 0 and 1, where the noise would be infinite
    gumbel = -torch.log(-torch.log(uniform.clamp(1e-7, 1 - 1e-7)))
    return (scores.detach().float().unsqueeze(-2) + gumbel).argsort(-1, descending=True)


def log_probabilities(scores: Tensor, rankings: Tensor) -> Tensor:
    """log pi(sigma_i | those ranked before it) of every rank, 0 where padding is chosen.

    Args:
        scores: f32 [..., m].
        rankings: int64 [..., K, m].

    Returns:
        f32 [..., K, m]; their sum over the last axis is the ranking's log-probability.
    """
    expanded = scores.float().unsqueeze(-2).expand(rankings.shape)
    ranked = expanded.gather(-1, rankings)
    # log sum_{j >= i} exp: what is still to be chosen from, summed from the last rank backwards
    remaining = ranked.flip(-1).logcumsumexp(-1).flip(-1)
    return torch.where(ranked > PADDING / 2, ranked - remaining, 0.0)


def rank_weights(m: int, kind: RankWeights = "i-1") -> Tensor:
    """The number of budgets that lose the token on rank i = 1 .. m: f32 [m]."""
    first = 0.0 if kind == "i-1" else 1.0
    return torch.arange(m, dtype=torch.float32) + first


def cost(importance: Tensor, rankings: Tensor, kind: RankWeights = "i-1") -> Tensor:
    """Future attention lost, summed over all budgets: sum_b sum_{i > b} a[sigma_i].

    Args:
        importance: f32 [..., m].
        rankings: int64 [..., K, m].

    Returns:
        f32 [..., K].
    """
    ranked = importance.float().unsqueeze(-2).expand(rankings.shape).gather(-1, rankings)
    return ranked @ rank_weights(importance.shape[-1], kind).to(ranked.device)


def oracle_cost(importance: Tensor, kind: RankWeights = "i-1") -> Tensor:
    """The cost of the best ranking, by descending importance: f32 [...]."""
    best = importance.float().sort(-1, descending=True).values
    return best @ rank_weights(importance.shape[-1], kind).to(best.device)


def reward(importance: Tensor, rankings: Tensor, kind: RankWeights = "i-1") -> Tensor:
    """Minus the cost relative to the best ranking's: f32 [..., K], at most -1 (section 3.1.1)."""
    best = oracle_cost(importance, kind).unsqueeze(-1)
    return -(cost(importance, rankings, kind) / best.clamp_min(_TINY)).clamp_max(-_WORST)


def advantages(rewards: Tensor, kind: Advantage = "zscore") -> Tensor:
    """The advantage of each ranking over the others of its state: f32 [..., K] from [..., K]."""
    k = rewards.shape[-1]
    centred = rewards - rewards.mean(-1, keepdim=True)
    if kind == "loo":
        return centred * (k / (k - 1))  # = r_k - mean of the others
    return (centred / (rewards.std(-1, keepdim=True) + _TINY)).clamp(-_CLAMP, _CLAMP)


def surrogate_loss(
    scores: Tensor,
    importance: Tensor,
    k: int,
    *,
    weights: RankWeights = "i-1",
    advantage: Advantage = "zscore",
    generator: torch.Generator | None = None,
) -> Tensor:
    """A number per state whose gradient is the estimate of the expected cost's gradient.

    It is divided by the number of competing tokens, so that long states do not outweigh short ones.

    Args:
        scores: [..., m]; ``PADDING`` where there is no token.
        importance: f32 [..., m], 0 where there is no token.

    Returns:
        f32 [...].
    """
    rankings = sample_rankings(scores, k, generator)
    gain = advantages(reward(importance, rankings, weights), advantage)
    log_probability = log_probabilities(scores, rankings).sum(-1)
    present = (scores > PADDING / 2).sum(-1).clamp_min(1)
    return -(gain * log_probability).mean(-1) / present
