"""Retention gates: their loss against plain loops, what they learn, and what is exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from support.packages import needs

torch = needs("torch", "train")
needs("safetensors", "train")

from conftest import RandomModel  # noqa: E402
from kvp_edge.errors import TrainingError  # noqa: E402
from kvp_edge.export import export  # noqa: E402
from kvp_edge.policies import ArrayView, Learned  # noqa: E402
from kvp_edge.policies.retention import BIAS  # noqa: E402
from kvp_edge.traces.format import TraceSet  # noqa: E402
from kvp_edge.traces.sources import TextFile  # noqa: E402
from kvp_edge.traces.writer import capture_traces  # noqa: E402
from kvp_edge.training import checkpoint, gates  # noqa: E402
from kvp_edge.training.data import Protected, check_traces  # noqa: E402
from kvp_edge.training.gates import lesson, log_beta, retention_loss, wanted  # noqa: E402
from kvp_edge.training.train import Settings, scorer_of, train  # noqa: E402
from kvp_edge.training.validate import choose_states, measure  # noqa: E402
from makers.gguf_models import ModelShape  # noqa: E402
from makers.synthetic_traces import SyntheticTraces  # noqa: E402

Floats = NDArray[np.float64]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# -- the loss ------------------------------------------------------------------------------------


def loss_in_loops(
    scores: Floats,
    paid: Floats,
    times: list[int],
    protected: Protected,
    capacity: float,
    weight: float,
) -> float:
    n_heads, n = scores.shape
    beta = 1 / (1 + np.exp(-(scores + BIAS)))
    lost = -sum(paid[h, i] * np.log(beta[h, i]) for h in range(n_heads) for i in range(n)) / n_heads
    excess = 0.0
    for t in times:
        retained = 0.0
        for h in range(n_heads):
            for i in range(t):  # token i is the (t - i)-th newest of the t that were read
                is_protected = i < protected.sinks or i >= t - protected.recent
                retained += 1.0 if is_protected else beta[h, i] ** (t - i)
        excess += max(0.0, retained / n_heads - capacity) / t
    return float(lost + weight * excess / max(1, len(times)))


def loss(scores: Any, paid: Any, times: list[int], protected: Protected, *how: float) -> Any:
    scores, paid = (torch.as_tensor(x, dtype=torch.float32) for x in (scores, paid))
    return retention_loss(scores, paid, torch.tensor(times), protected, *how)


@pytest.mark.parametrize("times", [[21], [12, 25, 40], []])
@pytest.mark.parametrize("capacity", [5.0, 12.0, 100.0])
def test_the_loss_is_that_of_plain_loops(capacity: float, times: list[int]) -> None:
    rng = np.random.default_rng(0)
    scores, paid = rng.normal(-4, 3, (3, 40)), rng.exponential(size=(3, 40))
    for protected in (Protected(2, 8), Protected(0, 1)):
        got = loss(scores, paid, times, protected, capacity, 4.0)
        want = loss_in_loops(scores, paid, times, protected, capacity, 4.0)
        assert float(got) == pytest.approx(want, rel=1e-5)


def test_what_is_retained_costs_nothing_up_to_the_capacity_and_something_beyond() -> None:
    """Gates that keep for ever retain all 30 tokens, in both heads."""
    for_ever, nothing = torch.full((2, 30), 40.0), torch.zeros(2, 30)

    def cost(capacity: float) -> float:
        return float(loss(for_ever, nothing, [30], Protected(4, 8), capacity, 1.0))

    assert cost(30.0) == 0
    assert cost(29.0) == pytest.approx(1 / 30)
    assert cost(10.0) == pytest.approx(20 / 30)


def test_protected_tokens_count_in_full_and_are_not_blamed() -> None:
    forgets = torch.full((2, 30), -60.0)
    assert float(loss(forgets, torch.zeros(2, 30), [30], Protected(4, 8), 12.0, 1.0)) == 0
    got = loss(forgets, torch.zeros(2, 30), [30], Protected(4, 8), 11.0, 1.0)
    assert float(got) == pytest.approx(1 / 30)
    kept = torch.zeros(2, 30, requires_grad=True)
    retention_loss(
        kept, torch.zeros(2, 30), torch.tensor([30]), Protected(4, 8), 1.0, 1.0
    ).backward()
    assert kept.grad is not None
    assert (kept.grad[:, 4:22] > 0).all()
    assert (kept.grad[:, :4] == 0).all()
    assert (kept.grad[:, 22:] == 0).all()


def test_heads_share_one_capacity() -> None:
    """One keeps everything, the other nothing beside the protected: (30 + 12) / 2 a head."""
    scores = torch.stack((torch.full((30,), 40.0), torch.full((30,), -60.0)))
    assert float(loss(scores, torch.zeros(2, 30), [30], Protected(4, 8), 21.0, 1.0)) == 0
    assert float(loss(scores, torch.zeros(2, 30), [30], Protected(4, 8), 20.0, 1.0)) > 0


def test_log_beta_is_finite_for_any_score() -> None:
    scores = torch.tensor([-1e4, -BIAS, 1e4])
    assert log_beta(scores).tolist() == pytest.approx([-9994.0, np.log(0.5), 0.0])


# -- what is wanted ------------------------------------------------------------------------------


def wanted_in_loops(trace: Any, importance: str, protected: Protected) -> Floats:
    """Token by token: attention while it competes, by the block that pays it or by all of them."""
    n_layer, n_head, n = trace.keys.shape[:3]
    payments = list(trace.payments())
    total, aged = np.zeros((n_layer * n_head, n)), np.zeros((n_layer * n_head, n))
    for head in range(n_layer * n_head):
        for token in range(protected.sinks, n):
            for begin, paid in payments:
                if token >= begin - protected.recent:
                    continue
                amount = float(paid.reshape(-1, begin)[head, token])
                if importance == "sum":
                    total[head, token] += amount
                    aged[head, token] += amount * (begin - token)
                elif amount > total[head, token]:
                    total[head, token] = amount
                    aged[head, token] = amount * (begin - token)
    return aged / total.sum() * len(aged)


@pytest.fixture(scope="module")
def captured(
    random_model: Callable[[ModelShape], RandomModel], tmp_path_factory: pytest.TempPathFactory
) -> TraceSet:
    """Traces of a real run, with blocks of several sizes."""
    folder = tmp_path_factory.mktemp("captured")
    (folder / "text.txt").write_text("the thing and the other, on and on. " * 40)
    model = random_model(ModelShape("llama", n_head=4, n_head_kv=2)).path
    how: dict[str, Any] = {"length": 150, "block": 16, "n_threads": 1, "n_threads_batch": 1}
    sources = [TextFile(str(folder / "text.txt"))]
    return TraceSet(capture_traces(model, sources, folder / "out", n_traces=1, **how))


@pytest.mark.parametrize("importance", ["sum", "peak"])
@pytest.mark.parametrize("protected", [Protected(4, 32), Protected(0, 1), Protected(2, 140)])
def test_wanted_is_attention_times_age_token_by_token(
    captured: TraceSet, importance: Any, protected: Protected
) -> None:
    for trace in (captured[0], SyntheticTraces(1)[0]):
        got = wanted(trace, 0, importance, protected)
        want = wanted_in_loops(trace, importance, protected)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=1e-6)
        assert (got[:, : protected.sinks] == 0).all()
        assert (got[:, -protected.recent :] == 0).all()


def test_a_head_that_receives_more_wants_more() -> None:
    trace = SyntheticTraces(1)[0]
    trace.paid[1] *= 10
    by_head = wanted(trace, 0, "sum", Protected()).sum(1)
    assert by_head[2:].min() > 5 * by_head[:2].max()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.1])
@pytest.mark.parametrize("importance", ["sum", "peak"])
def test_attention_that_is_none_is_refused(importance: Any, bad: float) -> None:
    trace = SyntheticTraces(1)[0]
    trace.paid[0, 1, 30] = bad
    with pytest.raises(TrainingError, match="trace 7 has attention that is negative or not"):
        wanted(trace, 7, importance, Protected())


def test_nobody_wanting_anything_is_no_division_by_0() -> None:
    trace = SyntheticTraces(1)[0]
    trace.paid[:] = 0
    assert (wanted(trace, 0, "peak", Protected()) == 0).all()


@pytest.mark.parametrize("tokens", [160, 64])
def test_a_lesson_holds_the_whole_trace_and_moments_with_something_to_choose(tokens: int) -> None:
    """64: the shortest that check_traces lets pass."""
    traces, protected = SyntheticTraces(1, tokens=tokens), Protected(4, 28)
    assert check_traces(traces, protected)[0] == [0]
    found = lesson(traces[0], 0, "sum", protected, np.random.default_rng(0))
    assert found.features.shape == (4, 1, tokens, 20)
    np.testing.assert_array_equal(found.features[3, 0, :, :8], traces[0].keys[1, 1])
    np.testing.assert_array_equal(found.wanted, wanted(traces[0], 0, "sum", protected))
    times = found.times.tolist()
    assert times == sorted(set(times))
    assert len(times) == 12
    assert min(times) > 4 + 28
    assert max(times) < tokens


# -- training ------------------------------------------------------------------------------------

QUICK: dict[str, Any] = {
    "objective": "global",
    "importance": "sum",
    "hidden": 16,
    "context": 1,
    "steps": 150,
    "lr": 2e-2,
    "warmup": 10,
    "states": 2,
    "eval_every": 75,
    "validation_states": 6,
    "capacity": 64,
}
TINY: dict[str, Any] = {**QUICK, "context": 3, "steps": 12, "eval_every": 4}


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("learned")
    torch.set_num_threads(1)
    return folder, train(SyntheticTraces(16), folder, Settings(**QUICK), progress=False)


def test_gates_learn_what_their_keys_say(learned: tuple[Path, Any]) -> None:
    _, result = learned
    for name in ("knorm", "keydiff", "recency", "random"):
        assert (result.quality.lost < 0.5 * result.baselines[name].lost).all(), name
        assert result.quality.token_lost < 0.8 * result.baselines[name].token_lost, name


def test_what_is_kept_is_what_was_measured(learned: tuple[Path, Any]) -> None:
    folder, result = learned
    agents, about = checkpoint.load_agents(folder)
    traces = SyntheticTraces(16)
    states = choose_states(traces, list(range(16))[5::10], Protected(), 6)
    scorer, whole = scorer_of(agents, about.settings["horizon"])
    again = measure(scorer, traces, states, Protected(), whole)
    np.testing.assert_array_equal(again.cost, result.quality.cost)
    assert again.token_lost == result.quality.token_lost


def test_a_smaller_capacity_retains_less(tmp_path: Path) -> None:
    retained = []
    traces = SyntheticTraces(8)
    for capacity in (48, 120):
        how = {**QUICK, "steps": 60, "eval_every": 60, "capacity": capacity}
        train(traces, tmp_path / str(capacity), Settings(**how), progress=False)
        agents, _ = checkpoint.load_agents(tmp_path / str(capacity))
        found = lesson(traces[0], 0, "sum", Protected(), np.random.default_rng(0))
        with torch.no_grad():
            decay = log_beta(agents(found.features)[:, 0])
        ages = 160 - torch.arange(160)
        retained.append(float((decay * ages)[:, 4:-32].exp().sum() / 4) + 36)
    assert retained[0] < 0.8 * retained[1]


def test_one_last_projection_is_shared_and_the_file_holds_it_for_every_head(
    learned: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, _ = learned
    tensors, about = checkpoint.load(folder / checkpoint.BEST)
    assert about.shape.shared_out
    assert tensors["out"].shape == (1, 16)
    done = export(folder, outfile=tmp_path / "gates.gguf", outtype="f32", traces=SyntheticTraces(2))
    assert done.parity is not None
    assert done.parity.executor < 1e-4
    policy = Learned(tmp_path / "gates.gguf")
    assert (policy.info.objective, policy.info.horizon) == ("global", 1024)
    for layer in range(2):
        for head in range(2):
            np.testing.assert_array_equal(policy.weights.out[layer, head, 0], tensors["out"][0])
    assert export(folder, dry_run=True).gguf.name == "kvp-synthetic-global-w1-F16.gguf"


def test_a_chat_ranks_as_validation_did(learned: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = learned
    export(folder, outfile=tmp_path / "gates.gguf", outtype="f32")
    agents, _ = checkpoint.load_agents(folder)
    trace, n = SyntheticTraces(1, seed=3)[0], 100
    scorer, whole = scorer_of(agents, 1024)
    policy = Learned(tmp_path / "gates.gguf")
    keys, values = (x[:, :, :n].astype(np.float32) for x in (trace.keys, trace.values))
    scores = policy.score(ArrayView(keys, values, trace.indices[:n]))
    worth = policy.worth(scores, n - trace.indices[:n])
    np.testing.assert_allclose(worth.reshape(4, n), scorer(trace, n), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        policy.whole_tokens(worth), whole(scorer(trace, n)), rtol=1e-4, atol=1e-4
    )


def ends(folder: Path) -> dict[str, Any]:
    """The best agents and all that a run goes on from, but for the time that it took."""
    last = checkpoint.load(folder / checkpoint.LAST)[0]
    last.pop("seconds")
    best = checkpoint.load(folder / checkpoint.BEST)[0]
    return {**last, **{"best." + name: tensor for name, tensor in best.items()}}


def assert_same(a: Path, b: Path) -> None:
    one, other = ends(a), ends(b)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_in_parts_ends_like_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces, how = SyntheticTraces(6), Settings(**TINY)
    train(traces, tmp_path / "whole", how, progress=False)
    train(traces, tmp_path / "parts", how, progress=False, stop_after=4)
    assert checkpoint.load(tmp_path / "parts" / checkpoint.LAST)[1].step == 4
    assert not (tmp_path / "parts" / "report.json").exists()
    asked, usual = 0, gates.lesson

    def interrupted(*args: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked > 10:  # in the middle of step 4 + 5, after the validation of step 8
            raise KeyboardInterrupt
        return usual(*args)

    with monkeypatch.context() as patch:
        patch.setattr(gates, "lesson", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(traces, tmp_path / "parts", how, progress=False)
    train(traces, tmp_path / "parts", how, progress=False)
    assert (tmp_path / "parts" / "report.json").exists()
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_a_folder_with_a_run_of_another_objective_is_refused(tmp_path: Path) -> None:
    traces = SyntheticTraces(6)
    train(traces, tmp_path, Settings(**TINY), progress=False, stop_after=1)
    with pytest.raises(TrainingError, match=r"other settings \(capacity: 64 instead of 65\)"):
        train(traces, tmp_path, Settings(**{**TINY, "capacity": 65}), progress=False)
    with pytest.raises(TrainingError, match=r"other settings \(objective: global instead of kvp\)"):
        train(traces, tmp_path, Settings(objective="kvp"), progress=False)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"token_steps": 10}, "token_steps belongs to .* regression, not global"),
        ({"effort": 0.5}, "effort belongs to objective kvp or foresight"),
        ({"rankings": 4}, "rankings belongs to objective kvp"),
        ({"margin": 0.2}, "margin belongs to objective foresight, not global"),
        ({"grpo_steps": 0}, "grpo_steps belongs to objective foresight"),
        ({"capacity": 0}, "capacity, horizon and distil_tokens must be at least 1"),
        ({"horizon": 0}, "capacity, horizon and distil_tokens must be at least 1"),
        ({"capacity_weight": 0.0}, "capacity_weight must be above 0"),
    ],
)
def test_settings_that_gates_do_not_have_are_refused(
    setting: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(TrainingError, match=sentence):
        Settings(objective="global", **setting)
    assert Settings(objective="global").phases == (("heads", 2000),)
