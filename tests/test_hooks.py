"""What Llama offers to those who look on or go along, so that nobody needs its private parts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from conftest import RandomModel, random_tokens
from kvp_edge import InUseError, KVCacheError, Llama, PolicyError
from kvp_edge.policies import SnapKV
from kvp_edge.text.spans import TEXT, Span
from makers.gguf_models import ModelShape

Maker = Callable[[ModelShape], RandomModel]
Loader = Callable[..., Llama]

LLAMA = ModelShape("llama", n_layer=2, n_embd=64, n_head=2, n_head_kv=1, n_ff=64)
BOUND = {"n_ctx": 2000, "kv_budget": 60, "recent": 10, "reserve": 196, "policy": "keydiff"}


def test_batches_are_told_one_after_the_other(random_model: Maker, load: Loader) -> None:
    llm = load(random_model(LLAMA).path, **BOUND)
    told: list[tuple[int, int, int]] = []
    llm.on_batch = lambda start, end: told.append((start, end, llm.kv_stats.seen))
    tokens = random_tokens(700)
    llm.eval(tokens[:300])
    llm.eval([])
    llm.eval(tokens[300:301])
    llm.eval(tokens[301:])
    starts, ends, seen = zip(*told, strict=True)
    assert [0, *ends] == [*starts, 700]
    assert seen == ends
    assert (300, 301, 301) in told
    assert llm.kv_stats.evictions > 1


def test_who_is_told_of_a_batch_may_only_look(random_model: Maker, load: Loader) -> None:
    llm = load(random_model(LLAMA).path, **BOUND)
    llm.on_batch = lambda start, end: llm.reset()
    with pytest.raises(InUseError, match="eval"):
        llm.eval(random_tokens(20))
    llm.on_batch = None
    llm.reset()
    llm.eval(random_tokens(20))
    assert llm.kv_stats.seen == 20


def test_all_logits_can_be_seen_and_are_not_kept(random_model: Maker, load: Loader) -> None:
    path, tokens = random_model(LLAMA).path, random_tokens(500)
    keeps, llm = load(path, **BOUND, logits_all=True), load(path, **BOUND)
    keeps.eval(tokens[:100])
    keeps.eval(tokens[100:])
    found: list[tuple[int, Any]] = []
    llm.eval(tokens[:100])
    rows = len(llm.scores)
    with llm.logits_to(lambda first, logits: found.append((first, logits.copy()))):
        llm.eval(tokens[100:])
    assert len(llm.scores) == rows
    assert [first for first, _ in found] == [
        100 + n for n in np.cumsum([0, *(len(one) for _, one in found)])[:-1].tolist()
    ]
    got = np.concatenate([one for _, one in found])
    np.testing.assert_array_equal(got, keeps.scores[100:500])
    np.testing.assert_array_equal(llm.newest_logits(), got[-1])
    assert llm.likeliest() == int(got[-1].argmax())
    llm.eval(tokens[:1])
    assert len(found) < 500  # nothing more was told
    assert found[-1][0] + len(found[-1][1]) == 500


def test_an_error_ends_the_seeing_of_logits(random_model: Maker, load: Loader) -> None:
    llm = load(random_model(LLAMA).path, **BOUND)
    seen: list[int] = []

    def see(first: int, _: Any) -> None:
        seen.append(first)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), llm.logits_to(see):
        llm.eval(random_tokens(20))
    assert not llm.keeps_logits
    llm.reset()
    llm.eval(random_tokens(20))
    assert seen == [0]


def test_a_policy_that_looks_at_queries_needs_their_log(random_model: Maker, load: Loader) -> None:
    path = random_model(LLAMA).path
    without, with_log = load(path, **BOUND), load(path, **{**BOUND, "policy": "snapkv"})
    policy = SnapKV()
    assert without.kv is not None
    with pytest.raises(PolicyError, match="'snapkv' needs queries, and none are logged"):
        without.kv.replace_policy(policy)
    assert without.kv.policy.name == "keydiff"
    assert with_log.kv is not None
    with_log.kv.replace_policy(policy)
    with_log.eval(random_tokens(500))
    assert with_log.kv_stats.evictions > 0
    assert with_log.kv.policy is policy


@pytest.mark.parametrize("named", [False, True])
def test_spans_are_those_that_the_model_names(random_model: Maker, named: bool) -> None:
    span = (20, 80, TEXT)

    class Whole(Llama):
        def find_spans(self, start: int, end: int) -> list[Span]:
            return [span] if named and start < span[1] <= end else []

    how: dict[str, Any] = {**BOUND, "granularity": "token", "verbose": False, "n_threads": 1}
    with closing(Whole(random_model(LLAMA).path, **how)) as llm:
        llm.eval(random_tokens(257))
        held = llm.kv_indices
        assert llm.kv_stats.evictions == 1
        assert (((held >= span[0]) & (held < span[1])).sum() == 0) == named  # more than the budget


def test_the_manager_is_there_if_the_cache_is_bounded(random_model: Maker, load: Loader) -> None:
    path = random_model(LLAMA).path
    assert load(path).kv is None
    llm = load(path, **BOUND)
    assert llm.kv is not None
    llm.eval(random_tokens(500))
    assert (llm.kv.seen, llm.kv.kept) == (500, llm.kv_stats.kept)
    llm.n_tokens = 3  # behind its back, and dropped meanwhile
    with pytest.raises(KVCacheError, match="cannot be rewound to 3 tokens"):
        llm.sync()
    llm.reset()
    llm.sync()
    assert llm.kv.seen == 0
