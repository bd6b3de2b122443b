"""Write tiny random-weight GGUF models that llama.cpp loads and runs.

Everything is drawn from a seed, so the same shape gives the same file. Tensor names and metadata
keys are those of llama.cpp's src/llama-arch.cpp; which tensors an architecture needs is in its
src/models/<arch>.cpp (`load_arch_tensors`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Literal, get_args

import numpy as np
from gguf import GGUFWriter, TokenType
from numpy.typing import NDArray

Arch = Literal["llama", "qwen2", "qwen3", "gemma3", "phi3"]
WeightType = Literal["f32", "f16"]

Weights = dict[str, NDArray[np.float32]]
"""Tensors by GGUF name; a matrix is [n_out, n_in], so a layer computes `x @ w.T`."""

SPECIAL_TOKENS = ("<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>", "<|system|>")
BOS, EOS, USER, ASSISTANT, END, SYSTEM = range(len(SPECIAL_TOKENS))

# A byte-level BPE spells the space as U+0120; each merge joins two tokens that exist before it.
MERGES = (
    "t h", "th e", "\u0120 the", "i n", "e r", "a n", "\u0120 a", "o n", "r e", "in g",
    "\u0120 t", "\u0120t o", "o u", "an d", "\u0120 and",
)  # fmt: skip

CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for m in messages -%}"
    "{{- '<|' + m['role'] + '|>' + m['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

_N_TEXT_TOKENS = 256 + len(MERGES)
_N_VOCAB_MIN = len(SPECIAL_TOKENS) + _N_TEXT_TOKENS


@dataclass(frozen=True)
class ModelShape:
    """What a random model looks like.

    Keys and values have the same head size: each of these architectures asserts it in its graph.
    """

    arch: Arch = "llama"
    n_layer: int = 2
    n_embd: int = 128
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int = 32
    n_ff: int = 192
    n_vocab: int = 320
    n_ctx_train: int = 8192
    rope_base: float = 10000.0
    rope_base_swa: float = 1000.0
    """RoPE base of gemma3's local layers."""
    sliding_window: int = 0
    """Tokens a local layer sees, the query's own included (gemma3 only); 0: no local layers."""
    sliding_pattern: int = 2
    """Every how many layers one is global; the others are local."""
    norm_eps: float = 1e-6
    weight_type: WeightType = "f32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.arch not in get_args(Arch):
            raise ValueError(f"unknown architecture {self.arch!r}")
        if self.n_head % self.n_head_kv:
            raise ValueError("n_head must be a multiple of n_head_kv")
        if self.n_vocab < _N_VOCAB_MIN:
            raise ValueError(f"n_vocab must be at least {_N_VOCAB_MIN}")
        if self.arch in ("qwen2", "phi3") and self.n_head * self.head_dim != self.n_embd:
            raise ValueError(f"{self.arch} needs n_head * head_dim == n_embd")
        if self.sliding_window and self.arch != "gemma3":
            raise ValueError("only gemma3 has a sliding window here")

    def is_local(self, layer: int) -> bool:
        """Whether a layer sees only the sliding window (`set_swa_pattern`, llama-hparams.cpp)."""
        last = self.sliding_pattern - 1
        return self.sliding_window > 0 and layer % self.sliding_pattern < last


#: The shape of common 0.5B models, for benchmarks.
HALF_B = ModelShape(
    "qwen2",
    n_layer=24,
    n_embd=896,
    n_head=14,
    n_head_kv=2,
    head_dim=64,
    n_ff=4864,
    n_ctx_train=32768,
    weight_type="f16",
)


def write_model(
    path: str | PathLike[str],
    shape: ModelShape,
    extra: Callable[[GGUFWriter], None] = lambda writer: None,
) -> Weights:
    """Write a random model; return its weights as llama.cpp sees them (after rounding to f16).

    ``extra`` may add metadata and tensors that the reference does not know of.
    """
    weights = _draw_weights(shape)
    writer = GGUFWriter(fspath(path), shape.arch)
    writer.add_block_count(shape.n_layer)
    writer.add_context_length(shape.n_ctx_train)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    if shape.sliding_window:
        writer.add_sliding_window(shape.sliding_window)
        writer.add_sliding_window_pattern(shape.sliding_pattern)
        writer.add_rope_freq_base_swa(shape.rope_base_swa)
    _add_tokenizer(writer, shape.n_vocab)
    extra(writer)
    for name, tensor in weights.items():
        # ggml adds and multiplies biases and norms in f32 only
        as_f16 = shape.weight_type == "f16" and tensor.ndim == 2
        writer.add_tensor(name, tensor.astype(np.float16) if as_f16 else tensor)
    _close(writer)
    return weights


