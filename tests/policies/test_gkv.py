"""G-KV against its formula, written down here once more, one number after the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import kvp_edge
from kvp_edge.binding.queries import Queries
from kvp_edge.errors import PolicyError
from kvp_edge.policies import GKV, ArrayView, CacheView
from kvp_edge.policies.gkv import redundancy
from support.properties import examples

Loader = Callable[..., kvp_edge.Llama]
Array = NDArray[np.float64]

L, H, GROUP, D = 2, 2, 3, 8
SCALE = np.array([0.4, 0.2], np.float32)


def draw(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def queries_of(indices: range, seed: int = 3) -> Queries:
    return Queries(draw(seed, L, H * GROUP, len(indices), D), np.array(indices, np.int32), SCALE)


# -- the reference ------------------------------------------------------------------------------


def local_of(queries: Queries, keys: Any, held: Any) -> Array:
    """[L, H, n]: the mean of the largest attention, over the largest of those before the window."""
    n_layer, n_head_kv, n, _ = keys.shape
    group = queries.queries.shape[1] // n_head_kv
    held = np.broadcast_to(held, keys.shape[:3])
    local = np.zeros((n_layer, n_head_kv, n))
    for layer, kv in np.ndindex(n_layer, n_head_kv):
        for j, at in enumerate(queries.indices):
            rows = []
            for g in range(group):
                q = queries.queries[layer, kv * group + g, j].astype(float)
                z = float(queries.scale[layer]) * (keys[layer, kv].astype(float) @ q)
                z = np.where(held[layer, kv] <= at, z, -np.inf)
                e = np.exp(z - z.max())
                rows.append(e / e.sum())
            local[layer, kv] += np.max(rows, axis=0) / len(queries.indices)
        local[layer, kv, held[layer, kv] >= queries.indices[0]] = 0
        local[layer, kv] /= max(local[layer, kv].max(), 1e-30)
    return local


def redundancy_of(keys: Any, alike: float, counted: Any) -> Array:
    """[n] of one head, as R-KV has it."""
    n = len(keys)
    norms = np.sqrt((keys.astype(float) ** 2).sum(axis=1))
    cosine = keys.astype(float) @ keys.astype(float).T / np.outer(norms, norms)
    for i in range(n):
        cosine[i, i] = 0.0
        similar = [j for j in range(n) if cosine[i, j] > alike]
        if similar:
            cosine[i, max(similar)] = 0.0
    mean = cosine.sum(axis=0) / n
    share = np.exp(mean) / np.exp(mean).sum()  # the softmax
    return np.asarray(share / share[counted].max())


@dataclass
class Reference:
    """What a policy does, eviction after eviction."""

    policy: GKV
    scored: list[Array] = field(default_factory=list)

    def score(self, queries: Queries, keys: Any, held: Any, before: Any) -> tuple[Array, Array]:
        """The scores and the global scores [L, H, n]."""
        p, held = self.policy, np.broadcast_to(held, keys.shape[:3])
        remembered = np.zeros(keys.shape[:3])
        remembered[:, :, : before.shape[2]] = before
        outside = np.ones(keys.shape[:3], bool)
        if len(queries.indices):
            local = local_of(queries, keys, held)
            outside = held < queries.indices[0]
            if p.memory == "max":
                remembered = np.maximum(p.decay * remembered, local)
            else:
                remembered = p.decay * remembered + local
        score = p.balance * remembered
        for at in np.ndindex(keys.shape[:2]):
            score[at] -= (1 - p.balance) * redundancy_of(keys[at], p.alike, outside[at])
        return score, remembered


POLICIES = [
    GKV(window=5),
    GKV(window=5, balance=1.0),
    GKV(window=5, balance=0.0, alike=0.1),
    GKV(window=5, decay=0.3, alike=0.9, memory="sum"),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.identity())
def test_the_score_is_the_formulas_through_two_evictions(policy: GKV) -> None:
    reference, rng = Reference(policy), np.random.default_rng(0)
    keys, held = draw(1, L, H, 30, D), np.arange(30, dtype=np.int32)
    queries = queries_of(range(25, 30))
    none = np.empty((L, H, 0))
    got = policy.score(ArrayView(keys, keys[..., :0], held, queries=queries))
    want, remembered = reference.score(queries, keys, held, none)
    before = slice(0, 25)
    np.testing.assert_allclose(got[:, :, before, 0], want[:, :, before], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got[..., 1], remembered, rtol=1e-4, atol=1e-6)
    assert got[:, :, 25:, 0].min() > got[:, :, before, 0].max()  # the window
    np.testing.assert_array_equal(policy.worth(got, np.arange(30, 0, -1)), got[..., 0])

    # each head loses ten, and twelve tokens come
    kept = np.sort([rng.choice(30, 20, replace=False) for _ in range(L * H)]).reshape(L, H, 20)
    newer = np.broadcast_to(np.arange(30, 42), (L, H, 12))
    own = np.concatenate((kept, newer), axis=2).astype(np.int32)
    keys = np.concatenate((np.take_along_axis(keys, kept[..., None], axis=2),
                           draw(2, L, H, 12, D)), axis=2)  # fmt: skip
    queries = queries_of(range(37, 42), seed=4)
    previous = np.take_along_axis(got, kept[..., None], axis=2)
    view = ArrayView(keys, keys[..., :0], own, queries=queries, previous=previous)
    again = policy.score(view)
    want, carried = reference.score(
        queries, keys, own, np.take_along_axis(remembered, kept, axis=2)
    )
    np.testing.assert_allclose(again[:, :, :27, 0], want[:, :, :27], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(again[..., 1], carried, rtol=1e-4, atol=1e-6)


# -- invariants ---------------------------------------------------------------------------------


@examples(12)
@given(
    windows=st.lists(st.integers(0, 1000), min_size=1, max_size=5),
    decay=st.sampled_from([0.0, 0.5, 1.0]),
    memory=st.sampled_from(["max", "sum"]),
)
def test_what_is_remembered_is_the_newest_window_all_of_them_or_between(
    windows: list[int], decay: float, memory: Any
) -> None:
    """Decay 0: the last window alone. Decay 1: the largest of all windows, or their sum."""
    policy = GKV(window=4, decay=decay, memory=memory, balance=1.0)
    keys, held = draw(1, L, H, 20, D), np.arange(20, dtype=np.int32)
    previous, locals_ = np.empty((L, H, 0, 2), np.float32), []
    for seed in windows:
        queries = queries_of(range(16, 20), seed)
        locals_.append(local_of(queries, keys, held))
        view = ArrayView(keys, keys[..., :0], held, queries=queries, previous=previous)
        previous = policy.score(view)
    got, newest = previous[..., 1], locals_[-1]
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6}
    if decay == 0:
        np.testing.assert_allclose(got, newest, **close)
    elif decay == 1:
        all_of = np.max if memory == "max" else np.sum
        np.testing.assert_allclose(got, all_of(locals_, axis=0), **close)
    assert (got >= newest - 1e-6).all()
    assert (got <= np.sum(locals_, axis=0) + 1e-5).all()
    np.testing.assert_array_equal(previous[:, :, :16, 0], got[:, :, :16])  # balance 1


@examples(25)
@given(seed=st.integers(0, 1000), n=st.integers(1, 12), alike=st.sampled_from([-1.0, 0.2, 1.0]))
def test_redundancy_is_a_softmax_over_its_largest(seed: int, n: int, alike: float) -> None:
    keys = draw(seed, 1, 2, n, 4)
    counted = np.random.default_rng(seed).random((1, 2, n)) < 0.7
    counted[..., 0] = True
    got = redundancy(keys, alike, counted)
    for head in range(2):
        want = redundancy_of(keys[0, head], alike, counted[0, head])
        np.testing.assert_allclose(got[0, head], want, rtol=1e-4)
    np.testing.assert_allclose(got.max(axis=-1, where=counted, initial=0), 1, rtol=1e-5)


def test_cosines_in_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, all_counted = draw(0, 1, 1, 50, 4), np.ones((1, 1, 50), bool)
    whole = redundancy(keys, 0.3, all_counted)
    monkeypatch.setattr("kvp_edge.policies.gkv._ROWS", 7)
    np.testing.assert_allclose(redundancy(keys, 0.3, all_counted), whole, rtol=1e-6)


def test_of_repeated_keys_the_newest_is_the_least_redundant() -> None:
    keys = draw(0, 1, 1, 40, 64)
    keys[0, 0, [5, 15, 25]] = keys[0, 0, 35]
    got = redundancy(keys, 0.9, np.ones((1, 1, 40), bool))[0, 0]
    assert got[35] < min(got[5], got[15], got[25])
    assert np.median(got) < min(got[5], got[15])


# -- nothing to do, and limits ------------------------------------------------------------------


def test_without_a_query_nothing_fades() -> None:
    keys, held = draw(1, L, H, 10, D), np.arange(10, dtype=np.int32)
    previous = np.full((L, H, 6, 2), 0.5, np.float32)
    view = ArrayView(keys, keys[..., :0], held, queries=queries_of(range(0)), previous=previous)
    got = GKV().score(view)
    assert (got[:, :, :6, 1] == 0.5).all()
    assert (got[:, :, 6:, 1] == 0).all()
    attention_alone = GKV(balance=1.0).score(view)
    assert (attention_alone[:, :, :6, 0] == 0.5).all()
    assert (attention_alone[:, :, 6:, 0] == 0).all()


@pytest.mark.parametrize("n", [1, 3, 4, 5])  # fewer than the window, just as many, one more
def test_a_cache_no_larger_than_the_window_is_scored(n: int) -> None:
    keys, held = draw(1, L, H, n, D), np.arange(n, dtype=np.int32)
    queries = queries_of(range(max(0, n - 4), n))
    got = GKV(window=4).score(ArrayView(keys, keys[..., :0], held, queries=queries))
    assert np.isfinite(got).all()
    window = got[:, :, -min(n, 4) :, 0]
    assert (window == window[0, 0, 0]).all()
    if n > 4:
        assert (got[:, :, 0, 1] == 1).all()  # all that the head attended to before its window
        assert got[:, :, 0, 0].max() < window.min()


def test_zero_keys_are_scored() -> None:
    keys, held = np.zeros((L, H, 9, D), np.float32), np.arange(9, dtype=np.int32)
    got = GKV(window=2).score(ArrayView(keys, keys, held, queries=queries_of(range(7, 9))))
    assert np.isfinite(got).all()


def test_what_another_policy_scored_counts_as_nothing() -> None:
    keys, held = draw(1, L, H, 10, D), np.arange(10, dtype=np.int32)
    unknown = np.full((L, H, 8, 2), -np.inf, np.float32)
    queries = queries_of(range(6, 10))
    got, want = (
        GKV().score(ArrayView(keys, keys, held, queries=queries, previous=previous))
        for previous in (unknown, unknown[:, :, :0])
    )
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"window": 0}, "window >= 1, not 0"),
        ({"decay": 1.5}, "decay is from 0 to 1, not 1.5"),
        ({"balance": -0.1}, "balance is from 0 to 1, not -0.1"),
        ({"decay": math.nan}, "decay is from 0 to 1, not nan"),
        ({"memory": "mean"}, "memory is max or sum, not 'mean'"),
    ],
)
def test_parameters_are_checked(wrong: Any, sentence: str) -> None:
    with pytest.raises(PolicyError, match=sentence):
        GKV(**wrong)


# -- in a bounded chat --------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded(GKV):
    """Remembers what it saw and said."""

    seen: list[Any] = field(default_factory=list, compare=False)

    def score(self, view: CacheView) -> Any:
        queries = view.queries(self.window)
        score = super().score(view)
        self.seen.append((view.indices, view.keys(), queries, score))
        return score


@pytest.mark.parametrize("granularity", ["token", "head"])
def test_in_a_chat_of_the_bundled_model_every_head_keeps_what_the_reference_ranks_first(
    granularity: str, bundled_model: str, load: Loader
) -> None:
    policy, kept, budget = Recorded(), [], 96
    llm = load(
        bundled_model, n_ctx=2000, kv_budget=budget, reserve=160, policy=policy,
        granularity=granularity, recall="off", sinks=4, recent=20,
        on_evict=lambda _: kept.append(llm.kv_indices.copy()),
    )  # fmt: skip
    story = "The old man walked to shore {}, and his daughter {} followed him. "
    text = "".join(story.format(i, i % 7) for i in range(60))
    llm.eval(llm.tokenize(text.encode())[:450])
    reference, before, held_before = Reference(policy), None, None
    assert len(kept) == len(policy.seen) >= 2
    for (indices, keys, queries, got), stay in zip(policy.seen, kept, strict=True):
        shape = keys.shape[:3]
        held = np.broadcast_to(indices, shape)
        remembered = np.zeros((*shape[:2], 0))
        if before is not None:
            rows = [
                np.searchsorted(held_before[at], held[at][:budget]) for at in np.ndindex(shape[:2])
            ]
            rows = np.array(rows).reshape(*shape[:2], -1)
            remembered = np.take_along_axis(before, rows, axis=2)
        want, before = reference.score(queries, keys, held, remembered)
        held_before = held
        outside = held < queries.indices[0]
        np.testing.assert_allclose(got[..., 1], before, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(got[..., 0][outside], want[outside], rtol=1e-3, atol=1e-4)
        if granularity == "head":
            best = np.where(held < 4, 9, np.where(held >= held.max() - 19, 8, got[..., 0]))
            order = np.argsort(-best, axis=2, kind="stable")[:, :, :budget]
            np.testing.assert_array_equal(np.sort(np.take_along_axis(held, order, axis=2)), stay)
