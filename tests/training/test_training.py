"""Training on synthetic traces, whose importance is a known function of the keys."""

from __future__ import annotations

import json
import os
import resource
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.packages import needs

torch = needs("torch", "train")
needs("safetensors", "train")

from kvp_edge.cli import main  # noqa: E402
from kvp_edge.errors import TrainingError  # noqa: E402
from kvp_edge.training import checkpoint  # noqa: E402
from kvp_edge.training.agent import Agents, AgentShape  # noqa: E402
from kvp_edge.training.data import (  # noqa: E402
    Protected,
    Sampler,
    check_traces,
    cut_points,
)
from kvp_edge.training.head_adamw import HeadAdamW  # noqa: E402
from kvp_edge.training.importance import Judged  # noqa: E402
from kvp_edge.training.train import Settings, train  # noqa: E402
from kvp_edge.training.validate import State, agent_scorer, costs, measure  # noqa: E402
from makers.synthetic_traces import SyntheticTraces  # noqa: E402

QUICK: dict[str, Any] = {
    "objective": "kvp",
    "importance": "sum",
    "hidden": 16,
    "steps": 120,
    "token_steps": 30,
    "lr": 1e-2,
    "warmup": 10,
    "states": 4,
    "tokens": 128,
    "eval_every": 60,
    "validation_states": 6,
}
TINY: dict[str, Any] = {**QUICK, "steps": 12, "token_steps": 6, "eval_every": 6, "states": 2}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / checkpoint.BEST)[0]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_policy_learns_what_its_keys_say(tmp_path: Path) -> None:
    traces = SyntheticTraces(16, "key")
    result = train(traces, tmp_path, Settings(context=1, **QUICK), progress=False)
    for name in ("knorm", "keydiff", "recency", "random"):
        assert (result.quality.cost < 0.5 * result.baselines[name].cost).all(), name
        assert result.quality.token_cost < 0.8 * result.baselines[name].token_cost, name
    assert (result.quality.cost < 1.2).all()
    np.testing.assert_allclose(result.baselines["oracle"].cost, 1, rtol=1e-5)
    assert result.baselines["oracle"].token_cost == pytest.approx(1)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["policy"]["cost"] == result.quality.cost.tolist()


def test_context_shows_its_worth_where_a_neighbour_tells(tmp_path: Path) -> None:
    traces = SyntheticTraces(16, "neighbour")
    longer = {**QUICK, "steps": 250, "token_steps": 0}
    blind = train(traces, tmp_path / "1", Settings(context=1, **longer), progress=False)
    sees = train(traces, tmp_path / "5", Settings(context=5, **longer), progress=False)
    assert (blind.quality.cost > 3).all()
    assert (sees.quality.cost < 0.6 * blind.quality.cost).all()


def test_a_policy_trained_for_peaks_keeps_what_one_block_wants(tmp_path: Path) -> None:
    traces = SyntheticTraces(16, "key")
    peaks = Judged(traces, "peak", Protected())
    states = [State(i, 96) for i in range(16)]
    for importance, best in (("sum", traces), ("peak", peaks)):
        settings = Settings(**{**QUICK, "context": 1, "importance": importance})
        result = train(traces, tmp_path / importance, settings, progress=False)
        assert (result.quality.cost < 1.2).all()  # by what it was trained for
        agents, _ = checkpoint.load_agents(tmp_path / importance)
        for judge in (traces, peaks):
            cost = measure(agent_scorer(agents), judge, states, Protected()).cost
            assert (cost < 1.2).all() if type(judge) is type(best) else (cost > 1.5).all()


def test_heads_are_weighed_by_what_they_say_about_tokens(tmp_path: Path) -> None:
    """The first layer pays hardly any attention: its heads should have little say."""
    traces = SyntheticTraces(16, "key")
    for trace in traces.items:
        trace.paid[0] *= 0.05
    settings = Settings(context=1, **{**QUICK, "token_steps": 100, "token_lr": 0.1})
    result = train(traces, tmp_path, settings, progress=False)
    agents, _ = checkpoint.load_agents(tmp_path)
    spread = agent_scorer(agents)(traces[0], 160).std(1)
    say = spread * agents.log_aggregate.exp().detach().numpy()
    assert say[:2].max() < 0.5 * say[2:].min()
    states = [State(i, 96) for i in range(16)]
    averaged = measure(agent_scorer(agents), traces, states, Protected())
    assert result.quality.token_cost < averaged.token_cost - 0.1


