"""What a policy notes of a token (``Policy.score_shape``) follows it wherever it goes.

``NotedNoise`` checks at every scoring that it finds each token's own notes;
``support.histories.any_history`` takes it through any history.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvp_edge
from conftest import RandomModel, random_tokens
from kvp_edge.cache.recall import RecallSettings
from kvp_edge.errors import SessionError
from kvp_edge.policies import GKV, H2O, KeyDiff, LazyEviction, SnapKV
from makers.gguf_models import ModelShape
from support.noise import NotedNoise

Maker = Callable[[ModelShape], RandomModel]
Loader = Callable[..., kvp_edge.Llama]

LLAMA = ModelShape("llama", head_dim=64)
BOUND: dict[str, Any] = {"n_ctx": 4000, "kv_budget": 100, "reserve": 156, "recent": 20}
ALWAYS = RecallSettings(threshold=0.0)


@pytest.mark.parametrize("granularity", ["token", "head"])
@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_notes_come_through_evictions_recall_and_going_back(
    granularity: str, positions: str, random_model: Maker, load: Loader
) -> None:
    noted = NotedNoise()
    how = {"policy": noted, "granularity": granularity, "recall": "reply", "positions": positions}
    llm = load(random_model(ModelShape("llama", n_ctx_train=512)).path, **BOUND, **how)
    assert llm.kv is not None
    llm.kv.recall_settings = ALWAYS
    for turn in range(4):
        llm.eval(random_tokens(290, seed=turn)[1:])
    assert noted.most > 3  # evictions that one token came through
    assert llm.recall() is not None
    llm.eval(random_tokens(200, seed=5)[1:])
    llm.n_tokens -= 7  # within the newest
    llm.eval(random_tokens(250, seed=6)[1:])
    llm.n_tokens = 700  # far back, from the log
    llm.eval(random_tokens(300, seed=7)[1:])
    assert llm.kv_stats.evictions > 0
    assert min(noted.carried[1:]) > 0
    llm.reset()
    llm.eval(random_tokens(258, seed=8)[1:])
    assert noted.carried[-1] == 0


@pytest.mark.parametrize("saved", ["session", "state"])
def test_notes_are_saved_with_the_conversation(
    saved: str, random_model: Maker, load: Loader, tmp_path: Path
) -> None:
    policies = NotedNoise(), NotedNoise()
    one, other = (
        load(random_model(LLAMA).path, **BOUND, policy=p, recall="reply") for p in policies
    )
    one.eval(random_tokens(600)[1:])
    if saved == "session":
        one.save_session(tmp_path / "s")
        other.load_session(tmp_path / "s")
    else:
        other.load_state(one.save_state())
    for llm in (one, other):
        assert llm.kv is not None
        llm.kv.recall_settings = ALWAYS
        llm.eval(random_tokens(300, seed=2)[1:])
        llm.recall()
        llm.eval(random_tokens(300, seed=3)[1:])
    np.testing.assert_array_equal(one.kv_indices, other.kv_indices)
    assert policies[0].carried[-3:] == policies[1].carried[-3:]
    assert policies[0].most == policies[1].most > 3


def test_a_log_with_the_notes_of_another_policy_is_refused(
    random_model: Maker, load: Loader, tmp_path: Path
) -> None:
    """The policies have one name, as a file can lie about it."""

    class Fewer(NotedNoise):
        score_shape = (2,)

        def score(self, view: Any) -> Any:
            return np.zeros((*view.shape, 2), np.float32)

        def worth(self, scores: Any, ages: Any) -> Any:
            return scores[..., 0]

    one, other = (
        load(random_model(LLAMA).path, **BOUND, policy=p, recall="reply")
        for p in (NotedNoise(), Fewer())
    )
    one.eval(random_tokens(600)[1:])
    one.save_session(tmp_path / "s")
    with pytest.raises(SessionError, match="its table of kept tokens is invalid"):
        other.load_session(tmp_path / "s")
    state = one.save_state()
    state._arrays["scores"] = state.arrays["scores"][..., :2]
    with pytest.raises(SessionError, match="its KV log has scores of another policy"):
        other.load_state(state)
    assert other.kv_stats.seen == 0


@pytest.mark.parametrize("granularity", ["token", "head"])
def test_a_policy_that_takes_over_begins_without_notes(
    granularity: str, random_model: Maker, load: Loader
) -> None:
    llm = load(
        random_model(LLAMA).path, **BOUND, policy=H2O(), granularity=granularity, recall="reply"
    )
    assert llm.kv is not None
    llm.kv.recall_settings = ALWAYS
    noted = NotedNoise()
    policies = [GKV(), noted, LazyEviction(), SnapKV(), GKV(decay=0), KeyDiff(), H2O(), noted]
    for turn, policy in enumerate(policies):
        llm.eval(random_tokens(300, seed=turn)[1:])
        llm.kv.score()  # by the policy before
        llm.kv.replace_policy(policy)
        seen = len(noted.carried)
        llm.evict()
        assert llm.kv_stats.kept == 100
        if policy is noted:
            assert noted.carried[seen:] == [0]
        if not isinstance(policy, NotedNoise):  # which must know every row
            llm.recall()
            llm.eval(random_tokens(200, seed=20 + turn)[1:])
    assert np.isfinite(llm.kv.snapshot().scores).all()


def test_the_scores_of_the_policy_before_are_not_those_of_the_one_that_takes_over(
    random_model: Maker, load: Loader
) -> None:
    kept = []
    for first in (H2O(), KeyDiff()):
        llm = load(random_model(LLAMA).path, **BOUND, policy=first, granularity="head")
        assert llm.kv is not None
        llm.eval(random_tokens(256))
        llm.kv.score()  # of all that is held; nothing is read before the next eviction
        llm.kv.replace_policy(KeyDiff())
        llm.evict()
        kept.append(llm.kv_indices)
    np.testing.assert_array_equal(*kept)
