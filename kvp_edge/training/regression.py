"""Scores as predictions of importance (the objective "regression").

The importance of tokens spans orders of magnitude. Its logarithm is learned, as KVzap
(arXiv:2601.07891) does, so that all tokens count; and its share of a head's importance, so that the
few with most of it count more. Within a head only the order matters: prediction and logarithm are
compared after both have lost their means, and the logarithm its scale. So heads and texts count
alike.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kvp_edge.training.kvp import PADDING

#: Beside the mean importance of a head's tokens. What is far less is all the same.
_LEAST = 1e-2
_TINY = 1e-6


def regression_loss(scores: Tensor, importance: Tensor, present: Tensor) -> Tensor:
    """Smooth L1 distance between scores and the logarithm of importance, plus the cross entropy
    between softmax(scores) and the shares of importance.

    Args:
        scores: f32 [..., m].
        importance: f32 [..., m], not negative.
        present: bool, broadcast to that: what counts.

    Returns:
        f32 [...]; 0 where nothing is present.
    """
    present = present.expand(scores.shape)
    counts = present.to(scores.dtype)
    n = counts.sum(-1, keepdim=True).clamp_min(1)

    def centred(x: Tensor) -> Tensor:
        return (x - (x * counts).sum(-1, keepdim=True) / n) * counts

    total = (importance * counts).sum(-1, keepdim=True)
    wanted = centred(torch.log(importance * n / total.clamp_min(_TINY) + _LEAST))
    spread = (wanted.square().sum(-1, keepdim=True) / n).sqrt()
    distance = F.smooth_l1_loss(centred(scores), wanted / (spread + _TINY), reduction="none")
    share = importance * counts / total.clamp_min(_TINY)
    log_share = scores.masked_fill(~present, PADDING).log_softmax(-1)
    entropy = -(share * log_share).sum(-1)
    return (distance * counts).sum(-1) / n.squeeze(-1) + entropy
