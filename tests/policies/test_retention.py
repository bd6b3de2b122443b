"""Geometric retention against the sum it stands for, and evictions by it in a running model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvp_edge.binding.model import read_model_shape
from kvp_edge.errors import PolicyFileError
from kvp_edge.policies import ArrayView, CacheView, Learned, get_policy
from kvp_edge.policies.learned import FromFile
from kvp_edge.policies.retention import BIAS, log_future_use, log_total
from kvp_edge.policy_file import PolicyInfo, read_policy, write_policy
from makers.policies import random_weights
from support.packages import needs
from support.policy_files import rewrite

GATES = PolicyInfo("llama", 2, 3, 32, 64, 16, 5, objective="global", horizon=200)
Numbers = NDArray[np.float64]


def direct(scores: Any, ages: Any, horizon: int) -> Numbers:
    """log of the mean of beta ** age, ..., beta ** (age + horizon - 1), term by term."""
    log_beta = -np.logaddexp(0.0, -(np.asarray(scores, np.float64) + BIAS))
    terms = np.asarray(ages)[..., None] + np.arange(horizon)
    out: Numbers = np.logaddexp.reduce(log_beta[..., None] * terms, axis=-1)
    return out - np.log(horizon)


# -- the formula ---------------------------------------------------------------------------------


@pytest.mark.parametrize("horizon", [1, 2, 37, 1024])
def test_future_use_is_the_mean_over_the_tokens_to_come(horizon: int) -> None:
    rng = np.random.default_rng(horizon)
    scores = rng.uniform(-20, 12, (2, 3, 50)).astype(np.float32)
    ages = rng.integers(1, 5000, 50).astype(np.int32)
    got = log_future_use(scores, ages, horizon)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, direct(scores, ages, horizon), rtol=1e-6, atol=1e-6)


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=8),
    st.integers(1, 10**6),
    st.integers(1, 4096),
)
def test_every_score_gives_a_number_in_the_order_of_the_scores(
    scores: list[float], age: int, horizon: int
) -> None:
    """Also where beta is 0 or 1 as far as floating point can tell."""
    ordered = np.sort(np.float32(scores))
    got = log_future_use(ordered, np.full(len(ordered), age, np.int32), horizon)
    assert np.isfinite(got).all()
    assert (np.diff(got) >= 0).all()
    assert got.max() <= 0


def test_a_token_that_stays_for_ever_is_worth_1_and_one_that_fades_at_once_nothing() -> None:
    ages = np.array([1, 1000], np.int32)
    for_ever = log_future_use(np.full(2, 1e4, np.float32), ages, 64)
    np.testing.assert_allclose(for_ever, 0, atol=1e-8)
    at_once = log_future_use(np.full(2, -1e4, np.float32), ages, 64)
    np.testing.assert_allclose(at_once, [-9994 - np.log(64), -9994 * 1000], rtol=1e-6)


def test_tokens_that_hardly_fade_are_still_told_apart() -> None:
    scores = np.arange(14, 20, dtype=np.float32)
    assert (np.diff(log_future_use(scores, np.ones(6, np.int32), 1024)) > 0).all()


def test_with_a_horizon_of_1_it_is_the_share_that_is_left() -> None:
    half = np.float32(-BIAS)  # of log beta = log(1 / 2)
    got = log_future_use(np.array([half, half]), np.array([1, 10], np.int32), 1)
    np.testing.assert_allclose(got, [np.log(0.5), 10 * np.log(0.5)], rtol=1e-6)


def test_a_whole_token_is_worth_the_sum_over_its_heads() -> None:
    worth = np.random.default_rng(0).uniform(-30, 3, (2, 3, 20)).astype(np.float32)
    want = np.log(np.exp(worth.astype(np.float64)).sum(axis=(0, 1)))
    np.testing.assert_allclose(log_total(worth), want, rtol=1e-5)
    faded = np.full((2, 3, 1), -1e6, np.float32)  # exp would be 0, its log no number
    np.testing.assert_allclose(log_total(faded), -1e6 + np.log(6))


# -- policies ------------------------------------------------------------------------------------


class Given(FromFile):
    """Gates whose scores do not matter here."""

    info = replace(GATES, horizon=1000)

    def score(self, view: CacheView) -> Any:
        raise NotImplementedError


def test_a_young_token_that_fades_falls_behind_an_old_one_that_lasts() -> None:
    policy = Given()
    fast, slow = (-np.log(1 / beta - 1) - BIAS for beta in (0.9, 0.99))
    scores = np.array([[[slow, fast]]], np.float32)
    now, later = (policy.worth(scores, np.int32([500 + t, 1 + t]))[0, 0] for t in (0, 60))
    assert now[1] > now[0]
    assert later[0] > later[1]
    as_they_are = Given()
    as_they_are.info = replace(GATES, objective="kvp")
    np.testing.assert_array_equal(as_they_are.worth(scores, np.int32([500, 1])), scores)


def model_gates(model: str, **changed: Any) -> PolicyInfo:
    shape = read_model_shape(model)
    sizes = (shape.n_layer, shape.n_head_kv[0], shape.head_size_k, shape.head_size_v)
    info = PolicyInfo(shape.architecture, *sizes, hidden=8, context=1, objective="global")
    return replace(info, **changed)


class Recorded(Learned):
    """Remembers the raw score of every token; with context 1 each is scored once."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, native=False)
        self.raw: dict[int, NDArray[np.float32]] = {}

    def score(self, view: CacheView) -> Any:
        scores, positions = super().score(view), view.indices
        assert not self.raw.keys() & set(positions.tolist())
        self.raw.update(zip(positions.tolist(), np.moveaxis(scores, -1, 0), strict=True))
        return scores


