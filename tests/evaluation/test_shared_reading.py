"""One-shot mode reads a conversation once for all settings; records are those of reading anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import RandomModel, random_tokens
from kvp_edge.binding.queries import Queries
from kvp_edge.cli import main
from kvp_edge.errors import PolicyFileError
from kvp_edge.evaluation import run
from kvp_edge.evaluation.readers import OWN
from kvp_edge.evaluation.records import FULL, GOLDEN, ORACLE, SHIFT, Record, read_records
from kvp_edge.evaluation.run import Run
from kvp_edge.evaluation.setting import Prompt, Setting
from kvp_edge.evaluation.tasks import TASKS
from kvp_edge.llama import Llama
from kvp_edge.llamacpp.context_shift import ContextShift
from kvp_edge.measuring import MeasuringLlama
from kvp_edge.policies import H2O, CacheView, SnapKV
from kvp_edge.policies.policy_of_model import own_policy
from kvp_edge.policy_file import read_policy, write_policy
from kvp_edge.traces.tracer import Tracer
from makers.gguf_models import ModelShape

ENGINE: dict[str, Any] = {"verbose": False, "n_threads": 1, "n_threads_batch": 1}
LENGTH = 512


@pytest.fixture(scope="module")
def asked(bundled_model: str) -> list[Prompt]:
    """A question, a text with an ending, and several questions one after the other."""
    llm = Llama(bundled_model, n_ctx=256, **ENGINE)
    made = run.prompts(llm, TASKS, ["fact", "books", "quiz"], LENGTH, 1, seed=0)
    llm.close()
    return made


@pytest.fixture(scope="module")
def the_run(bundled_model: str) -> Run:
    return Run(bundled_model, 0, "f16", "f16", ENGINE)


def jobs(asked: list[Prompt], options: Sequence[tuple[str, int | None]], **how: Any) -> list[Any]:
    longest = max(prompt.longest for prompt in asked)
    base = Setting("one-shot", "unseen", "head", LENGTH, longest, None, FULL, True)
    return [
        (replace(base, policy=policy, budget=budget, **how), asked) for policy, budget in options
    ]


def read_anew(model: str, setting: Setting, prompt: Prompt) -> dict[str, Any]:
    """What is compared of a record, from a model that was loaded for it and for nothing else."""
    n, budget = setting.longest, setting.budget
    policy = own_policy(model) if setting.policy == OWN else setting.policy
    how: dict[str, Any] = {
        "granularity": setting.granularity,
        "keep_whole": setting.keep_whole,
        "isolate_turns": setting.isolate_turns,
        **({} if setting.protected else {"sinks": 0, "recent": 1}),
    }
    whole = budget is None or setting.policy == SHIFT
    with closing(
        MeasuringLlama.whole(model, n, **ENGINE)
        if whole
        else MeasuringLlama(model, n, n, budget or n, policy=policy, **how, **ENGINE)
    ) as subject:
        shift = ContextShift(subject, cells=budget) if setting.policy == SHIFT else None
        if shift is not None:
            subject.read = shift.read  # type: ignore[method-assign]
        seen = setting.question == "seen" and prompt.item is not None
        tokens: list[int] = prompt.tokens.tolist()
        cut = len(tokens) if seen else prompt.border
        subject.read(tokens[:cut])
        if not whole:
            subject.evict()
        kept, reply = subject.held, ""
        if prompt.item is None:
            score = round(float(subject.losses(tokens[cut:]).mean()), 6)
        else:
            if tokens[cut:]:
                subject.read(tokens[cut:])
            replies = [subject.text(r) for r in subject.converse(prompt.turns, prompt.reply_tokens)]
            score, reply = prompt.item.score(*replies), "\n".join(replies)
        stats = subject.kv_stats
        return {
            "kept": kept,
            "dropped": cut - kept,
            "evictions": stats.evictions if shift is None else shift.shifts,
            "reply": reply,
            "score": score,
            "kv_bytes": stats.kv_bytes * subject.n_tokens // stats.cells,
        }


def assert_as_anew(model: str, records: list[Record], all_jobs: list[Any]) -> None:
    found = {record.key(): record for record in records}
    a_run = Run(model, 0, "f16", "f16", ENGINE)
    wanted = [(setting, prompt) for setting, todo in all_jobs for prompt in todo]
    assert len(records) == len(found) == len(wanted)
    for setting, prompt in wanted:
        record, anew = found[a_run.key(setting, prompt)], read_anew(model, setting, prompt)
        assert {name: getattr(record, name) for name in anew} == anew, (setting, prompt.task)


# Queries are looked at in four ways here, one of which clears what it has counted.
COMPARED = [
    (FULL, None),
    ("h2o", 64),
    ("h2o", 128),
    ("snapkv", 64),
    ("tova", 64),
    ("expected-attention", 64),
    (OWN, 64),
    (OWN, 128),
    ("keydiff", 64),
    ("random", 64),
    (SHIFT, 64),
]


@pytest.mark.parametrize("question", ["unseen", "seen"])
@pytest.mark.parametrize("granularity", ["head", "token"])
def test_records_are_those_of_reading_every_conversation_anew(
    the_run: Run, asked: list[Prompt], question: str, granularity: str
) -> None:
    todo = jobs(asked, COMPARED, question=question, granularity=granularity)
    assert_as_anew(the_run.model, list(run.run_all(the_run, todo, 1)), todo)


@pytest.mark.parametrize(
    "how",
    [{"keep_whole": "sentences"}, {"isolate_turns": True}, {"protected": False}],
    ids=lambda how: next(iter(how)),
)
def test_so_are_those_of_other_rules(
    the_run: Run, asked: list[Prompt], how: dict[str, Any]
) -> None:
    todo = jobs(asked[:2], [("snapkv", 64), ("random", 64), ("keydiff", 128)], **how)
    assert_as_anew(the_run.model, list(run.run_all(the_run, todo, 1)), todo)


@pytest.mark.parametrize("mode", ["one-shot", "bounded"])
def test_both_oracles_and_all_budgets_share_a_trace_and_differ_from_each_other_as_alone(
    the_run: Run, asked: list[Prompt], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    traced: list[int] = []
    capture = Tracer.capture

    def counted(self: Tracer, tokens: Sequence[int], *args: Any) -> Any:
        traced.append(len(tokens))
        return capture(self, tokens, *args)

    monkeypatch.setattr(Tracer, "capture", counted)
    todo = jobs(asked, [(ORACLE, 48), (GOLDEN, 48), (ORACLE, 96), (GOLDEN, 96)], mode=mode)
    together = list(run.run_all(the_run, todo, 1))
    assert len(traced) == len(asked)
    alone = [record for job in todo for record in run.run_all(the_run, [job], 1)]
    assert len({r.score for r in alone if r.measure == "loss"}) == 4
    in_order = sorted(together, key=lambda r: (r.budget, r.policy, r.task))
    for one, other in zip(
        in_order, sorted(alone, key=lambda r: (r.budget, r.policy, r.task)), strict=True
    ):
        assert replace(one, seconds=0.0) == replace(other, seconds=0.0)


def test_a_conversation_is_read_once_and_only_if_a_record_of_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read: list[int] = []
    evaluate = MeasuringLlama.eval

    def counted(self: MeasuringLlama, tokens: Sequence[int]) -> None:
        read.append(len(tokens))
        evaluate(self, tokens)

    monkeypatch.setattr(MeasuringLlama, "eval", counted)
    command = ["eval", "--threads", "1", "--mode", "one-shot", "--tasks", "fact", "--items", "2"]
    command += ["--lengths", "400", "--budgets", "1/4,1/8", "--out", str(tmp_path)]

    def contexts(policies: str) -> int:
        read.clear()
        assert main([*command, "--policies", policies]) == 0
        capsys.readouterr()
        return sum(n > 200 for n in read)

    assert contexts("keydiff,random,snapkv") == 2
    assert contexts("keydiff,random,snapkv") == 0
    lines = (tmp_path / "records.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 14
    (tmp_path / "records.jsonl").write_text("".join(lines[:3] + lines[4:]))
    assert contexts("keydiff,random,snapkv") == 1
    assert contexts("keydiff,knorm") == 2
    found = read_records(tmp_path / "records.jsonl")
    assert len({record.key() for record in found}) == len(found) == 18


def test_two_workers_find_the_same(the_run: Run, asked: list[Prompt]) -> None:
    # a job for each task, as the command makes them for workers
    todo = [
        (setting, [prompt])
        for prompt in asked[:2]
        for setting, _ in jobs(asked, [(FULL, None), ("h2o", 64), (SHIFT, 64)])
    ]
    one, two = (
        sorted((replace(r, seconds=0.0) for r in run.run_all(the_run, todo, n)), key=Record.key)
        for n in (1, 2)
    )
    assert one == two
    assert len(one) == len(todo)


def test_a_context_is_scored_once_for_all_budgets_of_a_policy(
    the_run: Run, asked: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[str] = []
    attention = CacheView.attention

    def counted(self: CacheView, queries: Queries) -> Any:
        scored.append("tova" if len(queries) == 1 else "h2o")
        return attention(self, queries)

    monkeypatch.setattr(CacheView, "attention", counted)
    budgets = (48, 64, 96)
    todo = jobs(asked[:2], [(policy, b) for policy in ("h2o", "tova") for b in budgets])
    assert len(list(run.run_all(the_run, todo, 1))) == 12
    assert scored == ["h2o", "tova"] * 2


@pytest.fixture
def subject(bundled_model: str) -> Iterator[MeasuringLlama]:
    with closing(
        MeasuringLlama(bundled_model, 700, 700, 700, policy="expected-attention", **ENGINE)
    ) as made:
        yield made


def test_after_going_back_logits_queries_and_cells_are_those_of_reading(
    subject: MeasuringLlama,
) -> None:
    tokens = random_tokens(600)
    subject.read(tokens)
    assert subject.kv.query_log is not None
    mark, read = subject.bookmark(), subject.newest_logits().copy()
    queries = subject.kv.query_log.read(600)
    kept = []
    for policy in (SnapKV(), H2O(), H2O()):
        subject.go_back(mark)
        subject.policy = policy
        subject.limit(100)
        np.testing.assert_array_equal(subject.newest_logits(), read)
        subject.evict()
        assert (subject.held, subject.evictions) == (100, 1)
        kept.append(subject.kv_indices)
        subject.read(random_tokens(40, seed=1))
    assert (kept[1] == kept[2]).all()  # the first one has counted its queries for itself alone
    assert (kept[0] != kept[1]).any()
    subject.go_back(mark)
    subject.limit(700)
    assert (subject.held, subject.evictions, subject.n_tokens) == (600, 0, 600)
    again = subject.kv.query_log.read(600)
    np.testing.assert_array_equal(again.queries, queries.queries)
    np.testing.assert_array_equal(again.indices, queries.indices)
    assert subject.kv is not None
    assert subject.kv.cache.check_cells(np.arange(600, dtype=np.int32))  # scored where they lie
    subject.read(tokens[:64])
    went_on = subject.newest_logits().copy()
    subject.forget()
    subject.read(tokens)
    subject.read(tokens[:64])
    np.testing.assert_array_equal(subject.newest_logits(), went_on)


@pytest.mark.parametrize("granularity", ["head", "token"])
@pytest.mark.parametrize(
    ("shape", "cache"),
    [
        (
            ModelShape("gemma3", head_dim=64, n_layer=4, sliding_window=24),
            {"type_k": 0, "type_v": 0},
        ),
        (ModelShape("qwen2", head_dim=64, n_head=2), {"type_k": 8, "type_v": 8}),
        (ModelShape("llama"), {"pack": "state", "flash_attn": True}),
    ],
    ids=["window", "quantised", "state"],
)
def test_so_are_they_in_other_caches(
    random_model: Callable[[ModelShape], RandomModel],
    shape: ModelShape,
    cache: dict[str, Any],
    granularity: str,
) -> None:
    if cache.get("type_v") == 8:
        cache = {**cache, "flash_attn": True}  # llama.cpp has quantised values only with it
    n, path, how = 300, random_model(shape).path, {"granularity": granularity, **cache, **ENGINE}
    for seed in (0, 1):
        tokens, more = random_tokens(n, seed), random_tokens(20, seed + 9)
        with closing(MeasuringLlama(path, 400, 400, 80, policy="snapkv", **how)) as anew:
            anew.read(tokens)
            anew.evict()
            kept = anew.kv_indices
            anew.read(more)
            wanted = anew.newest_logits().copy()
        with closing(MeasuringLlama(path, 400, 400, 400, policy="h2o", **how)) as shared:
            shared.read(random_tokens(n, seed=5))
            shared.forget()
            shared.read(tokens)
            mark = shared.bookmark()
            for policy, budget in ((H2O(), 100), (SnapKV(), 80), (SnapKV(), 80)):
                shared.go_back(mark)
                shared.policy = policy
                shared.limit(budget)
                shared.evict()
                held = shared.kv_indices
                shared.read(more)
            np.testing.assert_array_equal(held, kept)
            got = shared.newest_logits()
            if shape.sliding_window:  # cells in another order: other rounding
                np.testing.assert_allclose(got, wanted, atol=5e-3)
            else:
                np.testing.assert_array_equal(got, wanted)


def test_a_policy_of_another_model_is_refused_before_anything_is_read(
    the_run: Run, asked: list[Prompt], tmp_path: Path
) -> None:
    info, weights = read_policy(str(own_policy(the_run.model)))
    path = tmp_path / "other.gguf"
    write_policy(path, replace(info, architecture="other"), weights)
    todo = jobs(asked[:1], [(FULL, None), ("keydiff", 64), (str(path), 64)])
    records = run.run_all(the_run, todo, 1)
    with pytest.raises(PolicyFileError, match="'other'"):
        next(records)
