"""Libraries that use a Llama, or what is below it: what they ask for, and what they do to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

import kvp_edge
from conftest import RandomModel, random_tokens
from kvp_edge import KVCacheError, Llama
from makers.gguf_models import ModelShape

Maker = Callable[[ModelShape], RandomModel]
Loader = Callable[..., Llama]

LLAMA = ModelShape("llama")
BOUND = {"n_ctx": 3000, "kv_budget": 100, "recent": 20, "reserve": 156, "granularity": "head"}


def test_the_context_says_the_logical_length_wherever_it_is_asked(
    random_model: Maker, load: Loader
) -> None:
    """LlamaIndex asks context_params, and drops the messages that do not fit."""
    llm = load(random_model(LLAMA).path, **BOUND)
    assert llm.n_ctx() == llm.context_params.n_ctx == 3000
    assert llm.kv_stats.cells == 256
    unbounded = load(random_model(LLAMA).path, n_ctx=512)
    assert unbounded.n_ctx() == unbounded.context_params.n_ctx == 512


def test_a_library_that_makes_its_own_llama_takes_the_bounded_one(
    random_model: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As README says: LangChain and LlamaIndex import it from llama_cpp when they make one."""
    monkeypatch.setattr(llama_cpp, "Llama", kvp_edge.Llama)
    from llama_cpp import Llama as Theirs

    llm: Any = Theirs(random_model(LLAMA).path, verbose=False, n_threads=1, **BOUND)
    llm.create_completion(random_tokens(600), max_tokens=3)
    assert llm.kv_stats.evictions > 0
    llm.close()


# -- the context is used by somebody else ---------------------------------------------------------


def decode_below(llm: Llama, n: int) -> None:
    """What libraries do that have a loop of their own (guidance): empty the cache, and read."""
    llm._ctx.kv_cache_seq_rm(-1, 0, -1)
    batch = llama_cpp.llama_batch_init(n, 0, 1)
    batch.n_tokens = n
    for i, token in enumerate(random_tokens(n, seed=9)):
        batch.token[i], batch.pos[i] = token, i
        batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, i == n - 1
    assert llama_cpp.llama_decode(llm.ctx, batch) == 0
    llama_cpp.llama_batch_free(batch)


@pytest.mark.parametrize("n", [20, 119, 121, 140])
@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_what_others_did_to_the_context_is_noticed_and_the_conversation_read_again(
    random_model: Maker, load: Loader, n: int, positions: str
) -> None:
    path = random_model(LLAMA).path
    one, untouched = (load(path, **BOUND, n_batch=150, positions=positions) for _ in range(2))
    prompt = random_tokens(120)
    for llm in (one, untouched):
        llm.eval(prompt)
    decode_below(one, n)
    with pytest.raises(KVCacheError, match="something else has used the model's context"):
        one.eval([7])
    answers = [m.create_completion(prompt, max_tokens=9, temperature=0.0) for m in (one, untouched)]
    assert answers[0]["choices"] == answers[1]["choices"]
    decode_below(one, n)
    for save in (one.save_state, lambda: one.save_session("never written"), one.evict):
        with pytest.raises(KVCacheError):
            save()
    one.reset()
    one.eval(prompt)
    np.testing.assert_array_equal(one.kv_indices[0, 0], np.arange(120))


def test_also_after_evictions_and_a_compaction(random_model: Maker, load: Loader) -> None:
    path = random_model(ModelShape("llama", n_ctx_train=300)).path
    bound = {**BOUND, "positions": "compact"}
    one, fresh = load(path, **bound), load(path, **bound)
    one.eval(random_tokens(1000))
    assert one.kv is not None
    assert one.kv.shift > 0
    one.eval([7])  # nothing was noticed that is not so
    decode_below(one, 20)
    prompt = [*random_tokens(1000), 7, 8]
    answers = [m.create_completion(prompt, max_tokens=9, temperature=0.0) for m in (one, fresh)]
    assert answers[0]["choices"] == answers[1]["choices"]


