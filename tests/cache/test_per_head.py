"""Per-head eviction as a whole: random histories, rewinding, failures, limits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import RandomModel, random_tokens
from kvp_edge import KVCacheError, Llama, UnsupportedModelError
from kvp_edge.cache import manager
from makers.gguf_models import ModelShape, write_mpt
from support import failing_call
from support.closeness import HALF, difference
from support.histories import EXACT, EXACT_GELU, F32, any_history
from support.noise import Noise
from support.properties import examples
from support.watch import Watch

Maker = Callable[[ModelShape], RandomModel]
Loader = Callable[..., Llama]

LLAMA = ModelShape("llama")
WINDOW = ModelShape("gemma3", head_dim=64, n_head_kv=2, n_layer=4, sliding_window=24)
BOUND: dict[str, Any] = {"n_ctx": 3000, "kv_budget": 100, "recent": 20, "reserve": 60}


@examples(25)
@given(data=st.data())
def test_any_history_equals_the_reference(
    random_model: Maker, data: st.DataObject, way: str
) -> None:
    any_history(random_model, data, way)


@pytest.mark.slow
@examples(600)
@given(data=st.data())
def test_any_of_many_histories_equals_the_reference(
    random_model: Maker, data: st.DataObject, way: str
) -> None:
    any_history(random_model, data, way)


# -- rewinding -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [LLAMA, ModelShape("qwen3", head_dim=64)])
@pytest.mark.usefixtures("way")
def test_rewinding_inside_the_recent_window_is_exact(
    random_model: Maker, load: Loader, shape: ModelShape
) -> None:
    model = random_model(shape)
    llm = load(model.path, **BOUND, **F32, granularity="head", policy=Noise(), logits_all=True)
    watch = Watch(llm, shape)
    llm.eval(random_tokens(200))
    llm.eval(random_tokens(60, seed=1))  # evicts: cells = 256
    assert llm.kv_stats.evictions == 1
    oldest = llm.kv_stats.seen - 60 - BOUND["recent"] + 1
    for length in (llm.n_tokens - 1, llm.n_tokens - 30, oldest):
        assert llm.kv is not None
        assert llm.kv.can_rewind(length)
        llm.n_tokens = length
        llm.eval(random_tokens(40, seed=length))
        want = watch.expected(model.reference)
        assert difference(llm.scores[: llm.n_tokens], want) < EXACT
    assert llm.kv_stats.evictions == 1
    llm.n_tokens = oldest - 1
    with pytest.raises(KVCacheError, match="can go back to"):
        llm.eval([7])


@pytest.mark.usefixtures("way")
def test_an_edited_message_beyond_the_recent_window_is_read_again(
    random_model: Maker, load: Loader
) -> None:
    llm = load(random_model(LLAMA).path, **BOUND, granularity="head")
    fresh = load(random_model(LLAMA).path, **BOUND, granularity="head")
    tokens = random_tokens(500)
    llm.eval(tokens)
    edited = [*tokens[:100], 99, *tokens[101:]]

    def first(of: Llama, prompt: list[int]) -> int:
        return int(next(iter(of.generate(prompt, temp=0.0))))

    assert first(llm, edited) == first(fresh, edited)
    np.testing.assert_array_equal(llm.kv_indices, fresh.kv_indices)


@pytest.mark.usefixtures("way")
def test_a_window_cache_that_moved_on_is_not_rewound_into(
    random_model: Maker, load: Loader
) -> None:
    """llama.cpp frees the cells of a sliding window as it moves on, so going back needs a check of
    its own; whatever length it allows must be exact."""
    model = random_model(WINDOW)
    llm = load(model.path, **BOUND, **F32, granularity="head", policy=Noise(), logits_all=True)
    watch = Watch(llm, WINDOW)
    llm.eval(random_tokens(200))
    llm.eval(random_tokens(60, seed=1))
    assert llm.kv is not None
    allowed = [n for n in range(1, llm.n_tokens) if llm.kv.can_rewind(n)]
    assert allowed
    for length in (allowed[-1], allowed[len(allowed) // 2], allowed[0]):
        if not llm.kv.can_rewind(length):
            continue
        llm.n_tokens = length
        llm.eval(random_tokens(9, seed=length))
        want = watch.expected(model.reference)
        assert difference(llm.scores[: llm.n_tokens], want) < EXACT_GELU


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.usefixtures("way")
def test_an_interrupt_around_packing_ends_in_a_clean_re_read(
    random_model: Maker, load: Loader, where: str
) -> None:
    llm, untouched = (load(random_model(LLAMA).path, **BOUND, granularity="head") for _ in range(2))
    assert llm.kv is not None
    pack = llm.kv.cache.pack

    def interrupted(*args: Any) -> None:
        if where == "after":
            pack(*args)
        raise KeyboardInterrupt

    tokens = random_tokens(700)
    llm.kv.cache.pack = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        llm.eval(tokens)
    llm.kv.cache.pack = pack  # type: ignore[method-assign]
    with pytest.raises(KVCacheError, match="interrupted"):
        llm.eval([7])
    answers = [next(iter(of.generate(tokens, temp=0.0))) for of in (llm, untouched)]
    assert answers[0] == answers[1]
    np.testing.assert_array_equal(llm.kv_indices, untouched.kv_indices)


@pytest.mark.parametrize("policy", ["auto", "lagkv", "h2o"])
@pytest.mark.parametrize("granularity", ["head", "token"])
def test_an_interrupt_between_scoring_and_packing_leaves_no_score(
    bundled_model: str,
    load: Loader,
    granularity: str,
    policy: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The newest tokens' scores are others when the tokens after them are known, and they may be
    taken back."""
    how = {**BOUND, "granularity": granularity, "policy": policy}
    llm, untouched = (load(bundled_model, **how) for _ in range(2))
    text = llm.tokenize(b"The old man went to the sea. My dog is called Rex. " * 30)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    for model in (llm, untouched):
        model.eval(text[:200])
    with monkeypatch.context() as patch:
        patch.setattr(manager, "choose_rows", interrupt)
        patch.setattr(manager, "choose_tokens", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.evict()
    for model in (llm, untouched):
        model.eval(text[200:240])
        model.evict()
    np.testing.assert_array_equal(llm.kv_indices, untouched.kv_indices)


def test_states_in_memory_go_back_and_forth(random_model: Maker, load: Loader, way: str) -> None:
    llm = load(random_model(LLAMA).path, **BOUND, granularity="head", logits_all=True)
    llm.eval(random_tokens(400))
    state = llm.save_state()
    held = llm.kv_indices
    llm.eval(random_tokens(300, seed=1))
    want = np.array(llm.scores[400:700])
    llm.load_state(state)
    np.testing.assert_array_equal(llm.kv_indices, held)
    llm.eval(random_tokens(300, seed=1))
    if way in ("cpu", "state"):
        np.testing.assert_array_equal(llm.scores[400:700], want)
    else:  # transposed values on a device are left with holes, and sums go another way over them
        assert difference(llm.scores[400:700], want) < HALF


# -- limits and refusals ---------------------------------------------------------------------


@pytest.mark.usefixtures("way")
def test_no_more_cells_than_the_context_has_ever_hold_tokens(
    random_model: Maker, load: Loader
) -> None:
    seen: list[int] = []
    llm = load(
        random_model(LLAMA).path,
        **BOUND,
        on_evict=lambda e: seen.append(e.kept),
        granularity="head",
    )
    for seed in range(6):
        llm.eval(random_tokens(150, seed=seed))
        held = llm.kv.cache.read(0, 10**6, llm.kv_stats.kept, values=False)[0]  # type: ignore[union-attr]
        assert len(held) == llm.kv_stats.kept <= llm.kv_stats.cells == 256
    assert seen
    assert set(seen) == {BOUND["kv_budget"]}


@pytest.mark.usefixtures("way")
def test_dropped_spans_name_tokens_that_no_head_holds_any_more(
    random_model: Maker, load: Loader
) -> None:
    dropped: list[int] = []

    def note(event: Any) -> None:
        spans = [t for a, b in event.dropped for t in range(a, b)]
        assert len(spans) == event.n_dropped
        dropped.extend(spans)

    llm = load(random_model(LLAMA).path, **BOUND, policy=Noise(), on_evict=note, granularity="head")
    llm.eval(random_tokens(900))
    held = set(llm.kv_indices.reshape(-1).tolist())
    assert len(dropped) == len(set(dropped))
    assert held.isdisjoint(dropped)
    assert held | set(dropped) == set(range(900))


@pytest.mark.usefixtures("way")
def test_sinks_and_recent_tokens_are_in_the_same_rows_of_all_heads(
    random_model: Maker, load: Loader
) -> None:
    llm = load(random_model(LLAMA).path, **BOUND, policy=Noise(), granularity="head")
    llm.eval(random_tokens(257))
    held = llm.kv_indices
    assert (held[:, :, :4] == np.arange(4)).all()
    assert (held[:, :, -21:] == np.arange(236, 257)).all()
    assert (np.diff(held, axis=-1) > 0).all()
    assert not (held == held[:1, :1]).all()


def test_the_default_is_head_and_what_cannot_be_packed_is_refused_unless_allowed(
    random_model: Maker, tmp_path: Path
) -> None:
    quiet: dict[str, Any] = {"kv_budget": 100, "verbose": False}
    llm = Llama(random_model(LLAMA).path, **quiet)
    assert llm.kv_stats.granularity == "head"
    llm.close()
    write_mpt(tmp_path / "alibi.gguf")
    with pytest.raises(UnsupportedModelError, match="ALiBi.*granularity='token'"):
        Llama(str(tmp_path / "alibi.gguf"), **quiet)
    llm = Llama(str(tmp_path / "alibi.gguf"), **quiet, granularity="auto")
    assert llm.kv_stats.granularity == "token"
    llm.close()
    with pytest.raises(ValueError, match="'head', 'token' or 'auto', not 'layer'"):
        Llama(random_model(LLAMA).path, **quiet, granularity="layer")


_FAILING = """
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
/* Stands in for llama.cpp's own function and lets one call fail, before or half way through. */
typedef size_t set_data(void * ctx, const uint8_t * src, size_t size, int32_t seq);
size_t llama_state_seq_set_data(void * ctx, const uint8_t * src, size_t size, int32_t seq) {
    static int calls = 0;
    void * llama = dlopen(getenv("LLAMA_LIBRARY"), RTLD_NOW | RTLD_NOLOAD);
    set_data * real = (set_data *) dlsym(llama, "llama_state_seq_set_data");
    if (++calls == atoi(getenv("FAIL_AT"))) {
        return atoi(getenv("FAIL_HALF")) ? real(ctx, src, size / 2, seq) : 0;
    }
    return real(ctx, src, size, seq);
}
"""

_SURVIVOR = f"""
import sys
from kvp_edge import Llama
bound = dict(n_ctx=3000, kv_budget=100, recent=20, reserve=60, verbose=False)
bound["pack"] = "state"
llm, fresh = Llama(sys.argv[1], **bound), Llama(sys.argv[1], **bound)
failed = ""
{failing_call.READ_AGAIN}
print("survived")
"""


@failing_call.possible
@pytest.mark.parametrize("half", [False, True])
def test_a_state_that_llama_cpp_does_not_take_leaves_an_empty_cache_and_is_read_again(
    random_model: Maker, tmp_path: Path, half: bool
) -> None:
    # two packs while the two models are loaded, then the first eviction
    how = {"FAIL_AT": "3", "FAIL_HALF": str(int(half))}
    path = random_model(LLAMA).path
    out, err = failing_call.run(tmp_path, _FAILING, _SURVIVOR, path, **how)
    assert out == "survived\n", err