def write_mamba(path: str | PathLike[str]) -> None:
    """Write a one-layer Mamba: a recurrent state and no KV cache (src/models/mamba.cpp)."""
    n_embd, d_inner, d_state, d_conv, dt_rank, n_vocab = 32, 64, 16, 4, 2, 320
    writer = GGUFWriter(fspath(path), "mamba")
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(n_embd)
    writer.add_ssm_conv_kernel(d_conv)
    writer.add_ssm_inner_size(d_inner)
    writer.add_ssm_state_size(d_state)
    writer.add_ssm_time_step_rank(dt_rank)
    writer.add_layer_norm_rms_eps(1e-5)
    _add_tokenizer(writer, n_vocab)
    rng = np.random.default_rng(0)
    tensors = {
        "token_embd.weight": _normal(rng, 1.0, n_vocab, n_embd),
        "output_norm.weight": _norm(rng, n_embd),
        "blk.0.attn_norm.weight": _norm(rng, n_embd),
        "blk.0.ssm_in.weight": _linear(rng, 2 * d_inner, n_embd),
        "blk.0.ssm_conv1d.weight": _linear(rng, d_inner, d_conv),
        "blk.0.ssm_conv1d.bias": _normal(rng, 0.1, d_inner),
        "blk.0.ssm_x.weight": _linear(rng, dt_rank + 2 * d_state, d_inner),
        "blk.0.ssm_dt.weight": _linear(rng, d_inner, dt_rank),
        "blk.0.ssm_dt.bias": _normal(rng, 0.1, d_inner),
        # a state decays, so A is negative
        "blk.0.ssm_a": -np.exp(_normal(rng, 1.0, d_inner, d_state)),
        "blk.0.ssm_d": _norm(rng, d_inner),
        "blk.0.ssm_out.weight": _linear(rng, n_embd, d_inner),
    }
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    _close(writer)


def write_bert(path: str | PathLike[str]) -> None:
    """Write a one-layer BERT: an encoder, so no cache of any kind (src/models/bert.cpp)."""
    n_embd, n_head, n_ff, n_ctx, n_vocab = 32, 2, 64, 128, 320
    writer = GGUFWriter(fspath(path), "bert")
    writer.add_block_count(1)
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_causal_attention(False)
    writer.add_token_type_count(2)
    _add_tokenizer(writer, n_vocab)
    rng = np.random.default_rng(0)
    tensors = {
        "token_embd.weight": _normal(rng, 1.0, n_vocab, n_embd),
        "token_types.weight": _normal(rng, 0.1, 2, n_embd),
        "position_embd.weight": _normal(rng, 0.1, n_ctx, n_embd),
    }
    for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
        tensors[f"blk.0.{part}.weight"] = _linear(rng, n_embd, n_embd)
    tensors["blk.0.ffn_up.weight"] = _linear(rng, n_ff, n_embd)
    tensors["blk.0.ffn_down.weight"] = _linear(rng, n_embd, n_ff)
    for norm in ("token_embd_norm", "blk.0.attn_output_norm", "blk.0.layer_output_norm"):
        tensors[f"{norm}.weight"] = _norm(rng, n_embd)
        tensors[f"{norm}.bias"] = _normal(rng, 0.1, n_embd)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    _close(writer)


