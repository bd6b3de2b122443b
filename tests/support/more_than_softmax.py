"""Random models whose attention is more than softmax(scale q.k): soft caps, sinks, ALiBi."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from makers import gguf_models
from makers.gguf_models import ModelShape, write_model, write_mpt


def capped(weights: gguf_models.Weights, shape: ModelShape) -> None:
    """As gemma2 wants it (src/models/gemma2.cpp)."""
    del weights["output.weight"]
    for il in range(shape.n_layer):
        for norm in ("post_attention_norm", "post_ffw_norm"):
            weights[f"blk.{il}.{norm}.weight"] = np.ones(shape.n_embd, np.float32)


def with_sinks(weights: gguf_models.Weights, shape: ModelShape) -> None:
    """As gpt-oss wants it, with two experts (src/models/openai-moe.cpp)."""
    for il in range(shape.n_layer):
        b = f"blk.{il}."
        del weights[b + "ffn_norm.weight"]
        weights[b + "post_attention_norm.weight"] = np.ones(shape.n_embd, np.float32)
        weights[b + "attn_sinks.weight"] = np.zeros(shape.n_head, np.float32)
        weights[b + "attn_output.bias"] = np.zeros(shape.n_embd, np.float32)
        weights[b + "ffn_gate_inp.weight"] = np.ones((2, shape.n_embd), np.float32)
        weights[b + "ffn_gate_inp.bias"] = np.zeros(2, np.float32)
        for part in ("gate", "up", "down"):
            one = weights.pop(f"{b}ffn_{part}.weight")
            weights[f"{b}ffn_{part}_exps.weight"] = np.stack([one, one])
            weights[f"{b}ffn_{part}_exps.bias"] = np.zeros((2, len(one)), np.float32)


def write_more_than_a_softmax(path: Path, arch: str, window: int | None = 24) -> None:
    """A random model with soft caps (gemma2), attention sinks (gpt-oss) or ALiBi (mpt).

    Args:
        window: what the file says of the sliding window of gemma2 and gpt-oss; None: nothing.
    """
    if arch == "mpt":
        write_mpt(path)
        return
    normal = gguf_models._draw_weights

    def draw(shape: ModelShape) -> gguf_models.Weights:
        weights = normal(shape)
        (capped if arch == "gemma2" else with_sinks)(weights, shape)
        return weights

    def extra(writer: GGUFWriter) -> None:
        if window is not None:
            writer.add_sliding_window(window)
        if arch == "gemma2":
            writer.add_attn_logit_softcapping(50.0)
        else:
            writer.add_expert_count(2)
            writer.add_expert_used_count(1)
            writer.add_expert_feed_forward_length(ModelShape().n_ff)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_models, "GGUFWriter", lambda path, _: GGUFWriter(path, arch))
        patch.setattr(gguf_models, "_draw_weights", draw)
        write_model(path, ModelShape("llama"), extra)