def test_the_same_seed_makes_the_same_policy_and_another_seed_another(tmp_path: Path) -> None:
    traces = SyntheticTraces(6)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(traces, tmp_path / name, Settings(**TINY, seed=seed), progress=False)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


@pytest.mark.parametrize("stops", [(5,), (12,), (3, 11)])
def test_a_resumed_run_ends_like_an_uninterrupted_one(
    tmp_path: Path, stops: tuple[int, ...]
) -> None:
    traces = SyntheticTraces(6)
    settings = Settings(**{**TINY, "effort": 0.5})
    train(traces, tmp_path / "whole", settings, progress=False)
    for stop in stops:
        _interrupt(traces, tmp_path / "parts", settings, stop)
    train(traces, tmp_path / "parts", settings, progress=False)
    ends = [checkpoint.load(tmp_path / run / checkpoint.LAST)[0] for run in ("whole", "parts")]
    for end in ends:
        end.pop("seconds")
    assert same(*ends)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def _interrupt(traces: SyntheticTraces, out: Path, settings: Settings, steps: int) -> None:
    """Ctrl-C after so many steps: what the last validation saved is what there is."""
    drawn = 0
    draw = Sampler.draw

    def interrupted(self: Sampler, *args: Any) -> Any:
        nonlocal drawn
        drawn += 1
        if drawn > steps:
            raise KeyboardInterrupt
        return draw(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "draw", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(traces, out, settings, progress=False)


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    traces = SyntheticTraces(6)
    train(traces, tmp_path, Settings(**TINY), progress=False)
    before = weights(tmp_path)
    result = train(traces, tmp_path, Settings(**TINY), progress=False)
    assert same(before, weights(tmp_path))
    assert np.isfinite(result.quality.cost).all()


def test_a_folder_with_another_run_is_refused(tmp_path: Path) -> None:
    traces = SyntheticTraces(6)
    train(traces, tmp_path, Settings(**TINY), progress=False)
    with pytest.raises(TrainingError, match=r"other settings \(lr: 0.01 instead of 0.5\)"):
        train(traces, tmp_path, Settings(**{**TINY, "lr": 0.5}), progress=False)
    with pytest.raises(TrainingError, match="other settings"):
        train(SyntheticTraces(7), tmp_path, Settings(**TINY), progress=False)
    (tmp_path / checkpoint.LAST).write_bytes(b"nonsense")
    with pytest.raises(TrainingError, match="damaged or cut short"):
        train(traces, tmp_path, Settings(**TINY), progress=False)


def test_bad_traces_are_a_sentence(tmp_path: Path) -> None:
    def attempt(traces: SyntheticTraces) -> None:
        train(traces, tmp_path / "new", Settings(**TINY), progress=False)

    with pytest.raises(TrainingError, match="no traces to train on"):
        attempt(SyntheticTraces(0))
    with pytest.raises(TrainingError, match="all 3 traces are too short"):
        attempt(SyntheticTraces(3, tokens=60))
    mixed = SyntheticTraces(3)
    mixed.items += SyntheticTraces(1, shape=(2, 2, 16, 8)).items
    with pytest.raises(TrainingError, match=r"trace 3 is from another model: .* x 16\+8"):
        attempt(mixed)
    for damage in ("keys", "paid"):
        broken = SyntheticTraces(4)
        for trace in broken.items:
            getattr(trace, damage)[0, 0, 30] = np.nan
        with pytest.raises(
            TrainingError, match="keys or values that are not finite|negative or not finite"
        ):
            attempt(broken)


def test_what_was_finished_is_kept_when_a_trace_turns_out_bad(tmp_path: Path) -> None:
    traces = SyntheticTraces(6)
    settings = Settings(**TINY)
    train(traces, tmp_path, settings, progress=False, stop_after=6)
    finished = weights(tmp_path)
    for trace in traces.items:
        trace.paid[:] = np.nan
    with pytest.raises(TrainingError, match="not finite"):
        train(traces, tmp_path, settings, progress=False)
    assert same(finished, weights(tmp_path))


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        (
            {"objective": "magic"},
            "objective must be kvp or foresight or global or regression, not 'magic'",
        ),
        (
            {"objective": "global", "rankings": 4},
            "rankings belongs to objective kvp or foresight or regression, not global",
        ),
        ({"objective": "kvp", "rankings": 1}, "at least 2 rankings"),
        ({"objective": "kvp", "advantage": "both"}, "advantage must be loo or zscore, not 'both'"),
        ({"context": 99}, "must be at least half of the context width"),
        ({"objective": "kvp", "effort": 0.0}, "effort must be a fraction"),
        ({"validation": 1.0}, "validation must be a fraction"),
        ({"precision": "f8"}, "precision must be f32 or bf16"),
    ],
)
def test_impossible_settings_are_a_sentence(setting: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TrainingError, match=sentence):
        Settings(**setting)


