"""The PyTorch twin of a GGUF model against llama.cpp and the numpy reference.

Logits are compared by their largest difference over the standard deviation of all logits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from gguf import GGUFWriter

from support.packages import needs

torch = needs("torch", "train")

from conftest import RandomModel, random_tokens  # noqa: E402
from kvp_edge import Llama, UnsupportedModelError  # noqa: E402
from kvp_edge.errors import TrainingError  # noqa: E402
from kvp_edge.training.twin import Twin  # noqa: E402
from makers.gguf_models import ModelShape, write_model, write_mpt  # noqa: E402
from support.noise import Noise  # noqa: E402
from support.quantised import quantise  # noqa: E402
from support.real_models import write_exact  # noqa: E402

Maker = Callable[[ModelShape], RandomModel]
Loader = Callable[..., Llama]

EXACT = 1e-4
"""f32 against f32; measured: 2e-5 for llama.cpp, 1e-5 for the reference."""
EXACT_GELU = 0.01
"""ggml looks GELU up in an f16 table; measured: 0.004."""

SHAPES = {
    "llama": ModelShape("llama"),
    "llama, f16 weights": ModelShape("llama", weight_type="f16"),
    "qwen2, one KV head": ModelShape("qwen2", n_embd=256, head_dim=64, n_head_kv=1),
    "qwen3, no GQA": ModelShape("qwen3", head_dim=64, n_head_kv=4),
    "gemma3, no window": ModelShape("gemma3"),
    "gemma3, sliding window": ModelShape("gemma3", n_layer=4, sliding_window=24),
    "phi3": ModelShape("phi3"),
}
LLAMA, WINDOW = SHAPES["llama"], SHAPES["gemma3, sliding window"]
ONE_OF_EACH = ["llama", "qwen2, one KV head", "qwen3, no GQA", "gemma3, sliding window", "phi3"]
F32 = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
N = 120
TOKENS = random_tokens(N)


def tolerance(shape: ModelShape) -> float:
    return EXACT_GELU if shape.arch == "gemma3" else EXACT


def difference(got: Any, want: Any) -> float:
    return float(np.abs(got - want).max() / want.std())


def llama_logits(path: str | Path, tokens: list[int] = TOKENS) -> Any:
    """f32 [T, n_vocab] by llama.cpp itself, with an f32 cache and without flash attention."""
    one = {"n_threads": 1, "n_threads_batch": 1, "verbose": False}
    llm = llama_cpp.Llama(str(path), n_ctx=256, n_batch=256, logits_all=True, **F32, **one)
    try:
        llm.eval(tokens)
        return np.array(llm.scores[: len(tokens)])
    finally:
        llm.close()


def twin_logits(twin: Twin, tokens: list[int] = TOKENS, bias: Any = None) -> Any:
    with torch.no_grad():
        return twin(torch.tensor([tokens]), bias)[0].numpy()


# -- logits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_llama_cpps(name: str, random_model: Maker, tmp_path: Path) -> None:
    model = random_model(SHAPES[name])
    got = twin_logits(Twin.load(model.path))
    exact = write_exact(model.path, tmp_path / "exact.gguf")
    assert difference(got, llama_logits(exact)) < tolerance(model.shape)
    assert difference(got, model.reference.logits(TOKENS)) < EXACT


def test_logits_of_the_bundled_model_are_llama_cpps(bundled_model: str, tmp_path: Path) -> None:
    """An f16 file with tied output embeddings."""
    tokens = np.random.default_rng(0).integers(5, 4000, 200).tolist()
    got = twin_logits(Twin.load(bundled_model), tokens)
    exact = write_exact(bundled_model, tmp_path / "exact.gguf")
    assert difference(got, llama_logits(exact, tokens)) < EXACT


@pytest.mark.parametrize(
    "ftype",
    [
        llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
        llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
        llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    ],
    ids=["q8_0", "q4_0", "bf16"],
)
def test_logits_of_a_quantised_file_are_llama_cpps_with_the_same_weights(
    ftype: int, random_model: Maker, tmp_path: Path
) -> None:
    """llama.cpp gets them as f32: it would round activations to the weights' type, too."""
    plain = random_model(LLAMA).path
    quantised = quantise(plain, tmp_path / "quantised.gguf", ftype)
    again = quantise(quantised, tmp_path / "f32.gguf", llama_cpp.LLAMA_FTYPE_ALL_F32)
    got = twin_logits(Twin.load(quantised))
    assert difference(got, llama_logits(again)) < EXACT
    assert difference(got, llama_logits(plain)) > 100 * EXACT


