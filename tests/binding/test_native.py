"""The native library against llama.cpp's blob, the numpy reference and the Python definitions."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import RandomModel, random_tokens
from kvp_edge.binding import rules
from kvp_edge.binding.cache import NativeCache
from kvp_edge.binding.library import BUILT_FOR, check_versions
from kvp_edge.binding.model import read_model_shape
from kvp_edge.binding.ranking import choose_tokens
from kvp_edge.errors import UnsupportedModelError
from kvp_edge.policies import ArrayView, KeyDiff, KNorm
from makers.gguf_models import ModelShape, write_bert, write_mamba

F16, F32, Q8_0, Q4_0 = (
    llama_cpp.GGML_TYPE_F16,
    llama_cpp.GGML_TYPE_F32,
    llama_cpp.GGML_TYPE_Q8_0,
    llama_cpp.GGML_TYPE_Q4_0,
)

SHAPES = {
    "llama-32": ModelShape("llama", head_dim=32),
    "qwen2-64": ModelShape("qwen2", n_embd=256, head_dim=64),
    "qwen3-128": ModelShape("qwen3", head_dim=128, n_head=2, n_head_kv=1),
}

#: Largest error over the standard deviation of the keys or values. f16 rounds to 2^-11 of the
#: value; q8_0 to 1/254 of the largest in a block of 32, q4_0 to 1/16 of it.
TOLERANCE = {F32: 3e-4, F16: 5e-3, Q8_0: 0.03, Q4_0: 0.5}

Loader = Callable[..., Any]
Maker = Callable[[ModelShape], RandomModel]


RULES = {"knorm": rules.KNorm(), "keydiff": rules.KeyDiff()}


def opened(load: Loader, model: RandomModel, **kwargs: Any) -> tuple[Any, NativeCache]:
    """A bounded Llama that never evicts here, and its native cache."""
    llm = load(model.path, n_ctx=512, kv_budget=512, **kwargs)
    return llm, llm.kv.cache


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / want.std())


@pytest.mark.parametrize("cache_type", [F32, F16, Q8_0, Q4_0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("flash_attn", [False, True])
def test_keys_and_values_are_read_back_as_the_model_computed_them(
    shape: str, cache_type: int, flash_attn: bool, random_model: Maker, load: Loader
) -> None:
    # llama.cpp allows a quantised V only with flash attention
    type_v = cache_type if flash_attn or cache_type in (F16, F32) else F16
    model = random_model(SHAPES[shape])
    llm, cache = opened(load, model, type_k=cache_type, type_v=type_v, flash_attn=flash_attn)
    tokens = random_tokens(60)
    llm.eval(tokens)
    positions, keys, values = cache.read(10, 60, 50)
    assert values is not None
    np.testing.assert_array_equal(positions, np.arange(10, 60))
    # With flash attention the layers above compute in f16 whatever the cache holds.
    slack = TOLERANCE[F16] if flash_attn else 0.0
    # Rounding in the cache of one layer moves the keys of the next, hence the factor.
    error_k = relative_error(keys, model.reference.keys(tokens)[:, :, 10:])
    error_v = relative_error(values, model.reference.values(tokens)[:, :, 10:])
    assert error_k < 2 * TOLERANCE[cache_type] + slack
    assert error_v < 2 * max(TOLERANCE[cache_type], TOLERANCE[type_v]) + slack


@pytest.mark.parametrize("cache_type", [F16, Q8_0])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("policy", [KNorm(), KeyDiff()], ids=lambda p: p.name)
def test_native_scores_equal_the_formula_on_the_reference_keys(
    policy: Any, head_dim: int, cache_type: int, random_model: Maker, load: Loader
) -> None:
    model = random_model(ModelShape("qwen3", head_dim=head_dim))
    llm, cache = opened(load, model, type_k=cache_type)
    tokens = random_tokens(80)
    llm.eval(tokens)
    positions = np.arange(80, dtype=np.int32)
    got = cache.score(RULES[policy.name], 0, 80, 80)
    keys = model.reference.keys(tokens)
    want = policy.score(ArrayView(keys, keys[..., :0], positions))
    # On the scale of the largest score: a key's length, or a cosine.
    assert np.abs(got - want).max() < TOLERANCE[cache_type] * np.abs(want).max()


@pytest.mark.parametrize("policy", [KNorm(), KeyDiff()], ids=lambda p: p.name)
def test_native_scores_equal_the_python_definition_on_the_same_keys(
    policy: Any, random_model: Maker, load: Loader
) -> None:
    llm, cache = opened(load, random_model(SHAPES["llama-32"]))
    llm.eval(random_tokens(100))
    positions, keys, _ = cache.read(0, 100, 100, values=False)
    got = cache.score(RULES[policy.name], 0, 100, 100)
    np.testing.assert_allclose(got, policy.score(ArrayView(keys, keys, positions)), atol=2e-6)


def test_half_precision_is_converted_exactly(random_model: Maker, load: Loader) -> None:
    """Every key read is a half-precision number, the one that llama.cpp's own blob holds."""
    llm, cache = opened(load, random_model(SHAPES["llama-32"]), flash_attn=True)
    llm.eval(random_tokens(9))
    _, keys, _ = cache.read(0, 9, 9)
    size = llama_cpp.llama_state_seq_get_size(llm.ctx, 0)
    blob = (ctypes.c_uint8 * size)()
    assert llama_cpp.llama_state_seq_get_data(llm.ctx, blob, size, 0) == size
    start = 8 + 4 + 4 + 9 * 12 + 8 + 12  # up to layer 0's K rows, as design of the blob says
    rows = np.frombuffer(bytes(blob)[start : start + 9 * 2 * 32 * 2], np.float16)
    np.testing.assert_array_equal(
        keys[0].transpose(1, 0, 2), rows.reshape(9, 2, 32).astype(np.float32)
    )


