"""A gate of low-rank attention with sinks (Fast KVzip, arXiv:2601.17668), to compare agents with.

The gate of a layer scores all of its KV heads. Each head has a few queries and a key of low rank,
made of the token. The token's score is the share of attention that its own key takes from learned
sinks. In the paper queries and keys are made of the layer's hidden state; here, of what an agent
sees of a layer: keys and values, head by head, and the position (kvp_edge.training.agent). So the
gate needs no more than the KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_EPS = 1e-6


@dataclass(frozen=True)
class SinkGateShape:
    """Sizes of the gate of one layer.

    Attributes:
        n_features: numbers of a token that it sees.
        queries: of each KV head, g; in the paper those of the model's query heads.
        rank: of queries and keys.
        sinks: of each KV head, S.
    """

    n_features: int
    n_head_kv: int
    queries: int
    rank: int = 16
    sinks: int = 16

    def __post_init__(self) -> None:
        if min(self.n_features, self.n_head_kv, self.queries, self.rank, self.sinks) < 1:
            raise ValueError("a gate needs at least one feature, head, query, rank and sink")


class SinkGate(nn.Module):  # type: ignore[misc]  # torch is optional, so its types are not followed
    """The gate of one layer (f32; F features, H KV heads, g queries, rank r, S sinks).

    Attributes:
        mean, scale [F]: buffers that standardise the features: (x - mean) * scale.
        w_q [H * g * r, F], b_q [H * g * r], norm_q [r]: queries, and the scale of their RMSNorm.
        w_k [H * r, F], norm_k [r]: keys, likewise.
        bias [H, g]: what is added to the logit of a token's own key.
        sinks [H, S, r].
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, shape: SinkGateShape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        f, heads, g, r = shape.n_features, shape.n_head_kv, shape.queries, shape.rank
        generator = torch.Generator().manual_seed(seed)

        def normal(*dims: int, std: float) -> nn.Parameter:
            return nn.Parameter(std * torch.randn(dims, generator=generator))

        self.register_buffer("mean", torch.zeros(f))
        self.register_buffer("scale", torch.ones(f))
        self.w_q = normal(heads * g * r, f, std=f**-0.5)
        self.b_q = nn.Parameter(torch.zeros(heads * g * r))
        self.norm_q = nn.Parameter(torch.ones(r))
        self.w_k = normal(heads * r, f, std=f**-0.5)
        self.norm_k = nn.Parameter(torch.ones(r))
        self.bias = nn.Parameter(torch.zeros(heads, g))
        self.sinks = normal(heads, shape.sinks, r, std=1.0)

    @property
    def n_parameters(self) -> int:
        """Numbers that are trained."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, features: Tensor) -> Tensor:
        """Score tokens, each by itself.

        Args:
            features: [..., T, F], not standardised.

        Returns:
            f32 [..., H, T], in (0, 1): 1 / (1 + sum over sinks of exp(sink . q / sqrt(r) - (k . q /
            sqrt(r) + bias))), mean over the head's queries.
        """
        s = self.shape
        x = (features - self.mean) * self.scale
        q = F.linear(x, self.w_q, self.b_q).unflatten(-1, (s.n_head_kv, s.queries, s.rank))
        k = F.linear(x, self.w_k).unflatten(-1, (s.n_head_kv, s.rank))
        q = F.rms_norm(q, (s.rank,), self.norm_q, _EPS)
        k = F.rms_norm(k, (s.rank,), self.norm_k, _EPS)
        own = torch.einsum("...hr,...hgr->...hg", k, q) / s.rank**0.5 + self.bias
        sinks = torch.einsum("hmr,...hgr->...hgm", self.sinks, q) / s.rank**0.5
        share = torch.sigmoid(own - sinks.logsumexp(-1))  # which no exponential overflows
        return share.mean(-1).transpose(-1, -2).float()
