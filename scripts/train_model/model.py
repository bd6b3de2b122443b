"""The network: a Qwen3-shaped decoder that llama.cpp runs as architecture `qwen3`.

RMS norm before attention and before the SwiGLU feed-forward, rotary positions in the half-split
(NeoX) layout, grouped-query attention, RMS norm of every query and key head, tied embeddings, no
biases. The layout of rotary pairs and the tensor shapes are those of llama.cpp's `qwen3` graph, so
export renames tensors and changes nothing else.
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    """Sizes; all counts are numbers of units, `rope_base` and `norm_eps` are dimensionless."""

    vocab_size: int = 4096
    width: int = 256
    n_layer: int = 5
    n_head: int = 4
    n_head_kv: int = 2
    head_size: int = 64  # a multiple of 64 lets llama.cpp rotate quantised caches
    ff_width: int = 640
    rope_base: float = 100_000.0
    norm_eps: float = 1e-6

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rotary_tables(config: ModelConfig, length: int) -> tuple[Tensor, Tensor]:
    """Tables of cos and sin, float32 [length, 1, head_size / 2]."""
    half = config.head_size // 2
    frequency = config.rope_base ** (-torch.arange(half, dtype=torch.float32) / half)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
    return angle.cos()[:, None], angle.sin()[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [batch, length, heads, head_size]; element i is paired with i + head_size / 2."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention written out as two matrix products.

    On CPUs this is about twice as fast up to 1,024 tokens as the fused kernel, whose backward pass
    dominates there. q [batch, length, n_head, head_size]; k, v [batch, length, n_head_kv,
    head_size]; mask [length, length], 0 or a large negative number. Returns the mixed values
    [batch, length, n_head * head_size] and the attention [batch, n_head, length, length].
    """
    batch, length, n_head, size = q.shape
    n_kv = k.shape[2]
    group = n_head // n_kv
    q = q.view(batch, length, n_kv, group, size).permute(0, 2, 3, 1, 4)
    q = q.reshape(batch * n_kv, group * length, size)
    k = k.permute(0, 2, 3, 1).reshape(batch * n_kv, size, length)
    v = v.permute(0, 2, 1, 3).reshape(batch * n_kv, length, size)
    scores = torch.bmm(q, k).view(batch * n_kv, group, length, length)
    weights = torch.softmax(scores * (1 / math.sqrt(size)) + mask, -1)
    mixed = torch.bmm(weights.view(batch * n_kv, group * length, length), v)
    mixed = mixed.view(batch, n_kv, group, length, size).permute(0, 3, 1, 2, 4)
    return mixed.reshape(batch, length, -1), weights.view(batch, n_head, length, length)


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, size = config.width, config.head_size
        self.attn_norm = nn.Parameter(torch.ones(width))
        self.q = nn.Linear(width, config.n_head * size, bias=False)
        self.k = nn.Linear(width, config.n_head_kv * size, bias=False)
        self.v = nn.Linear(width, config.n_head_kv * size, bias=False)
        self.q_norm = nn.Parameter(torch.ones(size))
        self.k_norm = nn.Parameter(torch.ones(size))
        self.o = nn.Linear(config.n_head * size, width, bias=False)
        self.ff_norm = nn.Parameter(torch.ones(width))
        self.gate = nn.Linear(width, config.ff_width, bias=False)
        self.up = nn.Linear(width, config.ff_width, bias=False)
        self.down = nn.Linear(config.ff_width, width, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Map x [batch, length, width] to its shape; without a mask the fused kernel is used."""
        c = self.config
        batch, length, _ = x.shape
        y = rms_norm(x, self.attn_norm, c.norm_eps)
        q = self.q(y).view(batch, length, c.n_head, c.head_size)
        k = self.k(y).view(batch, length, c.n_head_kv, c.head_size)
        v = self.v(y).view(batch, length, c.n_head_kv, c.head_size)
        q = rotate(rms_norm(q, self.q_norm, c.norm_eps), cos, sin)
        k = rotate(rms_norm(k, self.k_norm, c.norm_eps), cos, sin)
        if mask is None:
            mixed = (
                F.scaled_dot_product_attention(
                    q.transpose(1, 2),
                    k.transpose(1, 2),
                    v.transpose(1, 2),
                    is_causal=True,
                    enable_gqa=True,
                )
                .transpose(1, 2)
                .reshape(batch, length, -1)
            )
            weights = None
        else:
            mixed, weights = attend(q, k, v, mask)
        x = x + self.o(mixed)
        y = rms_norm(x, self.ff_norm, c.norm_eps)
        return x + self.down(F.silu(self.gate(y)) * self.up(y)), weights


class Model(nn.Module):
    """Token ids [batch, length] to the final hidden states [batch, length, width]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.Parameter(torch.ones(config.width))
        # Input and output share the embedding: copying a token seen in the context then needs no
        # map learned token by token. The small final gain keeps a token from predicting itself.
        nn.init.normal_(self.embed.weight, std=0.5)
        # A part common to all tokens, so that heads can prefer positions ("the token before")
        # whatever stands there: attention has no biases that could do it.
        self.embed.weight.data += torch.randn(config.width) * 0.5
        nn.init.constant_(self.norm, 0.03)
        for block in self.blocks:
            for layer in (block.q, block.k, block.v, block.gate, block.up):
                nn.init.normal_(layer.weight, std=0.5 / math.sqrt(config.width))
            # Zero output projections: every layer starts as the identity.
            nn.init.zeros_(block.o.weight)
            nn.init.zeros_(block.down.weight)

    def forward(self, ids: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x, _ = block(x, cos, sin, mask)
        return rms_norm(x, self.norm, self.config.norm_eps)

    def attention(self, ids: Tensor) -> list[Tensor]:
        """Attention weights per layer, float32 [batch, n_head, length, length]."""
        cos, sin = rotary_tables(self.config, ids.shape[1])
        mask = causal_mask(ids.shape[1])
        x, kept = self.embed(ids), []
        for block in self.blocks:
            x, weights = block(x, cos, sin, mask)
            kept.append(weights)
        return kept

    def logits(self, ids: Tensor) -> Tensor:
        """float32 [batch, length, vocab_size]: for checks, not for training."""
        cos, sin = rotary_tables(self.config, ids.shape[1])
        hidden = self(ids, cos, sin, causal_mask(ids.shape[1]))
        return F.linear(hidden, self.embed.weight)


def causal_mask(length: int) -> Tensor:
    """float32 [length, length]: 0 where a query may look, -1e9 where it may not."""
    return torch.full((length, length), -1e9).triu(1)