def test_reading_leaves_the_conversation_as_it_was(random_model: Maker, load: Loader) -> None:
    model = random_model(SHAPES["llama-32"])
    tokens = random_tokens(40)
    read, _ = opened(load, model, logits_all=True)
    untouched, _ = opened(load, model, logits_all=True)
    for llm in (read, untouched):
        llm.eval(tokens[:30])
    read.kv.cache.read(5, 20, 15)
    read.kv.cache.score(rules.KeyDiff(), 0, 30, 30)
    for llm in (read, untouched):
        llm.eval(tokens[30:])
    np.testing.assert_array_equal(read.scores[:40], untouched.scores[:40])
    assert llama_cpp.llama_memory_seq_pos_max(read._ctx.memory, 1) == -1


def test_an_empty_range_is_no_error(random_model: Maker, load: Loader) -> None:
    llm, cache = opened(load, random_model(SHAPES["llama-32"]))
    positions, keys, _ = cache.read(0, 0, 0)
    assert positions.shape == (0,)
    assert keys.shape == (2, 2, 0, 32)
    llm.eval(random_tokens(3))
    assert cache.score(rules.KeyDiff(), 3, 9, 0).shape == (2, 2, 0)


def test_a_range_that_holds_other_than_the_expected_number_is_refused(
    random_model: Maker, load: Loader
) -> None:
    llm, cache = opened(load, random_model(SHAPES["llama-32"]))
    llm.eval(random_tokens(10))
    with pytest.raises(ValueError, match=r"\[2, 8\) hold 6 tokens, not the 7 expected"):
        cache.read(2, 8, 7)
    with pytest.raises(ValueError, match="not \\[8, 2\\)"):
        cache.read(8, 2, 0)


class TestRemove:
    @pytest.fixture
    def held(self, random_model: Maker, load: Loader) -> tuple[Any, NativeCache]:
        llm, cache = opened(load, random_model(SHAPES["llama-32"]))
        llm.eval(random_tokens(20))
        return llm, cache

    def positions(self, cache: NativeCache, n: int) -> list[int]:
        return cache.read(0, 1000, n, values=False)[0].tolist()

    def test_the_tokens_not_kept_are_gone_and_no_others(self, held: Any) -> None:
        _, cache = held
        keep = np.ones(20, np.bool_)
        keep[[3, 4, 9, 15, 16, 17]] = False
        assert cache.remove(np.arange(20), keep) == 3
        assert self.positions(cache, 14) == np.flatnonzero(keep).tolist()

    def test_a_range_runs_across_what_was_removed_before(self, held: Any) -> None:
        _, cache = held
        keep = np.ones(20, np.bool_)
        keep[5:10] = False
        cache.remove(np.arange(20), keep)
        present = np.flatnonzero(keep)
        # 4 and 10 are neighbours now: one call removes both
        assert cache.remove(present, ~np.isin(present, [4, 10])) == 1
        assert self.positions(cache, 13) == [p for p in present if p not in (4, 10)]

    def test_nothing_to_remove_is_no_call(self, held: Any) -> None:
        _, cache = held
        assert cache.remove(np.arange(20), np.ones(20, np.bool_)) == 0
        assert self.positions(cache, 20) == list(range(20))

    def test_the_newest_token_cannot_be_removed(self, held: Any) -> None:
        _, cache = held
        keep = np.ones(20, np.bool_)
        keep[[3, 19]] = False
        with pytest.raises(ValueError, match="newest token \\(position 19\\)"):
            cache.remove(np.arange(20), keep)
        assert self.positions(cache, 20) == list(range(20))

    def test_a_table_out_of_date_or_order_is_refused(self, held: Any) -> None:
        _, cache = held
        with pytest.raises(ValueError, match="newest token is at position 19, not 18"):
            cache.remove(np.arange(19), np.ones(19, np.bool_))
        with pytest.raises(ValueError, match="must ascend"):
            cache.remove(np.array([0, 2, 1, 19]), np.ones(4, np.bool_))


