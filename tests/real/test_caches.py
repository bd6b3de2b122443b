"""Quantised weights, quantised caches, every policy: evictions that real conversations meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from kvp_edge import Llama
from kvp_edge.binding import rules
from kvp_edge.policies import POLICIES, ArrayView, KeyDiff, KNorm
from support.cache_types import CACHE_TYPES
from support.real_models import ALL, GEMMA, newest_logits, tokens_of

pytestmark = pytest.mark.real

Opened = Callable[..., Llama]


RULES = {"knorm": rules.KNorm(), "keydiff": rules.KeyDiff()}


@pytest.fixture
def opened(real_model: Callable[[str], str]) -> Iterator[Opened]:
    """opened("smollm2", "f16-fa", **kwargs) -> Llama with a small cache, closed after the test."""
    made: list[Llama] = []

    def make(name: str, types: str = "f16", **kwargs: Any) -> Llama:
        type_k, type_v, flash_attn = CACHE_TYPES[types]
        bound = {"kv_budget": 192, "recent": 20, "reserve": 64}
        if name == GEMMA:  # the window of its other layers is 512 tokens
            bound = {"kv_budget": 512, "recent": 64, "reserve": 256}
        given: dict[str, Any] = {
            "n_ctx": 4000, "verbose": False, "n_threads": 1, "n_threads_batch": 1,
            "type_k": type_k, "type_v": type_v, "flash_attn": flash_attn, **bound, **kwargs,
        }  # fmt: skip
        made.append(Llama(real_model(name), **given))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


def read_past_evictions(llm: Llama, text: str, n_evictions: int = 2) -> list[int]:
    """Read until the cache was full so often, then five tokens more, one by one."""
    limits, cells = llm.kv_stats.budget, llm.kv_stats.cells
    assert limits is not None
    n = cells + (n_evictions - 1) * (cells - limits) + 1
    tokens = tokens_of(llm, text, n + 5)
    llm.eval(tokens[:n])
    for token in tokens[n:]:
        llm.eval([token])
    assert llm.kv_stats.evictions == n_evictions
    assert llm.kv_stats.kept + llm.kv_stats.dropped == llm.kv_stats.seen == len(tokens)
    return tokens


# -- in place and through the state ----------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("types", ["f16", "f16-fa", "q8_0-f16", "q8_0-fa", "q4_0-fa"])
def test_in_place_and_through_the_state_the_same_stays(
    name: str, types: str, opened: Opened, book: str
) -> None:
    both = [opened(name, types, policy="keydiff", pack=pack) for pack in ("device", "state")]
    for llm in both:
        read_past_evictions(llm, book)
    assert [llm.kv_stats.pack for llm in both] == ["device", "state"]
    a, b = (llm.kv_indices for llm in both)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(*(newest_logits(llm) for llm in both))
    for llm in both:  # the table is right about where the rows lie
        assert llm.kv is not None
        known = llm.kv.cache.check_cells(llm.kv.snapshot().llama_positions())
        assert known == (llm is both[0])


# -- quantised caches ------------------------------------------------------------------------


def mean_loss(llm: Llama, tokens: list[int], first: int) -> float:
    """Minus the log-likelihood of tokens[first:], in nats per token."""
    losses = []
    for at in range(first, len(tokens)):
        logits = llm.scores[at - 1].astype(np.float64)
        top = logits.max()
        losses.append(np.log(np.exp(logits - top).sum()) + top - logits[tokens[at]])
    assert np.isfinite(losses).all()
    return float(np.mean(losses))


@pytest.mark.parametrize("name", ALL)
def test_quantised_caches_lose_little_more_than_the_eviction_does(
    name: str, opened: Opened, book: str
) -> None:
    """In nats per token, over the tokens after the first eviction."""
    bounded: dict[str, float] = {}
    for types in ("f16-fa", "q8_0-fa", "q4_0-fa"):
        llm = opened(name, types, logits_all=True, n_ctx=1200)
        tokens = read_past_evictions(llm, book)
        first = llm.kv_stats.cells
        bounded[types] = mean_loss(llm, tokens, first)
        llm.close()
    llm = opened(name, "f16-fa", logits_all=True, n_ctx=1200, kv_budget=1100)
    llm.eval(tokens)
    assert llm.kv_stats.evictions == 0
    full = mean_loss(llm, tokens, first)
    assert bounded["f16-fa"] < full + 0.5
    assert bounded["q8_0-fa"] < bounded["f16-fa"] + 0.05
    assert bounded["q4_0-fa"] < bounded["f16-fa"] + 0.5


# -- policies --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("granularity", ["head", pytest.param("token", marks=pytest.mark.slow)])
def test_every_policy_gets_past_several_evictions(
    name: str, policy: str, granularity: str, opened: Opened, book: str
) -> None:
    llm = opened(name, policy=policy, granularity=granularity)
    tokens = read_past_evictions(llm, book, n_evictions=3)
    assert np.isfinite(newest_logits(llm)).all()
    held = llm.kv_indices
    assert (held[..., :4] == np.arange(4)).all()
    assert (held[..., -20:] == np.arange(len(tokens) - 20, len(tokens))).all()
    assert (np.diff(held, axis=-1) > 0).all()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("types", ["f16", "q8_0-fa"])
@pytest.mark.parametrize("pack", ["device", "state"])
def test_native_scores_are_those_of_numpy_on_the_keys_read(
    name: str, types: str, pack: str, opened: Opened, book: str
) -> None:
    llm = opened(name, types, pack=pack)
    read_past_evictions(llm, book)
    assert llm.kv is not None
    cache, n = llm.kv.cache, llm.kv_stats.kept
    p1 = cache.newest_position() + 1
    _, keys, values = cache.read(0, p1, n)
    for policy in (KeyDiff(), KNorm()):
        got = cache.score(RULES[policy.name], 0, p1, n)
        exact: Any = keys.astype(np.float64)
        want = policy.score(ArrayView(exact, values, llm.kv_indices))
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
