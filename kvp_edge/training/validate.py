"""The quality of rankings on held-out states, per head, compared with the heuristics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvp_edge.policies import POLICIES, ArrayView
from kvp_edge.training.agent import Agents
from kvp_edge.training.data import (
    Protected,
    TraceLike,
    TraceSetLike,
    cut_points,
    gather,
    importance_of,
)

FloatArray = npt.NDArray[np.float64]

#: Shares of the competing tokens kept, at which a head's loss is measured.
BUDGETS = (1 / 2, 1 / 4, 1 / 8, 1 / 16)

_WORST = 200.0
_ELEMENTS = 2**24  # features in memory at once while a state is scored

#: Scores of the first n tokens of a trace: f32 [N, n] for N = layers x KV heads.
Scorer = Callable[[TraceLike, int], npt.NDArray[np.float32]]

#: Combines the heads' scores into one for whole tokens: f32 [m] from f32 [N, m].
Whole = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Quality:
    """The quality of one scorer with N heads; means over states.

    Attributes:
        cost: f64 [N], all budgets, relative to the oracle's (the paper's measure; 1 is best).
        lost: f64 [N], share of a later query's attention lost beyond what the oracle loses, mean
            over BUDGETS; also near 0 if there is nothing to lose.
        token_cost, token_lost: the same for whole tokens, ranked by all heads together.
    """

    cost: FloatArray
    lost: FloatArray
    token_cost: float
    token_lost: float


@dataclass(frozen=True)
class State:
    """A trace cut after n tokens."""

    trace: int
    n: int


def choose_states(
    traces: TraceSetLike, usable: list[int], protected: Protected, count: int
) -> list[State]:
    """Up to ``count`` states, the same at every call: cuts at 1/2, 3/4, 1/4 and the end of each
    trace's range, one trace after the other."""
    states: list[State] = []
    for share in (0.5, 0.75, 0.25, 1.0):
        for index in usable:
            cuts = cut_points(traces[index], protected)
            states.append(State(index, int(cuts[min(len(cuts) - 1, int(share * len(cuts)))])))
    return list(dict.fromkeys(states))[:count]


def measure(
    scorer: Scorer,
    traces: TraceSetLike,
    states: list[State],
    protected: Protected,
    whole: Whole | None = None,
) -> Quality:
    """Rank every state's competing tokens by ``scorer`` and measure the loss.

    Args:
        whole: scores of whole tokens; None: the mean of the heads' standardised scores.
    """
    rows: list[tuple[FloatArray, FloatArray]] = []
    token_rows: list[tuple[FloatArray, FloatArray]] = []
    for state in states:
        trace = traces[state.trace]
        first, end = protected.competing(state.n)
        scores = scorer(trace, state.n)[:, first:end]
        received = importance_of(trace, state.n, np.arange(len(scores)), state.trace)[:, first:end]
        queries = trace.keys.shape[2] - state.n
        rows.append(costs(scores, received, queries))
        together = (whole or standardised)(scores)
        token_rows.append(costs(together[None], received.mean(0)[None], queries))
    cost, lost = (np.mean(column, axis=0) for column in zip(*rows, strict=True))
    token_cost, token_lost = (float(np.mean(column)) for column in zip(*token_rows, strict=True))
    return Quality(cost, lost, token_cost, token_lost)


def standardised(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Mean of the heads' standardised scores (see ``Whole``)."""
    centred = scores - scores.mean(1, keepdims=True)
    spread = np.maximum(scores.std(1, keepdims=True), 1e-12)
    together: npt.NDArray[np.float32] = (centred / spread).mean(0)
    return together


def weighted(weights: npt.NDArray[np.floating[Any]]) -> Whole:
    """Sum of the heads' scores with these weights, f32 [N]."""
    return lambda scores: weights.astype(np.float32) @ scores


def costs(
    scores: npt.NDArray[np.float32], importance: npt.NDArray[np.float32], queries: int
) -> tuple[FloatArray, FloatArray]:
    """Relative cost and excess attention lost of ranking by descending score: f64 [N] each.

    Args:
        scores, importance: [N, m].
        queries: number of later queries in the importance.
    """
    m = scores.shape[1]
    ranked = np.take_along_axis(importance, np.argsort(-scores, axis=1, kind="stable"), axis=1)
    best = -np.sort(-importance, axis=1)
    weights = np.arange(m, dtype=np.float64)
    relative = np.minimum((ranked @ weights) / np.maximum(best @ weights, 1e-8), _WORST)
    kept = [max(1, round(share * m)) for share in BUDGETS]
    lost = np.mean([(best[:, :b] - ranked[:, :b]).sum(1) for b in kept], axis=0) / queries
    return relative, lost.astype(np.float64)


def agent_scorer(agents: Agents) -> Scorer:
    """The agents' own scores, without noise."""

    def score(trace: TraceLike, n: int) -> npt.NDArray[np.float32]:
        shape, device = agents.shape, agents.mean.device
        group = max(1, _ELEMENTS // (n * shape.n_features))
        parts = []
        for start in range(0, shape.n_agents, group):
            some = np.arange(start, min(start + group, shape.n_agents))
            found = gather(trace, np.arange(n), some, 0, shape.heads_each)
            features = torch.from_numpy(found).to(device)
            with torch.no_grad():
                parts.append(agents(features[:, None], agents=torch.from_numpy(some).to(device)))
        return np.asarray(torch.cat(parts)[:, 0].cpu().numpy())

    return score


def heuristic_scorer(name: str) -> Scorer:
    """A policy of ``kvp_edge.policies``, which sees the n tokens that are in the cache.

    Raises:
        ValueError: the policy needs queries, which a trace does not have.
    """
    policy = POLICIES[name]()
    if policy.n_queries:
        raise ValueError(f"policy '{name}' needs queries, which a trace does not have")

    def score(trace: TraceLike, n: int) -> npt.NDArray[np.float32]:
        keys = trace.keys[:, :, :n].astype(np.float32)
        values = trace.values[:, :, :n].astype(np.float32)
        return policy.score(ArrayView(keys, values, trace.indices[:n])).reshape(-1, n)

    return score


def oracle_scorer() -> Scorer:
    """The oracle: scores are the importance."""

    def score(trace: TraceLike, n: int) -> npt.NDArray[np.float32]:
        return trace.importance(n).reshape(-1, n)

    return score
