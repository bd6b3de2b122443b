"""LazyEviction against its formulas, token after token and query after query."""

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
from kvp_edge.policies import ArrayView, CacheView, LazyEviction
from kvp_edge.policies.lazy_eviction import came_back
from support.properties import examples

Loader = Callable[..., kvp_edge.Llama]

L, H, GROUP, D = 2, 2, 3, 8


def draw(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# -- the reference ------------------------------------------------------------------------------


@dataclass
class Token:
    """What is known of one token in one head."""

    last: int
    longest: int = 0

    def look(self, at: int) -> None:
        self.longest = max(self.longest, at - self.last)
        self.last = max(self.last, at)

    def score(self, now: int, combine: str) -> float:
        if self.longest == 0:
            return 0.0
        overdue = max(0, now - self.last) / self.longest
        h1 = 2 / (1 + math.exp(min(overdue, 700)))
        h2 = 2 / (1 + math.exp(1 / self.longest))
        return h1 * h2 if combine == "product" else h1 + h2


def paid_to(queries: Queries, j: int, layer: int, kv: int, keys: Any, held: Any) -> Any:
    """[n]: what query j pays to the tokens held, the most of the head's group."""
    group = queries.queries.shape[1] // keys.shape[1]
    rows = []
    for g in range(group):
        q = queries.queries[layer, kv * group + g, j].astype(float)
        z = float(queries.scale[layer]) * (keys[layer, kv].astype(float) @ q)
        z = np.where(held <= queries.indices[j], z, -np.inf)
        e = np.exp(z - z.max())
        rows.append(e / e.sum())
    return np.max(rows, axis=0)


@dataclass
class Reference:
    """Follows every token of every head by its index."""

    threshold: float
    tokens: dict[tuple[int, int, int], Token] = field(default_factory=dict)

    def see(self, queries: Queries, keys: Any, held: Any, since: int) -> None:
        """Queries from ``since`` on, which look at the tokens held."""
        held = np.broadcast_to(held, keys.shape[:3])
        for layer, kv in np.ndindex(keys.shape[:2]):
            for index in held[layer, kv].tolist():
                self.tokens.setdefault((layer, kv, index), Token(index))
            for j, at in enumerate(queries.indices.tolist()):
                if at < since:
                    continue
                paid = paid_to(queries, j, layer, kv, keys, held[layer, kv])
                for i in np.flatnonzero(paid >= np.float32(self.threshold)).tolist():
                    self.tokens[layer, kv, int(held[layer, kv, i])].look(at)

    def numbers(self, held: Any, shape: tuple[int, ...]) -> Any:
        """[L, H, n, 2], as the policy notes them."""
        held, found = np.broadcast_to(held, shape), np.zeros((*shape, 2))
        for at in np.ndindex(shape):
            token = self.tokens[at[0], at[1], int(held[at])]
            found[at] = token.last - held[at], token.longest
        return found


@pytest.mark.parametrize("threshold", [1e-4, 0.03, 0.1])
def test_last_and_longest_are_those_of_a_count_by_hand_through_two_evictions(
    threshold: float,
) -> None:
    policy, reference = LazyEviction(threshold), Reference(threshold)
    rng, scale = np.random.default_rng(0), np.array([1.0, 0.4], np.float32)
    queries = Queries(draw(3, L, H * GROUP, 50, D), np.arange(50, dtype=np.int32), scale)
    keys, held = draw(1, L, H, 30, D), np.arange(30, dtype=np.int32)
    got = policy.score(ArrayView(keys, keys[..., :0], held, queries=queries[:30]))
    reference.see(queries[:30], keys, held, since=0)
    np.testing.assert_array_equal(got, reference.numbers(held, (L, H, 30)))

    # each head loses ten, and twenty tokens come
    kept = np.sort([rng.choice(30, 20, replace=False) for _ in range(L * H)]).reshape(L, H, 20)
    newer = np.broadcast_to(np.arange(30, 50), (L, H, 20))
    own = np.concatenate((kept, newer), axis=2).astype(np.int32)
    old = np.take_along_axis(keys, kept[..., None], axis=2)
    keys = np.concatenate((old, draw(2, L, H, 20, D)), axis=2)
    previous = np.take_along_axis(got, kept[..., None], axis=2)
    view = ArrayView(keys, keys[..., :0], own, queries=queries, previous=previous)
    again = policy.score(view)
    reference.see(queries, keys, own, since=30)
    np.testing.assert_array_equal(again, reference.numbers(own, (L, H, 40)))
    if threshold > 0.01:
        assert len(np.unique(again[..., 1])) > 5

    for combine in ("product", "sum"):
        worth = LazyEviction(threshold, combine).worth(again, 60 - own)  # ten queries later
        want = [
            reference.tokens[a, b, int(own[a, b, i])].score(59, combine)
            for a, b, i in np.ndindex(own.shape)
        ]
        np.testing.assert_allclose(worth.ravel(), want, rtol=1e-5, atol=1e-7)


# -- invariants ---------------------------------------------------------------------------------


@examples(60)
@given(data=st.data())
def test_pauses_counted_in_pieces_are_those_counted_at_once(data: st.DataObject) -> None:
    n, m = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
    looked = np.array(
        data.draw(st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=m, max_size=m))
    )
    cut = data.draw(st.integers(1, m))
    first = np.arange(n, dtype=np.int32)
    at = np.arange(n, n + m, dtype=np.int32)
    none = np.zeros(n, np.int32)
    whole = came_back(first, none, at, looked)
    last, longest = came_back(first, none, at[:cut], looked[:cut])
    if cut < m:
        last, longest = came_back(last, longest, at[cut:], looked[cut:])
    np.testing.assert_array_equal(last, whole[0])
    np.testing.assert_array_equal(longest, whole[1])
    for i in range(n):
        times = [i, *at[looked[:, i]].tolist()]
        assert last[i] == times[-1]
        assert longest[i] == max(np.diff(times), default=0)