def test_batches_hold_unprotected_tokens_before_the_cut_and_what_they_receive() -> None:
    traces = SyntheticTraces(3)
    protected = Protected(sinks=4, recent=32)
    usable, shape = check_traces(traces, protected)
    assert shape == (2, 2, 8, 8)
    sampler = Sampler(traces, usable, protected, context=5, states=6, tokens=128)
    heads = np.array([1, 3])
    batch = sampler.draw(np.random.default_rng(0), heads)
    assert batch.features.shape == (2, 12, 68, 20)
    keys = batch.features[..., :8].reshape(2, 6, 2, 68, 8)
    for state in range(6):
        inner = keys[:, state, :, 2:-2].reshape(2, 128, 8)[:, batch.present[0, state]]
        first = np.float32(inner[0, 0].numpy())
        (found,) = [t for t in traces.items if (np.float32(t.keys[0, 1, 4]) == first).all()]
        m = int(batch.present[0, state].sum())
        n = m + 36
        assert n in cut_points(found, protected)
        np.testing.assert_array_equal(inner[1].numpy(), np.float32(found.keys[1, 1, 4 : 4 + m]))
        want = found.importance(n).reshape(4, n)[heads, 4 : 4 + m]
        np.testing.assert_allclose(batch.importance[:, state, batch.present[0, state]], want)
        assert (batch.importance[:, state, ~batch.present[0, state]] == 0).all()


def test_in_long_traces_runs_of_neighbours_compete() -> None:
    traces = SyntheticTraces(2, tokens=640)
    usable, _ = check_traces(traces, Protected())
    sampler = Sampler(traces, usable, Protected(), context=9, states=8, tokens=128)
    batch = sampler.draw(np.random.default_rng(3), np.arange(4))
    assert batch.present.shape == (1, 8, 128)
    log = batch.features[0, :, :, -4] * 16  # log2(1 + p)
    positions = (2**log - 1).round()
    steps = positions.diff(dim=1)[batch.known[:, 1:] & batch.known[:, :-1]]
    assert (steps == 1).all()


def test_runs_score_as_whole_texts_do() -> None:
    agents = Agents(AgentShape(1, 2, 3, 2, hidden=8, context=5), seed=1)
    with torch.no_grad():
        agents.conv += 0.3 * torch.randn(agents.conv.shape, generator=torch.Generator())
        x = torch.randn(2, 1, 30, 9)
        whole = agents(x)
        at = torch.arange(-2, 32)
        known = ((at >= 0) & (at < 30))[None]
        padded = agents(x[:, :, at.clamp(0, 29)], known)
        one_head = agents(x[1:], agents=torch.tensor([1]))
    torch.testing.assert_close(whole, padded)
    torch.testing.assert_close(whole[1:], one_head)


def test_heads_step_like_adamw_and_those_left_out_stay() -> None:
    generator = torch.Generator().manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(3, 4, 5, generator=generator))
    theirs = torch.nn.Parameter(ours.detach()[:2].clone())
    reference = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1)
    optimiser = HeadAdamW({"w": ours}, weight_decay=0.1, clip=1e9)
    third = ours.detach()[2].clone()
    for _ in range(5):
        gradient = torch.randn(3, 4, 5, generator=generator)
        ours.grad, theirs.grad = gradient.clone(), gradient[:2].clone()
        optimiser.step(torch.tensor([0, 1]), 0.01)
        reference.step()
    torch.testing.assert_close(ours.detach()[:2], theirs.detach())
    assert torch.equal(ours.detach()[2], third)


