"""Draws of evictions and what is learned from them, against enumeration and closed forms."""

from __future__ import annotations

from itertools import permutations

import pytest

from support.packages import needs

torch = needs("torch", "train")

from kvp_edge.training.grpo import (  # noqa: E402
    advantages,
    draw,
    grpo_loss,
    log_probabilities,
)

T = 0.5  # temperature


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_by_one(scores: torch.Tensor, drawn: tuple[int, ...]) -> list[float]:
    """Each draw's probability as it is defined: softmax(-score / T) over what is left."""
    weight = (-scores.double() / T).exp()
    left = set(range(len(scores)))
    found = []
    for token in drawn:
        found.append(float(weight[token] / weight[sorted(left)].sum()))
        left.remove(token)
    return found


# -- draws ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_drop", [1, 2, 3, 5])
def test_probabilities_are_those_of_draws_without_replacement(n_drop: int) -> None:
    scores = torch.randn(5, generator=seeded(n_drop))
    drawn = list(permutations(range(5), n_drop))
    got = log_probabilities(scores.expand(len(drawn), -1), torch.tensor(drawn), T)
    want = torch.tensor([one_by_one(scores, each) for each in drawn])
    torch.testing.assert_close(got.exp(), want, rtol=1e-5, atol=1e-7)
    assert float(got.sum(-1).exp().sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("spread", [1.0, 1e3])
def test_drawing_all_candidates_has_probability_1_in_the_end_and_finite_gradients(
    spread: float,
) -> None:
    scores = (spread * torch.randn(3, 4, generator=seeded(0))).requires_grad_()
    drawn = torch.rand(3, 4, generator=seeded(1)).argsort(-1)
    got = log_probabilities(scores, drawn, T)
    assert (got[:, -1].abs() < 1e-6 * spread).all()  # one is left, and it is drawn
    got.sum().backward()
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()


def test_the_gradient_is_that_of_the_definition() -> None:
    scores = torch.randn(6, generator=seeded(2), dtype=torch.float64).requires_grad_()
    drawn = torch.tensor([4, 0, 3])
    (got,) = torch.autograd.grad(log_probabilities(scores, drawn, T).sum(), scores)
    logits = -scores / T
    left = torch.ones(6, dtype=torch.bool)
    want = torch.zeros(())
    for token in drawn.tolist():
        want = want + logits[token] - logits[left.clone()].logsumexp(0)
        left[token] = False
    (exact,) = torch.autograd.grad(want, scores)
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-6)


def test_sets_are_drawn_with_their_probabilities() -> None:
    scores = torch.tensor([0.5, -0.3, 0.9, 0.1])
    many = scores.expand(40_000, 4)
    candidates, drawn = draw(many, 2, T, seeded(0))
    tokens = candidates.gather(-1, drawn)
    for pair in permutations(range(4), 2):
        share = float((tokens == torch.tensor(pair)).all(-1).float().mean())
        first, second = one_by_one(scores, pair)
        assert share == pytest.approx(first * second, abs=0.01)


def test_candidates_are_the_twice_as_many_that_score_lowest() -> None:
    scores = torch.randn(7, 50, generator=seeded(3))
    candidates, drawn = draw(scores, 6, T, seeded(4))
    lowest = scores.argsort(-1)[:, :12]
    torch.testing.assert_close(candidates.sort(-1).values, lowest.sort(-1).values)
    assert drawn.shape == (7, 6)
    assert all(len(set(row)) == 6 and max(row) < 12 for row in drawn.tolist())


@pytest.mark.parametrize(("m", "n_drop"), [(5, 5), (5, 4), (1, 1)])
def test_where_fewer_compete_all_are_candidates(m: int, n_drop: int) -> None:
    scores = torch.randn(3, m, generator=seeded(5))
    candidates, drawn = draw(scores, n_drop, T, seeded(6))
    assert candidates.sort(-1).values.tolist() == [list(range(m))] * 3
    assert all(len(set(row)) == n_drop for row in drawn.tolist())
    assert torch.isfinite(log_probabilities(scores.gather(-1, candidates), drawn, T)).all()


