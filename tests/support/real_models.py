"""Models that others made, as the numpy reference of the tiny models computes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from numpy.typing import NDArray

from kvp_edge import Llama
from makers.gguf_models import ModelShape

from .quantised import quantise
from .reference import Reference

#: scripts/real_models.py. The larger two take minutes, and what is run for every change has none.
SMOLLM2, QWEN, GEMMA = "smollm2", "qwen", "gemma"
PLAIN = [SMOLLM2, pytest.param(QWEN, marks=pytest.mark.slow)]
ALL = [*PLAIN, pytest.param(GEMMA, marks=pytest.mark.slow)]


def read_reference(path: str | Path) -> Reference:
    """The model of a llama, qwen2 or gemma3 file in float64, its weights de-quantised.

    What such files leave out is what llama.cpp then takes (``load_arch_hparams`` in
    src/models/<arch>.cpp): gemma3's window has another base of RoPE, and each sixth layer none.
    """
    reader = gguf.GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()

    def key(name: str, default: Any = None) -> Any:
        field = reader.fields.get(f"{arch}.{name}")
        return default if field is None else field.contents()

    weights = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(
            tuple(int(n) for n in reversed(tensor.shape))
        )
        for tensor in reader.tensors
    }
    weights.setdefault("output.weight", weights["token_embd.weight"])
    n_embd, n_head = key("embedding_length"), key("attention.head_count")
    shape = ModelShape(
        arch,
        n_layer=key("block_count"),
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=key("attention.head_count_kv"),
        head_dim=key("attention.key_length", n_embd // n_head),
        n_ff=key("feed_forward_length"),
        n_vocab=len(weights["token_embd.weight"]),
        n_ctx_train=key("context_length"),
        rope_base=key("rope.freq_base"),
        rope_base_swa=key("rope.freq_base_swa", 10000.0),
        sliding_window=key("attention.sliding_window", 0),
        sliding_pattern=6,
        norm_eps=key("attention.layer_norm_rms_epsilon"),
    )
    return Reference(shape, weights)


def write_exact(path: str | Path, target: Path) -> Path:
    """A copy of a model with the same weights as f32. With quantised ones llama.cpp rounds what it
    multiplies with them, too, with f16 ones on some processors, and no reference can follow it
    closely."""
    return quantise(path, target, llama_cpp.LLAMA_FTYPE_ALL_F32)


def newest_logits(llm: llama_cpp.Llama) -> NDArray[np.float32]:
    """[n_vocab], after the token read last; a copy."""
    row = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
    return np.array(np.ctypeslib.as_array(row, shape=(llm.n_vocab(),)))


def tokens_of(llm: Llama, text: str, n: int) -> list[int]:
    """The first ``n`` tokens of a text, and before them <s> where the model wants it."""
    tokens = llm.tokenize(text.encode(), add_bos=True)
    assert len(tokens) >= n
    return tokens[:n]
