"""Scores as predictions of importance (the objective "regression").

The importance of tokens spans orders of magnitude: a network learns its logarithm, as KVzap
(arXiv:2601.07891) does. Within a head only the order counts, so prediction and target are compared
after both have lost their means, and the target its scale: heads and texts then count alike.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

#: Beside the mean importance of a head's tokens. What is far less is all the same.
_LEAST = 1e-2
_TINY = 1e-6


def regression_loss(scores: Tensor, importance: Tensor, present: Tensor) -> Tensor:
    """Smooth L1 distance between scores and the logarithm of importance.

    Args:
        scores: f32 [..., m].
        importance: f32 [..., m], not negative.
        present: bool, broadcast to that: what counts.

    Returns:
        f32 [...], the mean over the tokens present; 0 where there are none.
    """
    counts = present.expand(scores.shape).to(scores.dtype)
    n = counts.sum(-1, keepdim=True).clamp_min(1)

    def centred(x: Tensor) -> Tensor:
        return (x - (x * counts).sum(-1, keepdim=True) / n) * counts

    mean = (importance * counts).sum(-1, keepdim=True) / n
    wanted = centred(torch.log(importance / mean.clamp_min(_TINY) + _LEAST))
    spread = (wanted.square().sum(-1, keepdim=True) / n).sqrt()
    wanted = wanted / (spread + _TINY)
    distance = F.smooth_l1_loss(centred(scores), wanted, reduction="none")
    return (distance * counts).sum(-1) / n.squeeze(-1)
