"""Rollouts in the bundled model: what they read, draw and cost, and whole runs with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from numpy.typing import NDArray

from support.packages import needs

torch = needs("torch", "train")
needs("safetensors", "train")

from kvp_edge.binding.model import read_model_shape  # noqa: E402
from kvp_edge.errors import TrainingError  # noqa: E402
from kvp_edge.export import policy_of  # noqa: E402
from kvp_edge.policies import get_policy  # noqa: E402
from kvp_edge.policy_file import write_policy  # noqa: E402
from kvp_edge.traces.format import TraceSet  # noqa: E402
from kvp_edge.traces.sources import TextFile  # noqa: E402
from kvp_edge.traces.writer import capture_traces  # noqa: E402
from kvp_edge.training import checkpoint, grpo  # noqa: E402
from kvp_edge.training.agent import Agents, AgentShape  # noqa: E402
from kvp_edge.training.rollouts import Eviction, Reading, Rollout, Rollouts  # noqa: E402
from kvp_edge.training.train import Settings, train  # noqa: E402
from makers.gguf_models import ModelShape, write_model  # noqa: E402
from makers.synthetic_traces import SyntheticTraces  # noqa: E402
from support.layer_agents import whole_layers  # noqa: E402

QUIET = {"n_threads": 1, "n_threads_batch": 1}
HOW: dict[str, Any] = {
    "objective": "foresight",
    "hidden": 8,
    "context": 5,
    "budget": 64,
    "every": 32,
    "recent": 16,
}
N_TOKENS = 230
ROUNDING = 0.02  # of a token's loss in nats, where batches or the order of rows differ


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokens(bundled_model: str, book: str) -> list[int]:
    llm = llama_cpp.Llama(bundled_model, vocab_only=True, verbose=False)
    found = llm.tokenize(book[3000:6000].encode())[:N_TOKENS]
    llm.close()
    assert len(found) == N_TOKENS
    return [int(token) for token in found]


@pytest.fixture(scope="module")
def rollouts(bundled_model: str) -> Iterator[Rollouts]:
    made = Rollouts(bundled_model, N_TOKENS, Settings(**HOW), dict(QUIET))
    yield made
    made.close()


@pytest.fixture(scope="module")
def agents(bundled_model: str) -> Agents:
    """Random ones, which look at their neighbours."""
    s = read_model_shape(bundled_model)
    made = Agents(AgentShape(s.n_layer, s.n_head_kv[0], s.head_size_k, s.head_size_v, 8, 5), seed=1)
    with torch.no_grad():
        made.conv += 0.3 * torch.randn(made.conv.shape, generator=seeded(2))
    return made


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def held(rollouts: Rollouts) -> Iterator[list[tuple[int, NDArray[np.int32]]]]:
    """After every eviction: tokens read, and what each head holds, int32 [N, budget]."""
    kv = rollouts._small.kv
    assert kv is not None
    found: list[tuple[int, NDArray[np.int32]]] = []

    def keep(event: Any) -> None:
        found.append((event.seen, kv.indices.reshape(-1, event.kept).copy()))

    kv.on_evict = keep
    yield found
    kv.on_evict = None


# -- reading -------------------------------------------------------------------------------------


def test_a_full_reading_is_llama_cpp_s(
    bundled_model: str, rollouts: Rollouts, tokens: list[int]
) -> None:
    llm = llama_cpp.Llama(bundled_model, n_ctx=256, logits_all=True, verbose=False, **QUIET)
    llm.eval(tokens)
    logits = torch.from_numpy(np.array(llm.scores[: N_TOKENS - 1], np.float64))
    llm.close()
    log_p = logits.log_softmax(-1)
    full = rollouts.full(tokens)
    assert full.losses.shape == full.entropies.shape == (N_TOKENS - 1,)
    want = -log_p.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]
    np.testing.assert_allclose(full.losses, want, atol=ROUNDING)
    np.testing.assert_allclose(full.entropies, -(log_p.exp() * log_p).sum(-1), atol=ROUNDING)
    again = rollouts.full(tokens)  # nothing is left of what was read before
    np.testing.assert_array_equal(again.losses, full.losses)


@pytest.mark.parametrize("length", [2, 96])
def test_a_text_that_fits_has_no_evictions_and_costs_nothing(
    rollouts: Rollouts, agents: Agents, tokens: list[int], length: int
) -> None:
    """96: the budget and all that is read between two evictions."""
    full, rollout = rollouts.full(tokens[:length]), rollouts.roll(tokens[:length], agents, None)
    assert rollout.evictions == []
    np.testing.assert_allclose(rollout.losses, full.losses, atol=ROUNDING)
    assert rollouts.returns(rollout, full).shape == (0,)


def test_one_token_more_is_one_eviction_that_nothing_follows(
    rollouts: Rollouts, agents: Agents, tokens: list[int]
) -> None:
    full = rollouts.full(tokens[:97])
    rollout = rollouts.roll(tokens[:97], agents, seeded(0))
    assert [e.seen for e in rollout.evictions] == [96]
    np.testing.assert_allclose(rollout.losses, full.losses, atol=ROUNDING)
    assert rollouts.returns(rollout, full).tolist() == [0]


def test_losses_change_from_the_first_eviction_on(
    rollouts: Rollouts, agents: Agents, tokens: list[int]
) -> None:
    full, rollout = rollouts.full(tokens), rollouts.roll(tokens, agents, seeded(0))
    assert [e.seen for e in rollout.evictions] == [96, 128, 160, 192, 224]
    rise = np.abs(rollout.losses - full.losses)
    assert rise[:96].max() < ROUNDING
    assert (rise[96:] > ROUNDING).mean() > 0.5
    again = rollouts.roll(tokens, agents, seeded(0))
    np.testing.assert_array_equal(again.losses, rollout.losses)
    other = rollouts.roll(tokens, agents, seeded(1))
    assert (other.losses[96:] != rollout.losses[96:]).any()


# -- actions -------------------------------------------------------------------------------------


def test_what_is_drawn_is_what_the_cache_loses(
    rollouts: Rollouts, agents: Agents, tokens: list[int], held: list[Any]
) -> None:
    rollout = rollouts.roll(tokens, agents, seeded(3))
    assert [seen for seen, _ in held] == [e.seen for e in rollout.evictions]
    before = [set() for _ in range(10)]
    read = 0
    for (seen, after), eviction in zip(held, rollout.evictions, strict=True):
        assert eviction.candidates.shape == (10, min(64, 96 - 4 - 16))
        assert eviction.drawn.shape == (10, 32)
        dropped = eviction.candidates.gather(1, eviction.drawn).tolist()
        for head in range(10):
            before[head].update(range(read, seen))
            assert set(eviction.candidates[head].tolist()) <= before[head]
            assert set(range(4)).isdisjoint(dropped[head])
            assert max(eviction.candidates[head].tolist()) < seen - 16
            assert before[head] - set(after[head].tolist()) == set(dropped[head])
            before[head] = set(after[head].tolist())
        read = seen


def test_without_a_generator_it_drops_what_a_chat_drops(
    rollouts: Rollouts, agents: Agents, tokens: list[int], tmp_path: Path, held: list[Any]
) -> None:
    best = rollouts.roll(tokens, agents, None)
    assert best.evictions == []  # nothing was drawn
    by_agents = held[:]
    held.clear()
    about = checkpoint.About(agents.shape, HOW, {"architecture": "qwen3", "name": "test"}, 0)
    write_policy(tmp_path / "p.gguf", *policy_of(agents, about), "f32")
    losses = rollouts.read(tokens, get_policy(tmp_path / "p.gguf"))
    assert [seen for seen, _ in held] == [seen for seen, _ in by_agents] == [96, 128, 160, 192, 224]
    for (_, one), (_, other) in zip(held, by_agents, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(losses, best.losses, atol=ROUNDING)


def test_agents_of_layers_drop_what_those_of_their_heads_drop(
    rollouts: Rollouts, agents: Agents, tokens: list[int], held: list[Any]
) -> None:
    one = rollouts.roll(tokens, agents, None)
    by_heads = held[:]
    held.clear()
    other = rollouts.roll(tokens, whole_layers(agents), None)
    assert len(held) == len(by_heads) == 5
    # rounding may put two equal scores in the other order
    same = np.mean([a == b for (_, a), (_, b) in zip(held, by_heads, strict=True)])
    assert same > 0.99
    assert other.features.shape[0] == agents.shape.n_layer
    np.testing.assert_allclose(other.losses.mean(), one.losses.mean(), atol=ROUNDING)


def test_probabilities_are_those_at_the_time_of_the_draw(
    rollouts: Rollouts, agents: Agents, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A score is computed when the tokens after it are known, from those that are left; later it is
    computed again for the text as a whole."""
    then = []

    def draw(scores: Any, n_drop: int, temperature: float, generator: Any) -> Any:
        candidates, drawn = grpo.draw(scores, n_drop, temperature, generator)
        chosen = scores.gather(-1, candidates)
        then.append(grpo.log_probabilities(chosen, drawn, temperature))
        return candidates, drawn

    monkeypatch.setattr("kvp_edge.training.rollouts.draw", draw)
    rollout = rollouts.roll(tokens, agents, seeded(4))
    now = rollout.log_probabilities(agents, 0.1)
    assert now.shape == (10, 5, 32)
    torch.testing.assert_close(now.detach(), torch.stack(then, 1), rtol=1e-3, atol=1e-3)
    now.sum().backward()
    assert agents.fc1.grad is not None
    assert torch.isfinite(agents.fc1.grad).all()
    agents.zero_grad()


