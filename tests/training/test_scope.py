"""Agents that see and score whole layers (scope "layer"), beside those of single heads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from support.packages import needs

torch = needs("torch", "train")
needs("safetensors", "train")

from kvp_edge.binding.model import read_model_shape  # noqa: E402
from kvp_edge.errors import TrainingError  # noqa: E402
from kvp_edge.training import checkpoint  # noqa: E402
from kvp_edge.training.agent import Agents, AgentShape, side_by_side  # noqa: E402
from kvp_edge.training.data import Protected, Sampler  # noqa: E402
from kvp_edge.training.foresight import GoldenEvictions  # noqa: E402
from kvp_edge.training.learner import Learner, Worker  # noqa: E402
from kvp_edge.training.phases import Distil, Texts  # noqa: E402
from kvp_edge.training.train import Settings, train  # noqa: E402
from kvp_edge.training.twin import Twin  # noqa: E402
from makers.synthetic_traces import SyntheticTraces  # noqa: E402
from support.layer_agents import whole_layers  # noqa: E402

QUICK: dict[str, Any] = {
    "objective": "kvp",
    "importance": "sum",
    "hidden": 16,
    "context": 1,
    "steps": 120,
    "token_steps": 0,
    "lr": 1e-2,
    "warmup": 10,
    "tokens": 128,
    "eval_every": 60,
    "validation_states": 6,
}
TINY: dict[str, Any] = {
    **QUICK, "hidden": 8, "context": 3, "steps": 12, "token_steps": 6, "eval_every": 6, "states": 2
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_agents(shape: AgentShape) -> Agents:
    """Agents that look at their neighbours; positions are standardised for all alike."""
    agents, generator = Agents(shape, seed=1), torch.Generator().manual_seed(2)
    with torch.no_grad():
        agents.mean += 0.3 * torch.randn(shape.n_features, generator=generator)
        agents.conv += 0.3 * torch.randn(agents.conv.shape, generator=generator)
    return agents


@pytest.mark.parametrize("shared", [False, True])
def test_heads_side_by_side_in_a_layer_s_agent_score_as_they_do_alone(shared: bool) -> None:
    shape = AgentShape(2, 3, 5, 4, hidden=6, context=5, shared_out=shared)
    agents = random_agents(shape)
    layers = whole_layers(agents)
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randn(2, 3, 20, size, generator=generator) for size in (5, 4, 4)]
    rows[2] = rows[2][:1, :1].expand(2, 3, -1, -1)  # the position
    alone = torch.cat(rows, -1).flatten(0, 1)[:, None]
    k, v = (side_by_side(one, 3).flatten(0, 1) for one in rows[:2])
    together = torch.cat((k, v, rows[2][:, 0]), -1)[:, None]
    assert together.shape == (2, 1, 20, layers.shape.n_features)
    known = (torch.arange(20) != 7)[None]
    with torch.no_grad():
        for seen in (None, known):
            torch.testing.assert_close(layers(together, seen), agents(alone, seen))
        second = layers(together[1:], agents=torch.tensor([1]))
        torch.testing.assert_close(second, agents(alone)[3:])


@pytest.mark.parametrize("golden", [False, True])
def test_a_batch_for_layers_is_that_for_their_heads_side_by_side(golden: bool) -> None:
    traces, protected = SyntheticTraces(3, shape=(3, 2, 8, 4)), Protected(4, 16)
    states = GoldenEvictions(48, 32, protected) if golden else None
    how: dict[str, Any] = {"context": 5, "states": 4, "tokens": 128, "states_of": states}
    layers, heads = np.array([0, 2]), np.array([0, 1, 4, 5])
    one = Sampler(traces, [0, 1, 2], protected, **how).draw(np.random.default_rng(0), heads)
    all_ = Sampler(traces, [0, 1, 2], protected, **how, heads_each=2).draw(
        np.random.default_rng(0), layers
    )
    for name in ("known", "present", "importance"):
        torch.testing.assert_close(getattr(all_, name), getattr(one, name), rtol=0, atol=0)
    k, v, place = one.features.unflatten(0, (2, 2)).split((8, 4, 4), -1)
    wanted = torch.cat((k[:, 0], k[:, 1], v[:, 0], v[:, 1], place[:, 0]), -1)
    torch.testing.assert_close(all_.features, wanted, rtol=0, atol=0)


def test_a_layer_s_agent_learns_what_another_head_s_key_says(tmp_path: Path) -> None:
    traces = SyntheticTraces(16, "key")
    for trace in traces.items:
        trace.paid = trace.paid[:, ::-1].copy()
    blind = train(traces, tmp_path / "head", Settings(**QUICK), progress=False)
    sees = train(traces, tmp_path / "layer", Settings(**QUICK, scope="layer"), progress=False)
    assert (blind.quality.cost > 3).all()
    assert (sees.quality.cost < 1.3).all()


def test_a_step_with_half_the_effort_moves_one_of_two_layers(tmp_path: Path) -> None:
    settings = Settings(
        **{**TINY, "steps": 1, "token_steps": 0}, scope="layer", effort=0.5, ema=0.0
    )
    train(SyntheticTraces(4), tmp_path, settings, progress=False)
    now, before = (
        checkpoint.load(tmp_path / checkpoint.LAST)[0],
        Agents(AgentShape(2, 2, 8, 8, hidden=8, context=3, scope="layer")),
    )
    moved = [not torch.equal(now["agents.fc2"][i], before.fc2[i]) for i in range(2)]
    assert sorted(moved) == [False, True]


def test_a_resumed_run_of_layers_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    traces, settings = SyntheticTraces(6), Settings(**TINY, scope="layer", effort=0.5)
    train(traces, tmp_path / "whole", settings, progress=False)
    for stop in (6, 6):  # with a validation each, as in the whole run
        train(traces, tmp_path / "parts", settings, progress=False, stop_after=stop)
    train(traces, tmp_path / "parts", settings, progress=False)
    ends = [checkpoint.load(tmp_path / run / checkpoint.BEST)[0] for run in ("whole", "parts")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    with pytest.raises(TrainingError, match=r"other settings \(scope: layer instead of head\)"):
        train(traces, tmp_path / "parts", Settings(**TINY, effort=0.5), progress=False)


def test_layers_learn_the_order_of_golden_evictions(tmp_path: Path) -> None:
    small = {k: v for k, v in QUICK.items() if k != "importance"}
    settings = Settings(
        **{**small, "objective": "foresight"},
        scope="layer",
        budget=64,
        every=16,
        recent=16,
        grpo_steps=0,
    )
    result = train(SyntheticTraces(16), tmp_path, settings, progress=False)
    for name in ("knorm", "keydiff", "recency", "random"):
        assert (result.quality.lost < 0.5 * result.baselines[name].lost).all(), name


def test_a_checkpoint_that_says_nothing_of_a_scope_is_one_of_heads(tmp_path: Path) -> None:
    from safetensors.torch import save

    shape = AgentShape(1, 2, 4, 4, hidden=3, context=3)
    agents, path = random_agents(shape), tmp_path / "c.safetensors"
    about = checkpoint.About(shape, {"objective": "kvp"}, {"name": "Tiny"}, 7)
    checkpoint.save(path, agents.state_dict(), about)
    tensors, _ = checkpoint.load(path)
    sizes = {k: v for k, v in vars(shape).items() if k != "scope"}
    said = {"settings": about.settings, "model": about.model, "step": 7, "quality": {}}
    old = {"kind": checkpoint._KIND} | {
        k: json.dumps(v) for k, v in (said | {"shape": sizes}).items()
    }
    path.write_bytes(save(tensors, old))
    found, again = checkpoint.load_agents(path)
    assert again == about
    assert torch.equal(found.fc1, agents.fc1)


@pytest.mark.parametrize("scope", ["token", "Layer"])
def test_an_unknown_scope_is_a_sentence(scope: Any) -> None:
    with pytest.raises(TrainingError, match=f"scope must be head or layer, not '{scope}'"):
        Settings(scope=scope)
    with pytest.raises(ValueError, match="agents score a head or a layer, not"):
        AgentShape(1, 1, 4, 4, scope=scope)


def test_distillation_sees_layers_as_their_heads_side_by_side(bundled_model: str) -> None:
    s = read_model_shape(bundled_model)
    sizes = (s.n_layer, s.n_head_kv[0], s.head_size_k, s.head_size_v)
    agents = random_agents(AgentShape(*sizes, hidden=4, context=5, shared_out=True))
    texts = np.random.default_rng(0).integers(300, 2000, (2, 48)).astype(np.int32)
    supply: Any = SimpleNamespace(text=lambda index: texts[index])
    held_out, twin = Texts(supply, [0, 1], 1), Twin.load(bundled_model, "cpu")
    settings = Settings(objective="global", distil_steps=1, distil_tokens=48, capacity=8)
    losses = []
    for one in (agents, whole_layers(agents)):
        learner = Learner(one, settings, Worker(torch.device("cpu")))
        losses.append(Distil(learner, twin, held_out, held_out).begin())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
