"""AdamW (Loshchilov & Hutter, arXiv:1711.05101) in which every head steps on its own.

All heads' weights lie in shared tensors, but they are separate agents: a head that takes no part in
a step keeps its weights, moments and count of steps, and gradients are clipped head by head. Where
an agent sees a whole layer (scope "layer"), a layer takes the place of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8


class HeadAdamW:
    """Parameters have heads on their first axis; those with a third axis are decayed."""

    def __init__(
        self, parameters: dict[str, nn.Parameter], weight_decay: float = 1e-3, clip: float = 5.0
    ) -> None:
        self.parameters = parameters
        self.weight_decay, self.clip = weight_decay, clip
        first = next(iter(parameters.values()))
        self.steps = torch.zeros(first.shape[0], device=first.device)
        self.first = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.second = {name: torch.zeros_like(p) for name, p in parameters.items()}

    def step(self, heads: Tensor, lr: float) -> None:
        """Move ``heads`` (int64 [n]) by their gradients, then forget the gradients."""
        with torch.no_grad():
            gradients = {
                name: p.grad[heads] for name, p in self.parameters.items() if p.grad is not None
            }
            squares = [g.square().reshape(len(g), -1).sum(1) for g in gradients.values()]
            norm = torch.stack(squares).sum(0).sqrt()
            shrink = (self.clip / norm.clamp_min(1e-12)).clamp_max(1.0)
            self.steps[heads] += 1
            t = self.steps[heads]
            for name, gradient in gradients.items():
                p = self.parameters[name]
                per_head = (-1, *([1] * (p.dim() - 1)))
                g = gradient * shrink.view(per_head)
                m = self.first[name][heads] * _BETA1 + g * (1 - _BETA1)
                v = self.second[name][heads] * _BETA2 + g.square() * (1 - _BETA2)
                self.first[name][heads], self.second[name][heads] = m, v
                move = m / (1 - _BETA1**t).view(per_head)
                move = move / ((v / (1 - _BETA2**t).view(per_head)).sqrt() + _EPS)
                if p.dim() > 2:
                    move = move + self.weight_decay * p[heads]
                p[heads] -= lr * move
                p.grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything that a later run needs to resume exactly here."""
        out = {"adam.steps": self.steps}
        for name in self.parameters:
            out[f"adam.first.{name}"] = self.first[name]
            out[f"adam.second.{name}"] = self.second[name]
        return out

    def load(self, state: dict[str, Tensor]) -> None:
        self.steps.copy_(state["adam.steps"])
        for name in self.parameters:
            self.first[name].copy_(state[f"adam.first.{name}"])
            self.second[name].copy_(state[f"adam.second.{name}"])