@pytest.mark.parametrize(("budget", "every"), [(70, 32), (50, 7), (40, 100)])
def test_every_eviction_drops_as_many_whatever_the_budget(
    bundled_model: str, agents: Agents, tokens: list[int], budget: int, every: int
) -> None:
    settings = Settings(**{**HOW, "budget": budget, "every": every})
    rollouts = Rollouts(bundled_model, N_TOKENS, settings, dict(QUIET))
    try:
        rollout = rollouts.roll(tokens, agents, seeded(5))
        full = rollouts.full(tokens)
    finally:
        rollouts.close()
    seen = list(range(budget + every, N_TOKENS, every))
    assert [e.seen for e in rollout.evictions] == seen
    assert {e.drawn.shape[1] for e in rollout.evictions} == {every}
    assert rollout.log_probabilities(agents, 0.1).shape == (10, len(seen), every)
    assert np.abs(rollout.losses - full.losses)[: seen[0]].max() < ROUNDING


# -- rewards -------------------------------------------------------------------------------------


def random_rise() -> tuple[NDArray[np.float32], Reading]:
    rng = np.random.default_rng(0)
    full, entropies, rise = rng.exponential(size=(3, 50)).astype(np.float32)
    return full + 2 * rise - 1, Reading(full, entropies)


@pytest.mark.parametrize("reward", ["all", "low", "low-large"])
def test_penalties_are_squared_rises_of_the_tokens_that_count(
    rollouts: Rollouts, monkeypatch: pytest.MonkeyPatch, reward: Any
) -> None:
    settings = Settings(**HOW, reward=reward, low_entropy=0.6, large=1.0)
    monkeypatch.setattr(rollouts, "settings", settings)
    losses, full = random_rise()
    surest = set(np.argsort(full.entropies)[:30].tolist())
    want = np.zeros(50)
    for i in range(50):
        rise = float(losses[i]) - float(full.losses[i])
        if reward == "all" or (i in surest and (reward == "low" or rise > 1.0)):
            want[i] = max(rise, 0.0) ** 2
    got = rollouts.penalties(losses, full)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    assert 0 < (got > 0).sum() < 50


