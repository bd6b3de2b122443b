"""States in memory and prompt caches: what does not fit is refused, and nothing is lost by that."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from conftest import RandomModel, random_tokens
from kvp_edge import Llama, SessionError
from makers.gguf_models import ModelShape

Maker = Callable[[ModelShape], RandomModel]
Loader = Callable[..., Llama]

LLAMA = ModelShape("llama")
BOUND = {
    "n_ctx": 3000,
    "kv_budget": 100,
    "recent": 20,
    "reserve": 156,
    "policy": "random",
    "granularity": "head",
}


def go_on(llm: Llama) -> list[int]:
    """Greedy tokens after what was read and some more, over at least one more eviction."""
    before = llm.kv_stats.evictions
    out: list[int] = []
    for token in llm.generate([*llm.input_ids[: llm.n_tokens].tolist(), 42], temp=0.0):
        out.append(token)
        if len(out) == 160:
            break
    assert llm.kv_stats.evictions > before
    return out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kv_budget": 90}, "budget"),
        ({"reserve": 400}, "cells"),
        ({"granularity": "token"}, "granularity"),
        ({"policy": "knorm"}, "policy"),
        ({"positions": "compact"}, "positions"),
        ({"keep_whole": "words"}, "keep_whole"),
        ({"n_batch": 30}, "n_batch"),
        ({"type_k": 8, "flash_attn": True}, "type_k"),
    ],
)
def test_a_state_of_other_settings_is_refused_and_the_conversation_is_untouched(
    random_model: Maker, load: Loader, change: dict[str, Any], says: str
) -> None:
    path = random_model(LLAMA).path
    saved = load(path, **{**BOUND, **change})
    saved.eval(random_tokens(400))
    state = saved.save_state()
    one, never_asked = load(path, **BOUND), load(path, **BOUND)
    for llm in (one, never_asked):
        llm.eval(random_tokens(200, seed=3))
    with pytest.raises(SessionError, match=f"state was saved with {says} = .*, but here it is"):
        one.load_state(state)
    assert one.kv_stats == never_asked.kv_stats
    assert one.n_tokens == 200
    assert go_on(one) == go_on(never_asked)


def test_a_state_of_another_model_is_refused(random_model: Maker, load: Loader) -> None:
    saved = load(random_model(ModelShape("llama", seed=1)).path, **BOUND)
    saved.eval(random_tokens(50))
    with pytest.raises(SessionError, match="another model file .model = "):
        load(random_model(LLAMA).path, **BOUND).load_state(saved.save_state())


def test_a_pickled_state_goes_on_elsewhere_token_for_token_with_its_statistics(
    random_model: Maker, load: Loader
) -> None:
    path = random_model(LLAMA).path
    one, other = load(path, **BOUND), load(path, **BOUND)
    one.eval(random_tokens(400))
    state = pickle.dumps(one.save_state())
    other.eval(random_tokens(700, seed=2))
    other.load_state(pickle.loads(state))
    for name in ("seen", "kept", "evictions", "eviction_ms"):
        assert other.kv_stats[name] == one.kv_stats[name]
    np.testing.assert_array_equal(other.kv_indices, one.kv_indices)
    assert go_on(other) == go_on(one)


def test_a_state_may_go_on_in_a_longer_context_but_not_in_too_short_a_one(
    random_model: Maker, load: Loader
) -> None:
    path = random_model(LLAMA).path
    short, long = load(path, **{**BOUND, "n_ctx": 500}), load(path, **BOUND)
    short.eval(random_tokens(400))
    long.load_state(short.save_state())
    long.eval(random_tokens(2600, seed=4))
    assert long.kv_stats.seen == 3000
    long.reset()
    long.eval(random_tokens(3000))
    with pytest.raises(SessionError, match="this state has 3000 tokens, too many .* n_ctx=500"):
        short.load_state(long.save_state())
    assert short.kv_stats.seen == 400


def test_a_state_of_nothing_is_the_beginning(random_model: Maker, load: Loader) -> None:
    llm = load(random_model(LLAMA).path, **BOUND)
    nothing = llm.save_state()
    llm.eval(random_tokens(300))
    llm.load_state(nothing)
    assert llm.n_tokens == llm.kv_stats.seen == llm.kv_stats.evictions == 0
    llm.eval(random_tokens(300))


def test_a_state_is_no_larger_than_a_session(
    random_model: Maker, load: Loader, tmp_path: Path
) -> None:
    """Rows of logits that nobody asked for are no part of it."""
    llm = load(random_model(LLAMA).path, **BOUND)
    llm.eval(random_tokens(400))
    llm.save_session(tmp_path / "s")
    assert len(pickle.dumps(llm.save_state())) < 1.2 * (tmp_path / "s").stat().st_size


def test_with_logits_all_the_logits_come_back(random_model: Maker, load: Loader) -> None:
    path = random_model(LLAMA).path
    one, other = (load(path, **BOUND, logits_all=True) for _ in range(2))
    one.eval(random_tokens(400))
    other.load_state(one.save_state())
    np.testing.assert_array_equal(other.scores[:400], one.scores[:400])
    without = load(path, **BOUND)
    without.eval(random_tokens(300))
    with pytest.raises(SessionError, match="without logits_all"):
        other.load_state(without.save_state())
    assert other.n_tokens == 400
    without.load_state(one.save_state())
    assert go_on(without) == go_on(one)


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_prompt_cache_filled_with_other_settings_is_passed_over_and_the_prompt_is_read(
    random_model: Maker, load: Loader, kind: str, tmp_path: Path
) -> None:
    path, prompt = random_model(LLAMA).path, random_tokens(300)

    def answer(llm: Llama) -> tuple[str, Any]:
        result: Any = llm.create_completion(prompt, max_tokens=20, temperature=0.0)
        return result["choices"][0]["text"], llm.kv_indices

    disk = kind == "disk"
    cache = llama_cpp.LlamaDiskCache(str(tmp_path)) if disk else llama_cpp.LlamaRAMCache()
    other = load(path, **{**BOUND, "kv_budget": 90})
    one, without = (load(path, **BOUND) for _ in range(2))
    other.set_cache(cache)
    answer(other)
    one.set_cache(cache)
    for llm in (one, without):
        llm.eval(random_tokens(200, seed=3))
    with pytest.warns(UserWarning, match="prompt cache has nothing usable.*with budget = 90"):
        got = answer(one)
    want = answer(without)
    assert got[0] == want[0]
    np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.parametrize("recall", ["off", "reply"])
def test_a_prompt_cache_of_the_same_settings_spares_reading(
    random_model: Maker, load: Loader, recall: str
) -> None:
    path, prompt = random_model(LLAMA).path, random_tokens(300)
    cache = llama_cpp.LlamaRAMCache()
    first, second = (load(path, **BOUND, recall=recall) for _ in range(2))
    for llm in (first, second):
        llm.set_cache(cache)
    result = first.create_completion(prompt, max_tokens=20, temperature=0.0)
    read: list[int] = []
    second.on_batch = lambda start, end: read.append(end - start)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        more = second.create_completion(
            [*prompt, *first.input_ids[300 : first.n_tokens].tolist(), 42],
            max_tokens=1,
            temperature=0.0,
        )
    assert result["choices"]
    assert more["choices"]
    assert read[0] == 1
    if recall == "off":
        assert read == [1]
    else:  # what was dropped is known, and the newest tokens ask for it
        assert second.kv_stats.logged > 0
        assert sum(read) <= 1 + 3 * 8


# -- without a budget -----------------------------------------------------------------------------


def test_states_do_not_cross_between_bounded_and_unbounded(
    random_model: Maker, load: Loader
) -> None:
    path = random_model(LLAMA).path
    bounded, plain = load(path, **BOUND), load(path, n_ctx=512)
    for llm in (bounded, plain):
        llm.eval(random_tokens(100))
    with pytest.raises(SessionError, match="saved without a bounded cache"):
        bounded.load_state(plain.save_state())
    with pytest.raises(SessionError, match="saved with a bounded cache"):
        plain.load_state(bounded.save_state())
    for llm in (bounded, plain):
        assert llm.n_tokens == 100
        llm.eval([7])


def test_what_llama_cpp_refuses_without_a_budget_is_a_sentence_and_all_is_read_again(
    random_model: Maker, load: Loader
) -> None:
    """It has overwritten what the base class knows of the conversation by then."""
    path = random_model(LLAMA).path
    large, small, fresh = load(path, n_ctx=1024), load(path, n_ctx=256), load(path, n_ctx=256)
    large.eval(random_tokens(600))
    small.eval(random_tokens(100))
    with pytest.raises(SessionError, match="llama.cpp rejects this state"):
        small.load_state(large.save_state())
    prompt = random_tokens(200)
    answers = [m.create_completion(prompt, max_tokens=20, temperature=0.0) for m in (small, fresh)]
    assert answers[0]["choices"] == answers[1]["choices"]
