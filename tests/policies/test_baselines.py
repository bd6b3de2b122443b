"""Published policies against their formulas, written down here once more; logged queries against
the attention that llama.cpp computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from numpy.typing import NDArray

import kvp_edge
from conftest import RandomModel, random_tokens
from kvp_edge import Eviction
from kvp_edge.binding.observer import Observer
from kvp_edge.binding.queries import Queries, QueryLog
from kvp_edge.binding.rope import KeyFrequencies
from kvp_edge.errors import SessionError, UnsupportedModelError
from kvp_edge.evaluation.oracle import Oracle
from kvp_edge.policies import (
    H2O,
    POLICIES,
    TOVA,
    ArrayView,
    CacheView,
    ExpectedAttention,
    LagKV,
    SnapKV,
    ValueRange,
)
from kvp_edge.policies.query_attention import attention
from kvp_edge.traces.format import Trace
from kvp_edge.traces.tracer import Tracer
from makers.gguf_models import ModelShape, write_model, write_mpt

Maker = Callable[[ModelShape], RandomModel]
Loader = Callable[..., kvp_edge.Llama]
Array = NDArray[np.float64]

L, H, GROUP, N, D = 2, 2, 3, 40, 8
NOTING = ("gkv", "lazy-eviction")  # their formulas: test_gkv.py, test_lazy_eviction.py
F32, F16, Q8_0 = 0, llama_cpp.GGML_TYPE_F16, llama_cpp.GGML_TYPE_Q8_0
NEW = ("lagkv", "value-range", "snapkv", "tova", "h2o", "expected-attention", *NOTING)
WANT_QUERIES = [name for name in NEW if POLICIES[name]().n_queries]


def draw(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture
def keys() -> NDArray[np.float32]:
    return draw(L, H, N, D, seed=1)


@pytest.fixture
def values() -> NDArray[np.float32]:
    return draw(L, H, N, D, seed=2)


def queries_of(positions: range, seed: int = 3) -> Queries:
    scale = np.array([0.4, 0.2], np.float32)
    drawn = draw(L, H * GROUP, len(positions), D, seed=seed)
    return Queries(drawn, np.array(positions, np.int32), scale)


def seen(
    queries: Queries,
    keys: NDArray[np.float32],
    held: NDArray[np.int32],
    previous: NDArray[np.float32] | None = None,
) -> ArrayView:
    return ArrayView(keys, keys[..., :0], held, queries=queries, previous=previous)


def paid(queries: Queries, keys: NDArray[np.float32], held: NDArray[np.int32]) -> Array:
    """Attention [L, query head, query, n] by the textbook, one number after the other."""
    n = keys.shape[2]
    held = np.broadcast_to(held, (L, H, n))
    out = np.zeros((L, H * GROUP, len(queries), n))
    for layer in range(L):
        for head in range(H * GROUP):
            kv = head // GROUP
            for j, at in enumerate(queries.indices):
                e = np.zeros(n)
                for i in range(n):
                    if held[layer, kv, i] <= at:
                        q = queries.queries[layer, head, j].astype(float)
                        e[i] = np.exp(queries.scale[layer] * (q @ keys[layer, kv, i]))
                out[layer, head, j] = e / e.sum()
    return out


def by_group(x: Array) -> Array:
    return x.reshape(L, H, GROUP, *x.shape[2:]).mean(axis=2)


# -- formulas ----------------------------------------------------------------------------------


def test_lagkv_ranks_each_partition_by_its_distance_from_the_next(
    keys: NDArray[np.float32], values: NDArray[np.float32]
) -> None:
    lag, sinks = 10, 4  # partitions [4, 14), [14, 24), [24, 34), and 6 tokens that fill none
    got = LagKV(lag, sinks).score(ArrayView(keys, values, np.arange(N, dtype=np.int32)))

    def standing_out(x: NDArray[np.float32], token: int) -> float:
        part = (token - sinks) // lag
        reference = x[sinks + (part + 1) * lag : sinks + (part + 2) * lag].astype(float)
        z = [
            (x[token, c] - min(reference[:, c])) / (max(reference[:, c]) - min(reference[:, c]))
            for c in range(D)
        ]
        return float(np.sqrt(sum((a - sum(z) / D) ** 2 for a in z) / (D - 1)))

    for layer, head in np.ndindex(L, H):
        for start in (4, 14):
            tokens = range(start, start + lag)
            s = np.zeros(lag)
            for x in (keys[layer, head], values[layer, head]):
                e = np.exp([standing_out(x, token) for token in tokens])
                s += e / e.sum() / 2
            rank = [(s < own).sum() for own in s]
            np.testing.assert_allclose(got[layer, head, start : start + lag], np.divide(rank, lag))
        assert (got[layer, head, [*range(4), *range(24, N)]] == 1).all()
    assert got[:, :, 4:24].max() < 1


def test_lagkv_without_two_partitions_keeps_sinks_and_the_newest(
    keys: NDArray[np.float32], values: NDArray[np.float32]
) -> None:
    got = LagKV(lag=19).score(ArrayView(keys, values, np.arange(N, dtype=np.int32)))
    assert (np.diff(got[:, :, 4:]) > 0).all()
    assert (got[:, :, :4] > got[:, :, 4:].max()).all()
    for n in (1, 4, 5):
        few = LagKV().score(
            ArrayView(keys[:, :, :n], values[:, :, :n], np.arange(n, dtype=np.int32))
        )
        assert np.isfinite(few).all()
    same = np.zeros_like(keys)
    assert np.isfinite(
        LagKV(lag=10).score(ArrayView(same, same, np.arange(N, dtype=np.int32)))
    ).all()


def test_value_range_is_the_largest_value_minus_the_smallest(
    keys: NDArray[np.float32], values: NDArray[np.float32]
) -> None:
    got = ValueRange().score(ArrayView(keys, values, np.arange(N, dtype=np.int32)))
    assert got[1, 0, 7] == max(values[1, 0, 7]) - min(values[1, 0, 7])
    assert got.shape == (L, H, N)


@pytest.mark.parametrize("own_tokens", [False, True], ids=["all heads alike", "each head its own"])
def test_snapkv_pools_the_windows_attention(own_tokens: bool, keys: NDArray[np.float32]) -> None:
    held = np.arange(N, dtype=np.int32)
    if own_tokens:  # the newest ten are held by all
        rng = np.random.default_rng(0)
        old = [np.sort(rng.choice(70, N - 10, replace=False)) for _ in range(L * H)]
        newest = np.broadcast_to(np.arange(70, 80), (L * H, 10))
        held = np.concatenate((old, newest), axis=1).reshape(L, H, N).astype(np.int32)
    end = int(held.max()) + 1
    queries = queries_of(range(end - 12, end))
    got = SnapKV(window=8, kernel=3).score(seen(queries, keys, held))
    mean = by_group(paid(queries[4:], keys, held).mean(axis=2))
    inside = N - 8
    for layer, head in np.ndindex(L, H):
        row = [0.0, *mean[layer, head, :inside], 0.0]
        want = [sum(row[i : i + 3]) / 3 for i in range(inside)]
        np.testing.assert_allclose(got[layer, head, :inside], want, rtol=1e-4, atol=1e-6)
        assert got[layer, head, inside:].min() > got[layer, head, :inside].max()


def test_tova_is_the_newest_querys_attention_over_all_heads_of_a_layer(
    keys: NDArray[np.float32],
) -> None:
    held = np.arange(N, dtype=np.int32)
    queries = queries_of(range(N - 5, N))
    got = TOVA().score(seen(queries, keys, held))
    want = paid(queries, keys, held)[:, :, -1].mean(axis=1)
    for head in range(H):
        np.testing.assert_allclose(got[:, head], want, rtol=1e-4, atol=1e-6)


def test_h2o_adds_up_what_every_query_paid_to_what_was_there(keys: NDArray[np.float32]) -> None:
    policy = H2O()
    first, second = queries_of(range(30)), queries_of(range(30, 50), seed=4)
    held = np.arange(30, dtype=np.int32)
    first_sums = by_group(paid(first, keys[:, :, :30], held).sum(axis=2))
    before = policy.score(seen(first, keys[:, :, :30], held))
    np.testing.assert_allclose(before, first_sums, rtol=1e-4, atol=1e-5)

    # each head loses ten of them, and twenty tokens come
    rng = np.random.default_rng(0)
    kept = np.array([np.sort(rng.choice(30, 20, replace=False)) for _ in range(L * H)])
    tokens = np.concatenate((kept, np.broadcast_to(np.arange(30, 50), (L * H, 20))), axis=1)
    held = tokens.reshape(L, H, N).astype(np.int32)
    kept = kept.reshape(L, H, 20)
    all_logged = Queries(
        np.concatenate((first.queries, second.queries), axis=2),
        np.concatenate((first.indices, second.indices)),
        first.scale,
    )
    previous = np.take_along_axis(before, kept, axis=2)
    got = policy.score(seen(all_logged, keys, held, previous))  # the first were counted before
    want = by_group(paid(second, keys, held).sum(axis=2))
    want[:, :, :20] += np.take_along_axis(first_sums, kept, axis=2)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    again = policy.score(seen(all_logged, keys, held, got))  # no new query: the same
    np.testing.assert_array_equal(got, again)

    # another conversation: only its own queries count
    anew = policy.score(seen(first, keys[:, :, :30], np.arange(30, dtype=np.int32)))
    np.testing.assert_array_equal(anew, before)


def test_h2o_forgets_sums_of_tokens_that_were_replaced(keys: NDArray[np.float32]) -> None:
    policy, held, keys = H2O(), np.arange(30, dtype=np.int32), keys[:, :, :30]
    first = policy.score(seen(queries_of(range(30)), keys, held))
    back = queries_of(range(25, 30), seed=5)  # went back to 25 and read five other tokens
    got = policy.score(seen(back, keys, held, first[:, :, :25]))
    want = by_group(paid(back, keys, held).sum(axis=2))
    np.testing.assert_allclose(got[:, :, 25:], want[:, :, 25:], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        got[:, :, :25], first[:, :, :25] + want[:, :, :25], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("granularity", ["token", "head"])
def test_scores_of_before_follow_their_tokens_through_an_eviction_and_going_back(
    granularity: str, random_model: Maker, load: Loader
) -> None:
    policy = Recorded()
    llm = load(
        random_model(SHAPES["llama, 2 queries to a key"]).path,
        n_ctx=999, kv_budget=100, reserve=156, policy=policy, granularity=granularity,
    )  # fmt: skip
    tokens = random_tokens(300)
    llm.eval(tokens[:256])
    llm.evict()
    held = np.broadcast_to(llm.kv_indices, (2, 2, 100))
    llm.n_tokens = 251  # of the 100 tokens held the last five are replaced
    llm.eval(tokens[256:])
    llm.evict()
    assert [x.shape[2] for x in policy.previous] == [0, 95]
    assert policy.new == [256, 44]
    stayed = np.take_along_axis(policy.scored[0], held, axis=2)[:, :, :95]
    np.testing.assert_array_equal(policy.previous[1], stayed)
    assert (policy.scored[1][:, :, :95] > stayed).all()
    llm.reset()
    llm.eval(tokens[:101])
    llm.evict()
    assert policy.previous[2].shape[2] == 0


@dataclass(frozen=True)
class Recorded(H2O):
    """Remembers what it saw and said."""

    scored: list[Any] = field(default_factory=list, compare=False)
    previous: list[Any] = field(default_factory=list, compare=False)
    new: list[int] = field(default_factory=list, compare=False)

    def score(self, view: CacheView) -> Any:
        self.previous.append(view.previous)
        self.new.append(view.shape[2] - view.previous.shape[2])
        self.scored.append(super().score(view))
        return self.scored[-1]


@pytest.mark.parametrize("neox", [True, False])
def test_expected_attention_is_its_formula(
    neox: bool, keys: NDArray[np.float32], values: NDArray[np.float32]
) -> None:
    """With rotations as matrices; one pair of channels has no RoPE."""
    n_pairs, future, sinks = D // 2 - 1, 20, 4
    radians = np.array([[0.9, 0.3, 0.01], [0.5, 0.2, 0.02]])
    pairs = [(p, p + n_pairs) if neox else (2 * p, 2 * p + 1) for p in range(n_pairs)]

    def rotation(layer: int, position: int) -> Array:
        r = np.eye(D)
        for p, (a, b) in enumerate(pairs):
            angle = radians[layer, p] * position
            r[[a, b], [a, b]] = np.cos(angle)
            r[b, a], r[a, b] = np.sin(angle), -np.sin(angle)
        return r

    queries = queries_of(range(N))
    view = ArrayView(
        keys,
        values,
        np.arange(N, dtype=np.int32),
        queries=queries,
        frequencies=KeyFrequencies(radians, neox),
    )
    got = ExpectedAttention(future, sinks).score(view)
    for layer, kv in np.ndindex(L, H):
        r = np.mean([rotation(layer, p) for p in range(N, N + future)], axis=0)
        k, s = keys[layer, kv, sinks:].astype(float), float(queries.scale[layer])
        share = np.zeros(N - sinks)
        for head in range(kv * GROUP, (kv + 1) * GROUP):
            q = [rotation(layer, p).T @ queries.queries[layer, head, p] for p in range(sinks, N)]
            m, c = r @ np.mean(q, axis=0), r @ np.cov(q, rowvar=False, ddof=0) @ r.T
            e = np.exp([s * (x @ m) + s**2 * (x @ c @ x) / 2 for x in k])
            share += e / e.sum() / GROUP
        want = share * np.linalg.norm(values[layer, kv, sinks:], axis=-1)
        np.testing.assert_allclose(got[layer, kv, sinks:], want, rtol=1e-3, atol=1e-6)
    assert got[:, :, :sinks].min() > got[:, :, sinks:].max()


@pytest.mark.parametrize("name", [name for name in WANT_QUERIES if name not in NOTING])
def test_without_any_query_all_tokens_score_alike(name: str, keys: NDArray[np.float32]) -> None:
    got = POLICIES[name]().score(seen(queries_of(range(0)), keys, np.arange(N, dtype=np.int32)))
    assert (got == 0).all()


@pytest.mark.parametrize("name", WANT_QUERIES)
def test_a_view_without_queries_says_so(name: str, keys: NDArray[np.float32]) -> None:
    with pytest.raises(ValueError, match=r"queries exist only in a bounded cache.*kv_budget"):
        POLICIES[name]().score(ArrayView(keys, keys, np.arange(N, dtype=np.int32)))


# -- logged queries ----------------------------------------------------------------------------

SHAPES = {
    "llama, 2 queries to a key": ModelShape("llama", head_dim=64),
    "qwen2, 4 queries to a key": ModelShape("qwen2", n_embd=256, head_dim=64, n_head_kv=1),
    "qwen3, 1 query to a key": ModelShape("qwen3", head_dim=64, n_head=3, n_head_kv=3),
    "gemma3, sliding window": ModelShape("gemma3", n_layer=4, sliding_window=24, head_dim=64),
    "phi3, queries scaled before": ModelShape("phi3", n_embd=256, head_dim=64),
}
N_TOKENS = 90


@pytest.fixture
def tracer() -> Iterator[Callable[..., Tracer]]:
    made: list[Tracer] = []

    def make(path: str, **kwargs: Any) -> Tracer:
        how = {"verbose": False, "n_threads": 1, "n_threads_batch": 1, **kwargs}
        made.append(Tracer(path, N_TOKENS, block=128, **how))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("flash", [False, True], ids=["long way", "flash attention"])
@pytest.mark.parametrize("type_k", [F32, F16, Q8_0], ids=["f32", "f16", "q8_0"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logged_queries_pay_the_attention_that_llama_computed(
    shape: str, type_k: int, flash: bool, random_model: Maker, load: Loader, tracer: Any
) -> None:
    model, tokens = random_model(SHAPES[shape]), random_tokens(N_TOKENS)
    types = {"type_k": type_k, "type_v": F32 if type_k == F32 else F16}
    captured = tracer(model.path, **types).capture(tokens, N_TOKENS)
    want = captured.sums.astype(np.float32) / captured.blocks.scale

    policy = SnapKV(window=N_TOKENS)
    llm = load(
        model.path, n_ctx=999, kv_budget=200, policy=policy, flash_attn=flash, n_ubatch=7, **types
    )
    llm.eval(tokens)
    logged = llm.kv.query_log.read(N_TOKENS)
    np.testing.assert_array_equal(logged.indices, np.arange(N_TOKENS))
    _, keys, _ = llm.kv.cache.read(0, N_TOKENS, N_TOKENS, values=False)
    got = np.array(
        [paid.max(axis=1).sum(axis=1) for paid in attention(logged, keys, logged.indices)]
    )
    tolerance = {F32: 2e-3, F16: 5e-3, Q8_0: 0.05}[type_k]
    if flash and type_k == F32:
        tolerance = 5e-3
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def logged_by(llm: kvp_edge.Llama) -> Queries:
    """What its policy sees: the queries of the newest ten tokens."""
    assert llm.kv.query_log is not None
    return llm.kv.query_log.read(10)


def test_the_log_holds_the_newest_tokens_and_follows_the_conversation(
    random_model: Maker, load: Loader
) -> None:
    policy = SnapKV(window=10)
    path = random_model(SHAPES["llama, 2 queries to a key"]).path
    llm = load(path, n_ctx=999, kv_budget=200, policy=policy)
    tokens = random_tokens(60)
    llm.eval(tokens[:40])
    before = logged_by(llm)
    np.testing.assert_array_equal(before.indices, np.arange(30, 40))
    llm.eval(tokens[40:43])
    np.testing.assert_array_equal(logged_by(llm).indices, np.arange(33, 43))
    llm.n_tokens = 40  # three queries are withdrawn; those they had replaced are gone
    llm.eval(tokens[43:45])
    logged = logged_by(llm)
    np.testing.assert_array_equal(logged.indices, np.arange(33, 42))
    np.testing.assert_array_equal(logged.queries[:, :, :7], before.queries[:, :, 3:])
    llm.n_tokens = 20
    llm.eval(tokens[:1])
    np.testing.assert_array_equal(logged_by(llm).indices, [20])
    llm.reset()
    assert len(logged_by(llm)) == 0
    llm.eval(tokens[:40])
    again = logged_by(llm)
    np.testing.assert_allclose(again.queries, before.queries, atol=1e-5)
    assert len(again[-3:]) == 3


def test_logging_changes_nothing_of_what_is_computed(random_model: Maker, load: Loader) -> None:
    path = random_model(SHAPES["qwen3, 1 query to a key"]).path
    logits = []
    for policy in (SnapKV(), "keydiff"):
        llm = load(path, n_ctx=999, kv_budget=200, policy=policy, logits_all=True)
        llm.eval(random_tokens(100))
        logits.append(llm.scores[:100].copy())
    np.testing.assert_array_equal(*logits)


def test_queries_that_were_not_shown_are_an_error(random_model: Maker, load: Loader) -> None:
    path = random_model(SHAPES["llama, 2 queries to a key"]).path
    llm = load(path, n_ctx=999, kv_budget=200, policy="snapkv")
    llm.eval(random_tokens(9))
    log = llm.kv.query_log
    assert log is not None
    with pytest.raises(kvp_edge.KVCacheError, match="did not show the queries of the 2 tokens"):
        log.append(9, 2)
    assert len(log) == 9


@pytest.mark.parametrize("where", ["decoded", "counted", "logged"])
def test_an_interrupted_batch_takes_no_logged_query_away_and_none_is_lost(
    where: str, random_model: Maker, load: Loader
) -> None:
    """Also one of more tokens than the log holds: evictions look at the same queries."""
    path = random_model(SHAPES["llama, 2 queries to a key"]).path
    llm, untouched = (load(path, n_ctx=999, kv_budget=100, policy="snapkv") for _ in range(2))
    log, append, decode = llm.kv.query_log, llm.kv.append, llm._ctx.decode
    kept = log.append

    def interrupt(*args: Any) -> None:
        if where == "decoded":
            decode(*args)
        elif where == "logged":
            kept(*args)
        raise KeyboardInterrupt

    text = random_tokens(200)
    for model in (llm, untouched):
        model.eval(text[:90])
    at = {"decoded": (llm._ctx, "decode"), "counted": (llm.kv, "append"), "logged": (log, "append")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*at[where], interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.eval(text[90:160])
    llm.sync()
    assert llm.kv.append == append
    if where != "decoded":
        untouched.eval(text[90:160])
    assert llm.n_tokens == untouched.n_tokens
    for model in (llm, untouched):
        model.eval([9])
    a, b = (model.kv.query_log.read(len(model.kv.query_log)) for model in (llm, untouched))
    np.testing.assert_array_equal(a.indices, b.indices)
    np.testing.assert_array_equal(a.queries, b.queries)


def test_a_log_that_was_not_started_says_so() -> None:
    log = QueryLog(Observer(llama_cpp.llama_context_default_params()))
    assert len(log) == 0
    for use in (lambda: log.append(0, 1), lambda: log.rewind(0), lambda: log.read(1)):
        with pytest.raises(ValueError, match="was not started"):
            use()


# -- chats -------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["token", "head"])
@pytest.mark.parametrize("name", NEW)
def test_a_chat_in_a_small_budget_keeps_exactly_the_budget(
    name: str, granularity: str, random_model: Maker, load: Loader
) -> None:
    evictions: list[Eviction] = []
    llm = load(
        random_model(SHAPES["llama, 2 queries to a key"]).path,
        n_ctx=4000, kv_budget=100, reserve=156, recent=20, policy=name, granularity=granularity,
        on_evict=evictions.append,
    )  # fmt: skip
    for turn in range(4):
        llm.eval(random_tokens(300, seed=turn))
        for token in range(30, 40):
            llm.eval([token])
        assert llm.kv_indices.shape[-1] == llm.kv_stats.kept
        newest = llm.kv_indices[..., -20:]
        assert (newest == np.arange(llm.n_tokens - 20, llm.n_tokens)).all()
    assert len(evictions) > 5
    assert {e.kept for e in evictions} == {100}
    assert {e.policy for e in evictions} == {name}

    # going back inside the recent window, and a new conversation, are the same as without a past
    llm.n_tokens -= 5
    llm.eval(random_tokens(200))
    assert llm.kv_stats.kept <= llm.kv_stats.cells
    llm.reset()
    llm.eval(random_tokens(300, seed=0))
    held = llm.kv_indices.copy()
    fresh = load(
        llm.model_path, n_ctx=4000, kv_budget=100, reserve=156, recent=20, policy=name,
        granularity=granularity,
    )  # fmt: skip
    fresh.eval(random_tokens(300, seed=0))
    np.testing.assert_array_equal(held, fresh.kv_indices)


def test_tova_keeps_the_same_tokens_in_all_heads_of_a_layer(
    random_model: Maker, load: Loader
) -> None:
    llm = load(
        random_model(SHAPES["llama, 2 queries to a key"]).path,
        n_ctx=4000, kv_budget=100, reserve=156, policy="tova", granularity="head",
    )  # fmt: skip
    llm.eval(random_tokens(1200))
    held = llm.kv_indices
    np.testing.assert_array_equal(held[:, 0], held[:, 1])
    assert (held[0, 0] != held[1, 0]).any()


def test_h2os_sums_in_a_chat_are_the_references(random_model: Maker, load: Loader) -> None:
    model, policy = random_model(SHAPES["llama, 2 queries to a key"]), Recorded()
    llm = load(model.path, n_ctx=999, kv_budget=100, reserve=156, policy=policy, type_k=F32,
               type_v=F32)  # fmt: skip
    tokens = random_tokens(156)
    llm.eval(tokens)
    llm.eval(random_tokens(101))  # which do not fit
    assert llm.kv_stats.evictions == 1
    shape = model.shape
    want = model.reference.attention(tokens).sum(axis=2)
    want = want.reshape(shape.n_layer, shape.n_head_kv, -1, 156).mean(axis=2)
    np.testing.assert_allclose(policy.scored[0], want, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("name", WANT_QUERIES)
@pytest.mark.parametrize("granularity", ["token", "head"])
def test_compacted_positions_go_on(name: str, granularity: str, tmp_path: Path, load: Any) -> None:
    write_model(tmp_path / "short.gguf", ModelShape("llama", n_ctx_train=512))
    llm = load(
        str(tmp_path / "short.gguf"),
        n_ctx=4000, kv_budget=100, reserve=156, policy=name, granularity=granularity,
        positions="compact",
    )  # fmt: skip
    for turn in range(5):
        llm.eval(random_tokens(300, seed=turn))
        logged = len(llm.kv.query_log)
    assert llm.kv.shift > 0
    assert 0 < logged <= 256


def test_every_baseline_runs_on_the_bundled_model(bundled_model: str, load: Loader) -> None:
    for name in NEW:
        llm = load(bundled_model, n_ctx=2000, kv_budget=128, policy=name, granularity="head")
        llm.eval(llm.tokenize(b"The words of a long text. " * 100))
        assert llm.kv_stats.evictions > 0
        llm.close()


# -- what goes wrong ---------------------------------------------------------------------------


def test_attention_with_a_bias_is_refused(tmp_path: Path) -> None:
    write_mpt(tmp_path / "mpt.gguf")
    for flash in (False, True):
        with pytest.raises(UnsupportedModelError, match=r"layer 0 is more than softmax"):
            kvp_edge.Llama(
                str(tmp_path / "mpt.gguf"), n_ctx=999, kv_budget=100, policy="tova",
                granularity="token", flash_attn=flash, verbose=False,
            )  # fmt: skip


def test_expected_attention_refuses_a_model_without_rope(tmp_path: Path) -> None:
    write_mpt(tmp_path / "mpt.gguf")
    with pytest.raises(
        UnsupportedModelError, match="'expected-attention' must remove RoPE from queries"
    ):
        kvp_edge.Llama(
            str(tmp_path / "mpt.gguf"), n_ctx=999, kv_budget=100, policy="expected-attention",
            granularity="token", verbose=False,
        )  # fmt: skip


def test_a_conversation_whose_queries_are_logged_is_not_saved(
    random_model: Maker, load: Loader, tmp_path: Path
) -> None:
    path = random_model(SHAPES["llama, 2 queries to a key"]).path
    llm = load(path, n_ctx=999, kv_budget=200, policy="h2o")
    llm.eval(random_tokens(9))
    for save in (llm.save_state, lambda: llm.save_session(tmp_path / "chat.kvp")):
        with pytest.raises(SessionError, match="not possible with policy 'h2o'"):
            save()


# -- the oracle --------------------------------------------------------------------------------


def trace_of(llm: Tracer, tokens: list[int], n_prompt: int) -> Trace:
    c = llm.capture(tokens, n_prompt)
    return Trace(
        c.keys, c.values, c.indices, c.tokens, c.sums, n_prompt, c.blocks, c.blocks.scale, "made"
    )


@pytest.mark.parametrize("granularity", ["token", "head"])
def test_the_oracle_keeps_what_the_rest_of_the_trace_attends_to(
    granularity: str, random_model: Maker, load: Loader
) -> None:
    model, tokens = random_model(SHAPES["llama, 2 queries to a key"]), random_tokens(300)
    llm = Tracer(model.path, 300, block=8, verbose=False, n_threads=1, n_threads_batch=1)
    trace = trace_of(llm, tokens, 256)
    llm.close()
    bounded = load(
        model.path, n_ctx=999, kv_budget=100, reserve=156, sinks=4, recent=20,
        policy=Oracle(trace), granularity=granularity,
    )  # fmt: skip
    bounded.eval(tokens[:256])
    bounded.eval(tokens[256:])
    assert bounded.kv_stats.evictions == 1
    free = trace.importance(256)[:, :, 4:236]
    if granularity == "head":
        for layer, head in np.ndindex(*free.shape[:2]):
            best = np.sort(np.argsort(-free[layer, head], kind="stable")[:76]) + 4
            np.testing.assert_array_equal(bounded.kv_indices[layer, head, 4:80], best)
    else:
        z = (free - free.mean(-1, keepdims=True)) / free.std(-1, keepdims=True)
        best = np.sort(np.argsort(-z.mean(axis=(0, 1)), kind="stable")[:76]) + 4
        np.testing.assert_array_equal(bounded.kv_indices[4:80], best)


def test_the_oracle_rounds_to_the_traces_borders(random_model: Maker) -> None:
    model, tokens = random_model(SHAPES["llama, 2 queries to a key"]), random_tokens(90)
    llm = Tracer(model.path, 90, block=8, verbose=False, n_threads=1, n_threads_batch=1)
    trace = trace_of(llm, tokens, 80)
    one_block = trace_of(llm, tokens[:8], 8)
    llm.close()
    oracle, none = Oracle(trace), np.empty((2, 2, 88, 0), np.float32)

    def view(held: NDArray[np.int32]) -> ArrayView:
        nothing = none[:, :, : len(held)]
        return ArrayView(nothing, nothing, held)

    def score(n: int) -> NDArray[np.float32]:
        return oracle.score(view(np.arange(n, dtype=np.int32)))

    np.testing.assert_array_equal(score(50), trace.received(56, 90, 50))  # up to 56
    late = score(89 - 1)  # the last border is 88
    np.testing.assert_array_equal(late, trace.importance(88))
    for newest in (89, 90):  # the trace's last token, and one that only the reader has
        held = np.array([3, 85, 86, newest], np.int32)
        beyond = oracle.score(view(held))
        assert (beyond[..., 3] > beyond[..., :3].max()).all()
    golden = Oracle(trace, peak=True).score(view(np.arange(50, dtype=np.int32)))
    blocks = [trace.received(n, n + 8, 50) for n in (56, 64, 72, 80, 88)]
    np.testing.assert_allclose(golden, np.max(blocks, axis=0), rtol=1e-6)
    with pytest.raises(ValueError, match="one block"):
        Oracle(one_block)