@examples(60)
@given(
    last=st.integers(0, 50),
    longest=st.integers(1, 50),
    later=st.integers(0, 100),
    combine=st.sampled_from(["product", "sum"]),
)
def test_worth_falls_while_a_token_is_not_looked_at_and_grows_with_its_pauses(
    last: int, longest: int, later: int, combine: Any
) -> None:
    policy = LazyEviction(combine=combine)

    def worth(last: float, longest: float, age: int) -> float:
        numbers = np.array([last, longest], np.float32).reshape(1, 1, 1, 2)
        return float(policy.worth(numbers, np.array([age], np.int32))[0, 0, 0])

    age = last + 1 + later
    now = worth(last, longest, age)
    assert 0 < now <= (1 if combine == "product" else 2) or now == 0 < later / longest
    assert worth(last, longest, age + 1) <= now
    assert worth(last, longest + 1, age) >= now
    assert worth(last, 0, age) == 0
    assert worth(-math.inf, -math.inf, age) == 0  # of another policy


def test_an_overdue_token_fades_with_the_product_and_not_with_the_sum() -> None:
    numbers = np.array([[0, 100], [5000, 1]], np.float32)[None, None]  # one long pause; every time
    ages = np.array([5002, 5003], np.int32)
    product, total = (
        LazyEviction(combine=c).worth(numbers, ages)[0, 0] for c in ("product", "sum")
    )
    assert product[0] < product[1]
    assert total[0] > total[1] - 0.1


# -- nothing to do, and limits ------------------------------------------------------------------


def test_without_a_query_nothing_is_looked_at() -> None:
    none = Queries(
        np.zeros((L, H, 0, D), np.float32), np.zeros(0, np.int32), np.ones(L, np.float32)
    )
    keys, held = draw(1, L, H, 9, D), np.arange(9, dtype=np.int32)
    policy = LazyEviction()
    got = policy.score(ArrayView(keys, keys, held, queries=none))
    assert (got == 0).all()
    assert (policy.worth(got, np.arange(9, 0, -1, dtype=np.int32)) == 0).all()


def test_exactly_the_threshold_counts() -> None:
    """One query, four equal keys: each gets a quarter."""
    keys = np.ones((1, 1, 4, D), np.float32)
    q = Queries(np.ones((1, 1, 1, D), np.float32), np.array([3], np.int32), np.ones(1, np.float32))
    held = np.arange(4, dtype=np.int32)
    for threshold, want in ((0.25, [3, 2, 1, 0]), (np.nextafter(np.float32(0.25), 1), [0] * 4)):
        got = LazyEviction(float(threshold)).score(ArrayView(keys, keys, held, queries=q))
        np.testing.assert_array_equal(got[0, 0, :, 0], want)
        np.testing.assert_array_equal(got[0, 0, :, 1], want)