def test_at_a_low_temperature_the_lowest_scores_are_dropped_in_order() -> None:
    scores = torch.linspace(1, 0, 20).expand(4, 20)
    candidates, drawn = draw(scores, 3, 1e-4, seeded(7))
    assert candidates.gather(-1, drawn).tolist() == [[19, 18, 17]] * 4


# -- what is learned from them -------------------------------------------------------------------


def test_advantages_compare_the_rollouts_of_a_text() -> None:
    returns = -torch.rand(8, 5, generator=seeded(8)) * 30
    got = advantages(returns)
    want = (returns - returns.mean(0)) / returns.std(0)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert (got.mean(0).abs() < 1e-6).all()
    assert got.dtype == torch.float32


@pytest.mark.parametrize("n_rollouts", [2, 3, 7, 8])
def test_rollouts_that_did_equally_well_teach_nothing(n_rollouts: int) -> None:
    returns = -200 * torch.rand(64, generator=seeded(9))
    returns[0] = 0
    assert (advantages(returns.expand(n_rollouts, -1)).abs() < 1e-3).all()


def test_at_the_start_the_gradient_is_that_of_advantage_times_log_probability() -> None:
    old = -torch.rand(3, 4, 2, generator=seeded(10))
    gain = torch.tensor([1.5, -0.5, 0.0, 2.0])
    new = old.clone().requires_grad_()
    loss = grpo_loss(new, old, old, gain, 0.2, 0.05)
    assert loss.shape == (3,)
    (got,) = torch.autograd.grad(loss.sum(), new)
    torch.testing.assert_close(got, (-gain[:, None] / 8).expand(3, 4, 2))


@pytest.mark.parametrize(
    ("ratio", "gain", "moves"),
    [
        (1.19, 1.0, True),
        (1.21, 1.0, False),  # far enough up
        (0.5, 1.0, True),  # the wrong way: back
        (0.81, -1.0, True),
        (0.79, -1.0, False),  # far enough down
        (2.0, -1.0, True),  # the wrong way: back
    ],
)
def test_clipping_holds_a_draw_only_where_it_has_moved_far_enough(
    ratio: float, gain: float, moves: bool
) -> None:
    new = torch.tensor([[[ratio]]]).log().requires_grad_()
    old = torch.zeros(1, 1, 1)
    loss = grpo_loss(new, old, old, torch.tensor([gain]), 0.2, 0.0)
    (got,) = torch.autograd.grad(loss.sum(), new)
    assert float(got) == pytest.approx(-gain * ratio if moves else 0.0)


def test_the_distance_to_the_start_is_0_there_and_never_negative() -> None:
    start = -3 * torch.rand(2, 3, 4, generator=seeded(11))
    nothing = torch.zeros(3)
    assert (grpo_loss(start, start, start, nothing, 0.2, 1.0) == 0).all()
    for seed in range(20):
        new = start + 0.5 * torch.randn(2, 3, 4, generator=seeded(seed))
        assert (grpo_loss(new, new, start, nothing, 0.2, 1.0) > 0).all()
    (pull,) = torch.autograd.grad(
        grpo_loss(moved := (start + 1).requires_grad_(), start, start, nothing, 0.2, 1.0).sum(),
        moved,
    )
    assert (pull > 0).all()  # descending leads back


def test_the_distance_is_the_kl_divergence_in_the_mean() -> None:
    """Over all draws of one distribution: E[exp(back) - back - 1] = KL(new || start)."""
    p, q = (torch.randn(6, generator=seeded(s)).log_softmax(0) for s in (12, 13))
    each = torch.stack([grpo_loss(a, a, b, torch.zeros(1), 0.2, 1.0) for a, b in zip(
        p.view(6, 1, 1, 1), q.view(6, 1, 1, 1), strict=True)])[:, 0]  # fmt: skip
    torch.testing.assert_close((p.exp() * each).sum(), (p.exp() * (p - q)).sum())
