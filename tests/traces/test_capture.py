"""Captured attention, keys and values against the numpy reference of the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import RandomModel, random_tokens
from kvp_edge.binding.blocks import Blocks
from kvp_edge.binding.library import call
from kvp_edge.binding.structs import CacheShape
from kvp_edge.errors import KVCacheError, UnsupportedModelError
from kvp_edge.traces.tracer import Captured, Tracer, smallest_block
from makers import gguf_models
from makers.gguf_models import ModelShape, write_mamba, write_model
from support.more_than_softmax import write_more_than_a_softmax

F16, F32, BF16, Q8_0, Q4_0 = (
    llama_cpp.GGML_TYPE_F16,
    llama_cpp.GGML_TYPE_F32,
    30,  # GGML_TYPE_BF16 in ggml.h; llama_cpp has no name for it
    llama_cpp.GGML_TYPE_Q8_0,
    llama_cpp.GGML_TYPE_Q4_0,
)

SHAPES = {
    "llama, 2 queries to a key": ModelShape("llama", head_dim=32),
    "qwen2, 4 queries to a key": ModelShape("qwen2", n_embd=256, head_dim=64, n_head_kv=1),
    "qwen3, 1 query to a key": ModelShape("qwen3", head_dim=64, n_head=3, n_head_kv=3),
    "gemma3, sliding window": ModelShape("gemma3", n_layer=3, sliding_window=24),
}
N_TOKENS = 90

Maker = Callable[[ModelShape], RandomModel]
Trace = Callable[..., Tracer]
Sums = NDArray[np.float32]


@pytest.fixture
def tracer() -> Iterator[Trace]:
    """tracer(path, length, ...) -> Tracer, quiet and on one thread; closed after the test."""
    made: list[Tracer] = []

    def make(path: str, length: int = N_TOKENS, block: int | None = None, **kwargs: Any) -> Tracer:
        how = {"verbose": False, "n_threads": 1, "n_threads_batch": 1, **kwargs}
        made.append(Tracer(path, length, block, **how))
        return made[-1]

    yield make
    for each in made:
        each.close()


def expected(model: RandomModel, tokens: list[int]) -> Sums:
    """The largest attention of each group, [n_layer, n_head_kv, n_query, n_token], base layers."""
    paid = model.reference.attention(tokens)
    shape = model.shape
    base = [il for il in range(shape.n_layer) if not shape.is_local(il)]
    grouped = paid[base].reshape(len(base), shape.n_head_kv, -1, len(tokens), len(tokens))
    largest: Sums = grouped.max(axis=2)
    return largest


def block_sums(got: Captured) -> list[tuple[int, int, Sums]]:
    """(first query, end, sums of the tokens before the end) of every block."""
    out, begin, at = [], 0, 0
    for end in got.blocks.ends(len(got.tokens)):
        sums = got.sums[:, :, at : at + end].astype(np.float32) / got.blocks.scale
        out.append((begin, end, sums))
        begin, at = end, at + end
    return out


@pytest.mark.parametrize("flash", [False, True], ids=["as computed", "from queries"])
@pytest.mark.parametrize("n_ubatch", [7, 512])
@pytest.mark.parametrize("shape", SHAPES)
def test_block_sums_are_the_references_attention(
    shape: str, n_ubatch: int, flash: bool, random_model: Maker, tracer: Trace
) -> None:
    model = random_model(SHAPES[shape])
    tokens = random_tokens(N_TOKENS)
    how = {"type_k": F32, "type_v": F32, "flash_attn": flash}
    got = tracer(model.path, block=8, n_ubatch=n_ubatch, **how).capture(tokens, n_prompt=43)
    want = expected(model, tokens)
    # gemma3: ggml looks GELU up in an f16 table (see test_reference.py); flash attention is in f16
    tolerance = 0.01 if flash or model.shape.arch == "gemma3" else 1e-3
    for begin, end, sums in block_sums(got):
        np.testing.assert_allclose(
            sums, want[:, :, begin:end, :end].sum(axis=2), rtol=tolerance, atol=tolerance
        )
    assert [b for b, _, _ in block_sums(got)] == [0, *range(3, N_TOKENS, 8)]
    assert got.sums.shape == (*want.shape[:2], sum(e for _, e, _ in block_sums(got)))


def test_the_maximum_over_a_group_comes_before_the_sum(random_model: Maker, tracer: Trace) -> None:
    model = random_model(SHAPES["llama, 2 queries to a key"])
    tokens = random_tokens(N_TOKENS)
    got = tracer(model.path, block=128, type_k=F32, type_v=F32).capture(tokens, N_TOKENS)
    [(_, _, sums)] = block_sums(got)
    paid = model.reference.attention(tokens).reshape(2, 2, 2, N_TOKENS, N_TOKENS)
    sum_first = paid.sum(axis=3).max(axis=2)
    np.testing.assert_allclose(sums, paid.max(axis=2).sum(axis=2), rtol=1e-3, atol=1e-4)
    assert np.abs(sums - sum_first).max() > 0.5


@pytest.mark.parametrize("types", [(F32, F32), (F16, F16), (BF16, BF16), (Q8_0, F16)])
def test_keys_and_values_are_the_references(
    types: tuple[int, int], random_model: Maker, tracer: Trace
) -> None:
    model = random_model(SHAPES["qwen2, 4 queries to a key"])
    tokens = random_tokens(N_TOKENS)
    got = tracer(model.path, type_k=types[0], type_v=types[1]).capture(tokens, 40)
    tolerance = 0.06 if types[0] in (Q8_0, BF16) else 0.01
    for name in ("keys", "values"):
        want = getattr(model.reference, name)(tokens)
        error = np.abs(getattr(got, name).astype(np.float32) - want).max() / want.std()
        assert error < tolerance, name
        assert getattr(got, name).dtype == np.float16
    np.testing.assert_array_equal(got.indices, np.arange(N_TOKENS))
    np.testing.assert_array_equal(got.tokens, tokens)


def test_small_sums_keep_their_digits(random_model: Maker, tracer: Trace) -> None:
    """Unscaled, sums below 6e-5 would be float16's subnormal numbers."""
    model = random_model(SHAPES["qwen3, 1 query to a key"])
    tokens = random_tokens(N_TOKENS)
    got = tracer(model.path, block=1, type_k=F32, type_v=F32).capture(tokens, N_TOKENS)
    want = expected(model, tokens)
    small = 0
    for begin, end, sums in block_sums(got):
        exact = want[:, :, begin, :end]
        tiny = (exact < 1e-5) & (exact > 0)
        small += int(tiny.sum())
        np.testing.assert_allclose(sums[tiny], exact[tiny], rtol=2e-3)
    assert small > 50