def test_a_number_of_tokens_that_were_never_read_is_refused(
    random_model: Maker, load: Loader
) -> None:
    llm = load(random_model(LLAMA).path, **BOUND)
    llm.eval(random_tokens(50))
    llm.n_tokens = 60
    with pytest.raises(KVCacheError, match="reset"):
        llm.eval([7])


# -- logits of all tokens -------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["logits_all", "draft_model"])
def test_rows_of_logits_grow_with_the_conversation_and_not_with_the_logical_context(
    random_model: Maker, load: Loader, how: str
) -> None:
    more = {"logits_all": True, "draft_model": LlamaPromptLookupDecoding()}[how]
    bound = {**BOUND, "n_ctx": 2**30}
    llm = load(random_model(LLAMA).path, **bound, **{how: more})
    assert llm.scores.nbytes <= 512 * 320 * 4
    whole = load(random_model(LLAMA).path, n_ctx=1500, logits_all=True)
    tokens = random_tokens(200)
    for at in range(0, 200, 50):
        llm.eval(tokens[at : at + 50])
    whole.eval(tokens)
    np.testing.assert_allclose(llm.scores[:200], whole.scores[:200], atol=1e-3)
    first = llm.scores[:200].copy()
    llm.eval(random_tokens(1000, seed=1))
    assert 1200 <= len(llm.scores) < 2000
    np.testing.assert_array_equal(llm.scores[:200], first)


def test_logits_beyond_memory_are_a_sentence_and_the_conversation_goes_on(
    random_model: Maker, load: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = load(random_model(LLAMA).path, **BOUND, logits_all=True)
    llm.eval(random_tokens(250))
    empty = np.empty

    def none_left(shape: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(shape, tuple) and shape[-1] == 320:
            raise MemoryError
        return empty(shape, *args, **kwargs)

    monkeypatch.setattr(np, "empty", none_left)
    with pytest.raises(MemoryError, match="logits of 384 tokens take 0.0 GiB.*lower n_ctx"):
        llm.eval(random_tokens(50, seed=1))
    monkeypatch.undo()
    n = llm.n_tokens
    assert 250 <= n < 300
    llm.eval(random_tokens(50, seed=1)[n - 250 :])
    assert llm.kv_stats.seen == 300


@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_drafts_that_are_rejected_are_nobody_elses_doing(
    random_model: Maker, load: Loader, positions: str
) -> None:
    """The base class takes their cells away itself, at positions that may be others."""
    path = random_model(ModelShape("llama", n_ctx_train=300)).path
    bound = {**BOUND, "positions": positions}
    draft = LlamaPromptLookupDecoding(num_pred_tokens=5)
    drafting, plain = load(path, **bound, draft_model=draft), load(path, **bound)
    prompt = [0, *[7, 8, 9, 10] * 20]
    answers = [
        m.create_completion(prompt, max_tokens=100, temperature=0.0) for m in (drafting, plain)
    ]
    assert answers[0]["choices"] == answers[1]["choices"]  # nothing was dropped yet
    drafting.create_completion([*prompt, 11], max_tokens=700, temperature=0.0)
    assert drafting.kv_stats.evictions > 2
    assert drafting.kv is not None
    assert (drafting.kv.shift > 0) == (positions == "compact")
    assert drafting.kv.trusted


def test_drafts_that_do_not_fit_into_a_batch_are_left_out(
    random_model: Maker, load: Loader
) -> None:
    """llama.cpp has the logits of the newest batch alone, and aborts if asked for older ones."""
    draft = LlamaPromptLookupDecoding(num_pred_tokens=30)
    llm = load(random_model(LLAMA).path, **BOUND, recall="off", n_batch=4, draft_model=draft)
    prompt = [0, *[7, 8, 9, 10] * 40]
    out = llm.create_completion(prompt, max_tokens=150, temperature=0.0)
    assert out["usage"]["completion_tokens"] == 150
    assert llm.kv_stats.evictions > 0
