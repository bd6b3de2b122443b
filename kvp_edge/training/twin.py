"""A model of a GGUF file in PyTorch, with weights that stay fixed and attention that can be biased.

It computes what llama.cpp computes for a whole text (src/models/<architecture>.cpp), so that
gradients can flow through the model to whatever biases its attention. Each formula names the file
it follows. The twin refuses what it does not know.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvp_edge.errors import TrainingError
from kvp_edge.training.gguf_weights import GGUFWeights

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3", "phi3")

#: (layer of the base cache, keys f32 [B, n_head_kv, T, head_size_k], values f32 [B, n_head_kv, T,
#: head_size_v]) -> what is added to the attention logits, broadcastable to f32 [B, n_head_kv,
#: T queries, T keys], or None.
AttentionBias = Callable[[int, Tensor, Tensor], Tensor | None]


class Twin(nn.Module):  # type: ignore[misc]  # torch is optional, so its types are not followed
    """The model of a GGUF file: llama, qwen2, qwen3, gemma3 or phi3. Make it with ``load``.

    Weights are f32 buffers: they take no gradient.

    Attributes:
        architecture: ``general.architecture`` of the file.
        n_layer, n_head_kv, head_size_k, head_size_v: those of llama.cpp's base KV cache
            (kvp_edge.binding.cache.CacheShape). Layers with a sliding window are not in it; the
            others count from 0 in ascending order.
    """

    def __init__(self, file: GGUFWeights) -> None:
        super().__init__()
        if file.architecture not in ARCHITECTURES:
            raise TrainingError(
                f"the model file '{file.path}' has the architecture '{file.architecture}', "
                f"but the PyTorch twin supports {', '.join(ARCHITECTURES)}"
            )
        self.architecture = file.architecture
        n_layer = file.shape.n_layer
        window, local = _window(file, n_layer)
        self.n_layer = local.count(False)
        self.n_head_kv = _one_of(file, "attention.head_count_kv", file.shape.n_head_kv)
        self.head_size_k = file.shape.head_size_k
        self.head_size_v = file.shape.head_size_v
        embedding = file.tensor("token_embd.weight")
        self.register_buffer("embedding", embedding)
        # src/models/gemma3.cpp: "inp_scaled"
        self._scale = embedding.shape[1] ** 0.5 if file.architecture == "gemma3" else 1.0
        frequencies = _frequencies(file)
        self.layers = nn.ModuleList(
            _Layer(file, il, frequencies[local[il]], window if local[il] else None)
            for il in range(n_layer)
        )
        self.norm = _Norm(file, "output_norm")
        self.output = _Linear(file, "output", tied=embedding)
        file.check_all_known()

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Twin:
        """Read a model file; quantised weights are de-quantised.

        Raises:
            UnsupportedModelError: missing or foreign file.
            TrainingError: a file that is damaged or of an architecture that the twin does not know,
                or that holds a key or tensor that it does not know; the message names it.
        """
        return cls(GGUFWeights(path, device))

    def forward(
        self,
        tokens: Tensor,
        attention_bias: AttentionBias | None = None,
        bias_share: Tensor | None = None,
    ) -> Tensor:
        """Next-token logits after each token.

        Args:
            tokens: int64 [B, T]: B texts, each from position 0.
            attention_bias: called once for each layer of the base cache, in order, with the keys
                and values as llama.cpp caches them (after norm and RoPE). What it returns is added
                to the attention logits of all query heads of the KV head's group, on top of the
                causal mask; gradients flow through it and through keys and values. It must leave
                each query at least one visible key: hiding (-inf) all of them gives NaN.
            bias_share: f32 [n_layer, n_head_kv]; what a head puts out is that with the bias times
                its share, plus that without it times the rest. None: all 1.

        Returns:
            f32 [B, T, n_vocab].
        """
        x = F.embedding(tokens, self.embedding) * self._scale
        base = 0
        for layer in self.layers:
            hook = None
            if attention_bias is not None and layer.window is None:
                hook = partial(attention_bias, base)
            share = None if hook is None or bias_share is None else bias_share[base]
            base += layer.window is None
            x = layer(x, hook, share)
        logits: Tensor = self.output(self.norm(x))
        return logits


class _Norm(nn.Module):  # type: ignore[misc]
    """RMS norm over the last axis, eps inside the root (``ggml_rms_norm``, ggml-cpu/ops.cpp)."""

    def __init__(self, file: GGUFWeights, name: str) -> None:
        super().__init__()
        self.eps = float(file.key("attention.layer_norm_rms_epsilon"))
        self.register_buffer("weight", file.tensor(name + ".weight"))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class _Linear(nn.Module):  # type: ignore[misc]
    """x W^T + b; without W, ``tied`` is used."""

    def __init__(self, file: GGUFWeights, name: str, tied: Tensor | None = None) -> None:
        super().__init__()
        own = tied is None or file.holds(name + ".weight")
        self.register_buffer("weight", file.tensor(name + ".weight") if own else tied)
        has_bias = file.holds(name + ".bias")
        self.register_buffer("bias", file.tensor(name + ".bias") if has_bias else None)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class _Layer(nn.Module):  # type: ignore[misc]
    """A pre-norm block: attention, then a gated feed-forward network.

    qwen3 and gemma3 norm each head's query and key before RoPE, gemma3 also what a block adds. Some
    files, phi3's always, hold query, key and value in one matrix (`build_qkv`, llama-graph.cpp).

    Attributes:
        window: tokens that a query sees, its own included; None: all.
    """

    def __init__(self, file: GGUFWeights, il: int, frequency: Tensor, window: int | None) -> None:
        super().__init__()
        arch, shape, b = file.architecture, file.shape, f"blk.{il}."
        n_head, n_head_kv = _n_head(file), shape.n_head_kv[il]
        self.n_heads = (n_head, n_head_kv, n_head_kv)
        self.sizes = [
            n_head * shape.head_size_k,
            n_head_kv * shape.head_size_k,
            n_head_kv * shape.head_size_v,
        ]
        self.window = window
        self.scale = _attention_scale(file, n_head)
        # `llama_model_rope_type`, llama-model.cpp: NORM turns neighbours, NEOX halves
        self.neox = arch != "llama"
        self.register_buffer("frequency", frequency)

        self.attn_norm = _Norm(file, b + "attn_norm")
        fused = file.holds(b + "attn_qkv.weight")
        names = ["attn_qkv"] if fused else ["attn_q", "attn_k", "attn_v"]
        self.qkv = nn.ModuleList(_Linear(file, b + name) for name in names)
        norms_heads = arch in ("qwen3", "gemma3")
        self.q_norm = _Norm(file, b + "attn_q_norm") if norms_heads else nn.Identity()
        self.k_norm = _Norm(file, b + "attn_k_norm") if norms_heads else nn.Identity()
        self.attn_output = _Linear(file, b + "attn_output")
        self.ffn_norm = _Norm(file, b + "ffn_norm")
        self.gate = None if arch == "phi3" else _Linear(file, b + "ffn_gate")
        self.up = _Linear(file, b + "ffn_up")
        self.down = _Linear(file, b + "ffn_down")
        norms_sums = arch == "gemma3"
        self.act: Callable[[Tensor], Tensor] = _gelu if norms_sums else F.silu
        self.attn_post = _Norm(file, b + "post_attention_norm") if norms_sums else nn.Identity()
        self.ffn_post = _Norm(file, b + "post_ffw_norm") if norms_sums else nn.Identity()

    def forward(
        self,
        x: Tensor,
        bias: Callable[[Tensor, Tensor], Tensor | None] | None,
        bias_share: Tensor | None = None,
    ) -> Tensor:
        x = x + self.attn_post(self._attention(self.attn_norm(x), bias, bias_share))
        return x + self.ffn_post(self._ffn(self.ffn_norm(x)))

    def _attention(
        self,
        x: Tensor,
        bias: Callable[[Tensor, Tensor], Tensor | None] | None,
        bias_share: Tensor | None,
    ) -> Tensor:
        flat = torch.cat([part(x) for part in self.qkv], -1).split(self.sizes, -1)
        q, k, v = (
            y.unflatten(-1, (n, -1)).transpose(1, 2)
            for y, n in zip(flat, self.n_heads, strict=True)
        )
        angle = torch.arange(x.shape[1], device=x.device)[:, None] * self.frequency
        cos, sin = angle.cos().float(), angle.sin().float()
        q = _rope(self.q_norm(q), cos, sin, self.neox)
        k = _rope(self.k_norm(k), cos, sin, self.neox)
        added = bias(k, v) if bias is not None else None
        out = self._attended(q, k, v, added)
        if added is not None and bias_share is not None:
            share = bias_share.repeat_interleave(q.shape[1] // k.shape[1])[:, None, None]
            plain = self._attended(q, k, v, None)
            out = plain + share * (out - plain)
        y: Tensor = self.attn_output(out.transpose(1, 2).flatten(2))
        return y

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, added: Tensor | None) -> Tensor:
        """What every query head puts out, f32 [B, n_head, T, head_size_v]."""
        group = q.shape[1] // k.shape[1]
        mask = self._mask(k, added)
        if mask is not None and mask.ndim > 2:
            mask = mask.repeat_interleave(group, 1)
        return F.scaled_dot_product_attention(
            q,
            k.repeat_interleave(group, 1),
            v.repeat_interleave(group, 1),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
        )

    def _mask(self, keys: Tensor, added: Tensor | None) -> Tensor | None:
        """The mask added to attention logits: [T, T] or, with a bias, [B, n_head_kv, T, T]; None if
        the causal mask is enough.

        A window hides keys at a distance of its size or more (`is_masked_swa`, llama-hparams.h).
        """
        if self.window is None and added is None:
            return None
        b, h, t, _ = keys.shape
        at = torch.arange(t, device=keys.device)
        distance = at[:, None] - at
        hidden = distance < 0
        if self.window is not None:
            hidden |= distance >= self.window
        if added is None:
            return keys.new_zeros(t, t).masked_fill(hidden, -torch.inf)
        return added.broadcast_to(b, h, t, t).masked_fill(hidden, -torch.inf)

    def _ffn(self, x: Tensor) -> Tensor:
        """down(act(gate(x)) * up(x)); phi3's ffn_up holds gate and up (``ggml_swiglu``)."""
        if self.gate is None:
            gate, up = self.up(x).chunk(2, -1)
        else:
            gate, up = self.gate(x), self.up(x)
        y: Tensor = self.down(self.act(gate) * up)
        return y