@pytest.mark.parametrize("type_v", [F16, Q8_0])
def test_a_capture_does_not_depend_on_what_was_read_before(
    type_v: int, random_model: Maker, tracer: Trace
) -> None:
    model = random_model(SHAPES["llama, 2 queries to a key"])
    llm = tracer(model.path, type_v=type_v)
    first = llm.capture(random_tokens(50), 20)
    llm.capture(random_tokens(N_TOKENS, seed=1), 30)
    llm.eval(random_tokens(5))
    again = llm.capture(random_tokens(50), 20)
    for name in ("keys", "values", "sums", "tokens", "indices"):
        assert getattr(first, name).tobytes() == getattr(again, name).tobytes(), name


@pytest.mark.parametrize("flash", [False, True], ids=["as computed", "from queries"])
def test_the_models_own_future_is_its_greedy_continuation(
    flash: bool, random_model: Maker, tracer: Trace, load: Callable[..., Any]
) -> None:
    model = random_model(SHAPES["qwen3, 1 query to a key"])
    prompt = random_tokens(40)
    # a batch of 5, which the log of queries has room for, is full twice while the model writes
    llm = tracer(model.path, block=4, n_ubatch=5, flash_attn=flash)
    got = llm.capture(prompt, 40, n_generate=12)
    reply = []
    for token in load(model.path, n_ctx=256).generate(prompt, temp=0.0, repeat_penalty=1.0):
        reply.append(token)
        if len(reply) == 12:
            break
    assert got.tokens.tolist() == [*prompt, *reply]
    want = expected(model, got.tokens.tolist())
    _, end, sums = block_sums(got)[-1]
    np.testing.assert_allclose(sums, want[:, :, end - 4 :].sum(axis=2), atol=0.02)


