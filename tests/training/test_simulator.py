"""Simulated one-shot eviction against llama.cpp's, the numpy reference, and choosing by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from support.packages import needs

torch = needs("torch", "train")

from conftest import RandomModel, random_tokens  # noqa: E402
from kvp_edge.measuring import MeasuringLlama  # noqa: E402
from kvp_edge.policies import ArrayView  # noqa: E402
from kvp_edge.training.simulator import (  # noqa: E402
    equal_counts,
    layer_counts,
    ragged_counts,
    simulated_loss,
)
from kvp_edge.training.twin import Twin  # noqa: E402
from makers.gguf_models import ModelShape  # noqa: E402
from support.noise import Noise  # noqa: E402
from support.real_models import write_exact  # noqa: E402

Maker = Callable[[ModelShape], RandomModel]

SHAPE = ModelShape("qwen3", n_head=4, n_head_kv=2)
N, BORDER = 60, 40
TOKENS = random_tokens(N)


# -- the loss --------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [24, 100, 299, 300])
def test_with_equal_counts_the_loss_is_that_of_a_real_eviction(
    bundled_model: str, book: str, budget: int, tmp_path: Path
) -> None:
    border, f32 = 300, llama_cpp.GGML_TYPE_F32
    exact = str(write_exact(bundled_model, tmp_path / "exact.gguf"))
    engine: dict[str, Any] = {"type_k": f32, "type_v": f32, "n_threads": 1, "n_threads_batch": 1}
    subject = MeasuringLlama(
        exact, 512, 512, budget, policy=Noise(), recent=16, verbose=False, **engine
    )
    try:
        tokens = subject.tokenize(book[5000:9000].encode())[:400]
        subject.read(tokens[:border])
        subject.evict()
        held = np.broadcast_to(subject.kv_indices, (5, 2, min(budget, border)))
        real = subject.losses(tokens[border:]).mean()
    finally:
        subject.close()
    nothing: Any = np.empty((5, 2, border, 0))
    scores = Noise().score(ArrayView(nothing, nothing, np.arange(border)))
    at = np.arange(border)
    keep = equal_counts(scores, (at < 4) | (at >= border - 16), budget)
    assert (np.nonzero(keep)[2].reshape(held.shape) == held).all()
    twin = Twin.load(bundled_model)
    simulated = simulated_loss(twin, tokens, border, keep)
    assert simulated == pytest.approx(real, abs=1e-4)
    if budget == 24:
        full = simulated_loss(twin, tokens, border, np.ones_like(keep))
        assert abs(full - real) > 0.05  # or the comparison would say nothing


@pytest.mark.parametrize("budget", [2, 10, BORDER])
@pytest.mark.parametrize("counts", [equal_counts, layer_counts, ragged_counts])
def test_the_loss_is_the_references_when_heads_do_not_see_what_they_dropped(
    random_model: Maker, counts: Any, budget: int
) -> None:
    model = random_model(SHAPE)
    keep = counts(scores_of(0), protected_of(1, 1), budget)
    visible = np.ones((2, 2, N, N), bool)
    visible[:, :, BORDER:, :BORDER] = keep[:, :, None]
    logits = model.reference.logits(TOKENS, visible)[BORDER - 1 : -1].astype(np.float64)
    total = np.log(np.exp(logits).sum(-1))
    want = np.mean(total - logits[np.arange(N - BORDER), TOKENS[BORDER:]])
    got = simulated_loss(Twin.load(model.path), TOKENS, BORDER, keep)
    assert got == pytest.approx(want, rel=1e-5)


def test_a_head_may_keep_nothing(random_model: Maker) -> None:
    """A token always sees itself."""
    twin = Twin.load(random_model(SHAPE).path)
    nothing = np.zeros((2, 2, BORDER), bool)
    assert np.isfinite(simulated_loss(twin, TOKENS, BORDER, nothing))


@pytest.mark.parametrize("border", [1, N - 1])
def test_the_border_may_be_next_to_either_end(random_model: Maker, border: int) -> None:
    twin = Twin.load(random_model(SHAPE).path)
    assert np.isfinite(simulated_loss(twin, TOKENS, border, np.ones((2, 2, border), bool)))


@pytest.mark.parametrize("border", [0, N])
def test_a_border_outside_the_text_is_refused(random_model: Maker, border: int) -> None:
    twin = Twin.load(random_model(SHAPE).path)
    with pytest.raises(ValueError, match=f"from 1 to 59 in a text of 60, not {border}"):
        simulated_loss(twin, TOKENS, border, np.ones((2, 2, border), bool))


def test_keeping_in_another_model_s_heads_is_refused(random_model: Maker) -> None:
    twin = Twin.load(random_model(SHAPE).path)
    with pytest.raises(ValueError, match=r"the shape \(3, 2, 40\) instead of \(2, 2, 40\)"):
        simulated_loss(twin, TOKENS, BORDER, np.ones((3, 2, BORDER), bool))


# -- what is kept ----------------------------------------------------------------------------


def scores_of(seed: int) -> Any:
    return np.random.default_rng(seed).normal(size=(2, 2, BORDER)).astype(np.float32)


def protected_of(sinks: int, recent: int) -> Any:
    at = np.arange(BORDER)
    return (at < sinks) | (at >= BORDER - recent)


SCORES = arrays(
    np.float32,
    (2, 2, BORDER),
    elements=st.sampled_from([-np.inf, -2.0, -1.0, 0.0, 0.5, 3.0, np.inf, np.nan]),
)


@given(SCORES, st.integers(0, 4), st.integers(0, 9), st.integers(0, BORDER + 2))
def test_both_keep_as_many_and_all_that_is_protected(
    scores: Any, sinks: int, recent: int, budget: int
) -> None:
    protected = protected_of(sinks, recent)
    equal, ragged = (f(scores, protected, budget) for f in (equal_counts, ragged_counts))
    each = min(BORDER, max(budget, sinks + recent))
    assert (equal.sum(2) == each).all()
    assert ragged.sum() == 4 * each
    assert equal[:, :, protected].all()
    assert ragged[:, :, protected].all()


@given(SCORES, st.integers(0, 4), st.integers(0, 9), st.integers(0, BORDER + 2))
def test_nothing_that_competes_is_kept_before_anything_better(
    scores: Any, sinks: int, recent: int, budget: int
) -> None:
    competes = ~protected_of(sinks, recent)
    ranked = np.where(np.isfinite(scores), scores, -np.inf)[:, :, competes]
    equal = equal_counts(scores, ~competes, budget)[:, :, competes]
    ragged = ragged_counts(scores, ~competes, budget)[:, :, competes]
    worst = np.where(ragged, ranked, np.inf).min()
    assert (ranked[~ragged] <= worst).all()
    # within a head: by score, then by age
    newest = np.broadcast_to(np.arange(competes.sum()), ranked.shape)
    for keep in (equal, ragged):
        for head in np.ndindex(2, 2):
            order = np.lexsort((-newest[head], -ranked[head]))
            kept = keep[head][order]
            assert not (np.diff(kept.astype(int)) > 0).any()


def test_ragged_counts_follow_the_scores() -> None:
    """All that one head asks for, when its scores are above all others."""
    scores = scores_of(0)
    scores[1, 0] += 100
    keep = ragged_counts(scores, protected_of(1, 1), 12)
    assert keep[1, 0].all()
    assert keep.sum() == 48
    assert (keep.sum(2) >= 2).all()


def test_with_one_head_both_are_the_same() -> None:
    scores = scores_of(3)[:1, :1]
    for budget in (0, 7, BORDER):
        both = (f(scores, protected_of(2, 3), budget) for f in (equal_counts, ragged_counts))
        np.testing.assert_array_equal(*both)


def ada_kv(scores: Any, protected: Any, budget: int, floor: float) -> Any:
    """Ada-KV, token after token: bool [layer, head, n]."""
    n_layer, n_head_kv, n = scores.shape
    room = max(0, min(n, budget) - int(protected.sum()))
    keep = np.broadcast_to(protected, scores.shape).copy()

    def rank(layer: int, head: int, token: int) -> tuple[float, int]:
        score = float(scores[layer, head, token])
        return (score if np.isfinite(score) else -np.inf), token

    for layer in range(n_layer):
        free = [(h, t) for h in range(n_head_kv) for t in range(n) if not protected[t]]
        for head in range(n_head_kv):
            own = sorted((t for h, t in free if h == head), key=lambda t: rank(layer, head, t))
            for token in own[len(own) - min(len(own), int(floor * room)) :]:
                keep[layer, head, token] = True
        left = n_head_kv * room - int(keep[layer][:, ~protected].sum())
        rest = [(h, t) for h, t in free if not keep[layer, h, t]]
        # of equal scores the newer token, and of one token the first head
        rest.sort(key=lambda at: (*rank(layer, *at), -at[0]), reverse=True)
        for head, token in rest[:left]:
            keep[layer, head, token] = True
    return keep


@given(
    SCORES,
    st.integers(0, 4),
    st.integers(0, 9),
    st.integers(0, BORDER + 2),
    st.sampled_from([0.0, 0.2, 0.5, 1.0]),
)
def test_layer_counts_are_ada_kvs(
    scores: Any, sinks: int, recent: int, budget: int, floor: float
) -> None:
    protected = protected_of(sinks, recent)
    got = layer_counts(scores, protected, budget, floor)
    np.testing.assert_array_equal(got, ada_kv(scores, protected, budget, floor))
    each = min(BORDER, max(budget, sinks + recent))
    assert (got.sum(axis=(1, 2)) == 2 * each).all()
    if floor == 1:
        np.testing.assert_array_equal(got, equal_counts(scores, protected, budget))
    if floor == 0:
        for layer in range(2):
            alone = ragged_counts(scores[layer : layer + 1], protected, budget)
            np.testing.assert_array_equal(got[layer], alone[0])