def test_losses_that_fall_are_no_penalty(rollouts: Rollouts) -> None:
    _, full = random_rise()
    assert (rollouts.penalties(full.losses - 5, full) == 0).all()


def test_returns_count_what_was_predicted_after_each_eviction(
    rollouts: Rollouts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollouts, "settings", Settings(**HOW, reward="all"))
    losses, full = random_rise()
    nothing = torch.zeros(1, 0, dtype=torch.long)
    evictions = [Eviction(seen, nothing, nothing) for seen in (1, 20, 49, 50)]
    rollout = Rollout(torch.zeros(0), evictions, losses)
    penalties = rollouts.penalties(losses, full)
    # loss i is of token i + 1, predicted when i + 1 tokens were read
    want = [-sum(penalties[i] for i in range(50) if i + 1 > e.seen) for e in evictions]
    np.testing.assert_allclose(rollouts.returns(rollout, full), want, rtol=1e-5)
    assert want[-1] == 0


# -- whole runs ----------------------------------------------------------------------------------

TINY: dict[str, Any] = {
    **HOW,
    "steps": 3,
    "token_steps": 2,
    "grpo_steps": 2,
    "texts": 2,
    "rollouts": 2,
    "states": 1,
    "tokens": 64,
    "eval_every": 3,
    "validation": 0.34,
    "validation_states": 2,
    "reward": "all",
}


