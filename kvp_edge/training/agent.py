"""The agents: one small MLP per (layer, KV head), or per layer, all in one batched computation.

What a token's score is made of is defined in docs/policy-format.md; ``kvp_edge.policies.learned``
computes the same in numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvp_edge.policy_file import N_POSITION_FEATURES, Scope, networks_of_layer


@dataclass(frozen=True)
class AgentShape:
    """Sizes of the agents.

    Attributes:
        context: the convolution's width; 1 is the blind agent of arXiv:2602.10238.
        shared_out: one last projection for all agents, which makes their scores comparable
            (arXiv:2605.09649, where an agent scores a layer, too).
        scope: what an agent scores, and sees: "head" or "layer", all heads of one.
    """

    n_layer: int
    n_head_kv: int
    head_size_k: int
    head_size_v: int
    hidden: int = 64
    context: int = 9
    shared_out: bool = False
    scope: Scope = "head"

    @property
    def n_heads(self) -> int:
        return self.n_layer * self.n_head_kv

    @property
    def n_agents(self) -> int:
        return self.n_layer * networks_of_layer(self.scope, self.n_head_kv)

    @property
    def heads_each(self) -> int:
        """Heads that an agent scores; those of agent i are number i * heads_each and following."""
        return self.n_heads // self.n_agents

    @property
    def n_features(self) -> int:
        """Of a token, for one agent: its heads' keys, their values, the position."""
        return self.heads_each * (self.head_size_k + self.head_size_v) + N_POSITION_FEATURES

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of ``Agents``, by its name."""
        a, f, h = self.n_agents, self.n_features, self.hidden
        return {
            "mean": (a, f),
            "scale": (a, f),
            "fc1": (a, f, h),
            "fc1_bias": (a, h),
            "conv": (a, h, self.context),
            "fc2": (a, h, h),
            "fc2_bias": (a, h),
            "out": (1 if self.shared_out else a, self.heads_each * h),
            "log_aggregate": (self.n_heads,),
        }

    def __post_init__(self) -> None:
        if self.context < 1 or self.context % 2 == 0:
            raise ValueError(f"the context width must be an odd number, not {self.context}")
        if min(self.n_layer, self.n_head_kv, self.head_size_k, self.head_size_v, self.hidden) < 1:
            raise ValueError("agents need at least one layer, head, dimension and hidden unit")
        if self.scope not in get_args(Scope):
            raise ValueError(f"agents score a {' or a '.join(get_args(Scope))}, not '{self.scope}'")


class Agents(nn.Module):  # type: ignore[misc]  # torch is optional, so its types are not followed
    """A scorers of N = n_layer * n_head_kv heads (A = N, or n_layer), and the weights that add the
    heads up to a score of whole tokens.

    Attributes (f32; F features, h hidden):
        mean, scale [A, F]: buffers that standardise the features: (x - mean) * scale.
        fc1 [A, F, h], fc1_bias [A, h]; conv [A, h, w]; fc2 [A, h, h], fc2_bias [A, h];
        out [A, N/A * h], a row of h for each of an agent's heads, or [1, N/A * h] if shared;
        log_aggregate [N]: log of the heads' weights in a token's score.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, shape: AgentShape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        n, f, h = shape.n_agents, shape.n_features, shape.hidden
        generator = torch.Generator().manual_seed(seed)

        def normal(*dims: int, std: float) -> nn.Parameter:
            return nn.Parameter(std * torch.randn(dims, generator=generator))

        self.register_buffer("mean", torch.zeros(n, f))
        self.register_buffer("scale", torch.ones(n, f))
        self.fc1 = normal(n, f, h, std=f**-0.5)
        self.fc1_bias = nn.Parameter(torch.zeros(n, h))
        identity = torch.zeros(n, h, shape.context)
        identity[..., shape.context // 2] = 1.0
        self.conv = nn.Parameter(identity, requires_grad=shape.context > 1)
        self.fc2 = normal(n, h, h, std=h**-0.5)
        self.fc2_bias = nn.Parameter(torch.zeros(n, h))
        self.out = normal(1 if shape.shared_out else n, shape.heads_each * h, std=h**-0.5)
        self.log_aggregate = nn.Parameter(torch.full((shape.n_heads,), 1.0 / shape.n_heads).log())

    def forward(
        self, features: Tensor, known: Tensor | None = None, agents: Tensor | None = None
    ) -> Tensor:
        """Score the inner tokens of runs of neighbours.

        Args:
            features: [A, B, T, F], B runs of T tokens in conversation order, not standardised.
            known: bool [B, T]; False where there is no such token (before the first one, after the
                newest one). None: zeros are known nowhere but outside the run, and all T tokens
                are scored.
            agents: int64 [a]; the first axis of ``features`` holds these agents only.

        Returns:
            f32 [N, B, T - (context - 1)], or [N, B, T] without ``known``; of the heads of these
            agents, in order.
        """

        def own(parameter: Tensor) -> Tensor:
            return parameter if agents is None else parameter[agents]

        n, b, t, _ = features.shape
        x = (features - own(self.mean)[:, None, None]) * own(self.scale)[:, None, None]
        x = torch.baddbmm(own(self.fc1_bias)[:, None], x.flatten(1, 2), own(self.fc1))
        if self.shape.context > 1:
            x = x.view(n, b, t, -1)
            if known is not None:
                x = x * known[:, :, None]
            x = _convolve(x, own(self.conv), 0 if known is not None else self.shape.context // 2)
            t = x.shape[2]
            x = x.flatten(1, 2)
        x = F.silu(x)
        x = F.silu(torch.baddbmm(own(self.fc2_bias)[:, None], x, own(self.fc2)))
        # no bias: a constant changes no ranking, so nothing would train it
        out = self.out.expand(n, -1) if self.shape.shared_out else own(self.out)
        scores = torch.bmm(x, out.unflatten(1, (self.shape.heads_each, -1)).transpose(1, 2))
        return scores.transpose(1, 2).reshape(-1, b, t).float()

    def token_scores(self, scores: Tensor) -> Tensor:
        """Scores of whole tokens, [...] from [N, ...]: the heads' scores, weighted and summed."""
        return torch.einsum("n...,n->...", scores, self.log_aggregate.exp())


def _convolve(x: Tensor, conv: Tensor, padding: int) -> Tensor:
    """Every channel of every agent with its own kernel: [n, B, T, h] -> [n, B, T', h]."""
    n, b, t, h = x.shape
    channels = x.permute(1, 0, 3, 2).reshape(b, n * h, t)
    kernel = conv.reshape(n * h, 1, -1).to(channels.dtype)
    y = F.conv1d(channels, kernel, padding=padding, groups=n * h)
    return y.view(b, n, h, -1).permute(1, 0, 3, 2)


def side_by_side(rows: Tensor, heads_each: int) -> Tensor:
    """What agents see of rows [..., H, T, size], head by head: [..., H / heads_each, T,
    heads_each * size]."""
    return rows.unflatten(-3, (-1, heads_each)).transpose(-3, -2).flatten(-2)


def position_features(positions: Tensor) -> Tensor:
    """f32 [..., 4] from indices of tokens in the conversation; unlike a table, unbounded."""
    p = positions.clamp_min(0).float()
    log = torch.log2(1 + p)
    return torch.stack((log / 16, torch.sin(log), torch.cos(log), 1 / (1 + p)), -1)
