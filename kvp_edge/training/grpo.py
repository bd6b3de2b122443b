"""Group-relative policy optimisation of evictions (ForesightKV, arXiv:2602.03203, stage 2).

An action is the set of tokens that a head drops at an eviction: k draws without replacement from
the 2 k lowest scores, with probabilities softmax(-score / temperature). Several rollouts of the
same text are compared with each other. The ratio of new and old probabilities is clipped for each
draw, and the distance to the supervised start is penalised.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvp_edge.training.kvp import PADDING

_TINY = 1e-6


def draw(
    scores: Tensor, n_drop: int, temperature: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw what to drop.

    Args:
        scores: f32 [N, m] of the tokens that compete, n_drop <= m.
        n_drop: how many each head drops.

    Returns:
        int64 [N, min(2 * n_drop, m)], the candidates, those with the lowest scores; int64
        [N, n_drop], indices among them in the order in which they were drawn.
    """
    width = min(2 * n_drop, scores.shape[-1])
    candidates = scores.topk(width, dim=-1, largest=False).indices
    logits = -scores.gather(-1, candidates) / temperature
    uniform = torch.rand(logits.shape, generator=generator).clamp(1e-7, 1 - 1e-7)
    # Gumbel noise, then the largest: draws without replacement, in order (arXiv:1903.06059)
    noisy = logits - torch.log(-torch.log(uniform))
    return candidates, noisy.topk(n_drop, dim=-1).indices


def log_probabilities(scores: Tensor, drawn: Tensor, temperature: float) -> Tensor:
    """log of each draw's probability, given the draws before it.

    Args:
        scores: f32 [..., w] of the candidates.
        drawn: int64 [..., k], different indices among them, in order, k <= w.

    Returns:
        f32 [..., k].
    """
    logits = -scores.float() / temperature
    chosen = logits.gather(-1, drawn)
    left = torch.ones_like(logits, dtype=torch.bool).scatter(-1, drawn, False)
    # candidates left at draw j: all that are never drawn, and draws j, j + 1, ...
    never = logits.masked_fill(~left, PADDING).logsumexp(-1, keepdim=True)
    later = chosen.flip(-1).logcumsumexp(-1).flip(-1)
    return chosen - torch.logaddexp(never, later)


def advantages(returns: Tensor) -> Tensor:
    """The advantage of each rollout over the others of its text, from each eviction on: f32 [G, K]
    from [G, K]."""
    exact = returns.double()  # in f32 the mean of equal returns may differ by rounding
    centred = exact - exact.mean(0, keepdim=True)
    return (centred / (exact.std(0, keepdim=True) + _TINY)).float()


def grpo_loss(
    new: Tensor, old: Tensor, start: Tensor, advantage: Tensor, clip: float, kl: float
) -> Tensor:
    """The clipped surrogate and the distance to the start, each head on its own.

    Args:
        new, old, start: f32 [N, K, k], log-probabilities of the draws at K evictions: as they are
            now, when they were drawn, and of the supervised start.
        advantage: f32 [K].

    Returns:
        f32 [N].
    """
    ratio = (new - old).exp()
    gain = advantage[:, None]
    surrogate = torch.minimum(ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain)
    back = start - new
    distance = back.exp() - back - 1  # an estimate of KL(new || start) that is never negative
    return (kl * distance - surrogate).flatten(1).mean(1)