def _rope(x: Tensor, cos: Tensor, sin: Tensor, neox: bool) -> Tensor:
    """Turn the pairs of every head (``ggml_compute_forward_rope``, ggml-cpu/ops.cpp).

    Args:
        x: [B, H, T, head_size].
        cos, sin: f32 [T, n_pairs]; what comes after the first 2 * n_pairs values stays.
        neox: pairs are (p, p + n_pairs); otherwise (2p, 2p + 1).
    """
    n = cos.shape[-1]
    pairs, side = ((2, n), -2) if neox else ((n, 2), -1)
    a, b = x[..., : 2 * n].unflatten(-1, pairs).unbind(side)
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), side).flatten(-2)
    return torch.cat((turned, x[..., 2 * n :]), -1)


def _gelu(x: Tensor) -> Tensor:
    """The tanh form (``ggml_gelu_f32``, ggml-cpu/vec.h)."""
    return F.gelu(x, approximate="tanh")


# -- what the metadata says ------------------------------------------------------------------


def _one_of(file: GGUFWeights, name: str, values: Any) -> int:
    """The one value that all layers have."""
    different = set(values) if isinstance(values, list) else {values}
    if len(different) != 1:
        raise file.refusal(f"has {name} = {values}, which differs between layers")
    return int(different.pop())


