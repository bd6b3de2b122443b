"""Attention statistics as inputs of a learned policy: from a trace and from logged queries against
plain loops, and a policy that looks at them from training to a chat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch", reason="training needs torch: pip install kvp_edge[train]")
pytest.importorskip("safetensors", reason="checkpoints need safetensors: kvp_edge[train]")

from conftest import DATA, RandomModel, random_tokens  # noqa: E402
from kvp_edge.binding.policy import NativePolicy  # noqa: E402
from kvp_edge.binding.queries import Queries  # noqa: E402
from kvp_edge.cli import main  # noqa: E402
from kvp_edge.errors import PolicyFileError, SessionError, TrainingError  # noqa: E402
from kvp_edge.export import export  # noqa: E402
from kvp_edge.export.onnx_graph import write_onnx  # noqa: E402
from kvp_edge.policies import Learned  # noqa: E402
from kvp_edge.policies.attention_statistics import attention_statistics  # noqa: E402
from kvp_edge.policies.discovery import own_policy  # noqa: E402
from kvp_edge.policy_file import PolicyInfo, read_policy, write_policy  # noqa: E402
from kvp_edge.traces.format import Trace, TraceSet  # noqa: E402
from kvp_edge.traces.sources import TextFile  # noqa: E402
from kvp_edge.traces.tracer import Tracer  # noqa: E402
from kvp_edge.traces.writer import capture_traces  # noqa: E402
from kvp_edge.training import checkpoint  # noqa: E402
from kvp_edge.training.data import (  # noqa: E402
    Protected,
    Sampler,
    standardisation,
    statistics_of,
)
from kvp_edge.training.foresight import GoldenEvictions  # noqa: E402
from kvp_edge.training.train import Settings, train  # noqa: E402
from kvp_edge.training.validate import agent_scorer  # noqa: E402
from makers.gguf_models import ModelShape  # noqa: E402
from makers.policies import random_weights  # noqa: E402
from makers.synthetic_traces import SyntheticTrace, SyntheticTraces  # noqa: E402

Floats = NDArray[np.float32]

SHAPE = ModelShape("llama", head_dim=64)
L, H, GROUP, D = 2, 2, 2, 64
T, BLOCK, N_PROMPT = 90, 4, 50  # so the first block has 2 queries
HEADS = np.arange(L * H)
QUIET = {"n_threads": 1, "n_threads_batch": 1}

TINY: dict[str, Any] = {
    "objective": "foresight",
    "hidden": 8,
    "context": 1,
    "steps": 8,
    "token_steps": 4,
    "grpo_steps": 0,
    "lr": 1e-2,
    "warmup": 2,
    "states": 2,
    "tokens": 128,
    "eval_every": 4,
    "validation_states": 4,
    "budget": 96,
    "every": 32,
    "statistics": 32,
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def log(paid: Any) -> Floats:
    return np.log(np.float32(1e-4) + np.asarray(paid, np.float32))


# -- from a trace --------------------------------------------------------------------------------


@dataclass
class Seen:
    """A text read by a random model: its trace, and f32 [L * H, T, T] of the largest attention in
    a group, query by token, from a reference implementation."""

    model: RandomModel
    tokens: list[int]
    trace: Trace
    largest: Floats


@pytest.fixture(scope="module")
def seen(random_model: Callable[[ModelShape], RandomModel]) -> Seen:
    model, tokens = random_model(SHAPE), random_tokens(T)
    tracer = Tracer(model.path, T, block=BLOCK, verbose=False, type_k=0, type_v=0, **QUIET)
    c = tracer.capture(tokens, N_PROMPT)
    tracer.close()
    trace = Trace(
        c.keys, c.values, c.indices, c.tokens, c.sums, N_PROMPT, c.blocks, c.blocks.scale, "made"
    )
    paid = model.reference.attention(tokens)
    return Seen(model, tokens, trace, paid.reshape(L * H, GROUP, T, T).max(axis=1))


@pytest.mark.parametrize("n", [50, 58, 18, T])
def test_statistics_are_means_over_the_newest_queries_of_a_trace(seen: Seen, n: int) -> None:
    heads = np.array([0, 3])
    got = statistics_of(seen.trace, n, heads, 0, 16)
    assert got is not None
    assert got.shape == (2, n, 2)
    for i, newest in enumerate((16, 8)):
        for head, mine in zip(heads, got, strict=True):
            for token in range(n):
                paid = [seen.largest[head, query, token] for query in range(n - newest, n)]
                assert mine[token, i] == pytest.approx(log(np.mean(paid)), abs=2e-2)


def test_a_cut_before_the_window_is_full_takes_the_queries_there_are(seen: Seen) -> None:
    got = statistics_of(seen.trace, 6, HEADS, 0, 16)
    assert got is not None
    want = log(seen.largest[:, :6, :6].mean(1))
    np.testing.assert_allclose(got, np.stack((want, want), -1), atol=2e-2)


def test_held_tokens_share_what_all_were_paid(seen: Seen) -> None:
    n, held = 58, np.random.default_rng(0).random((L * H, 58)) < 0.4
    got = statistics_of(seen.trace, n, HEADS, 0, 16, held)
    full = statistics_of(seen.trace, n, HEADS, 0, 16)
    assert got is not None
    assert full is not None
    for head, i in np.ndindex(L * H, 2):
        paid = np.exp(full[head, :, i]) - 1e-4
        share = paid[held[head]] * (paid.sum() / paid[held[head]].sum())
        np.testing.assert_allclose(got[head, held[head], i], log(share), atol=1e-4)
    everything = statistics_of(seen.trace, n, HEADS, 0, 16, np.ones((1, n), np.bool_))
    np.testing.assert_allclose(everything, full, atol=1e-6)
    assert statistics_of(seen.trace, n, HEADS, 0, 0) is None


def test_batches_hold_the_statistics_of_the_state_that_was_drawn(seen: Seen) -> None:
    protected = Protected(2, 8)
    golden = GoldenEvictions(32, 16, protected)
    sampler = Sampler([seen.trace], [0], protected, 1, 6, 128, states_of=golden, statistics=8)
    batch = sampler.draw(np.random.default_rng(0), HEADS)
    states = {
        n: statistics_of(seen.trace, n, HEADS, 0, 8, held) for n, held in golden.of(seen.trace, 0)
    }
    assert len(states) > 1
    features = batch.features.reshape(L * H, 6, 128, -1).numpy()
    assert features.shape[-1] == 2 * D + 4 + 2
    for state in range(6):
        m = int(np.flatnonzero(batch.present[:, state].any(0)).max()) + 1
        want = states[m + protected.sinks + protected.recent]
        assert want is not None
        np.testing.assert_array_equal(features[:, state, :m, -2:], want[:, 2 : m + 2])


def test_they_are_standardised_like_the_other_features(seen: Seen) -> None:
    mean, scale = standardisation([seen.trace], [0], HEADS, statistics=16)
    n = int(seen.trace.splits[len(seen.trace.splits) // 2])
    want = statistics_of(seen.trace, n, HEADS, 0, 16)
    assert want is not None
    np.testing.assert_allclose(mean[:, -2:], want.mean(1), rtol=1e-4)
    np.testing.assert_allclose(1 / scale[:, -2:], want.std(1), rtol=1e-3)


# -- from logged queries -------------------------------------------------------------------------


def drawn(n: int, m: int, seed: int = 0) -> tuple[Queries, Floats]:
    """Queries of the newest m of n tokens, and keys of all."""
    rng = np.random.default_rng(seed)
    queries = rng.normal(size=(L, H * GROUP, m, D)).astype(np.float32)
    keys = rng.normal(size=(L, H, n, D)).astype(np.float32)
    at = np.arange(n - m, n, dtype=np.int32)
    return Queries(queries, at, np.full(L, 0.1, np.float32)), keys


def by_definition(queries: Queries, keys: Floats, held: NDArray[np.int32], window: int) -> Floats:
    """One number after the other."""
    n = keys.shape[2]
    held = np.broadcast_to(held, (L, H, n))
    paid = np.zeros((L, H, n, 2))
    for layer, head in np.ndindex(L, H):
        for i, newest in enumerate((window, window // 2)):
            rows = []
            for j in list(range(len(queries)))[-newest:]:
                group = []
                for member in range(GROUP):
                    q = queries.queries[layer, head * GROUP + member, j]
                    e = np.exp(queries.scale[layer] * (keys[layer, head] @ q).astype(float))
                    e[held[layer, head] > queries.indices[j]] = 0
                    group.append(e / e.sum())
                rows.append(np.max(group, axis=0))
            paid[layer, head, :, i] = np.mean(rows, axis=0)
    return log(paid)


@pytest.mark.parametrize("m", [1, 3, 4, 8])
@pytest.mark.parametrize("granularity", ["token", "head"])
def test_statistics_of_a_log_are_their_definition(granularity: str, m: int) -> None:
    queries, keys = drawn(20, m)
    held = np.arange(20, dtype=np.int32)
    if granularity == "head":  # every head holds 20 of 30 tokens
        rng = np.random.default_rng(1)
        rows = [np.sort(rng.choice(30, 20, replace=False)) for _ in range(L * H)]
        held = np.array(rows, np.int32).reshape(L, H, 20)
        held[..., 0] = 0  # a query sees something
        queries = replace(queries, indices=np.arange(30 - m, 30, dtype=np.int32))
    got = attention_statistics(queries, keys, held, 8)
    np.testing.assert_allclose(got, by_definition(queries, keys, held, 8), atol=1e-4)


def test_without_a_query_nothing_was_paid() -> None:
    queries, keys = drawn(20, 0)
    got = attention_statistics(queries, keys, np.arange(20, dtype=np.int32), 8)
    np.testing.assert_allclose(got, np.log(1e-4), rtol=1e-6)


def test_a_log_and_a_trace_tell_the_same(
    seen: Seen, load: Callable[..., Any], tmp_path: Path
) -> None:
    """As long as nothing was dropped."""
    policy = Learned(random_policy(tmp_path / "p.gguf", window=16))
    llm = load(seen.model.path, n_ctx=999, kv_budget=200, policy=policy, type_k=0, type_v=0)
    llm.eval(seen.tokens[:58])
    _, keys, _ = llm._kv.cache.read(0, 58, 58, values=False)
    got = attention_statistics(policy.logged(), keys, np.arange(58, dtype=np.int32), 16)
    want = statistics_of(seen.trace, 58, HEADS, 0, 16)
    np.testing.assert_allclose(got.reshape(L * H, 58, 2), want, atol=2e-2)


# -- the file ------------------------------------------------------------------------------------

INFO = PolicyInfo("llama", L, H, D, D, hidden=8, context=1, objective="foresight", statistics=16)


def random_policy(path: Path, window: int) -> Path:
    info = replace(INFO, statistics=window)
    write_policy(path, info, random_weights(info), "f32")
    return path


def test_a_file_says_its_window_and_holds_its_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = random_policy(tmp_path / "p.gguf", 16)
    info, weights = read_policy(path)
    assert info.statistics == 16
    for name, array in random_weights(INFO).arrays().items():
        np.testing.assert_array_equal(weights.arrays()[name], array, err_msg=name)
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert list(tensors["blk.1.kvp_statistics.weight"].shape) == [2, 8, H]
    other = random_policy(tmp_path / "other.gguf", 18)
    assert Learned(path).identity() != Learned(other).identity()
    assert main(["inspect", str(path)]) == 0
    assert "of the newest 16 queries is looked at" in capsys.readouterr().out


def test_a_file_without_statistics_is_what_it_was_before_there_were_any(
    tmp_path: Path, bundled_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped = Path(own_policy(bundled_model) or "")
    info, weights = read_policy(shipped)
    assert (info.statistics, weights.statistics) == (0, None)
    write_policy(tmp_path / "again.gguf", info, weights, "f16")
    assert (tmp_path / "again.gguf").read_bytes() == shipped.read_bytes()
    policy = Learned(shipped)
    assert (policy.scope, policy.queries) == ("token", 0)
    assert policy.native_scorer is not None
    assert main(["inspect", str(shipped)]) == 0
    assert "queries" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"statistics": 15}, "kvp.statistics.window 15 .* must be even"),
        ({"context": 5}, "kvp.context_width 5; .* 1 with it"),
    ],
)
def test_a_file_that_cannot_be_is_refused(
    tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    info = replace(INFO, **change)
    write_policy(tmp_path / "p.gguf", info, random_weights(info), "f32")
    with pytest.raises(PolicyFileError, match=sentence):
        read_policy(tmp_path / "p.gguf")


def test_a_window_and_weights_go_together(tmp_path: Path) -> None:
    without = replace(INFO, statistics=0)
    with pytest.raises(PolicyFileError, match="window of 16 queries and no statistics weights"):
        write_policy(tmp_path / "p.gguf", INFO, random_weights(without))
    with pytest.raises(PolicyFileError, match="window of 0 queries and statistics weights"):
        write_policy(tmp_path / "p.gguf", without, random_weights(INFO))


def test_executors_that_see_no_queries_refuse_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="looks at attention statistics as well"):
        NativePolicy(random_weights(INFO))
    pytest.importorskip("onnx", reason="needs onnx: pip install kvp_edge[onnx]")
    with pytest.raises(PolicyFileError, match="looks at the attention of 16 queries"):
        write_onnx(tmp_path / "p.onnx", INFO, random_weights(INFO))


# -- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"objective": "kvp"}, "statistics is a setting of objective foresight"),
        ({"objective": "foresight", "statistics": 33}, "an even one, or 0 for none, not 33"),
        ({"objective": "foresight", "statistics": -2}, "an even one, or 0 for none, not -2"),
        ({"objective": "foresight", "context": 3}, "need --context 1, not 3"),
        ({"objective": "foresight", "grpo_steps": 5}, "need --grpo-steps 0, not 5"),
    ],
)
def test_impossible_settings_are_a_sentence(change: dict[str, Any], sentence: str) -> None:
    rest: dict[str, Any] = {"statistics": 32, "context": 1}
    if change["objective"] == "foresight":
        rest["grpo_steps"] = 0
    with pytest.raises(TrainingError, match=sentence):
        Settings(**{**rest, **change})


class AttendedTrace(SyntheticTrace):
    """Earlier queries paid what later ones will."""

    def received(self, start: int, stop: int, n_tokens: int | None = None) -> Floats:
        n = len(self.indices) if n_tokens is None else n_tokens
        return self.paid[:, :, :n] * np.float32(stop - start)


def attended(count: int) -> SyntheticTraces:
    """Traces whose importance neither keys nor values tell."""
    traces = SyntheticTraces(count, seed=5)
    rng = np.random.default_rng(6)
    traces.items = [AttendedTrace(**vars(trace)) for trace in traces.items]
    for trace in traces.items:
        paid = np.exp(2 * rng.normal(size=trace.paid.shape)).astype(np.float32)
        trace.paid = paid / paid.sum(-1, keepdims=True)
    return traces


def test_a_policy_learns_from_what_was_paid_where_keys_tell_nothing(tmp_path: Path) -> None:
    how = {**TINY, "importance": "sum", "steps": 100, "eval_every": 100, "states": 4, "budget": 64}
    how |= {"every": 16, "warmup": 10}
    traces = attended(10)
    sees = train(traces, tmp_path / "sees", Settings(**how), progress=False)
    blind = train(traces, tmp_path / "not", Settings(**{**how, "statistics": 0}), progress=False)
    assert (sees.quality.lost < 0.3 * blind.quality.lost).all()
    assert (sees.quality.cost < 1.5).all()


@pytest.mark.parametrize("stops", [(4, 8), (8,)])
def test_a_run_in_parts_ends_like_an_uninterrupted_one(
    tmp_path: Path, stops: tuple[int, ...]
) -> None:
    traces, how = attended(6), Settings(**{**TINY, "effort": 0.5, "eval_every": 4})
    train(traces, tmp_path / "whole", how, progress=False)
    done = 0
    for stop in stops:
        train(traces, tmp_path / "parts", how, progress=False, stop_after=stop - done)
        done = stop
    train(traces, tmp_path / "parts", how, progress=False)
    whole, parts = (checkpoint.load(tmp_path / x / checkpoint.BEST)[0] for x in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert whole["fc1"].shape[1] == 8 + 8 + 4 + 2


def test_traces_that_do_not_know_are_a_sentence(tmp_path: Path, seen: Seen) -> None:
    with pytest.raises(TrainingError, match="do not say what was paid before a cut"):
        train(SyntheticTraces(4), tmp_path, Settings(**TINY), progress=False)
    odd = Settings(**{**TINY, "statistics": 48})
    with pytest.raises(TrainingError, match="48 and 24 .* blocks of 16 .* multiple of 32"):
        train(attended(4), tmp_path, odd, progress=False)
    broken = replace(seen.trace, attention=np.full_like(seen.trace.attention, np.nan))
    with pytest.raises(TrainingError, match="trace 7 holds attention that is negative or not"):
        statistics_of(broken, 58, HEADS, 7, 16)


# -- from training to a chat ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def traces(bundled_model: str, tmp_path_factory: pytest.TempPathFactory) -> TraceSet:
    folder = tmp_path_factory.mktemp("traces")
    book = [TextFile(str(DATA / "penelope_brandling.txt"))]
    how: dict[str, Any] = {"length": 260, "n_traces": 4, "block": 16, **QUIET}
    return TraceSet(capture_traces(bundled_model, book, folder / "out", **how))


@pytest.fixture(scope="module")
def run(traces: TraceSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    train(traces, folder, Settings(**TINY), progress=False)
    return folder


@pytest.mark.parametrize("outtype", ["f32", "q8_0"])
@pytest.mark.parametrize("on_traces", [False, True])
def test_an_exported_file_scores_like_pytorch(
    run: Path, traces: TraceSet, tmp_path: Path, outtype: Any, on_traces: bool
) -> None:
    done = export(
        run,
        outfile=tmp_path / "p.gguf",
        outtype=outtype,
        traces=traces if on_traces else None,
    )
    assert done.parity is not None
    assert done.parity.executor < 1e-4
    assert done.parity.kept >= 0.999
    assert done.info.statistics == 32
    assert done.info.name == "kvp-Bookworm-4M-foresight-w1-a32"


def test_onnx_of_it_is_refused_before_anything_is_written(run: Path, tmp_path: Path) -> None:
    with pytest.raises(PolicyFileError, match="export it without --onnx"):
        export(run, outfile=tmp_path / "p.gguf", onnx=True)
    assert not list(tmp_path.iterdir())


class Watched(Learned):
    """Remembers what it was asked and what it answered."""

    asked: list[tuple[Floats, Floats, NDArray[np.int32], Queries, Floats]]

    def score(self, keys: Any, values: Any, positions: Any) -> Floats:
        found = super().score(keys, values, positions)
        self.asked.append((keys, values, np.array(positions), self.logged(), found))
        return found


@pytest.mark.parametrize("granularity", ["token", "head"])
def test_a_chat_keeps_what_pytorch_would_by_the_queries_that_were_logged(
    run: Path, traces: TraceSet, load: Any, bundled_model: str, tmp_path: Path, granularity: str
) -> None:
    done = export(run, outfile=tmp_path / "p.gguf", outtype="f32")
    policy = Watched(done.gguf)
    policy.asked = []
    budget, sinks, recent = 100, 4, 32
    held: list[NDArray[np.int32]] = []
    llm = load(
        bundled_model, n_ctx=4000, kv_budget=budget, reserve=156, sinks=sinks, recent=recent,
        policy=policy, granularity=granularity, on_evict=lambda _: held.append(llm.kv_indices),
    )  # fmt: skip
    llm.eval(traces[0].tokens.tolist())
    llm.eval(traces[1].tokens.tolist())
    assert len(policy.asked) > 1
    assert len(policy.asked) == len(held)
    agents, _ = checkpoint.load_agents(run)
    shape, info = agents.shape, done.info
    heads = (info.n_layer, info.n_head_kv)
    for (keys, values, positions, logged, scores), kept in zip(policy.asked, held, strict=True):
        n = keys.shape[2]
        assert len(logged) == 32
        assert logged.indices[-1] == positions.max()
        at = np.broadcast_to(positions, (*heads, n))
        p = at.astype(np.float32)
        place = np.stack(
            (np.log2(1 + p) / 16, np.sin(np.log2(1 + p)), np.cos(np.log2(1 + p)), 1 / (1 + p)), -1
        )
        paid = attention_statistics(logged, keys, positions, 32)
        features = np.concatenate((keys, values, place, paid), -1).reshape(shape.n_heads, 1, n, -1)
        with torch.no_grad():
            want = agents(torch.from_numpy(features)).numpy().reshape(*heads, n)
            whole = agents.token_scores(torch.from_numpy(want.reshape(-1, n))).numpy()
        np.testing.assert_allclose(scores, want, atol=1e-3 * max(1, np.abs(want).max()))
        ranked = scores if granularity == "head" else np.broadcast_to(whole, scores.shape)
        newest = positions.max() + 1
        for layer, head in np.ndindex(*heads):
            mine, there = ranked[layer, head].copy(), at[layer, head]
            mine[(there < sinks) | (there >= newest - recent)] = np.inf
            best = np.sort(there[np.argsort(-mine, kind="stable")[:budget]])
            stays = kept[layer, head] if granularity == "head" else kept
            assert len(np.intersect1d(best, stays)) >= budget - 1  # a tie may go either way
    with pytest.raises(SessionError, match="not possible with policy 'learned'"):
        llm.save_state()


def test_without_logged_queries_scores_are_finite_and_nobody_s_log_is_a_sentence(
    run: Path, traces: TraceSet, load: Any, bundled_model: str
) -> None:
    policy = Learned(export(run, outtype="f32").gguf)
    assert (policy.scope, policy.queries, policy.native_scorer) == ("cache", 32, None)
    trace = traces[0]
    cached = trace.keys.astype(np.float32), trace.values.astype(np.float32), trace.indices
    with pytest.raises(ValueError, match="'learned' looks at queries.*kv_budget"):
        policy.score(*cached)
    load(bundled_model, n_ctx=999, kv_budget=200, policy=policy)
    assert len(policy.logged()) == 0
    scores = policy.score(*cached)
    assert np.isfinite(scores).all()
    assert (scores.std(-1) > 0).all()


def test_validation_scores_by_the_statistics_at_the_cut(run: Path, traces: TraceSet) -> None:
    agents, _ = checkpoint.load_agents(run)
    trace, n = traces[0], int(traces[0].splits[8])
    without = replace(trace, attention=np.zeros_like(trace.attention))
    full, nothing = (agent_scorer(agents)(t, n) for t in (trace, without))
    assert full.shape == (10, n)
    assert (np.abs(full - nothing).max(1) > 1e-3).all()


def test_the_command_trains_with_statistics(traces: TraceSet, tmp_path: Path) -> None:
    words = [f"--{k.replace('_', '-')}={v}" for k, v in TINY.items()]
    assert main(["train", str(traces.path), "--out", str(tmp_path / "run"), *words]) == 0
    _, about = checkpoint.load_agents(tmp_path / "run")
    assert about.shape.statistics == 32
