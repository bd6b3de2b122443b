"""Golden evictions against a play in plain loops, their imitation, and training by it."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.packages import needs

torch = needs("torch", "train")
needs("safetensors", "train")

from kvp_edge.errors import TrainingError  # noqa: E402
from kvp_edge.training import checkpoint  # noqa: E402
from kvp_edge.training.data import Protected, Sampler  # noqa: E402
from kvp_edge.training.foresight import GoldenEvictions, hinge_loss  # noqa: E402
from kvp_edge.training.train import Settings, train  # noqa: E402
from makers.synthetic_traces import SyntheticTrace, SyntheticTraces  # noqa: E402
from support.properties import examples  # noqa: E402


class Fickle(SyntheticTrace):
    """Every moment wants other tokens: what was dropped may be wanted later."""

    def importance(self, n: int) -> Any:
        return np.random.default_rng(n).random((*self.keys.shape[:2], n), np.float32)


#: 160 tokens, 2 layers x 2 heads, borders every 16 tokens.
TRACE = Fickle(**vars(SyntheticTraces(1)[0]))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def played(
    trace: SyntheticTrace, budget: int, every: int, sinks: int, recent: int
) -> list[tuple[int, list[set[int]]]]:
    """The tokens read before each eviction, and what each head holds then."""
    n_layer, n_head = trace.keys.shape[:2]
    heads = [(layer, head) for layer in range(n_layer) for head in range(n_head)]
    held: list[set[int]] = [set() for _ in heads]
    read, states = 0, []
    for border in trace.splits.tolist():
        in_cache = border - read + (budget if states else 0)
        if in_cache < budget + every:
            continue
        for tokens in held:
            tokens.update(range(read, border))
        states.append((border, [set(tokens) for tokens in held]))
        wanted = trace.importance(border)
        for (layer, head), tokens in zip(heads, held, strict=True):
            free = [t for t in tokens if sinks <= t < border - recent]
            free.sort(key=lambda t: (wanted[layer, head, t], t))
            tokens.difference_update(free[: len(tokens) - budget])
        read = border
    return states


@pytest.mark.parametrize(
    ("budget", "every", "sinks", "recent"),
    [
        (48, 16, 4, 16),
        (48, 20, 4, 16),  # rounded up to 32
        (40, 32, 0, 1),
        (33, 16, 16, 16),  # one token to choose
        (128, 16, 4, 32),  # one eviction, at the last border
    ],
)
def test_golden_evictions_are_those_of_a_play_in_loops(
    budget: int, every: int, sinks: int, recent: int
) -> None:
    golden = GoldenEvictions(budget, every, Protected(sinks, recent))
    want = played(TRACE, budget, every, sinks, recent)
    assert golden.times(TRACE) == [n for n, _ in want]
    for _ in range(2):  # played, and remembered
        got = golden.of(TRACE, 0)
        assert [n for n, _ in got] == [n for n, _ in want]
        for (_, held), (n, sets) in zip(got, want, strict=True):
            assert held.shape == (4, n)
            assert held.dtype == np.bool_
            assert [set(np.flatnonzero(row).tolist()) for row in held] == sets


def test_evictions_come_when_so_many_tokens_were_read_since() -> None:
    def times(budget: int, every: int) -> list[int]:
        return GoldenEvictions(budget, every, Protected(4, 16)).times(TRACE)

    assert times(64, 32) == [96, 128]  # and 160 is the end: nobody wants anything after it
    assert times(64, 33) == [112]
    assert times(112, 32) == [144]
    assert times(113, 32) == []
    assert times(63, 1) == [64, 80, 96, 112, 128, 144]


def test_a_trace_too_short_for_an_eviction_has_no_states() -> None:
    golden = GoldenEvictions(128, 32, Protected())
    assert golden.of(TRACE, 0) == []


def test_equal_tokens_go_oldest_first() -> None:
    trace = SyntheticTraces(1)[0]
    trace.paid[:] = 1.0
    (_, _), (_, held) = GoldenEvictions(64, 32, Protected(4, 16)).of(trace, 0)
    assert [np.flatnonzero(row).tolist() for row in held] == [[*range(4), *range(36, 128)]] * 4


@st.composite
def tales(draw: st.DrawFn) -> tuple[SyntheticTrace, int, int, int, int]:
    sinks, recent = draw(st.integers(0, 6)), draw(st.integers(0, 20))
    budget = sinks + recent + draw(st.integers(1, 40))
    every = draw(st.integers(1, 40))
    trace = SyntheticTraces(1, seed=draw(st.integers(0, 50)))[0]
    if draw(st.booleans()):  # many wanted alike
        trace.paid[:] = trace.paid.round(2)
    elif draw(st.booleans()):
        trace = Fickle(**vars(trace))
    return trace, budget, every, sinks, recent


@examples(40)
@given(tales())
def test_budgets_are_kept_and_what_is_dropped_is_never_wanted_more(
    tale: tuple[SyntheticTrace, int, int, int, int],
) -> None:
    trace, budget, every, sinks, recent = tale
    states = GoldenEvictions(budget, every, Protected(sinks, recent)).of(trace, 0)
    for (n, before), (later, after) in pairwise(states):
        assert later >= n + every
        assert after[:, n:].all()
        kept = after[:, :n]
        assert not (kept & ~before).any()
        assert (kept.sum(1) == budget).all()
        assert kept[:, :sinks].all()
        assert kept[:, n - recent :].all()
        wanted = trace.importance(n).reshape(len(before), n)
        competing = np.zeros(n, np.bool_)
        competing[sinks : n - recent] = True
        most = np.where(before & ~kept, wanted, -np.inf).max(1)
        least = np.where(kept & competing, wanted, np.inf).min(1)
        assert (most <= least).all()


# -- the loss ------------------------------------------------------------------------------------


def all_pairs(scores: Any, wanted: Any, present: Any, margin: float) -> float:
    """The mean over all pairs of tokens that are there and not wanted alike."""
    losses = []
    for i, j in combinations(np.flatnonzero(present).tolist(), 2):
        if wanted[i] != wanted[j]:
            more, less = (i, j) if wanted[i] > wanted[j] else (j, i)
            losses.append(max(0.0, margin - float(scores[more] - scores[less])))
    return float(np.mean(losses)) if losses else 0.0


def loss(scores: Any, wanted: Any, present: Any, margin: float = 0.5, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return hinge_loss(scores, wanted, present, margin, generator)


@pytest.mark.parametrize("m", [2, 3])
def test_of_few_tokens_it_is_the_mean_over_all_pairs(m: int) -> None:
    """Where every shift makes the same pairs."""
    generator = torch.Generator().manual_seed(m)
    scores, wanted = (torch.randn(4, 5, m, generator=generator) for _ in range(2))
    got = loss(scores, wanted, torch.ones(1, 5, m, dtype=torch.bool))
    assert got.shape == (4, 5)
    for head in range(4):
        for state in range(5):
            want = all_pairs(scores[head, state], wanted[head, state], np.ones(m), 0.5)
            assert float(got[head, state]) == pytest.approx(want, abs=1e-6)


def test_of_many_tokens_it_is_so_in_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, wanted = (torch.randn(40, generator=generator) for _ in range(2))
    there = torch.ones(40, dtype=torch.bool)
    drawn = torch.stack([loss(scores, wanted, there, seed=seed) for seed in range(400)])
    error = float(drawn.std()) / 20
    assert float(drawn.mean()) == pytest.approx(
        all_pairs(scores, wanted, there, 0.5), abs=4 * error
    )
    assert error < 0.02 * float(drawn.mean())  # or the comparison would say nothing


def test_scores_in_order_with_the_margin_between_them_cost_nothing() -> None:
    wanted = torch.tensor([0.3, 0.1, 0.7, 0.2])
    there = torch.ones(4, dtype=torch.bool)
    assert float(loss(torch.tensor([1.0, 0.0, 1.5, 0.5]), wanted, there)) == 0
    assert float(loss(torch.tensor([1.0, 0.0, 1.5, 0.5]), wanted, there, margin=0.6)) > 0
    assert float(loss(torch.tensor([0.5, 1.5, 0.0, 1.0]), wanted, there)) > 0.5


def test_tokens_that_are_not_there_or_are_wanted_alike_do_not_count() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(6, generator=generator).requires_grad_()
    wanted = torch.tensor([0.5, 0.5, 0.1, 9.0, 0.5, 0.1])
    there = torch.tensor([True, True, True, False, False, True])
    for seed in range(10):
        other = scores.detach().clone()
        other[3:5] = 100.0
        torch.testing.assert_close(
            loss(scores, wanted, there, seed=seed), loss(other, wanted, there, seed=seed)
        )
    torch.stack([loss(scores, wanted, there, seed=seed) for seed in range(10)]).sum().backward()
    assert scores.grad is not None
    assert (scores.grad[3:5] == 0).all()
    alike = loss(torch.randn(6), torch.ones(6), torch.ones(6, dtype=torch.bool))
    assert float(alike) == 0


@pytest.mark.parametrize("m", [1, 8])
def test_where_nothing_can_be_compared_there_is_no_loss(m: int) -> None:
    scores = torch.randn(2, m).requires_grad_()
    got = loss(scores, torch.rand(2, m), torch.zeros(1, m, dtype=torch.bool))
    assert (got == 0).all()
    got.sum().backward()
    assert scores.grad is not None
    assert (scores.grad == 0).all()


def test_the_gradient_lifts_what_is_wanted_and_lowers_what_is_not() -> None:
    scores = torch.zeros(5, requires_grad=True)
    wanted = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    loss(scores, wanted, torch.ones(5, dtype=torch.bool)).backward()
    assert scores.grad is not None
    assert scores.grad[0] < 0 < scores.grad[4]


# -- training ------------------------------------------------------------------------------------

QUICK: dict[str, Any] = {
    "objective": "foresight",
    "importance": "sum",
    "hidden": 16,
    "context": 1,
    "steps": 120,
    "token_steps": 20,
    "grpo_steps": 0,
    "lr": 1e-2,
    "warmup": 10,
    "states": 4,
    "tokens": 128,
    "eval_every": 60,
    "validation_states": 6,
    "budget": 64,
    "every": 16,
}
TINY: dict[str, Any] = {**QUICK, "steps": 8, "token_steps": 4, "eval_every": 4, "states": 2}


def weights(folder: Path) -> dict[str, Any]:
    return checkpoint.load(folder / checkpoint.BEST)[0]


def test_states_are_drawn_from_golden_evictions() -> None:
    traces, protected = SyntheticTraces(2), Protected(4, 16)
    golden = GoldenEvictions(48, 32, protected)
    sampler = Sampler(traces, [0, 1], protected, 1, 8, 192, states_of=golden)
    heads = np.array([0, 3])
    batch = sampler.draw(np.random.default_rng(0), heads)
    known = []
    for index, trace in enumerate(traces.items):
        for n, held in golden.of(trace, index):
            wanted = trace.importance(n).reshape(4, n)
            known.append((held[heads, 4 : n - 16], np.where(held, wanted, 0)[heads, 4 : n - 16]))
    for state in range(8):
        present, importance = (x[:, state].numpy() for x in (batch.present, batch.importance))
        m = int(np.flatnonzero(present.any(0)).max()) + 1
        assert (importance[:, m:] == 0).all()
        assert any(
            there.shape[1] == m
            and (there == present[:, :m]).all()
            and np.allclose(wanted, importance[:, :m])
            for there, wanted in known
        )


def test_a_policy_learns_the_order_of_golden_evictions(tmp_path: Path) -> None:
    result = train(SyntheticTraces(16), tmp_path, Settings(**QUICK), progress=False)
    for name in ("knorm", "keydiff", "recency", "random"):
        assert (result.quality.lost < 0.5 * result.baselines[name].lost).all(), name
        assert result.quality.token_lost < 0.8 * result.baselines[name].token_lost, name
    assert (result.quality.cost < 1.3).all()
    assert result.loss_increase is None  # there were no rollouts
    _, about = checkpoint.load(tmp_path / checkpoint.BEST)
    assert about.settings["objective"] == "foresight"
    assert not about.shape.shared_out


@pytest.mark.parametrize("stops", [(4, 8), (8,)])
def test_a_run_in_parts_ends_like_an_uninterrupted_one(
    tmp_path: Path, stops: tuple[int, ...]
) -> None:
    traces, how = SyntheticTraces(6), Settings(**{**TINY, "effort": 0.5})
    train(traces, tmp_path / "whole", how, progress=False)
    done = 0
    for stop in stops:
        train(traces, tmp_path / "parts", how, progress=False, stop_after=stop - done)
        done = stop
        _, about = checkpoint.load(tmp_path / "parts" / checkpoint.LAST)
        assert about.step == stop
        assert not (tmp_path / "parts" / "report.json").exists()
    train(traces, tmp_path / "parts", how, progress=False)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_traces_too_short_for_an_eviction_are_a_sentence(tmp_path: Path) -> None:
    how = {**TINY, "budget": 128, "every": 17}
    with pytest.raises(TrainingError, match="more than 145 are needed. Lower budget"):
        train(SyntheticTraces(4), tmp_path, Settings(**how), progress=False)


def test_a_budget_that_leaves_no_choice_is_refused() -> None:
    Settings(objective="foresight", budget=37)
    with pytest.raises(TrainingError, match="budget \\(36\\) must be larger than sinks"):
        Settings(objective="foresight", budget=36)