def reference_choice(
    scores: np.ndarray, unit: np.ndarray, protected: np.ndarray, budget: int
) -> np.ndarray:
    """choose_tokens, the slow and obvious way."""
    flat = scores.reshape(6, -1).astype(np.float64)
    compete = ~protected
    z = np.zeros_like(flat)
    for h in range(len(flat)):
        s = flat[h, compete]
        if len(s) and s.std() > 0:
            z[h, compete] = (s - s.mean()) / s.std()
    token = z.mean(axis=0)
    units = [np.flatnonzero(unit == u) for u in dict.fromkeys(unit.tolist())]
    keep = np.zeros(len(unit), np.bool_)
    rest = []
    for members in units:
        if protected[members].any():
            keep[members] = True
        else:
            rest.append(members)
    rest.sort(key=lambda m: (-token[m].mean(), -m[0]))
    for members in rest:
        if keep.sum() + len(members) <= budget:
            keep[members] = True
    return keep


@settings(deadline=None)
@given(data=st.data())
def test_choosing_equals_the_obvious_implementation(data: st.DataObject) -> None:
    n = data.draw(st.integers(0, 40))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    scores = rng.normal(size=(2, 3, n)).astype(np.float32)
    lengths = rng.integers(1, 4, n)
    unit = np.repeat(np.cumsum(lengths), lengths)[:n].astype(np.int32)
    protected = rng.random(n) < data.draw(st.sampled_from([0.0, 0.2, 1.0]))
    budget = data.draw(st.integers(0, n + 2))
    keep = choose_tokens(scores, unit, protected, budget)
    np.testing.assert_array_equal(keep, reference_choice(scores, unit, protected, budget))
    for u in set(unit.tolist()):  # never part of a unit
        assert len(set(keep[unit == u].tolist())) == 1
    assert keep[protected].all()


def test_equal_scores_favour_newer_tokens() -> None:
    keep = choose_tokens(
        np.zeros((1, 1, 6), np.float32), np.arange(6), np.zeros(6, np.bool_), budget=2
    )
    assert keep.tolist() == [False] * 4 + [True] * 2


def test_a_broken_score_loses() -> None:
    scores = np.array([[[1.0, np.nan, 3.0, -np.inf, np.inf, 2.0]]], np.float32)
    keep = choose_tokens(scores, np.arange(6), np.zeros(6, np.bool_), budget=3)
    assert keep.tolist() == [True, False, True, False, False, True]


