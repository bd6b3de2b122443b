"""What training takes for the importance of tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.packages import needs

torch = needs("torch", "train")
needs("safetensors", "train")

from kvp_edge.errors import TrainingError  # noqa: E402
from kvp_edge.training.data import Protected, check_traces, cut_points  # noqa: E402
from kvp_edge.training.foresight import GoldenEvictions  # noqa: E402
from kvp_edge.training.importance import Judged, loss_unit  # noqa: E402
from kvp_edge.training.settings import Settings  # noqa: E402
from kvp_edge.training.train import train  # noqa: E402
from kvp_edge.training.validate import State, measure, oracle_scorer  # noqa: E402
from makers.synthetic_traces import SyntheticTraces  # noqa: E402

PROTECTED = Protected(sinks=4, recent=32)


def labelled(count: int = 2) -> Any:
    """The third dimension of its key says how much of a token is repeated."""
    traces: Any = SyntheticTraces(count)
    for trace in traces.items:
        trace.repeated = np.exp(2 * trace.keys[..., 2].astype(np.float32)).astype(np.float16)
        trace.questioned = np.zeros_like(trace.repeated)
    return traces


def test_a_label_is_an_importance_at_any_cut() -> None:
    traces = labelled()
    judged = Judged(traces, "repeated", PROTECTED)
    cuts = cut_points(judged[0], PROTECTED)
    assert cuts.tolist() == list(range(52, 161))  # 160 tokens: also after the last one
    for n in (52, 53, 160):
        got = judged[0].importance(n)
        assert got.dtype == np.float32
        norms = np.linalg.norm(traces[0].values[:, :, :n].astype(np.float32), axis=-1)
        want = traces[0].repeated[:, :, :n].astype(np.float32) * norms
        np.testing.assert_allclose(got, want, rtol=1e-6)
        assert loss_unit(judged[0], n, PROTECTED) == n - 36
    assert loss_unit(traces[0], 96, PROTECTED) == 64
    assert check_traces(judged, PROTECTED)[0] == [0, 1]
    assert Judged(traces, "repeated+questioned", PROTECTED)[0].splits.tolist() == [*range(1, 161)]


def test_a_mixture_adds_what_each_is_beside_its_mean() -> None:
    traces = labelled()
    judged = Judged(traces, "sum+repeated+questioned", PROTECTED)
    np.testing.assert_array_equal(judged[0].splits, traces[0].splits)  # those of the sum
    n, got = 96, judged[0].importance(96)
    for layer, head in np.ndindex(2, 2):
        want = np.zeros(n)
        norms = np.linalg.norm(traces[0].values[:, :, :n].astype(np.float32), axis=-1)
        for part in (traces[0].importance(n), traces[0].repeated[:, :, :n] * norms):
            mine = part[layer, head].astype(np.float64)
            want += mine / mine[4 : n - 32].mean()
        np.testing.assert_allclose(got[layer, head], want, rtol=1e-5)


def test_golden_evictions_by_labels_come_as_often_as_they_shall() -> None:
    judged = Judged(labelled(), "repeated", PROTECTED)
    golden = GoldenEvictions(budget=64, every=10, protected=PROTECTED)
    assert golden.times(judged[0]) == [*range(74, 161, 10)]
    n, held = golden.of(judged[0], 0)[1]
    label = judged[0].importance(n - 10).reshape(4, -1)
    for kept, wanted in zip(held, label, strict=True):
        best = set(4 + np.argsort(-wanted[4 : n - 42], kind="stable")[: 64 - 36])
        assert best <= set(np.flatnonzero(kept))


def test_a_policy_trained_for_a_label_keeps_what_has_it(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    how: dict[str, Any] = {"hidden": 16, "context": 1, "lr": 1e-2, "warmup": 10, "tokens": 128}
    how |= {"objective": "kvp", "steps": 100, "token_steps": 20, "eval_every": 50}
    traces = labelled(12)
    result = train(traces, tmp_path, Settings(importance="repeated", **how), progress=False)
    assert (result.quality.cost < 1.3).all()
    assert (result.baselines["keydiff"].cost > 1.5).all()
    judged = Judged(traces, "repeated", PROTECTED)
    whole = measure(oracle_scorer(), judged, [State(0, 160)], PROTECTED)  # nothing follows
    assert (whole.lost == 0).all()


def test_traces_without_the_label_are_refused(tmp_path: Path) -> None:
    settings = Settings(objective="kvp", importance="peak+questioned")
    with pytest.raises(
        TrainingError,
        match="do not say which tokens are questioned: record them with kvp-edge trace "
        "--future questions",
    ):
        train(SyntheticTraces(3), tmp_path, settings, progress=False)


@pytest.mark.parametrize("importance", ["some", "peak+", "peak+peak", "peak + sum"])
def test_an_importance_that_is_none_is_refused(importance: str) -> None:
    with pytest.raises(TrainingError, match="importance must be sum or peak or later"):
        Settings(objective="kvp", importance=importance)


@pytest.mark.parametrize("importance", ["repeated", "peak+questioned", "sum+peak"])
def test_gates_need_to_know_when_attention_is_paid(importance: str) -> None:
    with pytest.raises(TrainingError, match=re.escape(f"must be sum or peak, not '{importance}'")):
        Settings(objective="global", importance=importance)
    assert Settings(objective="foresight", importance=importance).importance == importance
