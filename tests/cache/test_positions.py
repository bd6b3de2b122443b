"""Position compaction: positions stay below the trained length, keys are those of the new ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from gguf import GGUFWriter, RopeScalingType

from conftest import RandomModel, random_tokens
from kvp_edge import BudgetError, Llama, UnsupportedModelError
from kvp_edge.binding.rope import measure_frequencies
from kvp_edge.cache import manager
from makers.gguf_models import ModelShape, write_model, write_mpt
from support.cache_types import CACHE_TYPES
from support.closeness import difference
from support.interrupt import interrupted
from support.noise import Noise
from support.watch import Watch

Maker = Callable[[ModelShape], RandomModel]
Loader = Callable[..., Llama]

TRAINED = 300
SHAPES = {
    "llama": ModelShape("llama", n_ctx_train=TRAINED),
    "qwen2": ModelShape("qwen2", n_embd=256, head_dim=64, n_ctx_train=TRAINED),
    "qwen3": ModelShape("qwen3", head_dim=64, n_ctx_train=TRAINED),
    "phi3": ModelShape("phi3", n_ctx_train=TRAINED),
    "gemma3": ModelShape("gemma3", n_ctx_train=TRAINED),
}
BOUND: dict[str, Any] = {
    "n_ctx": 5000,
    "kv_budget": 100,
    "recent": 20,
    "reserve": 60,
    "positions": "compact",
}
F32 = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}


def newest_position(llm: Llama) -> int:
    assert llm.kv is not None
    return llm.kv.cache.newest_position()


@pytest.mark.parametrize("granularity", ["head", "token"])
@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_attention_with_keys_at_the_compacted_positions(
    random_model: Maker, load: Loader, name: str, granularity: str
) -> None:
    model = random_model(SHAPES[name])
    policy = Noise()
    llm = load(model.path, **BOUND, **F32, granularity=granularity, policy=policy, logits_all=True)
    watch = Watch(llm, model.shape)
    llm.eval(random_tokens(230))
    for token in random_tokens(60, seed=1):
        llm.eval([token])
    llm.eval(random_tokens(130, seed=2))
    assert llm.kv is not None
    assert llm.kv.shift > 0
    assert llm.kv_stats.evictions >= 2
    limit = 0.02 if name == "gemma3" else 3e-4
    assert difference(llm.scores[: llm.n_tokens], watch.expected(model.reference)) < limit


@pytest.mark.parametrize("granularity", ["head", "token"])
def test_a_conversation_of_many_trained_lengths_stays_below_it(
    random_model: Maker, load: Loader, granularity: str
) -> None:
    llm = load(random_model(SHAPES["llama"]).path, **BOUND, granularity=granularity)
    for seed in range(16):
        llm.eval(random_tokens(250, seed=seed))
        assert newest_position(llm) < TRAINED
        assert llm.kv_stats.kept + llm.kv_stats.dropped == llm.kv_stats.seen == llm.n_tokens
        newest = llm.kv_indices[..., -1]
        assert (newest == llm.n_tokens - 1).all()
    assert llm.n_tokens == 4000
    assert next(iter(llm.generate([*llm.input_ids[:4000].tolist(), 9], temp=0.0))) >= 0
    assert llm.kv_stats.seen == 4001  # nothing was read again


def test_up_to_the_trained_length_compact_and_keep_are_the_same(
    random_model: Maker, load: Loader
) -> None:
    both = [
        load(random_model(SHAPES["llama"]).path, **{**BOUND, "positions": how}, logits_all=True)
        for how in ("keep", "compact")
    ]
    for llm in both:
        llm.eval(random_tokens(TRAINED - 60))
    np.testing.assert_array_equal(both[0].scores[:240], both[1].scores[:240])


@pytest.mark.parametrize("granularity", ["head", "token"])
def test_rewinding_after_a_compaction_is_exact(
    random_model: Maker, load: Loader, granularity: str
) -> None:
    model = random_model(SHAPES["qwen3"])
    llm = load(model.path, **BOUND, **F32, granularity=granularity, policy=Noise(), logits_all=True)
    watch = Watch(llm, model.shape)
    llm.eval(random_tokens(330))
    assert llm.kv is not None
    assert llm.kv.shift > 0
    llm.n_tokens -= 15
    llm.eval(random_tokens(60, seed=3))
    assert difference(llm.scores[: llm.n_tokens], watch.expected(model.reference)) < 3e-4


def test_an_interrupt_before_llama_cpp_turned_the_keys_ends_in_a_re_read(
    random_model: Maker, load: Loader
) -> None:
    """At token granularity llama.cpp turns keys at the next decode; until then they are wrong."""
    llm = load(random_model(SHAPES["llama"]).path, **BOUND, granularity="token")
    read_batch = llm.read_batch

    def interrupted(tokens: list[int], position: int) -> None:
        if position < llm.n_tokens:
            raise KeyboardInterrupt
        read_batch(tokens, position)

    llm.read_batch = interrupted
    tokens = random_tokens(700)
    with pytest.raises(KeyboardInterrupt):
        llm.eval(tokens)
    assert llm.kv is not None
    assert not llm.kv.can_rewind(llm.n_tokens)
    llm.read_batch = read_batch
    fresh = load(random_model(SHAPES["llama"]).path, **BOUND, granularity="token")
    answers = [next(iter(of.generate(tokens, temp=0.0))) for of in (llm, fresh)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("granularity", ["head", "token"])
def test_a_conversation_goes_on_after_every_eviction_that_was_asked_for(
    random_model: Maker, load: Loader, tmp_path: Path, granularity: str
) -> None:
    """Also after those where positions have to be compacted, now or with the next batch."""
    model = random_model(SHAPES["qwen3"])
    llm = load(model.path, **BOUND, **F32, granularity=granularity, policy=Noise(), logits_all=True)
    watch = Watch(llm, model.shape)
    assert llm.kv is not None
    for piece in range(50):
        llm.eval(random_tokens(11, seed=piece))
        assert llm.kv.cache.newest_position() < TRAINED
        llm.evict()
        llm.save_session(tmp_path / "s")
    assert llm.kv.shift > 0
    assert difference(llm.scores[: llm.n_tokens], watch.expected(model.reference)) < 3e-4


@pytest.mark.parametrize("granularity", ["head", "token"])
def test_an_interrupt_at_any_moment_of_an_eviction_is_known_afterwards(
    random_model: Maker, load: Loader, granularity: str
) -> None:
    """Cells that have moved are of no use before llama.cpp has turned their keys."""
    path = random_model(SHAPES["llama"]).path
    llm = load(path, **BOUND, granularity=granularity)
    kv = llm.kv
    assert kv is not None
    llm.eval(random_tokens(250))
    state, kept = llm.save_state(), kv.kept

    def survives(at: int) -> bool:
        llm.load_state(state)
        came = interrupted(lambda: kv.make_room(60), at, manager.__file__, contextlib.__file__)
        moved = kv.shift > 0 or kv.cache.newest_position() < 249
        if granularity == "token":
            assert not (moved and kv.trusted), at
        assert (kv.kept == kept) == (kv.shift == 0)
        if kv.trusted:
            llm.sync()
            kv.cache.check_state(kv.cache.state(), kv.snapshot().llama_positions())
        return came

    assert next(at for at in range(1000) if not survives(at)) > 10


@pytest.mark.parametrize("granularity", ["head", "token"])
def test_a_session_goes_on_after_a_compaction(
    random_model: Maker, load: Loader, tmp_path: Path, granularity: str
) -> None:
    path = random_model(SHAPES["llama"]).path
    first = load(path, **BOUND, granularity=granularity, logits_all=True)
    first.eval(random_tokens(700))
    first.save_session(tmp_path / "s")
    second = load(path, **BOUND, granularity=granularity, logits_all=True)
    second.load_session(tmp_path / "s")
    for llm in (first, second):
        llm.eval(random_tokens(300, seed=1))
    assert difference(second.scores[700:1000], first.scores[700:1000]) < 1e-3


# -- the ways llama.cpp makes angles -----------------------------------------------------------

YARN, LINEAR = 2, 1  # enum llama_rope_scaling_type


def long_rope(writer: GGUFWriter) -> None:
    rng = np.random.default_rng(0)
    writer.add_rope_scaling_orig_ctx_len(200)
    writer.add_rope_scaling_attn_factors(1.2)
    for name in ("long", "short"):
        factors = rng.uniform(1, 4, 16).astype(np.float32)
        writer.add_tensor(f"rope_factors_{name}.weight", factors)


def llama_3(writer: GGUFWriter) -> None:
    writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, 16, dtype=np.float32))


def yarn_file(writer: GGUFWriter) -> None:
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(100)


def nothing(writer: GGUFWriter) -> None:
    pass


VARIANTS: dict[str, tuple[str, Callable[[GGUFWriter], None], dict[str, Any]]] = {
    "plain": ("llama", nothing, {}),
    "neox": ("qwen3", nothing, {}),
    "base": ("llama", nothing, {"rope_freq_base": 3000.0}),
    "linear": ("llama", nothing, {"rope_scaling_type": LINEAR, "rope_freq_scale": 0.25}),
    "yarn": ("qwen3", yarn_file, {}),
    "yarn-interleaved": ("llama", yarn_file, {}),
    "long-rope": ("phi3", long_rope, {}),
    "factors": ("llama", llama_3, {}),
}


@pytest.mark.parametrize("types", ["f32", "f16", "q8_0-fa", "q4_0-fa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_keys_after_a_compaction_are_those_of_the_token_at_the_new_position(
    load: Loader, tmp_path: Path, variant: str, types: str
) -> None:
    """In the first layer a key depends on its token and position alone, so it can be asked for."""
    arch, extra, options = VARIANTS[variant]
    type_k, type_v, flash_attn = CACHE_TYPES[types]
    head_dim = 64 if arch == "qwen3" else 32
    shape = ModelShape(arch, head_dim=head_dim, n_ctx_train=TRAINED)  # type: ignore[arg-type]
    write_model(tmp_path / "m.gguf", shape, extra)
    kind = {"type_k": type_k, "type_v": type_v, "flash_attn": flash_attn, **options}
    llm = load(str(tmp_path / "m.gguf"), **{**BOUND, **kind}, policy=Noise(), granularity="head")
    tokens = random_tokens(560)
    llm.eval(tokens)
    assert llm.kv is not None
    table = llm.kv.snapshot()
    assert table.shift > 0
    n = table.kept
    rotated = table.rope_positions()[0]
    _, keys, _ = llm.kv.cache.read(0, 10**6, n, values=False)

    exact = load(str(tmp_path / "m.gguf"), **{**BOUND, **options, **F32, "positions": "keep"})
    assert exact.kv is not None
    want: dict[tuple[int, int], Any] = {}
    for head, row in np.ndindex(table.indices().shape[1:]):
        token, position = tokens[table.indices()[0, head, row]], int(rotated[head, row])
        if (token, position) not in want:
            exact._ctx.kv_cache_seq_rm(-1, 0, -1)
            exact._batch.set_batch(batch=[token], n_past=position, logits_all=False)
            exact._ctx.decode(exact._batch)
            _, one, _ = exact.kv.cache.read(position, position + 1, 1, values=False)
            want[token, position] = one[0, :, 0]
        key = want[token, position][head]
        error = np.linalg.norm(keys[0, head, row] - key) / np.linalg.norm(key)
        # twice what the type itself rounds off: keys are rounded when they come in and when turned
        assert error < {"f32": 1e-3, "f16": 2e-3, "q8_0-fa": 0.02, "q4_0-fa": 0.25}[types]


def test_llama_cpps_own_shift_is_refused_where_it_is_not_exact(tmp_path: Path) -> None:
    """With YaRN llama.cpp's K-shift scales keys once more by YaRN's magnitude factor."""
    write_model(tmp_path / "yarn.gguf", ModelShape("llama", n_ctx_train=TRAINED), yarn_file)
    quiet: dict[str, Any] = {**BOUND, "verbose": False}
    with pytest.raises(UnsupportedModelError, match="own position shift .* granularity='head'"):
        Llama(str(tmp_path / "yarn.gguf"), **quiet, granularity="token")
    Llama(str(tmp_path / "yarn.gguf"), **quiet, granularity="head").close()


def test_frequencies_are_those_of_the_formula(random_model: Maker, load: Loader) -> None:
    for name, base in (("llama", 10000.0), ("qwen3", 10000.0)):
        shape = SHAPES[name]
        llm = load(random_model(shape).path, **BOUND, granularity="head")
        found = measure_frequencies(llm._model.model, llm.context_params, own_shift=True)
        pairs = np.arange(shape.head_dim // 2)
        want = base ** (-2.0 * pairs / shape.head_dim)
        np.testing.assert_allclose(found.radians, np.tile(want, (2, 1)), atol=2e-6)
        assert found.neox == (name == "qwen3")


@pytest.mark.parametrize(
    ("shape", "options", "sentence"),
    [
        ("window", {"granularity": "head"}, "sliding-window .* granularity='token'"),
        (
            "llama",
            {"granularity": "token", "type_k": llama_cpp.GGML_TYPE_Q8_0},
            "not quantised.*granularity='head'",
        ),
        ("alibi", {"granularity": "token"}, "plain RoPE"),
    ],
)
def test_what_cannot_be_compacted_is_refused(
    random_model: Maker, tmp_path: Path, shape: str, options: dict[str, Any], sentence: str
) -> None:
    if shape == "alibi":
        write_mpt(tmp_path / "alibi.gguf")
        path = str(tmp_path / "alibi.gguf")
    else:
        window = ModelShape("gemma3", sliding_window=24, n_ctx_train=TRAINED)
        path = random_model(window if shape == "window" else SHAPES[shape]).path
    with pytest.raises(UnsupportedModelError, match=sentence):
        Llama(path, **BOUND, **options, verbose=False)


def test_a_trained_length_that_is_told_counts_in_place_of_the_file_s(
    random_model: Maker, load: Loader
) -> None:
    told = {"kv_overrides": {"llama.context_length": TRAINED}}
    llm = load(random_model(ModelShape("llama")).path, **{**BOUND, **told, "n_ctx": None})
    assert llm.n_ctx() == TRAINED


def test_more_cells_than_the_trained_length_leave_no_room_to_compact(random_model: Maker) -> None:
    path = random_model(SHAPES["llama"]).path
    with pytest.raises(BudgetError, match="at most 300 cells .* not 512"):
        Llama(path, **{**BOUND, "kv_budget": 300}, verbose=False)
    other = random_model(ModelShape("llama")).path
    told = {"kv_overrides": {"llama.context_length": TRAINED}}
    with pytest.raises(BudgetError, match="at most 300 cells .* not 512"):
        Llama(other, **{**BOUND, **told, "kv_budget": 300}, verbose=False)
    with pytest.raises(ValueError, match="'keep' or 'compact', not 'move'"):
        Llama(path, **{**BOUND, "positions": "move"}, verbose=False)