def linear(writer: GGUFWriter) -> None:
    from gguf import RopeScalingType

    writer.add_rope_scaling_type(RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


def unscaled(writer: GGUFWriter) -> None:
    from gguf import RopeScalingType

    writer.add_rope_scaling_type(RopeScalingType.NONE)
    writer.add_rope_scaling_factor(4.0)


def factors(writer: GGUFWriter) -> None:
    writer.add_tensor("rope_freqs.weight", np.geomspace(1, 8, 16, dtype=np.float32))


def biases(writer: GGUFWriter) -> None:
    rng = np.random.default_rng(1)
    for name, n in (("attn_k", 64), ("attn_output", 128), ("ffn_up", 192), ("ffn_down", 128)):
        writer.add_tensor(f"blk.1.{name}.bias", rng.normal(size=n).astype(np.float32))


def neutral(writer: GGUFWriter) -> None:
    for key in ("expert_count", "attention.sliding_window"):
        writer.add_uint32(f"llama.{key}", 0)
    writer.add_float32("llama.rope.scaling.attn_factor", 1.0)


@pytest.mark.parametrize(
    ("shape", "extra", "changes"),
    [
        (LLAMA, linear, True),
        (WINDOW, linear, True),
        (LLAMA, unscaled, False),
        (LLAMA, factors, True),
        (LLAMA, biases, True),
        (LLAMA, neutral, False),
        (SHAPES["phi3"], lambda w: w.add_sliding_window(24), False),  # llama.cpp does not use it
    ],
)
def test_what_a_file_adds_is_computed_as_llama_cpp_does(
    shape: ModelShape, extra: Any, changes: bool, random_model: Maker, tmp_path: Path
) -> None:
    path = tmp_path / "extra.gguf"
    write_model(path, shape, extra)
    got = twin_logits(Twin.load(path))
    assert difference(got, llama_logits(path)) < tolerance(shape)
    plain = llama_logits(random_model(shape).path)
    assert (difference(got, plain) > 0.5) == changes


def test_texts_of_a_batch_do_not_see_each_other(random_model: Maker) -> None:
    twin = Twin.load(random_model(WINDOW).path)
    both = torch.tensor([TOKENS, random_tokens(N, seed=1)])
    with torch.no_grad():
        together = twin(both)
        apart = torch.cat([twin(both[:1]), twin(both[1:])])
    assert together.shape == (2, N, WINDOW.n_vocab)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


# -- the bias --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_bias_gets_the_keys_and_values_that_llama_cpp_caches(
    name: str, random_model: Maker, load: Loader
) -> None:
    model = random_model(SHAPES[name])
    llm = load(model.path, n_ctx=512, kv_budget=256, **F32)
    llm.eval(TOKENS)
    assert llm.kv is not None
    cache = llm.kv.cache
    _, keys, values = cache.read(0, N, N)
    twin, got = Twin.load(model.path), {}

    def bias(layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        got[layer] = keys[0].numpy(), values[0].numpy()

    twin_logits(twin, bias=bias)
    s = cache.shape
    assert (twin.n_layer, twin.n_head_kv) == (s.n_layer, s.n_head_kv)
    assert (twin.head_size_k, twin.head_size_v) == (s.head_size_k, s.head_size_v)
    assert list(got) == list(range(s.n_layer))
    limit = tolerance(model.shape)
    for layer, (k, v) in got.items():
        np.testing.assert_allclose(k, keys[layer], rtol=limit, atol=limit)
        np.testing.assert_allclose(v, values[layer], rtol=limit, atol=limit)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_keys_hidden_by_the_bias_are_as_if_evicted_from_llama_cpps_cache(
    name: str, random_model: Maker, load: Loader
) -> None:
    """Every head keeps its own tokens."""
    model, border = random_model(SHAPES[name]), 90
    llm = load(
        model.path,
        n_ctx=512,
        kv_budget=40,
        recent=8,
        reserve=200,
        policy=Noise(),
        granularity="head",
        logits_all=True,
        **F32,
    )
    llm.eval(TOKENS[:border])
    llm.evict()
    held = llm.kv_indices
    assert held.shape[2] == 40
    llm.eval(TOKENS[border:])
    keep = torch.zeros(*held.shape[:2], N, dtype=torch.bool)
    keep[..., border:] = True
    keep.scatter_(2, torch.from_numpy(held).long(), True)

    def bias(layer: int, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        added = torch.zeros(1, keep.shape[1], N, N)
        hidden = ~keep[layer][None, :, None].expand_as(added).clone()
        hidden[:, :, :border] = False  # what came before the eviction saw everything
        return added.masked_fill(hidden, -torch.inf)

    twin = Twin.load(model.path)
    got = twin_logits(twin, bias=bias)
    assert difference(got, np.array(llm.scores[:N])) < tolerance(model.shape)
    assert difference(twin_logits(twin), got) > 0.5


def test_a_bias_of_nothing_or_of_zeros_changes_nothing(random_model: Maker) -> None:
    twin = Twin.load(random_model(WINDOW).path)
    plain = twin_logits(twin)
    assert difference(twin_logits(twin, bias=lambda *_: None), plain) == 0
    zeros = twin_logits(twin, bias=lambda *_: torch.zeros(()))
    assert difference(zeros, plain) < EXACT


def test_gradients_reach_what_makes_the_bias_and_no_weight(random_model: Maker) -> None:
    twin = Twin.load(random_model(LLAMA).path)
    gate = torch.full((twin.n_layer, 1, twin.n_head_kv, 1, N), -0.5, requires_grad=True)
    twin(torch.tensor([TOKENS]), lambda layer, keys, values: gate[layer]).square().mean().backward()
    assert gate.grad is not None
    assert (gate.grad != 0).float().mean() > 0.9
    assert not list(twin.parameters())
    assert not any(buffer.requires_grad for buffer in twin.buffers())


# -- refusals --------------------------------------------------------------------------------


def soft_cap(writer: GGUFWriter) -> None:
    writer.add_final_logit_softcapping(30.0)


def attention_scale(writer: GGUFWriter) -> None:
    writer.add_attention_scale(0.5)


def sinks(writer: GGUFWriter) -> None:
    writer.add_tensor("blk.1.attn_sinks.weight", np.zeros(4, np.float32))


def experts(writer: GGUFWriter) -> None:
    writer.add_expert_count(4)


def yarn(writer: GGUFWriter) -> None:
    from gguf import RopeScalingType

    writer.add_rope_scaling_type(RopeScalingType.YARN)


def long_rope(writer: GGUFWriter) -> None:
    writer.add_tensor("rope_factors_long.weight", np.ones(16, np.float32))


@pytest.mark.parametrize(
    ("arch", "extra", "names"),
    [
        ("gemma3", soft_cap, "gemma3.final_logit_softcapping = 30.0"),
        ("llama", attention_scale, "llama.attention.scale = 0.5"),
        ("qwen3", sinks, "tensor blk.1.attn_sinks.weight"),
        ("llama", experts, "llama.expert_count = 4"),
        ("qwen2", yarn, "qwen2.rope.scaling.type = yarn"),
        ("phi3", long_rope, "tensor rope_factors_long.weight"),
    ],
)
def test_what_the_twin_does_not_compute_is_refused_by_name(
    arch: Any, extra: Any, names: str, tmp_path: Path
) -> None:
    path = tmp_path / "extra.gguf"
    write_model(path, ModelShape(arch), extra)
    with pytest.raises(TrainingError, match=names) as caught:
        Twin.load(path)
    assert f"architecture '{arch}'" in str(caught.value)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    write_mpt(tmp_path / "mpt.gguf")
    with pytest.raises(
        TrainingError, match="architecture 'mpt', but the PyTorch twin supports llama"
    ):
        Twin.load(tmp_path / "mpt.gguf")


def test_a_missing_foreign_or_damaged_file_is_refused(random_model: Maker, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="missing"):
        Twin.load(tmp_path / "nothing.gguf")
    (tmp_path / "text.gguf").write_text("not a model")
    with pytest.raises(UnsupportedModelError, match="another format"):
        Twin.load(tmp_path / "text.gguf")
    whole = Path(random_model(LLAMA).path).read_bytes()
    (tmp_path / "half.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises((TrainingError, UnsupportedModelError), match="cut short|truncated"):
        Twin.load(tmp_path / "half.gguf")


def write_some(path: Path, **keys: Any) -> None:
    """A llama file with some keys and one tensor."""
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(9)
    writer.add_embedding_length(8)
    writer.add_block_count(2)
    for key, value in keys.items():
        getattr(writer, f"add_{key}")(value)
    writer.add_tensor("output_norm.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_part_of_a_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "part.gguf"
    write_some(path, head_count=2)
    with pytest.raises(TrainingError, match=r"lacks the tensor .* llama-gguf-split --merge"):
        Twin.load(path)


def test_layers_with_different_numbers_of_heads_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "uneven.gguf"
    write_some(path, head_count=2, head_count_kv=[2, 1])
    with pytest.raises(TrainingError, match=r"head_count_kv = \[2, 1\], which differs between"):
        Twin.load(path)