@pytest.fixture(scope="module")
def traces(bundled_model: str, book: str, tmp_path_factory: pytest.TempPathFactory) -> TraceSet:
    folder = tmp_path_factory.mktemp("traces")
    (folder / "text.txt").write_text(book[3000:8000])
    how = {"length": 180, "n_traces": 4, "block": 16, **QUIET}
    sources = [TextFile(str(folder / "text.txt"))]
    return TraceSet(capture_traces(bundled_model, sources, folder / "out", **how))


def run(traces: Any, out: Path, model: str | None, **how: Any) -> Any:
    settings = Settings(**{**TINY, **how.pop("changed", {})})
    return train(traces, out, settings, progress=False, model=model, engine=dict(QUIET), **how)


def test_a_run_with_rollouts_in_parts_ends_like_an_uninterrupted_one(
    traces: TraceSet, bundled_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # each stop validates, and so must a run without stops to be the same
    monkeypatch.setattr("kvp_edge.training.phases._EVAL_IN_MODEL", 1)
    result = run(traces, tmp_path / "whole", bundled_model)
    assert result.loss_increase is not None
    before, after = result.loss_increase
    assert np.isfinite(before)
    assert after <= before  # the best, and the start is one of them
    for steps in (3, 1):  # until the first step in the model, and between the two
        run(traces, tmp_path / "parts", bundled_model, stop_after=steps)
    again = run(traces, tmp_path / "parts", bundled_model)
    assert again.loss_increase == result.loss_increase
    for name in (checkpoint.BEST, checkpoint.LAST):
        one, other = (checkpoint.load(tmp_path / part / name)[0] for part in ("whole", "parts"))
        one.pop("seconds", None)
        other.pop("seconds", None)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_rollouts_move_the_agents_but_little(
    traces: TraceSet, bundled_model: str, tmp_path: Path
) -> None:
    run(traces, tmp_path, bundled_model, changed={"token_steps": 0})
    last = checkpoint.load(tmp_path / checkpoint.LAST)[0]
    moved = (last["agents.fc1"] - last["start.fc1"]).abs()
    assert (moved.flatten(1).max(1).values > 0).all()  # in every head
    assert float(moved.max()) < 0.01


def test_rollouts_without_the_traced_model_are_refused(traces: TraceSet, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="name the traced file with --model, or leave"):
        run(traces, tmp_path / "out", None)
    other = write_model_file(tmp_path)
    with pytest.raises(TrainingError, match="other.gguf' is not the model that was traced"):
        run(traces, tmp_path / "out", other)
    unsaid = SyntheticTraces(4)
    unsaid.model = {"architecture": "llama"}
    with pytest.raises(TrainingError, match="the traces have no token ids"):
        run(unsaid, tmp_path / "out", other)
    assert run(traces, tmp_path / "none", None, changed={"grpo_steps": 0}).loss_increase is None


def write_model_file(folder: Path) -> str:
    write_model(folder / "other.gguf", ModelShape("llama"))
    return str(folder / "other.gguf")


def test_texts_too_short_for_rollouts_are_refused(
    traces: TraceSet, bundled_model: str, tmp_path: Path
) -> None:
    sizes = {len(trace) for trace in traces}
    assert sizes == {180}
    for budget, every in ((116, 32), (80, 50)):
        with pytest.raises(TrainingError, match="no text .* has more than 180 tokens"):
            run(traces, tmp_path, bundled_model, changed={"budget": budget, "every": every})


def test_the_recent_window_covers_what_scores_are_made_of() -> None:
    Settings(**{**HOW, "context": 9, "recent": 8})
    with pytest.raises(TrainingError, match=r"recent \(7\) must be at least 8 for rollouts"):
        Settings(**{**HOW, "context": 9, "recent": 7})
    Settings(context=9, recent=7)  # nor do other objectives ask for it