def test_reading_is_not_captured_outside_a_capture(random_model: Maker, tracer: Trace) -> None:
    """The same tokens give the same cache with and without a callback that asks for nothing."""
    model = random_model(SHAPES["llama, 2 queries to a key"])
    llm = tracer(model.path)
    captured = llm.capture(random_tokens(60), 20)
    llm.forget()
    llm.eval(random_tokens(60))
    assert llm.native is not None
    _, keys, _ = llm.native.read(0, 60, 60)
    np.testing.assert_array_equal(keys.astype(np.float16), captured.keys)


# -- with flash attention, and so with quantised values ------------------------------------------


def by_hand(llm: Tracer, got: Captured) -> Sums:
    """softmax(scale q.k) over the trace's own keys, one query at a time in f64, the largest of each
    group: [n_layer, n_head_kv, n_query, n_token]."""
    n, keys = len(got.tokens), got.keys.astype(np.float64)
    logged = llm._attention._log.read(n)
    assert logged.indices.tolist() == list(range(n))
    group = logged.queries.shape[1] // keys.shape[1]
    paid = np.zeros((len(keys), logged.queries.shape[1], n, n))
    for layer, head, j in np.ndindex(*paid.shape[:3]):
        seen = keys[layer, head // group, : j + 1]
        e = np.exp(logged.scale[layer] * (seen @ logged.queries[layer, head, j].astype(np.float64)))
        paid[layer, head, j, : j + 1] = e / e.sum()
    largest: Sums = paid.reshape(*keys.shape[:2], group, n, n).max(axis=2).astype(np.float32)
    return largest


@pytest.mark.parametrize("type_v", [F16, Q8_0, Q4_0])
@pytest.mark.parametrize("type_k", [F16, Q8_0, Q4_0])
@pytest.mark.parametrize(
    "shape", ["qwen2, 4 queries to a key", "llama, 2 queries to a key", "gemma3, sliding window"]
)
def test_sums_from_queries_are_those_of_the_traces_own_keys(
    shape: str, type_k: int, type_v: int, random_model: Maker, tracer: Trace
) -> None:
    llm = tracer(
        random_model(SHAPES[shape]).path, block=8, type_k=type_k, type_v=type_v, flash_attn=True
    )
    got = llm.capture(random_tokens(N_TOKENS), n_prompt=43)
    want = by_hand(llm, got)
    for begin, end, sums in block_sums(got):
        np.testing.assert_allclose(
            sums, want[:, :, begin:end, :end].sum(axis=2), rtol=5e-3, atol=1e-4
        )
    # a head size of 64 lets llama.cpp rotate what it quantises
    turned = shape.startswith("qwen2")
    assert (llm.shape.k_hadamard_block > 0) == (turned and type_k != F16)
    assert (llm.shape.v_hadamard_block > 0) == (turned and type_v != F16)
    assert (llm.shape.type_k, llm.shape.type_v) == (type_k, type_v)
    assert llm.native is not None
    _, keys, values = llm.native.read(0, N_TOKENS, N_TOKENS)
    assert values is not None
    np.testing.assert_array_equal(got.keys, keys.astype(np.float16))
    np.testing.assert_array_equal(got.values, values.astype(np.float16))


def test_quantised_values_turn_flash_attention_on(random_model: Maker, tracer: Trace) -> None:
    path = random_model(SHAPES["llama, 2 queries to a key"]).path
    assert not tracer(path).flash_attn
    assert not tracer(path, type_k=Q8_0).flash_attn
    assert tracer(path, type_v=Q4_0).flash_attn


def test_in_the_first_layer_sums_are_the_same_with_flash_attention_and_without(
    bundled_model: str, book: str, tracer: Trace
) -> None:
    """Above it llama.cpp's own rounding differs: flash attention adds values up in f16."""
    without, with_ = tracer(bundled_model, 300), tracer(bundled_model, 300, flash_attn=True)
    tokens = without.tokenize(book.encode())[:300]
    want, got = without.capture(tokens, 150), with_.capture(tokens, 150)
    np.testing.assert_array_equal(got.keys[0], want.keys[0])
    exact, close = (x.sums.astype(np.float32) / x.blocks.scale for x in (want, got))
    np.testing.assert_allclose(close[0], exact[0], rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(close, exact, atol=0.01)
    assert np.linalg.norm(close - exact) < 1e-3 * np.linalg.norm(exact)


def test_what_is_important_with_a_quantised_cache_is_what_is_important_without(
    bundled_model: str, book: str, tracer: Trace
) -> None:
    def most_wanted(**how: Any) -> NDArray[np.int64]:
        llm = tracer(bundled_model, 300, **how)
        got = llm.capture(llm.tokenize(book.encode())[:300], 150)
        paid = sum(sums[:, :, :150] for begin, _, sums in block_sums(got) if begin >= 150)
        return np.argsort(-np.asarray(paid), axis=-1)[:, :, :30]

    want, got = most_wanted(), most_wanted(type_k=Q8_0, type_v=Q8_0)
    for a, b in zip(want.reshape(-1, 30), got.reshape(-1, 30), strict=True):
        assert len({*a.tolist()} & {*b.tolist()}) >= 27


def test_a_window_that_the_file_does_not_name_is_traced_as_well(
    tmp_path: Path, tracer: Trace
) -> None:
    """llama.cpp takes 4,096 tokens for gemma2 then; the window cache must be smaller than the
    other one, to be told from it."""
    write_more_than_a_softmax(tmp_path / "model.gguf", "gemma2", window=None)
    got = tracer(str(tmp_path / "model.gguf")).capture(random_tokens(50), 20)
    assert len(got.keys) == 1  # of two layers one is global
    for _, _, sums in block_sums(got):
        assert np.isfinite(np.asarray(sums, np.float32)).all()


@pytest.mark.parametrize("arch", ["gemma2", "gpt-oss", "mpt"])
def test_attention_that_is_more_than_a_softmax_is_traced_without_flash_attention_only(
    arch: str, tmp_path: Path, tracer: Trace
) -> None:
    write_more_than_a_softmax(tmp_path / "model.gguf", arch)
    with pytest.raises(
        UnsupportedModelError,
        match=r"the attention of layer \d is more than softmax\(scale \* q.k\)\. Trace it "
        r"without flash attention, with values that are not quantised \(--type-v f16\)$",
    ):
        tracer(str(tmp_path / "model.gguf"), flash_attn=True)
    got = tracer(str(tmp_path / "model.gguf")).capture(random_tokens(50), 20)
    assert np.isfinite(got.sums).all()


@pytest.mark.parametrize("head_size", [32, 64, 128])
@pytest.mark.parametrize("length", [64, 512, 4096])
def test_the_smallest_block_keeps_a_trace_within_twice_its_keys_and_values(
    head_size: int, length: int
) -> None:
    shape = CacheShape(n_layer=8, n_head_kv=2, head_size_k=head_size, head_size_v=head_size)
    block = smallest_block(shape, length)
    keys_and_values = 2 * 16 * length * 2 * head_size

    def on_disk(block: int, n_prompt: int) -> int:
        n_sums = Blocks.with_border_at(n_prompt, block).n_sums(length)
        return keys_and_values + 2 * 16 * n_sums + 8 * length + 1024

    assert max(on_disk(block, n) for n in range(1, block + 1)) <= 2 * keys_and_values
    if block > 1:
        assert on_disk(block // 2, 1) > 2 * keys_and_values


# -- what goes wrong ---------------------------------------------------------------------------


def write_with_nan(path: Path, weight: str) -> str:
    """A random model with one number of ``weight`` that is none; returns its path."""
    normal = gguf_models._draw_weights

    def with_nan(shape: ModelShape) -> gguf_models.Weights:
        weights = normal(shape)
        weights[weight][3, 5] = np.nan
        return weights

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_models, "_draw_weights", with_nan)
        write_model(path, ModelShape())
    return str(path)


def test_weights_that_are_no_numbers_are_reported(tmp_path: Path, tracer: Trace) -> None:
    llm = tracer(write_with_nan(tmp_path / "nan.gguf", "blk.1.attn_k.weight"))
    with pytest.raises(KVCacheError, match="layer 1 .* no probability .* not finite"):
        llm.capture(random_tokens(30), 10)


def test_queries_that_are_no_numbers_are_reported(tmp_path: Path, tracer: Trace) -> None:
    """With flash attention nothing else shows those of the last layer."""
    llm = tracer(write_with_nan(tmp_path / "nan.gguf", "blk.1.attn_q.weight"), flash_attn=True)
    with pytest.raises(KVCacheError, match="attention is not finite: the model file"):
        llm.capture(random_tokens(30), 10)


def test_numbers_too_large_for_a_trace_are_reported(random_model: Maker, tracer: Trace) -> None:
    from kvp_edge.traces.tracer import _half

    with pytest.raises(KVCacheError, match="the model's keys reach 70000"):
        _half(np.full((1, 2), 7e4, np.float32), "keys")


def test_a_recurrent_model_is_refused(tmp_path: Path) -> None:
    write_mamba(tmp_path / "mamba.gguf")
    with pytest.raises(UnsupportedModelError, match="recurrent"):
        Tracer(str(tmp_path / "mamba.gguf"), 64, verbose=False)


def test_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"none\.gguf"):
        Tracer(str(tmp_path / "none.gguf"), 64, verbose=False)


def test_a_text_longer_than_announced_is_refused(random_model: Maker, tracer: Trace) -> None:
    llm = tracer(random_model(SHAPES["llama, 2 queries to a key"]).path, 64)
    with pytest.raises(ValueError, match="60 tokens and 5 more does not fit into the 64"):
        llm.capture(random_tokens(60), 60, n_generate=5)


def begin(llm: Tracer, **changed: Any) -> None:
    from kvp_edge.binding.structs import CapturePlan

    plan = {"n_layer": 2, "n_head_kv": 2, "n_tokens": 64, "block": 8, "first": 8, "scale": 1.0}
    call("kvp_capture_begin", llm._attention._handle, CapturePlan(**{**plan, **changed}))


def end(llm: Tracer, n_tokens: int, n_sums: int) -> None:
    sums = np.empty(n_sums, np.uint16)
    call("kvp_capture_end", llm._attention._handle, n_tokens, sums, n_sums)


def test_the_library_refuses_what_cannot_be(random_model: Maker, tracer: Trace) -> None:
    llm = tracer(random_model(SHAPES["llama, 2 queries to a key"]).path, 64)
    for wrong in ({"block": 0}, {"first": 9}, {"first": 0}, {"scale": 0.0}, {"n_tokens": 0}):
        with pytest.raises(ValueError, match="a capture needs|cannot begin"):
            begin(llm, **wrong)
    with pytest.raises(ValueError, match="no capture to end"):
        end(llm, 1, 4)
    begin(llm)
    with pytest.raises(UnsupportedModelError, match="the attention of 0 layers, but the cache has"):
        end(llm, 0, 0)
    begin(llm)
    llm.eval(random_tokens(10))
    with pytest.raises(ValueError, match="10 tokens make 72 sums, not 71"):
        end(llm, 10, 71)
    with pytest.raises(ValueError, match="no capture to end"):  # it ended all the same
        end(llm, 10, 72)


def test_the_library_notices_a_cache_that_is_not_in_order(
    random_model: Maker, tracer: Trace
) -> None:
    llm = tracer(random_model(SHAPES["llama, 2 queries to a key"]).path, 64)
    llm.eval(random_tokens(10))
    begin(llm)
    llm.eval(random_tokens(5))  # these see ten tokens that the capture does not know of
    with pytest.raises(KVCacheError, match="attends past token 0"):
        end(llm, 5, 20)


def test_the_library_notices_heads_that_do_not_fit(random_model: Maker, tracer: Trace) -> None:
    llm = tracer(random_model(SHAPES["llama, 2 queries to a key"]).path, 64)
    begin(llm, n_head_kv=3)
    llm.eval(random_tokens(5))
    with pytest.raises(UnsupportedModelError, match="4 query heads, which its 3 KV heads"):
        end(llm, 5, 30)
    llm.forget()
    begin(llm, n_layer=1)
    llm.eval(random_tokens(5))
    with pytest.raises(UnsupportedModelError, match="layer 1 .* 1 layers in all"):
        end(llm, 5, 10)
    llm.forget()
    begin(llm, n_tokens=4)
    llm.eval(random_tokens(5))
    with pytest.raises(ValueError, match="more than the 4 tokens"):
        end(llm, 5, 20)
