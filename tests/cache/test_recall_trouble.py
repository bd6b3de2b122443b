"""Recall where something is in its way: windows, compacted positions, no memory, Ctrl-C, others."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import kvp_edge
from conftest import random_tokens
from kvp_edge.binding.cache import NativeCache
from kvp_edge.binding.queries import QueryLog
from kvp_edge.cache import asking, manager
from kvp_edge.cache.recall import Recall, RecallSettings
from kvp_edge.measuring import MeasuringLlama
from kvp_edge.policies import get_policy
from makers.gguf_models import ModelShape
from support.cache_types import CACHE_TYPES
from support.closeness import EXACT, difference
from support.histories import EXACT_GELU, F32, Maker
from support.interrupt import interrupted
from support.noise import Noise
from support.watch import Watch

Loader = Callable[..., kvp_edge.Llama]

BOUND: dict[str, Any] = {"n_ctx": 4000, "kv_budget": 100, "recent": 5, "reserve": 150}
ALWAYS = RecallSettings(threshold=0.0)
LLAMA = ModelShape("llama")


def windowed(sliding_window: int, **more: Any) -> ModelShape:
    return ModelShape(
        "gemma3", n_layer=2, n_embd=64, n_ff=64, head_dim=64, sliding_window=sliding_window, **more
    )


def open_with(load: Loader, path: str, settings: RecallSettings = ALWAYS, **more: Any) -> Any:
    llm = load(path, **{**BOUND, "recall": "reply", **more})
    assert llm.kv is not None
    llm.kv.recall_settings = settings
    return llm


# -- sliding windows -----------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["head", "token"])
@pytest.mark.parametrize("pack", ["auto", "state"])
def test_a_window_that_has_moved_on_ends_a_recall_and_not_the_chat(
    random_model: Maker, load: Loader, granularity: str, pack: str
) -> None:
    model = random_model(windowed(200))
    settings = RecallSettings(threshold=0.0, passes=3, n_queries=8)
    options = {**F32, "granularity": granularity, "pack": pack, "logits_all": True}
    llm = open_with(load, model.path, settings, **options, policy=Noise())
    watch = Watch(llm, model.shape)
    for seed in range(6):
        prompt = llm.input_ids[: llm.n_tokens].tolist() + random_tokens(90, seed=seed)[1:]
        llm.create_completion(prompt, max_tokens=5, temperature=0.0, seed=1)
    assert llm.kv_stats.recalls > 0
    if granularity == "head":  # at token granularity the window is thinned, too
        got = llm.scores[: llm.n_tokens]
        assert difference(got, watch.expected(model.reference)) < EXACT_GELU


def test_a_window_whose_keys_would_have_to_be_turned_recalls_nothing(
    random_model: Maker, load: Loader
) -> None:
    options = {"granularity": "token", "positions": "compact", "kv_budget": 150, "reserve": 60}
    llm = open_with(load, random_model(windowed(24, n_ctx_train=300)).path, **options)
    tokens = random_tokens(700)
    llm.create_completion(tokens, max_tokens=2, temperature=0.0)
    assert llm.kv.shift > 0
    assert llm.recall() is None
    assert not llm.kv.can_return(200)
    llm.create_completion([*tokens[:200], 9], max_tokens=2, temperature=0.0)
    assert llm.kv_stats.seen <= 203, "the 201 tokens were read again"


def test_a_window_without_its_dropped_tokens_is_not_taken_back(
    random_model: Maker, load: Loader
) -> None:
    """At token granularity the layers with a window lose what the others lose."""
    path = random_model(windowed(24)).path
    llm = open_with(load, path, RecallSettings(threshold=1.0), granularity="token")  # moves nothing
    tokens = random_tokens(400)
    llm.eval(tokens)
    llm.evict()
    first = 390  # inside the window, older than the recent tokens
    assert llm.kv.snapshot().tail > first
    got = next(iter(llm.generate([*tokens[:first], 9], temp=0.0)))
    fresh = load(path, **{**BOUND, "recall": "off", "granularity": "token"})
    assert got == next(iter(fresh.generate([*tokens[:first], 9], temp=0.0)))
    assert llm.kv.complete == fresh.kv.complete


# -- compacted positions -------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["head", "token"])
def test_rows_logged_after_a_compaction_are_turned_though_nothing_is_shifted_now(
    random_model: Maker, load: Loader, granularity: str
) -> None:
    model = random_model(ModelShape("llama", n_ctx_train=256))
    options = {"positions": "compact", "granularity": granularity, "logits_all": True, **F32}
    bound = {"kv_budget": 100, "recent": 5, "reserve": 156, "policy": Noise(), "n_batch": 8}
    llm = open_with(load, model.path, **options, **bound)
    watch = Watch(llm, model.shape)
    tokens = random_tokens(900)
    llm.eval(tokens)
    assert llm.kv.shift > 0
    llm.n_tokens = 255  # all of them fit, where they were read first
    llm.eval([9])
    assert llm.kv.complete
    assert llm.kv.shift == 0
    llm.eval(tokens[300:420])
    assert llm.recall() is not None
    llm.eval(tokens[:20])
    assert difference(llm.scores[: llm.n_tokens], watch.expected(model.reference)) < EXACT


# -- no memory -----------------------------------------------------------------------------------


def without_memory(*args: Any, **kwargs: Any) -> Any:
    raise MemoryError("not enough memory for this")


@pytest.mark.parametrize("granularity", ["head", "token"])
@pytest.mark.parametrize(
    ("part", "function"),
    [
        (asking, "score_log"),
        (NativeCache, "log_rows"),
        (NativeCache, "fill"),
        (manager.filling, "fill"),
        (manager.recall, "choose"),
    ],
)
def test_without_memory_for_a_recall_the_reply_is_written_from_what_is_held(
    random_model: Maker,
    load: Loader,
    monkeypatch: pytest.MonkeyPatch,
    part: Any,
    function: str,
    granularity: str,
) -> None:
    llm = open_with(load, random_model(LLAMA).path, granularity=granularity, policy="knorm")
    twin = open_with(
        load, random_model(LLAMA).path, granularity=granularity, policy="knorm", recall="off"
    )
    llm.eval(random_tokens(600))
    prompt = [*random_tokens(600), *random_tokens(30, seed=1)]
    with monkeypatch.context() as patched:
        patched.setattr(part, function, without_memory)
        with pytest.warns(UserWarning, match="not enough memory for this"):
            out = llm.create_completion(prompt, max_tokens=5, temperature=0.0)
    twin.eval(random_tokens(600))
    assert (
        out["choices"] == twin.create_completion(prompt, max_tokens=5, temperature=0.0)["choices"]
    )
    assert np.array_equal(llm.kv_indices, twin.kv_indices)
    assert llm.recall() is not None, "with memory it is possible again"


def test_without_memory_to_go_back_the_prompt_is_read_again(
    random_model: Maker, load: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = open_with(load, random_model(LLAMA).path)
    tokens = random_tokens(600)
    llm.eval(tokens)
    assert llm.kv.can_return(100)
    monkeypatch.setattr(NativeCache, "fill", without_memory)
    out = llm.create_completion([*tokens[:100], 9], max_tokens=3, temperature=0.0)
    fresh = load(random_model(LLAMA).path, **{**BOUND, "recall": "off"})
    want = fresh.create_completion([*tokens[:100], 9], max_tokens=3, temperature=0.0)
    assert out["choices"] == want["choices"]


# -- going back ----------------------------------------------------------------------------------


def test_tokens_of_an_interrupted_batch_do_not_keep_a_prompt_from_going_back(
    random_model: Maker, load: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = open_with(load, random_model(LLAMA).path)
    tokens = random_tokens(600)
    llm.eval(tokens)
    decode = llm._ctx.decode

    def interrupted_behind(batch: Any) -> None:
        decode(batch)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(llm._ctx, "decode", interrupted_behind)
        with pytest.raises(KeyboardInterrupt):
            llm.eval([5, 6, 7])
    out = llm.create_completion([*tokens[:100], 9], max_tokens=3, temperature=0.0)
    fresh = load(random_model(LLAMA).path, **{**BOUND, "recall": "off"})
    want = fresh.create_completion([*tokens[:100], 9], max_tokens=3, temperature=0.0)
    assert out["choices"] == want["choices"]


class FiveNeighbours(Noise):
    name = "five-neighbours"
    context = 5


def test_scores_that_look_at_later_tokens_are_asked_for_again_after_going_back(
    random_model: Maker, load: Loader
) -> None:
    llm = open_with(load, random_model(LLAMA).path, policy=FiveNeighbours())
    llm.eval(random_tokens(900))
    for length in (200, 400):
        llm.n_tokens = min(length, llm.n_tokens)
        llm.sync()
        t = llm.kv.snapshot()
        assert t.scores.shape[2] <= max(t.n_packed, t.kept - FiveNeighbours.context)
        llm.eval(random_tokens(700, seed=length))


# -- all caches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CACHE_TYPES)
def test_every_type_of_cache_recalls(random_model: Maker, load: Loader, name: str) -> None:
    type_k, type_v, flash_attn = CACHE_TYPES[name]
    types = {"type_k": type_k, "type_v": type_v, "flash_attn": flash_attn}
    llm = open_with(load, random_model(LLAMA).path, **types)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm.create_completion(random_tokens(600), max_tokens=2, temperature=0.0)
    assert llm.kv_stats.recalls == 1
    present = llm.kv.snapshot().llama_positions()
    llm.kv.cache.check_state(llm.kv.cache.state(), present)


@pytest.mark.parametrize("when", ["reply", "always"])
def test_until_something_is_dropped_no_query_is_looked_at(
    random_model: Maker, load: Loader, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    llm = open_with(load, random_model(LLAMA).path, recall=when)
    seen: list[bool] = []
    watch = QueryLog.watch
    monkeypatch.setattr(QueryLog, "watch", lambda log, on: (seen.append(on), watch(log, on)))
    llm.create_completion(random_tokens(150), max_tokens=40, temperature=0.0, seed=1)
    assert llm.kv.complete
    assert True not in seen
    llm.create_completion(random_tokens(400), max_tokens=2, temperature=0.0)
    assert True in seen


# -- who asks ------------------------------------------------------------------------------------


def test_the_same_prompt_again_is_asked_by_the_same_tokens(
    random_model: Maker, load: Loader
) -> None:
    events: list[Recall] = []
    llm = open_with(load, random_model(LLAMA).path, on_recall=events.append, recent=80)
    llm.eval(random_tokens(600))
    prompt = [*random_tokens(600), *random_tokens(50, seed=1)]
    for _ in range(2):
        llm.create_completion(prompt, max_tokens=3, temperature=0.0)
    assert [event.n_asked for event in events] == [50, 50]


def test_who_reads_between_two_pieces_of_a_stream_does_not_write_it(
    random_model: Maker, load: Loader
) -> None:
    llm = open_with(load, random_model(LLAMA).path, recall="always", recall_every=16)
    stream = llm.create_completion(random_tokens(600), max_tokens=50, temperature=0.0, stream=True)
    next(stream)
    before = llm.kv_stats.recalls
    for token in random_tokens(40):
        llm.eval([token])
    assert llm.kv_stats.recalls == before
    assert not llm.kv.query_log.watching


def test_a_measured_model_says_what_follows_after_a_recall(random_model: Maker) -> None:
    with_recall = {"recall": "reply", "n_threads": 1, "verbose": False, "policy": "knorm"}
    llm = MeasuringLlama(random_model(LLAMA).path, 4000, 256, 100, **with_recall)
    try:
        llm.read(random_tokens(600))
        assert llm.kv is not None
        llm.kv.recall_settings = ALWAYS
        then = llm.bookmark()
        llm.read([5])
        llm.go_back(then)
        assert llm.recall() is not None
        read = super(MeasuringLlama, llm).newest_logits()
        assert np.array_equal(llm.newest_logits(), read)
    finally:
        llm.close()


def test_a_policy_that_needs_all_queries_is_not_given_those_of_recall_alone(
    random_model: Maker, load: Loader
) -> None:
    llm = open_with(load, random_model(LLAMA).path, policy="knorm")
    with pytest.raises(kvp_edge.PolicyError, match="needs queries"):
        llm.kv.replace_policy(get_policy("snapkv"))
    complete = open_with(load, random_model(LLAMA).path, policy="snapkv")
    complete.kv.replace_policy(get_policy("knorm"))
    complete.create_completion(random_tokens(600), max_tokens=2, temperature=0.0)
    complete.kv.replace_policy(get_policy("snapkv"))
    complete.eval(random_tokens(20))
    assert complete.kv.logged_queries(20)


def begin(llm: kvp_edge.Llama, prompt: list[int]) -> None:
    """Read a prompt and what it asks for, and write a token."""
    next(iter(llm.generate(prompt, temp=0.0)))


# -- Ctrl-C --------------------------------------------------------------------------------------


def test_an_interrupted_switch_of_the_query_log_is_made_good(
    random_model: Maker, load: Loader
) -> None:
    llm = open_with(load, random_model(LLAMA).path)
    log = llm.kv.query_log
    at = 0
    while interrupted(lambda: log.watch(True), at):
        assert not log.watching
        log.watch(False)
        llm.eval(random_tokens(20))
        log.watch(True)
        llm.eval(random_tokens(20))
        assert llm.kv.logged_queries(20)
        log.watch(False)
        at += 1
    assert at > 0


@pytest.mark.parametrize("granularity", ["head", "token"])
def test_wherever_a_recall_is_interrupted_what_is_held_is_what_the_table_says(
    random_model: Maker, load: Loader, granularity: str
) -> None:
    model = random_model(ModelShape("llama", n_layer=1, n_embd=64, n_ff=64))
    options = {**F32, "granularity": granularity, "logits_all": True, "policy": Noise()}
    llm = open_with(load, model.path, RecallSettings(threshold=0.0, n_queries=8), **options)
    tokens = random_tokens(500)
    prompt = [*tokens, *random_tokens(12, seed=1)]
    watch = Watch(llm, model.shape)
    at, step = 0, 0
    while True:
        llm.reset()
        llm.eval(tokens)
        if not interrupted(lambda: begin(llm, prompt), at):
            break
        begin(llm, prompt)
        assert llm.n_tokens == len(prompt)
        assert llm.kv.trusted
        if step % 8 == 0:
            got = llm.scores[: llm.n_tokens]
            assert difference(got, watch.expected(model.reference)) < EXACT
        step += 1
        at += 1 + at // 6
    assert step > 10
