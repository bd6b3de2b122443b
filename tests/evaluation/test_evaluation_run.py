"""kvp-edge eval: what is read, what is held, what is written down."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from conftest import random_tokens
from kvp_edge.cli import main
from kvp_edge.evaluation import run
from kvp_edge.evaluation.readers import OWN
from kvp_edge.evaluation.records import FULL, GOLDEN, ORACLE, SHIFT, Record, read_records
from kvp_edge.evaluation.run import Run
from kvp_edge.evaluation.setting import Prompt, Setting, budget_of
from kvp_edge.evaluation.tasks import TASKS
from kvp_edge.llama import Llama
from kvp_edge.measuring import MeasuringLlama, Shifted
from kvp_edge.policies import POLICIES
from kvp_edge.text.chat_prompt import prompt_tokens
from support.packages import needs

ENGINE: dict[str, Any] = {"verbose": False, "n_threads": 1, "n_threads_batch": 1}
LENGTH = 512


@pytest.fixture
def subject(bundled_model: str) -> Iterator[Any]:
    """subject(...) -> MeasuringLlama, closed after the test."""
    made: list[MeasuringLlama] = []

    def make(n_ctx: int, cells: int, budget: int, **kwargs: Any) -> MeasuringLlama:
        made.append(MeasuringLlama(bundled_model, n_ctx, cells, budget, **{**ENGINE, **kwargs}))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def asked(bundled_model: str) -> list[Prompt]:
    """Two questions, and two texts with an ending."""
    llm = Llama(bundled_model, n_ctx=256, **ENGINE)
    made = run.prompts(llm, TASKS, ["fact", "books"], LENGTH, 2, seed=0)
    llm.close()
    return made


def setting(**changes: Any) -> Setting:
    base = Setting("bounded", "unseen", "head", LENGTH, LENGTH + 64, 128, "keydiff", True)
    return replace(base, **changes)


def results(the_run: Run, how: Setting, asked: list[Prompt]) -> list[Record]:
    return [replace(record, seconds=0.0) for record in the_run.records(how, asked)]


@pytest.fixture(scope="module")
def the_run(bundled_model: str) -> Run:
    return Run(bundled_model, 0, "f16", "f16", ENGINE)


# -- the subject ---------------------------------------------------------------------------------


def test_never_more_than_the_cells_are_held_and_all_of_them_are_used(subject: Any) -> None:
    one = subject(600, 100, 75, policy="keydiff")
    held = []
    for token in random_tokens(300):
        one.read([token])
        held.append(one.held)
    assert max(held) == 100
    assert min(held[100:]) == 76  # an eviction leaves 75, then comes the token that wanted room
    one.forget()
    one.read(random_tokens(300))
    assert one.held <= 100
    assert one.evictions > 0


def test_cells_for_the_whole_conversation_drop_nothing(subject: Any) -> None:
    one = subject(300, 300, 300, policy="keydiff")
    one.read(random_tokens(300))
    assert (one.held, one.evictions) == (300, 0)


def test_loss_is_that_of_llama_cpps_own_logits(subject: Any, bundled_model: str) -> None:
    tokens = random_tokens(200)
    plain = llama_cpp.Llama(bundled_model, n_ctx=256, logits_all=True, **ENGINE)
    plain.eval(tokens)
    logits = np.array(plain.scores[:200], np.float64)
    plain.close()
    losses = np.log(np.exp(logits).sum(1))[:-1] - logits[np.arange(199), tokens[1:]]
    one = subject(300, 300, 300, policy="keydiff")
    one.read(tokens[:120])
    np.testing.assert_allclose(one.losses(tokens[120:]), losses[119:], atol=1e-2)
    one.forget()
    one.read(tokens[:199])
    assert one.losses(tokens[199:]) == pytest.approx(losses[-1:], abs=1e-2)


def test_loss_is_the_same_in_pieces_while_tokens_are_dropped(subject: Any) -> None:
    tokens = random_tokens(400)
    one = subject(500, 128, 96, policy="recency")
    one.read(tokens[:200])
    whole = one.losses(tokens[200:])
    one.forget()
    one.read(tokens[:200])
    parts = np.concatenate((one.losses(tokens[200:232]), one.losses(tokens[232:])))
    assert whole.mean() == pytest.approx(parts.mean(), abs=2e-3)


def test_the_shifted_subject_holds_no_more_than_its_cells(bundled_model: str) -> None:
    one = Shifted(bundled_model, 600, 100, **ENGINE)
    for token in random_tokens(300):
        one.read([token])
        assert one.held <= 100
    assert one.evictions > 0
    one.forget()
    one.read(random_tokens(50))
    assert (one.held, one.evictions) == (50, 0)
    one.close()


# -- what is asked -------------------------------------------------------------------------------


def test_a_prompt_is_cut_where_the_question_or_the_ending_begins(
    asked: list[Prompt], bundled_model: str
) -> None:
    llm = Llama(bundled_model, n_ctx=256, **ENGINE)
    for prompt in asked:
        later = llm.detokenize(prompt.tokens[prompt.border :].tolist()).decode()
        if prompt.item is not None:
            assert later.strip().startswith(prompt.item.question)
            assert len(later) < len(prompt.item.question) + 30
        else:
            assert len(prompt.tokens) - prompt.border > 50
        assert len(prompt.tokens) <= LENGTH + 1  # a plain text gets a token that begins it
    llm.close()


@pytest.mark.parametrize(
    ("text", "want"), [("1/4", 256), ("0.125", 128), ("1", 1024), ("512", 512), ("16", 16)]
)
def test_budgets_are_shares_or_tokens(text: str, want: int) -> None:
    assert budget_of(text, 1024) == want


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "1/0", "many", ""])
def test_a_budget_that_is_neither_is_refused_with_its_value(text: str) -> None:
    with pytest.raises(ValueError, match=f"not '{text}'"):
        budget_of(text, 1024)


def test_a_question_cannot_be_seen_before_tokens_are_dropped_while_reading() -> None:
    with pytest.raises(ValueError, match="--mode one-shot"):
        setting(question="seen")


# -- what comes of it ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full(the_run: Run, asked: list[Prompt]) -> list[Record]:
    return results(the_run, setting(budget=None, policy=FULL), asked)


@pytest.mark.parametrize(
    ("policy", "mode"),
    [
        *((policy, "bounded") for policy in (OWN, *POLICIES, SHIFT, ORACLE, GOLDEN)),
        (OWN, "one-shot"),
        ("h2o", "one-shot"),
    ],
)
def test_with_cells_for_everything_every_policy_equals_the_full_cache(
    the_run: Run, asked: list[Prompt], full: list[Record], policy: str, mode: Any
) -> None:
    how = setting(mode=mode, budget=LENGTH + 64, policy=policy)
    for one, other in zip(full, results(the_run, how, asked), strict=True):
        assert (one.reply, one.dropped, other.dropped) == (other.reply, 0, 0)
        assert other.score == pytest.approx(one.score, abs=2e-3)  # sums in another order


@pytest.mark.parametrize(
    ("policy", "mode"),
    [
        (OWN, "bounded"),
        ("h2o", "bounded"),
        (SHIFT, "bounded"),
        (ORACLE, "bounded"),
        ("random", "one-shot"),
        (ORACLE, "one-shot"),
    ],
)
def test_a_second_run_gives_the_same_records(
    the_run: Run, asked: list[Prompt], mode: Any, policy: str
) -> None:
    how = setting(mode=mode, policy=policy)
    first = results(the_run, how, asked)
    assert first == results(the_run, how, asked)
    for record, prompt in zip(first, asked, strict=True):
        assert 63 <= record.kept <= 128
        assert record.kept + record.dropped == prompt.border
        assert record.evictions > 0


def test_one_shot_keeps_the_budget_exactly_and_drops_once(
    the_run: Run, asked: list[Prompt]
) -> None:
    for question in ("unseen", "seen"):
        how = setting(mode="one-shot", question=question)
        for record, prompt in zip(results(the_run, how, asked), asked, strict=True):
            assert (record.kept, record.evictions) == (128, 1)
            read = prompt.border if prompt.item is None else len(prompt.tokens)
            assert record.dropped == (read if question == "seen" else prompt.border) - 128


@pytest.mark.parametrize("change", [{"keep_whole": "sentences"}, {"isolate_turns": True}])
def test_what_stays_whole_and_isolated_turns_reach_the_model_and_the_records(
    the_run: Run, bundled_model: str, change: dict[str, Any]
) -> None:
    llm = Llama(bundled_model, n_ctx=256, **ENGINE)
    says = [("user", "My dog is called Ralph, and he is brown."), ("assistant", "I see.")] * 15
    tokens = prompt_tokens(llm, [{"role": role, "content": text} for role, text in says])
    llm.close()
    chat = [Prompt("chat", 0, np.array(tokens, np.int32), len(tokens) - 5, None, 0)]
    usual, other = setting(policy="random"), setting(policy="random", **change)
    [one], [two] = results(the_run, usual, chat), results(the_run, other, chat)
    assert {name: getattr(two, name) for name in change} == change
    assert one.key() != two.key()
    held = [next(the_run.kept_tokens(how, chat)).kept for how in (usual, other)]
    assert (held[0] != held[1]).any()


def test_unprotected_policies_may_drop_the_first_and_the_newest_tokens(
    the_run: Run, asked: list[Prompt]
) -> None:
    [shown] = the_run.kept_tokens(setting(policy="random", protected=False), asked[:1])
    assert shown.protected.sum() == 1
    assert shown.protected[-1]
    [shown] = the_run.kept_tokens(setting(policy="random"), asked[:1])
    assert shown.protected[:4].all()
    assert shown.kept[:, :, shown.protected].all()


def test_kept_tokens_are_those_of_every_head(the_run: Run, asked: list[Prompt]) -> None:
    [shown] = the_run.kept_tokens(setting(mode="one-shot"), asked[:1])
    assert shown.kept.shape == (5, 2, asked[0].border)
    assert (shown.kept.sum(axis=2) == 128).all()
    assert not (shown.kept == shown.kept[:1, :1]).all()


def test_several_workers_find_the_same(the_run: Run, asked: list[Prompt]) -> None:
    jobs = [(setting(), [prompt]) for prompt in asked]
    one, two = (list(run.run_all(the_run, jobs, n)) for n in (1, 2))
    assert sorted((r.task, r.item, r.reply, r.score) for r in one) == sorted(
        (r.task, r.item, r.reply, r.score) for r in two
    )


def test_memory_is_that_of_the_most_tokens_held_at_once(the_run: Run, asked: list[Prompt]) -> None:
    per_token = 5 * 2 * 2 * 64 * 2  # layers, K and V, KV heads, head size, bytes of f16
    for policy in ("keydiff", SHIFT):
        [bounded] = the_run.records(setting(policy=policy), asked[:1])
        assert bounded.kv_bytes == 128 * per_token
    for all_at_first in (setting(mode="one-shot"), setting(policy="none", budget=None)):
        [found] = the_run.records(all_at_first, asked[:1])
        assert len(asked[0].tokens) * per_token < found.kv_bytes <= asked[0].longest * per_token


# -- the command ---------------------------------------------------------------------------------


COMMAND = ["eval", "--threads", "1", "--lengths", "400", "--budgets", "1/4", "--items", "2"]


def test_the_command_writes_records_report_and_pages_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = [*COMMAND, "--tasks", "fact,books", "--out", str(out), "--draw", "1"]
    assert main([*command, "--policies", "keydiff"]) == 0
    found = read_records(out / "records.jsonl")
    assert len(found) == 8  # two policies, two tasks, two items
    printed = capsys.readouterr().out
    assert printed.strip() == (out / "report.md").read_text().strip()
    assert "keydiff" in printed
    assert len(list((out / "kept").glob("*.html"))) == 2
    n_plots = len(list((out / "kept").glob("*.png")))

    # what is there is not read again
    lines = (out / "records.jsonl").read_text().splitlines()
    changed = [json.dumps({**json.loads(line), "reply": "from before"}) for line in lines[:-1]]
    (out / "records.jsonl").write_text("\n".join(changed) + "\n" + lines[-1][:20])
    assert main([*command, "--policies", "keydiff,recency"]) == 0
    capsys.readouterr()
    found = read_records(out / "records.jsonl")
    assert len(found) == 12
    assert [r.reply for r in found[:7]] == ["from before"] * 7
    assert {r.policy for r in found[8:]} == {"recency"}
    needs("matplotlib", "train")
    assert n_plots == 2


@pytest.mark.parametrize("mode", ["bounded", "one-shot"])
def test_a_run_interrupted_anywhere_goes_on_to_the_records_of_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    command = [*COMMAND, "--tasks", "fact", "--policies", "keydiff", "--mode", mode, "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    read, n_read, interrupted = MeasuringLlama.eval, 0, [2, 9, 17]

    def until(self: MeasuringLlama, tokens: Any) -> None:
        nonlocal n_read
        n_read += 1
        if interrupted and n_read == interrupted[0]:
            raise KeyboardInterrupt
        read(self, tokens)

    monkeypatch.setattr(MeasuringLlama, "eval", until)
    while interrupted:
        n_read = 0
        assert main([*command, str(tmp_path / "out")]) == 130
        del interrupted[0]
    assert main([*command, str(tmp_path / "out")]) == 0
    capsys.readouterr()
    whole, found = (read_records(tmp_path / name / "records.jsonl") for name in ("whole", "out"))
    for records in (whole, found):
        records[:] = sorted((replace(r, seconds=0.0) for r in records), key=str)
    assert found == whole


def test_tasks_are_listed_with_what_they_ask(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--list"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == list(TASKS)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (["--tasks", "nonsense"], "unknown task 'nonsense'"),
        (["--policies", "nonsense"], "unknown policy 'nonsense'"),
        (["--policies", "missing.gguf"], "missing.gguf"),
        (["--budgets", "many"], "not 'many'"),
        (["--lengths", "few"], "few"),
        (["--budgets", "4"], "at least 16 are needed"),
        (["--question", "seen"], "--mode one-shot"),
        (["--tasks", "fact", "--lengths", "20"], "20"),
    ],
)
def test_bad_input_is_a_sentence(
    wrong: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*COMMAND, "--tasks", "fact", "--policies", "keydiff", "--out", str(tmp_path / "o")]
    assert main([*command, *wrong]) in (1, 2)
    said = capsys.readouterr()
    assert sentence in said.err
    assert "Traceback" not in said.err
    assert said.out == ""
