"""The forward pass of the tiny models in numpy, with attention that can be told what not to see.

Written from the graphs in llama.cpp's src/models/<arch>.cpp, in float64 so that a difference from
llama.cpp is llama.cpp's own rounding. Every formula names the file it follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from makers.gguf_models import ModelShape, Weights

Array = NDArray[np.float64]
Tokens = Sequence[int] | NDArray[np.integer]
Visible = NDArray[np.bool_]
"""Row = query token, column = token it may attend to: [n_tokens, n_tokens] for all heads alike, or
[n_layer, n_head_kv, n_tokens, n_tokens]. Causality and the sliding window apply on top."""


@dataclass(frozen=True)
class Forward:
    """What one pass leaves behind; keys carry RoPE, as in llama.cpp's cache."""

    logits: NDArray[np.float32]
    """[n_tokens, n_vocab]"""
    keys: NDArray[np.float32]
    """[n_layer, n_head_kv, n_tokens, head_dim]"""
    values: NDArray[np.float32]
    """[n_layer, n_head_kv, n_tokens, head_dim]"""


class Reference:
    """A model from `write_model`, evaluated on a whole sequence at once."""

    def __init__(self, shape: ModelShape, weights: Weights) -> None:
        self.shape = shape
        self._w = {name: tensor.astype(np.float64) for name, tensor in weights.items()}

    def logits(
        self,
        tokens: Tokens,
        visible: Visible | None = None,
        positions: NDArray[np.integer] | None = None,
    ) -> NDArray[np.float32]:
        """Next-token logits after each token, [n_tokens, n_vocab]."""
        return self.forward(tokens, visible, positions).logits

    def keys(
        self,
        tokens: Tokens,
        visible: Visible | None = None,
        positions: NDArray[np.integer] | None = None,
    ) -> NDArray[np.float32]:
        """Keys after RoPE, [n_layer, n_head_kv, n_tokens, head_dim]."""
        return self.forward(tokens, visible, positions).keys

    def values(
        self,
        tokens: Tokens,
        visible: Visible | None = None,
        positions: NDArray[np.integer] | None = None,
    ) -> NDArray[np.float32]:
        """Values, [n_layer, n_head_kv, n_tokens, head_dim]."""
        return self.forward(tokens, visible, positions).values

    def attention(self, tokens: Tokens) -> NDArray[np.float32]:
        """What each query head's queries (rows) pay to the tokens (columns) with nothing evicted,
        [n_layer, n_head, n_tokens, n_tokens]."""
        paid: list[Array] = []
        self.forward(tokens, paid=paid)
        return np.stack(paid).astype(np.float32)

    def forward(
        self,
        tokens: Tokens,
        visible: Visible | None = None,
        positions: NDArray[np.integer] | None = None,
        key_positions: NDArray[np.integer] | None = None,
        paid: list[Array] | None = None,
        rows: Sequence[int] | None = None,
    ) -> Forward:
        """Run all layers; positions default to 0, 1, 2, ...; `paid` takes each layer's attention.

        rows: the tokens whose logits are wanted, in place of all: a large vocabulary costs more
        than the layers.

        key_positions [n_layer, n_head_kv, n_tokens, n_tokens]: the RoPE position that each key
        (column) has when a query (row) looks at it, for caches whose keys were turned meanwhile;
        then causality is left to `visible`, which must not show a query its future.

        Pre-norm residual blocks; gemma3 also norms what each block adds and scales the embeddings
        (src/models/{llama,qwen2,qwen3,gemma3,phi3}.cpp).
        """
        shape, w = self.shape, self._w
        ids = np.asarray(tokens)
        pos = np.arange(len(ids)) if positions is None else np.asarray(positions)
        seen = np.ones((1, 1, 1, 1), bool) if visible is None else visible
        seen = np.broadcast_to(seen, (shape.n_layer, shape.n_head_kv, len(ids), len(ids)))

        x = w["token_embd.weight"][ids]
        if shape.arch == "gemma3":
            x = x * np.sqrt(shape.n_embd)
        keys, values = [], []
        for il in range(shape.n_layer):
            q, k, v = self._qkv(il, self._norm(x, f"blk.{il}.attn_norm"), pos)
            if key_positions is None:
                mask = seen[il] & self._mask(il, pos)
                out = _attention(q, k, v, mask, paid=paid)
            else:
                by = key_positions[il] - pos  # [n_head_kv, query, key]: how far a key was turned
                turn = partial(self._turned_scores, by=by, seen=seen[il])
                out = _attention(q, k, v, seen[il], turn)
            out = out @ w[f"blk.{il}.attn_output.weight"].T
            if shape.arch == "gemma3":
                out = self._norm(out, f"blk.{il}.post_attention_norm")
            x = x + out
            out = self._ffn(il, self._norm(x, f"blk.{il}.ffn_norm"))
            if shape.arch == "gemma3":
                out = self._norm(out, f"blk.{il}.post_ffw_norm")
            x = x + out
            keys.append(k)
            values.append(v)
        wanted = x if rows is None else x[list(rows)]
        logits = self._norm(wanted, "output_norm") @ w["output.weight"].T
        return Forward(
            logits.astype(np.float32),
            np.stack(keys).astype(np.float32),
            np.stack(values).astype(np.float32),
        )

    def _qkv(self, il: int, x: Array, pos: NDArray[np.integer]) -> tuple[Array, Array, Array]:
        """Queries, keys and values by head, [n_head or n_head_kv, n_tokens, head_dim].

        phi3 stacks the three matrices in one, qwen2 adds biases (`build_qkv`, llama-graph.cpp);
        qwen3 and gemma3 norm each head's query and key before RoPE (src/models/qwen3.cpp).
        """
        shape, w, b = self.shape, self._w, f"blk.{il}."
        sizes = np.array([shape.n_head, shape.n_head_kv, shape.n_head_kv]) * shape.head_dim
        if shape.arch == "phi3":
            flat = np.split(x @ w[b + "attn_qkv.weight"].T, np.cumsum(sizes)[:-1], axis=-1)
        else:
            flat = [x @ w[f"{b}attn_{part}.weight"].T for part in "qkv"]
        if shape.arch == "qwen2":
            flat = [y + w[f"{b}attn_{part}.bias"] for y, part in zip(flat, "qkv", strict=True)]
        q, k, v = (y.reshape(len(x), -1, shape.head_dim).swapaxes(0, 1) for y in flat)
        if shape.arch in ("qwen3", "gemma3"):
            q, k = self._norm(q, b + "attn_q_norm"), self._norm(k, b + "attn_k_norm")
        base = shape.rope_base_swa if shape.is_local(il) else shape.rope_base
        return _rope(q, pos, base, shape.arch), _rope(k, pos, base, shape.arch), v

    def _turned_scores(
        self, h: int, q: Array, k: Array, by: NDArray[np.integer], seen: Visible
    ) -> Array:
        """q.k of one head, [query, key], with the keys that a query sees turned for it."""
        scores = np.empty((len(q), len(k)))
        end = len(q)
        while end > 0:
            # the newest query left, and those before it that see their keys turned as it does
            same = ((by[h, :end] == by[h, end - 1]) | ~seen[h, :end]).all(axis=-1)
            start = int(np.max(np.flatnonzero(~same), initial=-1)) + 1
            keys = _rope(k, by[h, end - 1], self.shape.rope_base, self.shape.arch)
            scores[start:end] = q[start:end] @ keys.T
            end = start
        return scores

    def _mask(self, il: int, pos: NDArray[np.integer]) -> Visible:
        """Causal mask by position, and the window on local layers, [n_tokens, n_tokens].

        A local layer hides keys at a distance of n_swa or more (`is_masked_swa`, llama-hparams.h).
        """
        distance = pos[:, None] - pos[None, :]
        causal: Visible = distance >= 0
        if self.shape.is_local(il):
            causal &= distance < self.shape.sliding_window
        return causal

    def _ffn(self, il: int, x: Array) -> Array:
        """down(act(gate(x)) * up(x)), act = SiLU, for gemma3 GELU (`build_ffn`, llama-graph.cpp).

        phi3's ffn_up holds gate and up, in this order (`ggml_swiglu`).
        """
        w, b = self._w, f"blk.{il}.ffn_"
        if self.shape.arch == "phi3":
            gate, up = np.split(x @ w[b + "up.weight"].T, 2, axis=-1)
        else:
            gate, up = x @ w[b + "gate.weight"].T, x @ w[b + "up.weight"].T
        act = _gelu(gate) if self.shape.arch == "gemma3" else _silu(gate)
        return (act * up) @ w[b + "down.weight"].T

    def _norm(self, x: Array, name: str) -> Array:
        """RMS norm over the last axis, eps inside the root (`ggml_rms_norm`, ggml-cpu/ops.cpp)."""
        rms: Array = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.shape.norm_eps)
        return x / rms * self._w[name + ".weight"]