def write_mpt(path: str | PathLike[str]) -> None:
    """Write a two-layer MPT: no RoPE, positions reach attention as ALiBi (models/mpt.cpp)."""
    n_embd, n_head, n_ff, n_vocab = 64, 4, 96, 320
    writer = GGUFWriter(fspath(path), "mpt")
    writer.add_block_count(2)
    writer.add_context_length(2048)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_max_alibi_bias(8.0)
    _add_tokenizer(writer, n_vocab)
    rng = np.random.default_rng(0)
    tensors = {
        "token_embd.weight": _normal(rng, 1.0, n_vocab, n_embd),
        "output_norm.weight": _norm(rng, n_embd),
        "output.weight": _linear(rng, n_vocab, n_embd),
    }
    for il in range(2):
        b = f"blk.{il}."
        tensors[b + "attn_norm.weight"] = _norm(rng, n_embd)
        tensors[b + "attn_qkv.weight"] = _linear(rng, 3 * n_embd, n_embd)
        tensors[b + "attn_output.weight"] = _linear(rng, n_embd, n_embd, 2.0)
        tensors[b + "ffn_norm.weight"] = _norm(rng, n_embd)
        tensors[b + "ffn_up.weight"] = _linear(rng, n_ff, n_embd)
        tensors[b + "ffn_down.weight"] = _linear(rng, n_embd, n_ff)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    _close(writer)


def write_vocabulary(
    path: str | PathLike[str],
    kind: Literal["bpe", "spm"],
    special: dict[str, TokenType],
    *,
    name: str = "vocabulary",
    add_eos: bool = False,
) -> None:
    """Write a GGUF file of a tokenizer alone, for ``vocab_only=True``.

    Args:
        special: tokens besides <s>, </s> and (spm) <unk>, and what they are.
        name: of the model. With "phi-3" in it llama.cpp lets special tokens of the kind <|...|>
            strip the white space behind them, with "modern-bert" [MASK] that before it.
    """
    writer = GGUFWriter(fspath(path), "llama")
    writer.add_name(name)
    tokens = {"<s>": TokenType.CONTROL, "</s>": TokenType.CONTROL}
    if kind == "bpe":
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges(MERGES)
        text = [*_byte_symbols(), *(merge.replace(" ", "") for merge in MERGES)]
        tokens |= special | dict.fromkeys(text, TokenType.NORMAL)
    else:
        writer.add_tokenizer_model("llama")
        text = [*"\u2581abcdeghinort<|>\n", "\u2581a", "th", "the", "\u2581the", "in", "an"]
        tokens = {"<unk>": TokenType.UNKNOWN, **tokens, **special}
        tokens |= dict.fromkeys((f"<0x{b:02X}>" for b in range(256)), TokenType.BYTE)
        tokens |= {t: TokenType.NORMAL for t in text if t not in tokens}
        writer.add_token_scores([-float(i) for i in range(len(tokens))])
        writer.add_unk_token_id(0)
    writer.add_token_list(list(tokens))
    writer.add_token_types([int(kind) for kind in tokens.values()])
    writer.add_bos_token_id(list(tokens).index("<s>"))
    writer.add_eos_token_id(list(tokens).index("</s>"))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(add_eos)
    _close(writer)


