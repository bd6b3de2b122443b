"""The trained policy against everything it can be compared with, on traces it has never seen."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvp_edge.binding.policy import NativePolicy
from kvp_edge.evaluation.plots import cost_per_head_plot
from kvp_edge.policies import Learned
from kvp_edge.traces.format import Trace, TraceSet
from kvp_edge.training.attention_baselines import ATTENTION_BASELINES
from kvp_edge.training.data import Protected, check_traces
from kvp_edge.training.train import BASELINES
from kvp_edge.training.validate import (
    Quality,
    choose_states,
    heuristic_scorer,
    measure,
    oracle_scorer,
)

PLOTTED = ("policy", "keydiff", "recency", "snapkv", "tova")
LITTLE = 0.01  # a head that loses less than this to every heuristic has nothing to lose


def compare(policy: Path, traces: TraceSet, states: int) -> dict[str, Quality]:
    """Quality of the policy file, run natively, and of all baselines on the same cuts."""
    learned = Learned(policy)
    info = learned.info
    protected = Protected(info.sinks, info.recent)
    usable, _ = check_traces(traces, protected)
    chosen = choose_states(traces, usable, protected, states)
    native = NativePolicy(learned.weights)

    def score(trace: Trace, n: int) -> NDArray[np.float32]:
        keys = trace.keys[:, :, :n].astype(np.float32)
        values = trace.values[:, :, :n].astype(np.float32)
        scores = native.score(keys, values, trace.indices[:n])
        return learned.worth(scores, n - trace.indices[:n]).reshape(-1, n)

    def whole(worth: NDArray[np.float32]) -> NDArray[np.float32]:
        together = learned.whole_tokens(worth.reshape(info.n_layer, info.n_head_kv, -1))
        assert together is not None  # a policy file always says
        return together

    found = {"policy": measure(score, traces, chosen, protected, whole)}
    scorers = {name: heuristic_scorer(name) for name in BASELINES}
    for name, scorer in (scorers | ATTENTION_BASELINES | {"oracle": oracle_scorer()}).items():
        found[name] = measure(scorer, traces, chosen, protected)
    return found


def summary(found: dict[str, Quality], n_head_kv: int) -> str:
    """Markdown: means over heads, then every head against the best heuristic."""
    lines = [
        "| | cost, mean over heads | attention lost | whole tokens: cost | lost |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {q.cost.mean():.2f} | {q.lost.mean():.3f} | {q.token_cost:.2f} "
        f"| {q.token_lost:.3f} |"
        for name, q in found.items()
    ]
    best_cost = np.min([found[name].cost for name in BASELINES], axis=0)
    best_lost = np.min([found[name].lost for name in BASELINES], axis=0)
    matters = best_lost > LITTLE
    cost = found["policy"].cost
    won = int((cost < best_cost)[matters].sum())
    lines += [
        "",
        f"Below the best of {', '.join(BASELINES)} in {won} of the {int(matters.sum())} heads that "
        f"have something to lose (more than {LITTLE} of a query's attention to each of them).",
        "",
        "| layer, head | policy: cost | best heuristic | SnapKV | policy: lost | best heuristic |",
        "|---|---|---|---|---|---|",
    ]
    for i, mine in enumerate(cost):
        lines.append(
            f"| {i // n_head_kv}, {i % n_head_kv}{'' if matters[i] else ' (little to lose)'} "
            f"| {mine:.2f} | {best_cost[i]:.2f} | {found['snapkv'].cost[i]:.2f} "
            f"| {found['policy'].lost[i]:.3f} | {best_lost[i]:.3f} |"
        )
    return "\n".join(lines)


def plot(found: dict[str, Quality], n_head_kv: int, path: Path) -> None:
    """Cost of every head as PNG."""
    costs = {name: found[name].cost.reshape(-1, n_head_kv) for name in PLOTTED}
    cost_per_head_plot(costs, path)