def _attention(
    q: Array,
    k: Array,
    v: Array,
    mask: Visible,
    turn: Callable[[int, Array, Array], Array] | None = None,
    paid: list[Array] | None = None,
) -> Array:
    """softmax(q.k / sqrt(head_dim)) v over the visible tokens, [n_tokens, n_head * head_dim].

    q [n_head, n_tokens, head_dim], k and v [n_head_kv, ...], mask [n_head_kv, n_tokens, n_tokens].
    Neighbouring query heads share a KV head (`build_attn_mha`, llama-graph.cpp).
    """
    if not mask.any(axis=-1).all():
        raise ValueError("every query must see at least one token in every head")
    group = len(q) // len(k)
    out = np.empty_like(q)
    weights = np.empty((len(q), q.shape[1], q.shape[1]))
    for h in range(len(q)):
        kv = h // group
        scores = q[h] @ k[kv].T if turn is None else turn(kv, q[h], k[kv])
        scores /= np.sqrt(q.shape[-1])
        scores[~mask[kv]] = -np.inf
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights[h] = p / p.sum(axis=-1, keepdims=True)
        out[h] = weights[h] @ v[kv]
    if paid is not None:
        paid.append(weights)
    return out.swapaxes(0, 1).reshape(q.shape[1], -1)


