"""The objective "regression": its loss, and heads whose tokens age."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.packages import needs

torch = needs("torch", "train")
needs("safetensors", "train")

from kvp_edge.export.convert import export  # noqa: E402
from kvp_edge.policies import ArrayView, get_policy  # noqa: E402
from kvp_edge.policies.ageing import YOUNG, faded  # noqa: E402
from kvp_edge.policy_file import read_policy  # noqa: E402
from kvp_edge.training import checkpoint  # noqa: E402
from kvp_edge.training.agent import Agents, AgentShape  # noqa: E402
from kvp_edge.training.regression import regression_loss  # noqa: E402
from kvp_edge.training.settings import Settings  # noqa: E402
from kvp_edge.training.train import train  # noqa: E402
from kvp_edge.training.validate import agent_scorer  # noqa: E402
from makers.synthetic_traces import SyntheticTraces  # noqa: E402

RNG = np.random.default_rng(0)


def loss(scores: Any, importance: Any, present: Any) -> Any:
    """In numpy and float64, token by token."""
    found = []
    for s, a in zip(scores[:, present].astype(float), importance[:, present], strict=True):
        wanted = np.log(a / a.mean() + 1e-2)
        wanted = (wanted - wanted.mean()) / wanted.std()
        away = np.abs(s - s.mean() - wanted)
        smooth = np.where(away < 1, away**2 / 2, away - 0.5).mean()
        share = a / a.sum()
        found.append(smooth - (share * (s - np.log(np.exp(s).sum()))).sum())
    return np.array(found)


def test_the_loss_is_that_of_the_logarithm_and_of_the_shares() -> None:
    scores = RNG.normal(size=(3, 20)).astype(np.float32)
    importance = RNG.exponential(size=(3, 20)).astype(np.float32)
    present = RNG.random(20) < 0.7
    got = regression_loss(*map(torch.from_numpy, (scores, importance * present, present)))
    np.testing.assert_allclose(got, loss(scores, importance, present), rtol=1e-4)


def test_absent_tokens_change_nothing_and_nobody_gives_nothing() -> None:
    scores = torch.randn(2, 6, requires_grad=True)
    present = torch.tensor([True, True, False, True, False, False])
    importance = torch.rand(2, 6) * present
    whole = regression_loss(scores, importance, present)
    np.testing.assert_allclose(
        whole.detach(),
        regression_loss(
            scores[:, [0, 1, 3]], importance[:, [0, 1, 3]], torch.ones(3, dtype=torch.bool)
        ).detach(),
        rtol=1e-5,
    )
    whole.sum().backward()
    assert (scores.grad[:, [2, 4, 5]] == 0).all()
    none = regression_loss(scores, torch.zeros(2, 6), torch.zeros(6, dtype=torch.bool))
    assert none.tolist() == [0, 0]


def test_the_best_scores_rank_by_importance() -> None:
    importance = torch.rand(1, 12)
    scores = torch.zeros(1, 12, requires_grad=True)
    descent = torch.optim.Adam([scores], 0.1)
    for _ in range(200):
        descent.zero_grad()
        regression_loss(scores, importance, torch.ones(12, dtype=torch.bool)).sum().backward()
        descent.step()
    assert scores.argsort().tolist() == importance.argsort().tolist()


def test_a_score_fades_by_its_head_s_rate_while_its_age_doubles() -> None:
    scores, rates = RNG.normal(size=(2, 1, 3)), np.array([[0.5], [0.0]])
    ages = np.array([1, YOUNG, 3 * YOUNG])
    got = faded(scores.astype(np.float32), ages, rates.astype(np.float32))
    doublings = np.log2([1 + 1 / YOUNG, 2, 4])
    np.testing.assert_allclose(got[0], scores[0] - 0.5 * doublings, rtol=1e-6)
    np.testing.assert_allclose(got[1], scores[1], rtol=1e-6)
    agents = Agents(AgentShape(2, 1, 4, 4, hidden=2, context=1, ageing=True))
    agents.age.data[:] = torch.from_numpy(rates)
    worth = agents.worth(torch.from_numpy(scores)[:, 0], torch.from_numpy(ages))
    np.testing.assert_allclose(worth.detach()[:, None], got, rtol=1e-5)


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_heads_learn_that_old_tokens_are_asked_for_less_and_their_policy_file_says_so(
    scope: Any, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    traces: Any = SyntheticTraces(8)
    settings = Settings(
        objective="regression", scope=scope, importance="sum", hidden=8, context=3, steps=60,
        warmup=5, eval_every=60, token_steps=0, lr=1e-2, recent=16,
    )  # fmt: skip
    train(traces, tmp_path / "run", settings, progress=False)
    agents, about = checkpoint.load_agents(tmp_path / "run")
    assert about.shape.ageing
    assert agents.age.shape == ((4, 1) if scope == "head" else (2, 2))
    made = export(tmp_path / "run", architecture="llama", outtype="f32", traces=traces)
    info, weights = read_policy(made.gguf)
    assert info.objective == "regression"
    assert weights.ageing is not None
    np.testing.assert_allclose(weights.ageing.ravel(), agents.age.detach().ravel(), rtol=1e-6)
    # what a chat ranks by is what training ranked by
    n, trace = 96, traces[0]
    keys, values = (rows[:, :, :n].astype(np.float32) for rows in (trace.keys, trace.values))
    policy = get_policy(str(made.gguf))
    scores = policy.score(ArrayView(keys, values, trace.indices[:n]))
    worth = policy.worth(scores, n - trace.indices[:n])
    np.testing.assert_allclose(
        worth.reshape(4, n), agent_scorer(agents)(trace, n), rtol=1e-4, atol=1e-4
    )


def test_a_run_without_ageing_writes_none(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    settings = Settings(
        objective="kvp", hidden=8, context=3, steps=2, warmup=1, token_steps=0, importance="sum",
        recent=16,
    )  # fmt: skip
    train(SyntheticTraces(3), tmp_path / "run", settings, progress=False)
    made = export(tmp_path / "run", architecture="llama", outtype="f32")
    assert read_policy(made.gguf)[1].ageing is None
