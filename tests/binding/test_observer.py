"""One observer of a context's graphs and all who subscribe to it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import llama_cpp
import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import RandomModel, random_tokens
from kvp_edge.binding import rules
from kvp_edge.binding.blocks import Blocks
from kvp_edge.binding.cache import NativeCache
from kvp_edge.binding.capture import AttentionAsComputed
from kvp_edge.binding.observer import Observer
from kvp_edge.binding.queries import QueryLog
from kvp_edge.binding.rope import measure_frequencies
from kvp_edge.errors import KVCacheError
from makers.gguf_models import ModelShape

Maker = Callable[[ModelShape], RandomModel]

SHAPE = ModelShape("llama", head_dim=32)
N_TOKENS = 40


@dataclass
class Observed:
    """A context with an observer; subscribers are created in the order of the calls."""

    ctx: Any
    model: Any
    params: Any
    observer: Observer
    caches: list[NativeCache] = field(default_factory=list)

    def cache(self, *, observed: bool = True) -> NativeCache:
        self.caches.append(NativeCache(self.ctx, self.observer if observed else None))
        return self.caches[-1]

    def decode(self, tokens: Sequence[int]) -> int:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)  # the batch does not keep it
        return int(
            llama_cpp.llama_decode(self.ctx, llama_cpp.llama_batch_get_one(array, len(tokens)))
        )


@pytest.fixture
def observed() -> Iterator[Callable[..., Observed]]:
    """observed(path, callback=...) -> Observed, closed after the test."""
    made: list[Observed] = []

    def make(path: str, callback: Any = None) -> Observed:
        model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = 256, 2, True
        params.n_threads = params.n_threads_batch = 1
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if callback is not None:
            params.cb_eval = callback
        observer = Observer(params)
        context = llama_cpp.llama_init_from_model(model, params)
        made.append(Observed(context, model, params, observer))
        return made[-1]

    yield make
    for each in made:
        for cache in each.caches:
            cache.close()
        llama_cpp.llama_free(each.ctx)
        llama_cpp.llama_model_free(each.model)


def what_they_see(on: Observed, order: Sequence[str]) -> dict[str, NDArray[Any]]:
    """All that the subscribers of these names, created in this order, saw of a text."""
    subscribed: dict[str, Any] = {}
    make = {
        "cells": on.cache,
        "queries": lambda: QueryLog(on.observer),
        "attention": lambda: AttentionAsComputed(on.observer),
    }
    for name in order:
        subscribed[name] = make[name]()
    cache: NativeCache = subscribed.get("cells") or on.cache(observed=False)
    log: QueryLog | None = subscribed.get("queries")
    attention: AttentionAsComputed | None = subscribed.get("attention")
    if log is not None:
        log.start(on.ctx, cache, N_TOKENS)
    if attention is not None:
        attention.start(on.ctx, cache, N_TOKENS)
        attention.begin(Blocks.with_border_at(N_TOKENS, 8), N_TOKENS)
    assert on.decode(random_tokens(N_TOKENS)) == 0
    cache.appended(0, N_TOKENS)
    seen: dict[str, NDArray[Any]] = {}
    _, keys, _ = cache.read(0, N_TOKENS, N_TOKENS)
    if log is not None:
        log.append(0, N_TOKENS)
        seen["queries"] = log.read(N_TOKENS).queries
    if attention is not None:
        seen["attention"] = attention.end(keys)
    if "cells" in subscribed:
        assert cache.location.known
        assert cache.check_cells(np.arange(N_TOKENS, dtype=np.int32))
        before = cache.location.bytes_transferred
        scores = cache.score(rules.KeyDiff(), 0, N_TOKENS, N_TOKENS)
        assert isinstance(scores, np.ndarray)
        seen["cells"] = scores
        assert cache.location.bytes_transferred == before  # scored where they lie
    return seen


def test_what_a_subscriber_sees_does_not_depend_on_the_others_or_on_their_order(
    random_model: Maker, observed: Callable[..., Observed]
) -> None:
    path = random_model(SHAPE).path
    alone: dict[str, NDArray[Any]] = {}
    for name in ("cells", "queries", "attention"):
        alone.update(what_they_see(observed(path), [name]))
    for order in permutations(alone):
        together = what_they_see(observed(path), order)
        assert together.keys() == alone.keys()
        for name, want in alone.items():
            assert together[name].tobytes() == want.tobytes(), (name, order)


def test_a_callback_that_was_there_is_shown_all_nodes_and_those_it_asked_for(
    random_model: Maker, observed: Callable[..., Observed]
) -> None:
    """As llama.cpp would without an observer, while another subscriber asks for other nodes."""
    path = random_model(SHAPE).path

    def run(subscribe: bool) -> tuple[list[int], int]:
        asked: list[int] = []
        computed: list[int] = []

        @llama_cpp.ggml_backend_sched_eval_callback  # type: ignore[untyped-decorator]
        def every_third(node: Any, ask: bool, data: Any) -> bool:
            if ask:
                asked.append(ctypes.cast(node, ctypes.c_void_p).value or 0)
                return len(asked) % 3 == 0
            computed.append(len(asked))
            return True

        on = observed(path, every_third)
        cache = on.cache()
        log = QueryLog(on.observer)
        if subscribe:
            log.start(on.ctx, cache, N_TOKENS)
        asked.clear()
        computed.clear()
        assert on.decode(random_tokens(N_TOKENS)) == 0
        # every node that it asked for, right after it asked
        assert computed == list(range(3, len(asked) + 1, 3))
        return asked, len(computed)

    without, with_log = run(False), run(True)
    assert len(without[0]) == len(with_log[0]) > 50
    assert without[1] == with_log[1]


def test_a_callback_that_was_there_can_still_stop_the_graph(
    random_model: Maker, observed: Callable[..., Observed]
) -> None:
    stop, shown = [False], [0]

    @llama_cpp.ggml_backend_sched_eval_callback  # type: ignore[untyped-decorator]
    def stopping(node: Any, ask: bool, data: Any) -> bool:
        shown[0] += not ask
        return bool(ask or not stop[0])

    on = observed(random_model(SHAPE).path, stopping)
    assert on.decode(random_tokens(4)) == 0
    whole, stop[0] = shown[0], True
    shown[0] = 0
    on.decode(random_tokens(4))
    assert shown[0] == 1 < whole


def test_subscribers_may_go_before_the_observer_and_after_it(
    random_model: Maker, observed: Callable[..., Observed]
) -> None:
    on = observed(random_model(SHAPE).path)
    first, cache = QueryLog(on.observer), on.cache()
    first.start(on.ctx, cache, N_TOKENS)
    second = QueryLog(on.observer)
    second.start(on.ctx, cache, N_TOKENS)
    del first
    gc.collect()
    assert on.decode(random_tokens(N_TOKENS)) == 0
    second.append(0, N_TOKENS)
    assert len(second) == N_TOKENS

    params = llama_cpp.llama_context_default_params()
    observer = Observer(params)
    log, capture = QueryLog(observer), AttentionAsComputed(observer)
    for each in (log, capture):
        del each._observer
    del observer
    gc.collect()  # the handle is freed, and they are not
    with pytest.raises(ValueError, match="was not started"):
        log.read(1)


def test_one_who_fails_leaves_the_others_alone(
    random_model: Maker, observed: Callable[..., Observed]
) -> None:
    """A capture that is told of other heads than there are fails at its first node."""
    on = observed(random_model(SHAPE).path)
    attention, cache = AttentionAsComputed(on.observer), on.cache()
    log = QueryLog(on.observer)
    log.start(on.ctx, cache, N_TOKENS)
    attention.start(on.ctx, cache, N_TOKENS)
    attention.begin(Blocks(8, 8), N_TOKENS - 1)  # one token less than are read
    assert on.decode(random_tokens(N_TOKENS)) == 0
    cache.appended(0, N_TOKENS)
    log.append(0, N_TOKENS)
    assert len(log) == N_TOKENS
    assert cache.check_cells(np.arange(N_TOKENS, dtype=np.int32))
    _, keys, _ = cache.read(0, N_TOKENS, N_TOKENS)
    with pytest.raises((ValueError, KVCacheError), match="more than the 39 tokens"):
        attention.end(keys)


def test_the_context_in_which_rope_is_measured_is_not_observed(
    random_model: Maker, observed: Callable[..., Observed]
) -> None:
    """It is made from the same parameters, and its cells are not those of the cache."""
    shown = [0]

    @llama_cpp.ggml_backend_sched_eval_callback  # type: ignore[untyped-decorator]
    def counting(node: Any, ask: bool, data: Any) -> bool:
        shown[0] += 1
        return False

    on = observed(random_model(SHAPE).path, counting)
    assert on.decode(random_tokens(4)) == 0
    before = shown[0]
    assert before > 0
    measure_frequencies(on.model, on.params, own_shift=False)
    assert shown[0] == before