def _draw_weights(shape: ModelShape) -> Weights:
    """Random weights scaled so that attention is peaked and removing a token shows in the logits.

    With entries of variance 1/n_in a projection keeps the RMS-normed input's scale of 1, so
    `scale` is the standard deviation of what it puts out.
    """
    rng = np.random.default_rng(shape.seed)
    n_embd, n_ff = shape.n_embd, shape.n_ff
    n_q, n_kv = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
    # gemma3 multiplies its embeddings by sqrt(n_embd)
    embd_std = n_embd**-0.5 if shape.arch == "gemma3" else 1.0
    # q and k of this size give scores q.k/sqrt(head_dim) a standard deviation of 2
    qk_std = 2.0**0.5

    w: Weights = {"token_embd.weight": _normal(rng, embd_std, shape.n_vocab, n_embd)}
    for il in range(shape.n_layer):
        b = f"blk.{il}."
        w[b + "attn_norm.weight"] = _norm(rng, n_embd)
        wq = _linear(rng, n_q, n_embd, qk_std)
        wk = _linear(rng, n_kv, n_embd, qk_std)
        wv = _linear(rng, n_kv, n_embd)
        if shape.arch == "phi3":
            w[b + "attn_qkv.weight"] = np.concatenate([wq, wk, wv])
        else:
            w[b + "attn_q.weight"], w[b + "attn_k.weight"], w[b + "attn_v.weight"] = wq, wk, wv
        if shape.arch == "qwen2":
            w[b + "attn_q.bias"] = _normal(rng, 0.3, n_q)
            w[b + "attn_k.bias"] = _normal(rng, 0.3, n_kv)
            w[b + "attn_v.bias"] = _normal(rng, 0.3, n_kv)
        if shape.arch in ("qwen3", "gemma3"):
            w[b + "attn_q_norm.weight"] = _norm(rng, shape.head_dim, qk_std)
            w[b + "attn_k_norm.weight"] = _norm(rng, shape.head_dim, qk_std)
        # an average over several tokens shrinks; the factor keeps attention as loud as the FFN
        w[b + "attn_output.weight"] = _linear(rng, n_embd, n_q, 2.0)
        w[b + "ffn_norm.weight"] = _norm(rng, n_embd)
        if shape.arch == "gemma3":
            w[b + "post_attention_norm.weight"] = _norm(rng, n_embd)
            w[b + "post_ffw_norm.weight"] = _norm(rng, n_embd)
        if shape.arch == "phi3":
            w[b + "ffn_up.weight"] = _linear(rng, 2 * n_ff, n_embd)
        else:
            w[b + "ffn_gate.weight"] = _linear(rng, n_ff, n_embd)
            w[b + "ffn_up.weight"] = _linear(rng, n_ff, n_embd)
        w[b + "ffn_down.weight"] = _linear(rng, n_embd, n_ff)
    w["output_norm.weight"] = _norm(rng, n_embd)
    output = _linear(rng, shape.n_vocab, n_embd, 3.0)
    output[_never_greedy(shape.n_vocab)] = 0.0
    w["output.weight"] = output

    if shape.weight_type == "f16":
        for name, tensor in w.items():
            if tensor.ndim == 2:
                w[name] = tensor.astype(np.float16).astype(np.float32)
    return w


def _never_greedy(n_vocab: int) -> NDArray[np.bool_]:
    """Tokens whose logit is 0, which is never the largest: all but visible ASCII and the merges.

    Greedy decoding then neither stops by itself nor writes broken UTF-8, during which
    `Llama.create_completion` would not count tokens and run past max_tokens.
    """
    silent = np.ones(n_vocab, bool)
    first_byte = len(SPECIAL_TOKENS)
    silent[first_byte + 0x20 : first_byte + 0x7F] = False
    silent[first_byte + 256 : _N_VOCAB_MIN] = False
    return silent


def _add_tokenizer(writer: GGUFWriter, n_vocab: int) -> None:
    """Add a byte-level BPE: special tokens, 256 bytes, merges, then unused tokens up to n_vocab."""
    text = [*_byte_symbols(), *(merge.replace(" ", "") for merge in MERGES)]
    n_unused = n_vocab - _N_VOCAB_MIN
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*SPECIAL_TOKENS, *text, *(f"<unused{i}>" for i in range(n_unused))])
    writer.add_token_types(
        [TokenType.CONTROL] * len(SPECIAL_TOKENS)
        + [TokenType.NORMAL] * len(text)
        + [TokenType.UNUSED] * n_unused
    )
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_eot_token_id(END)
    writer.add_add_bos_token(True)
    writer.add_chat_template(CHAT_TEMPLATE)


def _byte_symbols() -> list[str]:
    """How a byte-level BPE writes each byte: visible ones as they are, the others from U+0100 on.

    See `unicode_byte_to_utf8_map`, llama.cpp's src/unicode.cpp.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b if b in visible else next(others)) for b in range(256)]


def _normal(rng: np.random.Generator, std: float, *dims: int) -> NDArray[np.float32]:
    return (std * rng.standard_normal(dims)).astype(np.float32)


def _linear(
    rng: np.random.Generator, n_out: int, n_in: int, scale: float = 1.0
) -> NDArray[np.float32]:
    return _normal(rng, scale * n_in**-0.5, n_out, n_in)


def _norm(rng: np.random.Generator, n: int, scale: float = 1.0) -> NDArray[np.float32]:
    """RMS-norm weights around `scale`, uneven so that forgetting them shows."""
    return scale * (1.0 + _normal(rng, 0.1, n))


def _close(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
