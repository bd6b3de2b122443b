"""Recall: rows that were dropped come back, the right ones, and as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_cpp.llama_speculative import LlamaDraftModel
from numpy.typing import NDArray

import kvp_edge
from conftest import random_tokens
from kvp_edge.binding.queries import Queries
from kvp_edge.cache.kv_log import InMemory
from kvp_edge.cache.recall import Recall, RecallSettings
from kvp_edge.cache.table import Table
from makers.gguf_models import ModelShape
from support.histories import F32, Maker, any_history
from support.noise import Noise
from support.properties import examples

Loader = Callable[..., kvp_edge.Llama]

#: 256 cells; an eviction keeps 130 tokens, the newest 70 among them.
BOUND: dict[str, Any] = {"n_ctx": 4000, "kv_budget": 130, "recent": 70, "reserve": 126}


@examples(12)
@given(data=st.data())
def test_after_any_history_with_recall_logits_are_those_of_what_heads_held(
    random_model: Maker, data: st.DataObject
) -> None:
    any_history(random_model, data, "host", recall=True)


# -- which rows come back: against attention in float64 ------------------------------------------


def keys_of_all(llm: kvp_edge.Llama, end: int) -> NDArray[np.float64]:
    """f64 [n_layer, n_head_kv, end, head_size], of an f32 cache: from the log, then the cells."""
    assert llm.kv is not None
    assert llm.kv.log is not None
    log, shape = llm.kv.log, llm.kv.cache.shape
    keys = np.zeros((shape.n_layer, shape.n_head_kv, end, shape.head_size_k))
    rows = [(b.first, b.n, b.rows) for b in log.blocks]
    n = end - log.end
    rows.append((log.end, n, llm.kv.cache.log_rows(log.layout, log.end, end, n)))
    for first, n, raw in rows:
        of_layer = raw.reshape(shape.n_layer, -1)[:, : n * log.layout.k_row]
        found = np.ascontiguousarray(of_layer).view(np.float32)
        found = found.reshape(shape.n_layer, n, shape.n_head_kv, shape.head_size_k)
        keys[:, :, first : first + n] = found.swapaxes(1, 2)
    return keys


def attention_of(
    asked: Queries, keys: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[n_layer, n_head_kv, n]: the largest and the mean attention, one softmax for each query."""
    n_layer, n_head_kv, n, _ = keys.shape
    n_head, n_asked = asked.queries.shape[1:3]
    largest, mean = np.zeros((2, n_layer, n_head_kv, n))
    group = n_head // n_head_kv
    for il, h, q in np.ndindex(n_layer, n_head, n_asked):
        seen = int(asked.indices[q]) + 1
        logits = keys[il, h // group, :seen] @ asked.queries[il, h, q].astype(np.float64)
        weights = np.exp(float(asked.scale[il]) * (logits - logits.max()))
        weights /= weights.sum()
        at = (il, h // group, slice(0, seen))
        largest[at] = np.maximum(largest[at], weights)
        mean[at] += weights / (group * n_asked)
    return largest, mean


def choice_of(
    s: RecallSettings,
    table: Table,
    attention: NDArray[np.float64],
    worth: NDArray[np.float32],
    sinks: int,
    tail: int,
) -> NDArray[np.int64]:
    """[n_layer, n_head_kv, n_packed]: the same choice, one head and one token after the other."""
    held = table.indices()
    n_packed = table.n_packed + tail - table.tail
    chosen = []
    for il, h in np.ndindex(held.shape[:2]):
        wanted = np.zeros(tail)
        own = attention[..., :tail] / attention[..., :tail].max(-1, keepdims=True)
        all_heads = attention[..., :tail].mean((0, 1))
        mixed = (1 - s.shared) * own[il, h] + s.shared * all_heads / all_heads.max()
        for t in range(tail):
            reach = [(mixed[t - d] * 0.999**d) for d in range(s.after + 1) if d <= t]
            reach += [
                mixed[t + d] * 0.999 ** (d + s.after)
                for d in range(1, s.before + 1)
                if t + d < tail
            ]
            wanted[t] = max(reach)
        rows = [r for r in range(n_packed) if held[il, h, r] >= sinks]
        best = sorted(rows, key=lambda r: -worth[il, h, r])[: int(s.floor * len(rows))]
        floor = {int(held[il, h, r]) for r in best}
        rank = [(t < sinks, t in floor, wanted[t], t) for t in range(tail)]
        chosen.append(sorted(t for *_, t in sorted(rank, reverse=True)[:n_packed]))
    return np.array(chosen).reshape(*held.shape[:2], n_packed)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize(("floor", "shared"), [(0.0, 0.5), (0.5, 0.0), (0.25, 1.0)])
def test_the_rows_that_come_back_are_those_that_the_queries_attend_to(
    arch: Any, floor: float, shared: float, random_model: Maker, load: Loader
) -> None:
    shape = ModelShape(arch, n_embd=128 if arch == "qwen2" else 64)
    llm = load(
        random_model(shape).path,
        **{**BOUND, **F32, "recall": "reply", "granularity": "head", "policy": Noise()},
    )
    llm.eval(random_tokens(600)[1:])
    llm.evict()
    llm.eval(random_tokens(15, seed=3)[1:])
    kv = llm.kv
    assert kv is not None
    s = kv.recall_settings = RecallSettings(
        floor=floor, passes=1, threshold=0.0, after=5, shared=shared
    )
    kv.watch_queries(True)
    n, end = 8, llm.n_tokens
    llm.n_tokens -= n
    llm.eval(llm.input_ids[end - n : end].tolist())
    assert kv.query_log is not None
    asked, keys = kv.query_log.read(n), keys_of_all(llm, end)
    choice = kv.choose_by_queries(n)
    assert choice is not None
    largest, mean = attention_of(asked, keys)
    t = choice.table
    lost = np.ones(mean.shape, bool)
    np.put_along_axis(lost, t.indices(), False, axis=-1)
    lost[..., t.seen :] = False
    assert choice.share == pytest.approx((mean * lost).sum(-1).mean(), rel=1e-4)
    want = choice_of(s, t, largest, t.scores, kv.limits.sinks, choice.tail)
    same = [
        len(set(a) & set(b))
        for a, b in zip(
            want.reshape(-1, want.shape[-1]), choice.tokens.reshape(-1, want.shape[-1]), strict=True
        )
    ]
    # what is equal but for rounding may be one or the other
    assert min(same) >= want.shape[-1] - 1
    assert sum(same) >= 0.995 * want.size
    assert choice.n_rows > 0


# -- when nothing is to be done, and when ----------------------------------------------------------


def test_a_recall_costs_nothing_when_nothing_was_dropped(random_model: Maker, load: Loader) -> None:
    llm = load(random_model(ModelShape("llama")).path, **{**BOUND, "recall": "reply"})
    assert llm.recall() is None
    llm.eval(random_tokens(100)[1:])
    assert llm.recall() is None
    assert llm.kv is not None
    assert llm.kv.query_log is not None
    assert len(llm.kv.query_log) == 0, "no query was logged"
    assert llm.kv_stats.logged == llm.kv_stats.recalls == 0


def test_without_recall_nothing_is_logged(random_model: Maker, load: Loader) -> None:
    llm = load(random_model(ModelShape("llama")).path, **{**BOUND, "recall": "off"})
    llm.eval(random_tokens(600)[1:])
    assert llm.kv_stats.evictions > 0
    assert (llm.kv_stats.logged, llm.kv_stats.recall) == (0, "off")
    assert llm.recall() is None


def test_nothing_moves_below_the_threshold(random_model: Maker, load: Loader) -> None:
    llm = load(random_model(ModelShape("llama")).path, **{**BOUND, "recall": "reply"})
    llm.eval(random_tokens(600)[1:])
    assert llm.kv is not None
    llm.kv.recall_settings = RecallSettings(threshold=1.0)
    before, events = llm.kv_indices.copy(), llm.kv_stats.evictions
    assert llm.recall() is None
    assert np.array_equal(llm.kv_indices, before)
    assert llm.kv_stats.evictions == events
    llm.kv.recall_settings = RecallSettings(threshold=0.0)
    assert llm.recall() is not None


def test_every_dropped_token_is_logged_once_and_up_to_the_tail(
    random_model: Maker, load: Loader
) -> None:
    llm = load(random_model(ModelShape("llama")).path, **{**BOUND, "recall": "reply"})
    llm.eval(random_tokens(900)[1:])
    assert llm.kv is not None
    assert llm.kv.log is not None
    assert llm.kv.log.end == llm.kv.snapshot().tail
    assert llm.kv.log.holds(llm.kv.log.end).all()
    assert llm.kv_stats.logged == llm.kv.log.end
    assert llm.kv_stats.log_bytes == llm.kv.log.end * llm.kv.cache.shape.bytes_per_cell


def test_the_oldest_tokens_are_lost_past_the_limit_but_never_the_protected_ones(
    random_model: Maker, load: Loader
) -> None:
    path = random_model(ModelShape("llama")).path
    per_token = load(path, **BOUND).kv_stats.kv_bytes // 256
    limit = f"{600 * per_token / 1024:.3f}KiB"
    llm = load(path, **{**BOUND, "recall": "reply", "kv_log_limit": limit})
    llm.eval(random_tokens(1500)[1:])
    stats = llm.kv_stats
    assert 0 < stats.log_bytes <= 600 * per_token
    assert stats.lost > 0
    assert stats.logged + stats.lost == llm.kv.log.end  # type: ignore[union-attr]
    held = llm.kv.log.holds(llm.kv.log.end)  # type: ignore[union-attr]
    assert held[:4].all(), "sinks get attention from every query"
    assert held[-100:].all()
    llm.kv.recall_settings = RecallSettings(threshold=0.0)  # type: ignore[union-attr]
    assert llm.recall() is not None
    llm.eval([5])


def test_a_log_that_finds_no_memory_loses_tokens_and_the_conversation_goes_on(
    random_model: Maker, load: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = load(random_model(ModelShape("llama")).path, **{**BOUND, "recall": "reply"})

    def full(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    llm.eval(random_tokens(300)[1:])
    with monkeypatch.context() as patched:
        patched.setattr(InMemory, "add", full)
        llm.eval(random_tokens(300, seed=4)[1:])
    llm.eval(random_tokens(300, seed=5)[1:])
    stats = llm.kv_stats
    assert stats.lost > 0
    assert stats.logged > 0
    assert llm.kv is not None
    assert llm.kv.log is not None
    assert llm.kv.log.failure == "No space left on device"
    llm.kv.recall_settings = RecallSettings(threshold=0.0)
    assert llm.recall() is not None
    llm.eval([5])


# -- before a reply, and while it is written -------------------------------------------------------


def test_a_completion_recalls_before_its_first_token_and_tells(
    random_model: Maker, load: Loader
) -> None:
    events: list[Recall] = []
    llm = load(
        random_model(ModelShape("llama")).path,
        **{**BOUND, "recall": "reply", "granularity": "head", "on_recall": events.append},
    )
    assert llm.kv is not None
    llm.kv.recall_settings = RecallSettings(threshold=0.0)
    llm.create_completion(random_tokens(700), max_tokens=4, temperature=0.0)
    (event,) = events
    assert event.n_asked == 64
    assert 1 <= event.passes <= 2
    assert event.n_rows > 0
    assert event.n_tokens > 0
    assert event.spans
    assert 0.0 < event.share < 1.0
    stats = llm.kv_stats
    assert (stats.recalls, stats.recalled) == (1, event.n_tokens)
    assert stats.recall_ms == pytest.approx(event.ms)
    assert stats.recall == "reply"


def test_always_recalls_again_while_a_reply_is_written(random_model: Maker, load: Loader) -> None:
    counts = {}
    for when in ("reply", "always"):
        llm = load(
            random_model(ModelShape("llama")).path,
            **{**BOUND, "recall": when, "recall_every": 20, "granularity": "head"},
        )
        assert llm.kv is not None
        llm.kv.recall_settings = RecallSettings(threshold=0.0, turned_away=-1.0)
        out = llm.create_completion(random_tokens(700), max_tokens=70, temperature=0.0, seed=1)
        counts[when] = llm.kv_stats.recalls
        assert out["usage"]["completion_tokens"] == 70
    assert counts == {"reply": 1, "always": 4}


def test_queries_that_turn_away_ask_again_before_their_time(
    random_model: Maker, load: Loader
) -> None:
    llm = load(
        random_model(ModelShape("llama")).path,
        **{**BOUND, "recall": "always", "recall_every": 1000, "granularity": "head"},
    )
    assert llm.kv is not None
    llm.kv.recall_settings = RecallSettings(threshold=0.0, turned_away=1.1)  # always
    llm.create_completion(random_tokens(700), max_tokens=70, temperature=0.0)
    assert llm.kv_stats.recalls == 1 + 69 // 16


class Drafts(LlamaDraftModel):  # type: ignore[misc]  # llama_cpp is untyped
    """Proposes the next tokens of a reply that is known; every second time the third is wrong."""

    def __init__(self, prompt: list[int], reply: list[int], errs: bool) -> None:
        self.text, self.errs = [*prompt, *reply], errs
        self.calls = 0

    def __call__(self, input_ids: NDArray[np.intc], /, **_: Any) -> NDArray[np.intc]:
        self.calls += 1
        draft = np.array(self.text[len(input_ids) :][:6], np.intc)
        if self.errs and self.calls % 2:
            draft[2:3] ^= 1
        return draft


@pytest.mark.parametrize("errs", [False, True])
def test_a_reply_with_drafts_recalls_when_one_without_does(
    random_model: Maker, load: Loader, errs: bool
) -> None:
    how = {**BOUND, "recall": "always", "recall_every": 20, "granularity": "head"}
    prompt = random_tokens(640)  # nothing is evicted for its reply: drafts need cells earlier

    def reply(draft: Drafts | None) -> tuple[list[int], kvp_edge.KVStats]:
        llm = load(random_model(ModelShape("llama")).path, **how, draft_model=draft)
        assert llm.kv is not None
        llm.kv.recall_settings = RecallSettings(threshold=0.0, turned_away=-1.0)
        writing = llm.generate(prompt, temp=0.0)
        return [next(writing) for _ in range(50)], llm.kv_stats

    plain, stats = reply(None)
    drafts = Drafts(prompt, plain, errs)
    drafted, with_drafts = reply(drafts)
    assert drafts.calls < 25, "most drafts were right"
    assert drafted == plain
    assert (with_drafts.recalls, with_drafts.evictions) == (stats.recalls, stats.evictions)
    assert stats.recalls == 1 + 49 // 20


def test_drafts_ask_again_before_their_time_when_queries_turn_away(
    random_model: Maker, load: Loader
) -> None:
    how = {**BOUND, "recall": "always", "recall_every": 1000, "granularity": "head"}
    llm = load(
        random_model(ModelShape("llama")).path,
        **how,
        draft_model=Drafts(random_tokens(640), [7] * 70, errs=False),
    )
    assert llm.kv is not None
    llm.kv.recall_settings = RecallSettings(threshold=0.0, turned_away=1.1)  # always
    llm.create_completion(random_tokens(640), max_tokens=70, temperature=0.0)
    assert 1 + 69 // (16 + 6) <= llm.kv_stats.recalls <= 1 + 69 // 16


def test_a_prompt_that_is_read_without_a_reset_is_no_reply(
    random_model: Maker, load: Loader
) -> None:
    how = {**BOUND, "recall": "always", "recall_every": 5, "granularity": "head"}
    llm = load(random_model(ModelShape("llama")).path, **how)
    tokens = random_tokens(640)
    llm.eval(tokens[:600])
    writing = llm.generate(tokens[600:], temp=0.0, reset=False)
    assert len([next(writing) for _ in range(4)]) == 4
    assert llm.kv_stats.recalls == 0
    assert llm.n_tokens == 643


def test_an_earlier_point_is_restored_from_the_log_without_reading_again(
    random_model: Maker, load: Loader
) -> None:
    llm = load(random_model(ModelShape("llama")).path, **{**BOUND, "recall": "reply"})
    tokens = random_tokens(900)[1:]
    llm.eval(tokens)
    read: list[tuple[int, int]] = []
    llm.on_batch = lambda start, end: read.append((start, end))
    llm.create_completion([*tokens[:200], 7, 8, 9], max_tokens=1, temperature=0.0)
    assert read[0][0] == 200, "the first 200 tokens were not read again"
    assert llm.kv_stats.kept == llm.kv_stats.seen == 203, "so few that all of them fit"
    assert llm.kv_stats.evictions == 0


def test_the_log_is_forgotten_with_the_conversation(random_model: Maker, load: Loader) -> None:
    llm = load(random_model(ModelShape("llama")).path, **{**BOUND, "recall": "reply"})
    llm.eval(random_tokens(900)[1:])
    llm.reset()
    assert llm.kv_stats.logged == llm.kv_stats.log_bytes == 0
    llm.eval(random_tokens(900, seed=2)[1:])
    assert llm.kv_stats.logged > 0
