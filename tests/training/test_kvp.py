"""The KVP objective against enumeration, direct summation and closed forms."""

from __future__ import annotations

from itertools import permutations

import pytest

from support.packages import needs

torch = needs("torch", "train")

from kvp_edge.training import kvp  # noqa: E402


def brute_force(scores: torch.Tensor, ranking: tuple[int, ...]) -> float:
    """Plackett-Luce as it is defined: choose one after the other from what is left."""
    weight = scores.double().exp()
    probability = 1.0
    for i, chosen in enumerate(ranking):
        probability *= float(weight[chosen] / weight[list(ranking[i:])].sum())
    return probability


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
def test_log_probabilities_are_plackett_luce_s(n: int) -> None:
    scores = torch.randn(n, generator=torch.Generator().manual_seed(n)) * 2
    rankings = list(permutations(range(n)))
    got = kvp.log_probabilities(scores, torch.tensor(rankings)).sum(-1)
    want = torch.tensor([brute_force(scores, ranking) for ranking in rankings])
    torch.testing.assert_close(got.exp(), want, rtol=1e-5, atol=1e-7)
    assert float(got.exp().sum()) == pytest.approx(1, abs=1e-5)


def test_rankings_are_drawn_with_their_probabilities() -> None:
    scores = torch.tensor([0.5, -1.0, 1.5])
    draws = kvp.sample_rankings(scores, 40_000, torch.Generator().manual_seed(0))
    for ranking in permutations(range(3)):
        share = float((draws == torch.tensor(ranking)).all(-1).float().mean())
        assert share == pytest.approx(brute_force(scores, ranking), abs=0.01)


@pytest.mark.parametrize("kind", ["i-1", "i"])
def test_the_cost_is_the_loss_summed_over_all_budgets(kind: kvp.RankWeights) -> None:
    generator = torch.Generator().manual_seed(3)
    importance = torch.rand(3, 7, generator=generator)
    rankings = kvp.sample_rankings(torch.zeros(3, 7), 5, generator)
    got = kvp.cost(importance, rankings, kind)
    for state in range(3):
        for k in range(5):
            order = importance[state][rankings[state, k]]
            budgets = range(1 if kind == "i-1" else 0, 7)
            want = sum(float(order[b:].sum()) for b in budgets)
            assert float(got[state, k]) == pytest.approx(want, rel=1e-5)


def test_the_best_ranking_has_the_reward_minus_one_and_others_less() -> None:
    importance = torch.rand(4, 9, generator=torch.Generator().manual_seed(1))
    best = importance.argsort(-1, descending=True).unsqueeze(-2)
    torch.testing.assert_close(kvp.reward(importance, best), -torch.ones(4, 1))
    assert (kvp.reward(importance, best.flip(-1)) < -1.2).all()


def test_a_state_nobody_attends_to_gives_a_finite_reward() -> None:
    nothing = torch.zeros(1, 4)
    rankings = kvp.sample_rankings(nothing, 3)
    assert torch.isfinite(kvp.reward(nothing, rankings)).all()


def test_padding_is_ranked_last_and_counts_for_nothing() -> None:
    scores = torch.randn(5, generator=torch.Generator().manual_seed(2))
    importance = torch.rand(5, generator=torch.Generator().manual_seed(4))
    padded = torch.cat((scores, torch.full((3,), kvp.PADDING))).requires_grad_()
    with_zeros = torch.cat((importance, torch.zeros(3)))
    rankings = kvp.sample_rankings(padded, 20, torch.Generator().manual_seed(5))
    assert (rankings[:, :5] < 5).all()
    torch.testing.assert_close(
        kvp.log_probabilities(padded, rankings).sum(-1),
        kvp.log_probabilities(scores, rankings[:, :5]).sum(-1),
    )
    torch.testing.assert_close(
        kvp.reward(with_zeros, rankings), kvp.reward(importance, rankings[:, :5])
    )
    kvp.surrogate_loss(padded, with_zeros, 4).backward()
    assert padded.grad is not None
    assert torch.isfinite(padded.grad).all()
    assert (padded.grad[5:] == 0).all()


def test_the_gradient_estimator_is_unbiased() -> None:
    """Against the exact gradient of the expected reward, over all 24 rankings of 4 tokens."""
    scores = torch.tensor([0.3, -0.5, 0.8, 0.0], requires_grad=True)
    importance = torch.tensor([0.1, 0.6, 0.2, 0.4])
    rankings = torch.tensor(list(permutations(range(4))))
    probability = kvp.log_probabilities(scores, rankings).sum(-1).exp()
    expected = (probability * kvp.reward(importance, rankings)).sum()
    (exact,) = torch.autograd.grad(expected, scores)

    many = scores.detach().expand(20_000, 4).clone().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    loss = kvp.surrogate_loss(
        many, importance.expand(20_000, 4), 4, advantage="loo", generator=generator
    )
    (each,) = torch.autograd.grad(loss.sum() * 4, many)  # the loss is per token, of which 4
    error = each.std(0) / len(each) ** 0.5
    assert ((-each.mean(0) - exact).abs() < 4 * error).all()
    assert (error < 0.2 * exact.abs().max()).all()  # or the comparison would say nothing


def test_the_loo_advantage_subtracts_the_mean_of_the_others() -> None:
    rewards = torch.tensor([-1.0, -2.0, -4.0])
    want = torch.tensor([-1.0 + 3.0, -2.0 + 2.5, -4.0 + 1.5])
    torch.testing.assert_close(kvp.advantages(rewards, "loo"), want)
    assert float(kvp.advantages(torch.full((3,), -2.0)).abs().max()) == 0