def test_a_withdrawn_query_looks_no_later_than_the_last_that_stays() -> None:
    keys, held = np.ones((1, 1, 3, D), np.float32), np.array([0, 1, 20], np.int32)
    previous = np.array([[30, 7], [5, 5]], np.float32)[None, None]  # seen by token 30; went back
    q = Queries(np.ones((1, 1, 1, D), np.float32), np.array([20], np.int32), np.ones(1, np.float32))
    got = LazyEviction(0.9).score(ArrayView(keys, keys, held, queries=q, previous=previous))
    np.testing.assert_array_equal(got[0, 0], [[19, 7], [5, 5], [0, 0]])


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"threshold": 0.0}, "more than 0 and at most 1, not 0.0"),
        ({"threshold": 1.01}, "more than 0 and at most 1, not 1.01"),
        ({"threshold": math.nan}, "more than 0 and at most 1, not nan"),
        ({"combine": "mean"}, "product or sum, not 'mean'"),
    ],
)
def test_parameters_are_checked(wrong: Any, sentence: str) -> None:
    with pytest.raises(PolicyError, match=sentence):
        LazyEviction(**wrong)


# -- in a bounded chat --------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded(LazyEviction):
    """Remembers what it saw and said."""

    seen: list[Any] = field(default_factory=list, compare=False)

    def score(self, view: CacheView) -> Any:
        new = view.queries(view.shape[2] - view.previous.shape[2])
        score = super().score(view)
        self.seen.append((view.indices, view.keys(), new, score))
        return score


@pytest.mark.parametrize("granularity", ["token", "head"])
def test_in_a_chat_of_the_bundled_model_every_head_notes_what_the_reference_counts(
    granularity: str, bundled_model: str, load: Loader
) -> None:
    threshold, budget = 0.01, 96
    policy, kept = Recorded(threshold), []
    llm = load(
        bundled_model, n_ctx=2000, kv_budget=budget, reserve=160, policy=policy,
        granularity=granularity, recall="off", sinks=4, recent=20,
        on_evict=lambda _: kept.append(llm.kv_indices.copy()),
    )  # fmt: skip
    story = "The old man walked to shore {}, and his daughter {} followed him. "
    text = "".join(story.format(i, i % 7) for i in range(60))
    llm.eval(llm.tokenize(text.encode())[:450])
    assert len(kept) == len(policy.seen) >= 2
    reference, since = Reference(threshold), 0
    for (indices, keys, queries, got), stay in zip(policy.seen, kept, strict=True):
        shape = keys.shape[:3]
        held = np.broadcast_to(indices, shape)
        assert queries.indices[0] == since  # every query once
        reference.see(queries, keys, held, since)
        since = int(queries.indices[-1]) + 1
        want = reference.numbers(held, shape)
        near = np.isclose(got, want)
        assert near.mean() > 0.999  # an attention of just the threshold may fall to either side
        if granularity == "head":
            worth = policy.worth(got, since - held)
            best = np.where(held < 4, 9, np.where(held >= since - 20, 8, worth))
            for layer, kv in np.ndindex(shape[:2]):  # equal scores favour the newer
                rank = np.lexsort((-held[layer, kv], -best[layer, kv]))[:budget]
                np.testing.assert_array_equal(np.sort(held[layer, kv, rank]), stay[layer, kv])


def test_what_never_comes_back_is_dropped_by_age(bundled_model: str, load: Loader) -> None:
    """With a threshold that only a token's own query reaches, the newest stay: recency."""
    held = []
    for policy in (LazyEviction(1.0), "recency"):
        llm = load(
            bundled_model, n_ctx=2000, kv_budget=96, reserve=160, policy=policy,
            granularity="head", recall="off",
        )  # fmt: skip
        text = "".join(f"The old man {i} walked to the shore. " for i in range(60))
        llm.eval(llm.tokenize(text.encode())[:450])
        held.append(llm.kv_indices.copy())
    np.testing.assert_array_equal(*held)
