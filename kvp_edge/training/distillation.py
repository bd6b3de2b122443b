"""Training retention gates by distillation (TRIM-KV, arXiv:2512.03324; DBTrimKV, 2605.09649).

A gate gives every token i of every KV head a retention beta_i in [0, 1]; at step t it has faded to
beta_i^(t - i). In training this weighs the token in the attention of a frozen model, which learns
to predict what it predicts without gates. An eviction then drops what has faded most.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from kvp_edge.training.twin import Twin

#: (layer of the base cache, keys f32 [B, n_head_kv, T, head_size_k], values f32 [B, n_head_kv, T,
#: head_size_v]) -> log beta f32 [B, n_head_kv, T], finite and <= 0; the tokens are at positions
#: 0 .. T - 1.
Gates = Callable[[int, Tensor, Tensor], Tensor]


def distillation_loss(
    twin: Twin, gates: Gates, tokens: Tensor, capacity: float, *, capacity_weight: float = 1.0
) -> Tensor:
    """KL(full || gated) + the gated model's next-token cross entropy + capacity_weight * L_cap.

    The gated model adds (t - i) log beta_i to the attention logits of query t and key i (TRIM-KV).
    L_cap penalises what all heads together retain beyond ``capacity`` cells per head (DBTrimKV's
    global hinge), relative to what they would retain without gates, averaged over steps:

        L_cap = mean over t = 1 .. T of
                max(0, sum over layers, heads and i <= t of beta_i^(t - i) - capacity L H) / (t L H)

    The KL divergence is averaged over tokens, too. All texts of a batch have equal weight.

    Args:
        tokens: int64 [B, T], T >= 2.
        capacity: cells per KV head; a fraction is possible.

    Returns:
        f32 scalar in nats, with gradients for the gates only.

    Raises:
        ValueError: a text of less than two tokens.
    """
    b, t = tokens.shape
    if t < 2:
        raise ValueError(f"distillation needs texts of at least 2 tokens, not {t}")
    at = torch.arange(t, device=tokens.device)
    # after the query a token is hidden anyway; any other number would overflow there
    distance = (at[:, None] - at).clamp_min(0)
    retained: list[Tensor] = []

    def fade(layer: int, keys: Tensor, values: Tensor) -> Tensor:
        faded = gates(layer, keys, values)[:, :, None] * distance
        retained.append(faded.exp().tril().sum((1, 3)))
        return faded

    with torch.no_grad():
        full = twin(tokens).log_softmax(-1)
    gated = twin(tokens, fade).log_softmax(-1)
    divergence = F.kl_div(gated, full, reduction="sum", log_target=True) / (b * t)
    cross_entropy = F.nll_loss(gated[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    heads = twin.n_layer * twin.n_head_kv
    excess = (torch.stack(retained).sum(0) - capacity * heads).clamp_min(0)
    too_much = (excess / (heads * (at + 1))).mean()
    loss: Tensor = divergence + cross_entropy + capacity_weight * too_much
    return loss