def _rope(x: Array, pos: NDArray[np.integer], base: float, arch: str) -> Array:
    """Rotate pair i of each head by the angle pos * base^(-2i/head_dim); x [..., n_tokens, dim].

    llama pairs neighbours (NORM), the others element i with i + dim/2 (NEOX): see
    `llama_model_rope_type`, llama-model.cpp, and `ggml_compute_forward_rope`, ggml-cpu/ops.cpp.
    """
    dim = x.shape[-1]
    angle = pos[..., None] * base ** (-2.0 * np.arange(dim // 2) / dim)
    cos, sin = np.cos(angle), np.sin(angle)
    if arch == "llama":
        first, second = slice(0, dim, 2), slice(1, dim, 2)
    else:
        first, second = slice(0, dim // 2), slice(dim // 2, dim)
    a, b = x[..., first], x[..., second]
    out = np.empty((*np.broadcast_shapes(x.shape[:-1], pos.shape), dim))
    out[..., first], out[..., second] = a * cos - b * sin, a * sin + b * cos
    return out


def _silu(x: Array) -> Array:
    """x * sigmoid(x) (`ggml_silu_f32`, ggml-cpu/vec.h)."""
    return x / (1.0 + np.exp(-x))


def _gelu(x: Array) -> Array:
    """The tanh form of GELU (`ggml_gelu_f32`, ggml-cpu/vec.h)."""
    inner: Array = np.sqrt(2.0 / np.pi) * x * (1.0 + 0.044715 * x * x)
    return 0.5 * x * (1.0 + np.tanh(inner))
