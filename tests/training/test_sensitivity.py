"""What each head's memory is worth: against passes whose masks are made by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from support.packages import needs

torch = needs("torch", "train")

from conftest import RandomModel, random_tokens  # noqa: E402
from kvp_edge.training.sensitivity import Eviction, Sensitivity, head_sensitivity  # noqa: E402
from kvp_edge.training.twin import Twin  # noqa: E402
from makers.gguf_models import ModelShape  # noqa: E402

Maker = Callable[[ModelShape], RandomModel]

SHAPE = ModelShape("qwen3", n_head=4, n_head_kv=2)
TOKENS = random_tokens(60)
EVICTION = Eviction(sinks=2, recent=5)


def reference_loss(model: RandomModel, head: tuple[int, int] | None) -> float:
    """Of the numpy reference, when one head sees only the first 2 and newest 5 of 30 tokens."""
    visible = np.ones((2, 2, 60, 60), bool)
    if head is not None:
        visible[head][30:, 2:25] = False
    logits = model.reference.logits(TOKENS, visible)[29:-1].astype(np.float64)
    total = np.log(np.exp(logits).sum(-1))
    return float(np.mean(total - logits[np.arange(30), TOKENS[30:]]))


def test_exact_rises_are_those_of_a_pass_with_one_head_masked(random_model: Maker) -> None:
    model = random_model(SHAPE)
    full = reference_loss(model, None)
    want = [[reference_loss(model, (il, h)) - full for h in range(2)] for il in range(2)]
    got = head_sensitivity(Twin.load(model.path), [TOKENS], EVICTION, exact=True)
    np.testing.assert_allclose(got.rise, want, atol=1e-5)
    assert np.abs(want).min() > 1e-3


def test_the_estimate_is_the_slope_of_the_loss_as_a_head_s_output_changes(
    random_model: Maker,
) -> None:
    """Against the quotient of a small step, one head at a time."""
    twin = Twin.load(random_model(SHAPE).path).double()
    keep = torch.ones(60, 60, dtype=torch.bool)
    keep[30:, 2:25] = False
    hidden = torch.zeros(60, 60).masked_fill(~keep, -torch.inf).double()

    def loss(share: Any) -> Any:
        with torch.no_grad():
            ids = torch.tensor([TOKENS])
            logits = twin(ids, lambda *_: hidden, share)[0, 29:-1]
            return torch.nn.functional.cross_entropy(logits, ids[0, 30:])

    got = head_sensitivity(Twin.load(random_model(SHAPE).path), [TOKENS], EVICTION).rise
    for head in np.ndindex(2, 2):
        step = torch.zeros(2, 2, dtype=torch.float64)
        step[head] = 1e-4
        assert got[head] == pytest.approx(float(loss(step) - loss(-step)) / 2e-4, rel=1e-2)


@pytest.mark.parametrize("exact", [False, True])
def test_a_head_whose_output_goes_nowhere_carries_nothing(random_model: Maker, exact: bool) -> None:
    twin = Twin.load(random_model(SHAPE).path)
    columns = 2 * SHAPE.head_dim  # of the two query heads of a KV head
    twin.layers[1].attn_output.weight[:, columns:] = 0
    got = head_sensitivity(twin, [TOKENS], EVICTION, exact=exact)
    assert got.rise[1, 1] == 0
    assert (np.delete(got.rise.ravel(), 3) != 0).all()
    assert got.weights[1, 1] == 0
    assert got.weights.mean() == pytest.approx(1)


@pytest.mark.parametrize("exact", [False, True])
def test_a_head_that_drops_nothing_loses_nothing(random_model: Maker, exact: bool) -> None:
    twin = Twin.load(random_model(SHAPE).path)
    for eviction in (Eviction(2, 28), Eviction(2, 100), Eviction(share=1.0)):
        got = head_sensitivity(twin, [TOKENS], eviction, exact=exact)
        np.testing.assert_allclose(got.rise, 0, atol=1e-6)


def test_texts_are_averaged_and_progress_ends_at_all(random_model: Maker) -> None:
    twin = Twin.load(random_model(SHAPE).path)
    texts = [TOKENS, TOKENS[::-1][:41]]
    told: list[tuple[int, int]] = []
    for exact, steps in ((False, 1), (True, 5)):
        told.clear()
        both = head_sensitivity(
            twin, texts, EVICTION, exact=exact, progress=lambda *at: told.append(at)
        )
        each = [head_sensitivity(twin, [t], EVICTION, exact=exact).rise for t in texts]
        np.testing.assert_allclose(both.rise, np.mean(each, 0), rtol=1e-6)
        assert told == [(i + 1, 2 * steps) for i in range(2 * steps)]


@pytest.mark.parametrize("texts", [[], [[1, 2, 3], [1]]])
def test_nothing_to_measure_on_is_refused(random_model: Maker, texts: Any) -> None:
    twin = Twin.load(random_model(SHAPE).path)
    with pytest.raises(ValueError, match="at least one text is needed"):
        head_sensitivity(twin, texts)


def test_a_text_of_two_tokens_is_enough(random_model: Maker) -> None:
    got = head_sensitivity(Twin.load(random_model(SHAPE).path), [[7, 8]])
    assert (got.rise == 0).all()
    assert (got.weights == 1).all()


def test_what_stays_is_protected_or_evenly_spaced() -> None:
    assert Eviction(2, 3).kept(8).tolist() == [True] * 2 + [False] * 3 + [True] * 3
    assert Eviction(2, 3).kept(5).all()
    assert Eviction(2, 3).kept(1).all()
    assert Eviction(0, 0, 0.25).kept(8).nonzero()[0].tolist() == [3, 7]
    assert not Eviction(0, 0).kept(8).any()
    for bad, sentence in (
        ((-1, 0, 0.0), "sinks must be at least 0, not -1"),
        ((0, -1, 0.0), "recent must be at least 0, not -1"),
        ((0, 0, 1.5), "share must be from 0 to 1, not 1.5"),
        ((0, 0, np.nan), "share must be from 0 to 1, not nan"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Eviction(*bad)


def test_weights_are_shares_of_what_is_carried() -> None:
    got = Sensitivity(np.array([[3.0, 1.0], [-2.0, 0.0]]))
    assert got.weights.tolist() == [[3, 1], [0, 0]]
    assert got.heads_with_half() == 1
    assert Sensitivity(np.ones((2, 2))).heads_with_half() == 2
    nothing = Sensitivity(np.array([[0.0, -1.0]]))
    assert nothing.weights.tolist() == [[1, 1]]