@pytest.mark.parametrize("horizon", [1, 300])
@pytest.mark.parametrize("granularity", ["token", "head"])
def test_an_eviction_keeps_what_will_be_used_most(
    bundled_model: str,
    book: str,
    tmp_path: Path,
    load: Callable[..., Any],
    granularity: str,
    horizon: int,
) -> None:
    info = model_gates(bundled_model, horizon=horizon)
    weights = random_weights(info)
    weights.out[:] *= 0.7  # so that some gates forget within tokens and others hardly ever
    write_policy(tmp_path / "gates.gguf", info, weights, "f32")
    policy = Recorded(tmp_path / "gates.gguf")
    budget, sinks, recent, states = 64, 4, 16, []
    llm = load(
        bundled_model,
        policy=policy,
        granularity=granularity,
        n_ctx=2048,
        kv_budget=budget,
        sinks=sinks,
        recent=recent,
        reserve=64,
        n_batch=32,
        on_evict=lambda event: states.append((event.seen, llm.kv.indices)),
    )
    llm.eval(llm.tokenize(book[:6000].encode())[:900])
    assert len(states) > 3
    heads = (info.n_layer, info.n_head_kv)
    before, done = np.empty((*heads, 0), np.int32), 0
    for seen, tokens in states:
        new = np.broadcast_to(np.arange(done, seen, dtype=np.int32), (*heads, seen - done))
        held = np.concatenate((before, new), axis=-1)
        raw = np.stack([policy.raw[t] for t in range(seen)], axis=-1)
        scores = np.take_along_axis(raw, held, axis=-1)
        worth = direct(scores, seen - held, horizon)
        if granularity == "token":
            worth = np.broadcast_to(np.logaddexp.reduce(worth, axis=(0, 1)), worth.shape)
        kept = np.broadcast_to(tokens, (*heads, budget))
        stays = (held[..., None] == kept[..., None, :]).any(-1)
        assert (stays.sum(-1) == budget).all()
        protected = (held < sinks) | (held >= seen - recent)
        assert stays[protected].all()
        assert_ranked(worth, stays, protected)
        with pytest.raises(AssertionError):  # or age would not have been seen to matter
            assert_ranked(scores, stays, protected)
        before, done = kept, seen


def assert_ranked(worth: Numbers, stays: NDArray[np.bool_], protected: NDArray[np.bool_]) -> None:
    """In every head what is dropped is worth no more than what stays; f32 knows it to 1e-6."""
    most = np.where(stays, -np.inf, worth).max(-1)
    least = np.where(stays & ~protected, worth, np.inf).min(-1)
    assert (most <= least + 1e-6 * np.abs(least)).all()


# -- the file ------------------------------------------------------------------------------------


@pytest.fixture
def gates_file(tmp_path: Path) -> Path:
    write_policy(tmp_path / "gates.gguf", GATES, random_weights(GATES), "f32")
    return tmp_path / "gates.gguf"


def test_objective_and_horizon_come_back(gates_file: Path) -> None:
    assert read_policy(gates_file)[0] == GATES


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kvp__objective": "magic"}, "'magic', but this kvp_edge knows kvp, foresight, global"),
        ({"drop": "kvp.objective"}, "lacks the key kvp.objective"),
        ({"drop": "kvp.retention.horizon"}, "lacks the key kvp.retention.horizon"),
        ({"kvp__retention__horizon": 0}, "kvp.retention.horizon 0; it must be at least"),
    ],
)
def test_a_file_that_does_not_say_what_its_scores_mean_is_refused(
    gates_file: Path, tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(PolicyFileError, match=sentence):
        read_policy(rewrite(gates_file, tmp_path / "changed.gguf", **change))


def test_only_gates_need_a_horizon(tmp_path: Path) -> None:
    info = replace(GATES, objective="foresight", horizon=PolicyInfo.horizon)
    write_policy(tmp_path / "p.gguf", info, random_weights(info), "f32")
    assert read_policy(tmp_path / "p.gguf")[0] == info


def test_onnx_says_the_same_of_tokens(gates_file: Path, tmp_path: Path) -> None:
    needs("torch", "train")
    needs("onnxruntime", "onnx")
    needs("onnx", "onnx")
    from kvp_edge.export.onnx_graph import write_onnx

    write_onnx(tmp_path / "gates.onnx", *read_policy(gates_file))
    rng = np.random.default_rng(0)
    keys, values = (rng.normal(size=(2, 3, 80, size)).astype(np.float32) for size in (32, 64))
    positions = np.r_[0:30, 33:50, 100:133].astype(np.int32)
    ages = 140 - positions
    said = []
    for name in ("gates.gguf", "gates.onnx"):
        policy = get_policy(str(tmp_path / name))
        assert policy.info == GATES
        worth = policy.worth(policy.score(ArrayView(keys, values, positions)), ages)
        said.append((worth, policy.whole_tokens(worth)))
    np.testing.assert_allclose(said[0][0], said[1][0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(said[0][1], said[1][1], rtol=1e-4, atol=1e-4)
