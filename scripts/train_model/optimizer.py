"""Muon for the matrices inside the layers (K. Jordan, https://kellerjordan.github.io/posts/muon/).

A step moves every matrix along the orthogonalised running gradient, so that all directions learn at
the same speed. In our trials it was what let look-up heads form from a random start.
"""

import math

import torch
from torch import Tensor, nn


def orthogonalise(x: Tensor) -> Tensor:
    """Newton-Schulz iteration: bfloat16 [n, rows, columns] with singular values near 1."""
    x = x.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, then orthogonalisation; equal shapes are handled as one batch."""

    def __init__(
        self, params: list[nn.Parameter], lr: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                updates = []
                for p in params:
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                    state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(state["momentum"], group["momentum"]))
                # Scaled so that one step changes elements about as much as Adam would with 0.2 lr.
                scale = group["lr"] * 0.2 * math.sqrt(max(shape))
                for p, update in zip(params, orthogonalise(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.float(), alpha=-scale)
