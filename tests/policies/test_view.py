"""What policies see, and policies of one's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import RandomModel, random_tokens
from kvp_edge import Llama, Policy, SessionError
from kvp_edge.binding import rules
from kvp_edge.binding.cache import NativeCache
from kvp_edge.binding.queries import Queries
from kvp_edge.policies import POLICIES, CacheView, ExpectedAttention, LagKV, SnapKV
from makers.gguf_models import ModelShape

Maker = Callable[[ModelShape], RandomModel]
Loader = Callable[..., Llama]

SHAPE = ModelShape("llama", n_layer=2, n_head_kv=2, head_dim=32)
BOUND: dict[str, Any] = {"n_ctx": 999, "kv_budget": 100, "reserve": 156}


@dataclass(frozen=True)
class LargeValues(Policy):
    """As in docs/how-eviction-works.md."""

    name = "large-values"
    order: float = 2.0

    def score(self, view: CacheView) -> Any:
        return np.linalg.norm(view.values(), ord=self.order, axis=-1)


class Asking(Policy):
    """Calls a function with every view, and keeps the newest."""

    name = "asking"
    scope = "cache"

    def __init__(self, ask: Callable[[CacheView], object]) -> None:
        self.ask = ask

    def score(self, view: CacheView) -> Any:
        self.ask(view)
        return np.broadcast_to(view.indices.astype(np.float32), view.shape)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was read of a cache: keys, or keys and values."""
    found: list[str] = []
    read = NativeCache.read

    def counted(self: NativeCache, *args: Any, values: bool = True) -> Any:
        found.append("keys and values" if values else "keys")
        return read(self, *args, values=values)

    monkeypatch.setattr(NativeCache, "read", counted)
    return found


@pytest.mark.parametrize(
    ("ask", "want"),
    [
        (lambda view: view.indices, []),
        (lambda view: (view.keys(), view.keys()), ["keys"]),
        (lambda view: (view.values(), view.values(), view.keys()), ["keys and values"]),
        (lambda view: (view.keys_and_values(), view.values()), ["keys and values"]),
        (lambda view: (view.keys(), view.values()), ["keys", "keys and values"]),
    ],
)
def test_nothing_is_read_unasked_or_twice(
    random_model: Maker, load: Loader, reads: list[str], ask: Any, want: list[str]
) -> None:
    llm = load(random_model(SHAPE).path, **BOUND, policy=Asking(ask))
    reads.clear()
    llm.eval(random_tokens(257))
    assert llm.kv_stats.evictions == 1
    assert reads == want


@pytest.mark.parametrize(("pack", "defined"), [("device", 0), ("state", 1)])
def test_a_rule_is_applied_where_the_cache_lies_or_else_by_its_definition(
    random_model: Maker, load: Loader, reads: list[str], pack: str, defined: int
) -> None:
    def definition(view: CacheView) -> Any:
        calls.append(view)
        values = view.values()
        return values.max(axis=-1) - values.min(axis=-1)

    calls: list[CacheView] = []
    found: list[Any] = []
    policy = Asking(lambda view: found.append(view.apply(rules.Range(), definition)))
    llm = load(random_model(SHAPE).path, **BOUND, policy=policy, pack=pack)
    reads.clear()
    llm.eval(random_tokens(257))
    assert len(calls) == len(reads) == defined
    want = POLICIES["value-range"]()
    llm = load(random_model(SHAPE).path, **BOUND, policy=want, pack=pack)
    llm.eval(random_tokens(257)[: found[0].shape[2]])
    assert llm.kv is not None
    llm.kv.score()
    np.testing.assert_allclose(found[0], llm.kv.snapshot().scores, atol=1e-6)


def test_queries_of_a_chat_that_logs_none_are_a_sentence(random_model: Maker, load: Loader) -> None:
    llm = load(random_model(SHAPE).path, **BOUND, policy=Asking(lambda view: view.queries(3)))
    llm.eval(random_tokens(256))
    with pytest.raises(ValueError, match="a policy with n_queries > 0"):
        llm.eval([7])
    assert (llm.n_tokens, llm.kv_stats.seen) == (256, 256)


def test_parameters_are_the_identity() -> None:
    assert {policy().identity() for policy in POLICIES.values()} == {
        "keydiff",
        "knorm",
        "recency",
        "random(seed=0)",
        "lagkv(lag=128, sinks=4)",
        "value-range",
        "snapkv(window=32, kernel=5)",
        "tova",
        "h2o",
        "gkv(window=16, decay=0.8, balance=0.5, alike=0.5, memory='max')",
        "lazy-eviction(threshold=0.0001, combine='product')",
        "expected-attention(future=512, sinks=4)",
    }
    assert SnapKV(window=8).identity() == "snapkv(window=8, kernel=5)"
    assert Asking(print).identity() == "asking"


def test_a_session_knows_the_parameters_of_ones_own_policy(
    random_model: Maker, load: Loader, tmp_path: Path
) -> None:
    path = random_model(SHAPE).path
    llm = load(path, **BOUND, policy=LargeValues(order=1.0))
    llm.eval(random_tokens(300))
    assert llm.kv_stats.evictions == 1
    llm.save_session(tmp_path / "chat.kvp")
    load(path, **BOUND, policy=LargeValues(order=1.0)).load_session(tmp_path / "chat.kvp")
    with pytest.raises(SessionError, match=r"large-values\(order=1.0\)"):
        load(path, **BOUND, policy=LargeValues()).load_session(tmp_path / "chat.kvp")


@pytest.mark.parametrize(
    "make",
    [
        lambda: LagKV(lag=0),
        lambda: LagKV(sinks=-1),
        lambda: SnapKV(window=0),
        lambda: SnapKV(kernel=4),
        lambda: ExpectedAttention(future=0),
        lambda: ExpectedAttention(sinks=-1),
    ],
)
def test_impossible_parameters_are_refused_where_they_are_given(make: Any) -> None:
    with pytest.raises(ValueError, match=r"needs (lag|window|future) >= "):
        make()


def test_arrays_that_do_not_fit_the_cache_are_refused(random_model: Maker, load: Loader) -> None:
    llm = load(random_model(SHAPE).path, **BOUND)
    llm.eval(random_tokens(10))
    assert llm.kv is not None
    queries, one, held = np.ones((2, 4, 1, 32)), np.ones(1), np.zeros((2, 2, 10))
    mean, covariance, some = np.ones((2, 4, 32)), np.ones((2, 4, 32, 32)), np.ones((2, 2, 10)) > 0
    for wrong in (
        rules.Attention(Queries(queries[..., 1:], one, np.ones(2)), held),  # type: ignore[arg-type]
        rules.Attention(Queries(queries, np.ones(2), np.ones(2)), held),  # type: ignore[arg-type]
        rules.Attention(Queries(queries, one, one), held),  # type: ignore[arg-type]
        rules.Attention(Queries(queries, one, np.ones(2)), held[..., 1:]),  # type: ignore[arg-type]
        rules.Expected(mean[1:], covariance, np.ones(2), some),  # type: ignore[arg-type]
        rules.Expected(mean, covariance[:, 1:], np.ones(2), some),  # type: ignore[arg-type]
        rules.Expected(mean, covariance, one, some),  # type: ignore[arg-type]
        rules.Expected(mean, covariance, np.ones(2), some[..., 1:]),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=r"an array \(.*\) where \(.*\) belongs"):
            llm.kv.cache.score(wrong, 0, 10, 10)