def test_costs_are_relative_to_the_best_ranking_and_per_query() -> None:
    importance = np.array([[4.0, 3.0, 2.0, 1.0]], np.float32)
    relative, lost = costs(importance, importance, 10)
    assert relative[0] == 1
    assert lost[0] == 0
    relative, lost = costs(-importance, importance, 10)
    assert relative[0] == pytest.approx((3 * 4 + 2 * 3 + 2) / (3 + 2 * 2 + 3))
    # at the budgets 2, 1, 1, 1 of 4 tokens: (7 - 3), 4 - 1 three times
    assert lost[0] == pytest.approx((4 + 3 * 3) / 4 / 10)


def test_the_command_trains_and_tells_what_came_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvp_edge.cli.train.open_traces", lambda path: SyntheticTraces(6))
    options = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    assert main(["train", "traces", "--out", str(tmp_path), *options]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told[1:7]] == [
        "policy", "keydiff", "knorm", "recency", "random", "oracle"
    ]  # fmt: skip
    assert told[-2].startswith("below the best of keydiff, knorm, recency, random in ")
    assert told[-1] == str(tmp_path / "best.safetensors")


def test_a_full_disk_is_a_sentence_and_the_checkpoint_before_is_kept(tmp_path: Path) -> None:
    """A limit on the size of files stands for it: like a full disk it fails in the middle."""
    traces, settings = SyntheticTraces(6), Settings(**TINY)
    train(traces, tmp_path / "whole", settings, progress=False)
    train(traces, tmp_path / "cut", settings, progress=False, stop_after=6)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot write .*safetensors': File too large.*to resume"):
            train(traces, tmp_path / "cut", settings, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "cut").glob("*.part"))
    train(traces, tmp_path / "cut", settings, progress=False)
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_the_command_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) != 0
    assert "none" in capsys.readouterr().err


def test_whatever_is_wrong_with_a_checkpoint_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save

    shape = AgentShape(1, 2, 4, 4, hidden=3, context=3)
    model = {"architecture": "llama", "name": "Tiny", "fingerprint": "f00d"}
    about = checkpoint.About(shape, {"objective": "kvp", "sinks": 4}, model, 7, {"cost": [0.5]})
    path = tmp_path / "c.safetensors"
    tensors = Agents(shape).state_dict()
    checkpoint.save(path, tensors, about)
    assert checkpoint.load_agents(path)[1] == about
    good = {"kind": checkpoint._KIND} | {k: json.dumps(v) for k, v in asdict(about).items()}

    def said(**changed: Any) -> dict[str, str]:
        return good | {name: json.dumps(value) for name, value in changed.items()}

    sizes = asdict(shape)
    hostile = [
        *({k: v for k, v in good.items() if k != name} for name in good),
        *(said(**{name: v}) for name in asdict(about) for v in (None, "x", 2.5, [], [1])),
        *(said(shape=sizes | {name: v}) for name in sizes for v in (None, "2", 2.5, 2**40, -1)),
        *(
            said(shape={k: v for k, v in sizes.items() if k != name})
            for name in sizes
            if name not in ("scope", "ageing")  # older runs have none
        ),
        said(step=-1),
        said(settings={"objective": 1}),
        said(settings={"sinks": "4"}),
        said(model={"name": 1}),
        good | {"shape": "{"},
        good | {"shape": "[" * 100_000},
    ]
    for metadata in hostile:
        path.write_bytes(save(tensors, metadata))
        with pytest.raises(TrainingError, match="is damaged|not a policy checkpoint"):
            checkpoint.load_agents(path)
    for name in tensors:
        rest = {k: v for k, v in tensors.items() if k != name}
        for others in (rest, {**rest, name: torch.zeros(2, 2)}):
            path.write_bytes(save(others, good))
            with pytest.raises(TrainingError, match="is damaged"):
                checkpoint.load_agents(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(TrainingError, match="cannot be read: it is not a regular file"):
        checkpoint.load_agents(path)


def test_a_run_whose_checkpoint_lacks_something_is_refused(tmp_path: Path) -> None:
    traces, settings = SyntheticTraces(6), Settings(**TINY)
    train(traces, tmp_path, settings, progress=False, stop_after=6)
    tensors, about = checkpoint.load(tmp_path / checkpoint.LAST)
    for name in ("best", "stakes", "ema.fc1"):
        rest = {k: v for k, v in tensors.items() if k != name}
        checkpoint.save(tmp_path / checkpoint.LAST, rest, about)
        with pytest.raises(TrainingError, match="is damaged"):
            train(traces, tmp_path, settings, progress=False)
