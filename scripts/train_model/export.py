"""Write the trained model as a GGUF file that stock llama.cpp loads, chat template included."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer

from .model import Model
from .tokenizer import BOS, END, SPECIAL_TOKENS

NAME = "Bookworm 4M"
LICENSE = "mit"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + "
    "message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
FILE_TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_LAYER_TENSORS = {
    "attn_norm": "attn_norm",
    "q.weight": "attn_q",
    "k.weight": "attn_k",
    "v.weight": "attn_v",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "o.weight": "attn_output",
    "ff_norm": "ffn_norm",
    "gate.weight": "ffn_gate",
    "up.weight": "ffn_up",
    "down.weight": "ffn_down",
}


def tensors(model: Model) -> dict[str, np.ndarray]:
    """GGUF name -> float32 array in PyTorch's [rows, columns] order."""
    state = {
        name: value.detach().float().cpu().numpy() for name, value in model.state_dict().items()
    }
    named = {"token_embd.weight": state["embed.weight"], "output_norm.weight": state["norm"]}
    for layer in range(model.config.n_layer):
        for ours, theirs in _LAYER_TENSORS.items():
            named[f"blk.{layer}.{theirs}.weight"] = state[f"blocks.{layer}.{ours}"]
    return named


def write_gguf(
    path: Path,
    model: Model,
    tokenizer: Tokenizer,
    context: int,
    facts: dict[str, str | int],
    file_type: str = "f16",
) -> None:
    """Write the model; `facts` (how it was trained) are stored under `kvp_edge.training.*`.

    Norm weights stay float32 in every file type: they are tiny and llama.cpp expects it.
    """
    config = model.config
    matrix_type, declared_type = FILE_TYPES[file_type]
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_name(NAME)
    writer.add_license(LICENSE)
    writer.add_description(
        "Small language model that looks things up in its context; made to study KV-cache eviction."
    )
    writer.add_languages(["en"])
    writer.add_size_label(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M")
    writer.add_file_type(declared_type)
    for key, value in facts.items():
        add = writer.add_uint64 if isinstance(value, int) else writer.add_string
        add(f"kvp_edge.training.{key}", value)

    writer.add_context_length(context)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.ff_width)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_head_kv)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rope_base)

    bpe = json.loads(tokenizer.to_str())["model"]
    ranked = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(ranked)
    writer.add_token_types([control if token in SPECIAL_TOKENS else normal for token in ranked])
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(END)
    writer.add_eot_token_id(END)
    writer.add_add_bos_token(True)
    writer.add_chat_template(CHAT_TEMPLATE)

    for name, value in tensors(model).items():
        kind = matrix_type if value.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load_checkpoint(path: Path, model: Model) -> Model:
    """Fill `model` with the master weights of a training checkpoint."""
    model.load_state_dict(torch.load(path, map_location="cpu")["model"])
    return model