def _n_head(file: GGUFWeights) -> int:
    return _one_of(file, "attention.head_count", file.key("attention.head_count"))


def _attention_scale(file: GGUFWeights, n_head: int) -> float:
    """1 / sqrt(head size), except for gemma3 27B, recognised by its number of layers
    (gemma3.cpp)."""
    if file.architecture == "gemma3" and file.shape.n_layer == 62:
        return float((file.key("embedding_length") // n_head) ** -0.5)
    return float(file.shape.head_size_k**-0.5)


def _window(file: GGUFWeights, n_layer: int) -> tuple[int, list[bool]]:
    """The sliding window, and which layers have it (``load_swa_pattern``, llama-model.cpp).

    Of these architectures only gemma3 has one in llama.cpp, whatever the metadata say; phi3's is
    disabled (phi3.cpp).
    """
    window = int(file.key("attention.sliding_window", 0))
    if file.architecture != "gemma3" or window == 0:
        return 0, [False] * n_layer
    pattern = file.key("attention.sliding_window_pattern", 6)
    if isinstance(pattern, list):
        return window, [bool(local) for local in pattern[:n_layer]]
    return window, [pattern == 0 or il % pattern < pattern - 1 for il in range(n_layer)]


def _frequencies(file: GGUFWeights) -> tuple[Tensor, Tensor]:
    """RoPE's radians per position, f64 [n_pairs], of global layers and of those with a window.

    llama-model.cpp and llama-context.cpp; linear scaling is for global layers only.
    """
    kind = file.key("rope.scaling.type", "linear")
    factor = float(file.key("rope.scaling.factor", 0) or file.key("rope.scale_linear", 0) or 1)
    file.key("rope.scale_linear", 0)
    if kind == "none":
        factor = 1.0
    elif kind != "linear":
        raise file.refusal(f"has {file.architecture}.rope.scaling.type = {kind}")
    n = int(file.key("rope.dimension_count", file.shape.head_size_k))
    exponent = torch.arange(0, n, 2, dtype=torch.float64) / -n
    everywhere = float(file.key("rope.freq_base", 10000.0)) ** exponent / factor
    local = everywhere
    if file.architecture == "gemma3":
        local = float(file.key("rope.freq_base_swa", 10000.0)) ** exponent
    # other architectures' graphs use no factors
    if file.architecture == "llama" and file.holds("rope_freqs.weight"):
        everywhere = everywhere / file.tensor("rope_freqs.weight").cpu().double()
    return everywhere.to(file.device), local.to(file.device)