class TestModelFiles:
    def test_the_shape_of_a_file_is_what_was_written(self, random_model: Maker) -> None:
        shape = SHAPES["qwen3-128"]
        got = read_model_shape(random_model(shape).path)
        assert got.architecture == "qwen3"
        assert (got.n_layer, got.head_size_k, got.head_size_v) == (2, 128, 128)
        assert got.n_head_kv == [1, 1]
        assert got.n_ctx_train == shape.n_ctx_train

    def test_bytes_per_cell_are_those_of_the_rows(self, random_model: Maker) -> None:
        got = read_model_shape(random_model(SHAPES["qwen2-64"]).path)
        assert got.bytes_per_cell(F16, F16) == 2 * 2 * (2 * 64) * 2
        assert got.bytes_per_cell(Q8_0, F32) == 2 * (2 * 64 // 32 * 34 + 2 * 64 * 4)

    def test_an_impossible_cache_type_is_refused(self, random_model: Maker) -> None:
        got = read_model_shape(random_model(SHAPES["qwen2-64"]).path)
        with pytest.raises(ValueError, match="999 is not a ggml type"):
            got.bytes_per_cell(999, F16)

    @pytest.mark.parametrize(
        "content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 64, b"%PDF-1.7"]
    )
    def test_what_is_no_gguf_is_refused(self, content: bytes, tmp_path: Path) -> None:
        path = tmp_path / "no.gguf"
        path.write_bytes(content)
        with pytest.raises(UnsupportedModelError, match="cannot be read as a GGUF file"):
            read_model_shape(path)

    def test_every_truncation_of_the_metadata_is_refused(
        self, random_model: Maker, tmp_path: Path
    ) -> None:
        whole = Path(random_model(SHAPES["llama-32"]).path).read_bytes()
        path = tmp_path / "cut.gguf"
        for size in range(1, 4000, 97):
            path.write_bytes(whole[:size])
            with pytest.raises(UnsupportedModelError):
                read_model_shape(path)


class TestRefusals:
    def context(self, path: str, **params: Any) -> Any:
        """A raw llama_context; kept alive by the caller."""
        model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        p = llama_cpp.llama_context_default_params()
        p.n_ctx, p.n_seq_max, p.kv_unified = 256, 2, True
        for name, value in params.items():
            setattr(p, name, value)
        return llama_cpp.llama_init_from_model(model, p)

    def test_recurrent_models(self, tmp_path: Path) -> None:
        write_mamba(tmp_path / "m.gguf")
        with pytest.raises(UnsupportedModelError, match="'mamba'.*recurrent.*without kv_budget"):
            NativeCache(self.context(str(tmp_path / "m.gguf")))

    def test_models_without_a_cache(self, tmp_path: Path) -> None:
        write_bert(tmp_path / "b.gguf")
        with pytest.raises(UnsupportedModelError, match="'bert'"):
            NativeCache(self.context(str(tmp_path / "b.gguf")))

    def test_a_context_of_one_sequence(self, random_model: Maker) -> None:
        path = random_model(SHAPES["llama-32"]).path
        with pytest.raises(ValueError, match="n_seq_max >= 2"):
            NativeCache(self.context(path, n_seq_max=1))

    def test_a_context_that_is_not_unified(self, random_model: Maker) -> None:
        path = random_model(SHAPES["llama-32"]).path
        with pytest.raises(ValueError, match="kv_unified = true"):
            NativeCache(self.context(path, kv_unified=False))

    @pytest.mark.parametrize("sequence", [0, 1])
    def test_a_context_that_holds_tokens(self, sequence: int, random_model: Maker) -> None:
        ctx = self.context(random_model(SHAPES["llama-32"]).path)
        batch = llama_cpp.llama_batch_init(1, 0, 1)
        batch.n_tokens, batch.token[0], batch.pos[0] = 1, 5, 0
        batch.n_seq_id[0], batch.seq_id[0][0], batch.logits[0] = 1, sequence, 1
        assert llama_cpp.llama_decode(ctx, batch) == 0
        with pytest.raises(ValueError, match="already holds tokens"):
            NativeCache(ctx)

    def test_null(self) -> None:
        with pytest.raises(ValueError, match="must not be NULL"):
            NativeCache(None)

    def test_opening_leaves_an_empty_cache(self, random_model: Maker) -> None:
        ctx = self.context(random_model(SHAPES["llama-32"]).path)
        cache = NativeCache(ctx)
        assert llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(ctx), 0) == -1
        assert cache.shape.bytes_per_cell == 2 * 2 * (2 * 32) * 2
        cache.close()
        cache.close()  # twice is harmless

    def test_a_context_of_batches_smaller_than_the_probe_can_be_opened(
        self, random_model: Maker
    ) -> None:
        path = random_model(SHAPES["llama-32"]).path
        assert NativeCache(self.context(path, n_batch=2, n_ubatch=2)).shape.n_layer == 2


class TestVersions:
    def test_the_library_was_built_for_what_is_installed(self) -> None:
        assert llama_cpp.__version__ == BUILT_FOR

    def test_another_llama_cpp_python_is_refused_with_the_command_that_mends_it(self) -> None:
        with pytest.raises(ImportError, match=r"pip install 'llama-cpp-python==0\.3\.36'"):
            check_versions("0.3.36", "0.4.0", "0.5.0", "0.5.0")

    def test_another_llama_cpp_library_is_refused(self) -> None:
        with pytest.raises(ImportError, match="LLAMA_CPP_LIB_PATH"):
            check_versions("0.3.36", "0.3.36", "0.5.0", "0.6.1")
