"""scripts/eval_recall.py: every answer is measured once, and controls recall what they say."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvp_edge import Llama
from kvp_edge.bundled import bundled_model
from kvp_edge.cli.demo_tasks import Prose
from recall_eval.conversations import KINDS, Question, make_conversation, make_facts
from recall_eval.records import KEY, key
from recall_eval.ways import BASE, CONTROLS, OFF, RECALL, BoundedCache, Way, parse_ways
from scripts.eval_recall import main

THINGS = ("roof", "door", "wall", "gate")
CHOSEN = ("foreign question", "previous question", "random rows")


def command(out: Path) -> list[str]:
    return [
        *("--out", str(out), "--lengths", "240", "--shares", "4", "--facts", "2"),
        *("--conversations", "2", "--recent", "8", "--reserve", "48", "--threads", "1"),
        *("--controls", ",".join(CHOSEN), "--settings", "deep:passes=3", "--dialogue"),
    ]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recall") / "answers.jsonl"
    assert main(command(out)) == 0
    return out


def test_every_way_answers_every_question_once(answers: Path) -> None:
    found = read(answers)
    assert len({key(record) for record in found}) == len(found)
    counts = Counter((r["conversation"], r["way"], r["task"]) for r in found)
    expected = Counter[tuple[int, str, str]]()
    for conversation in (0, 1):
        for way in ("full cache", "off", "recall"):
            tasks = {"fact": 2, "count": 1, "all": 1, "dialogue": 2}
            expected.update({(conversation, way, task): n for task, n in tasks.items()})
        for way in (*CHOSEN, "deep"):
            expected[conversation, way, "fact"] = 2
    assert counts == expected
    assert {r["kind"] for r in found} == set(KINDS)
    for record in found:
        assert set(KEY) < set(record)
        assert record["score"] == Question(
            record["task"], 0, record["asked"], tuple(record["answers"])
        ).score(record["reply"])
        if record["way"] in ("full cache", "off"):
            assert (record["recalled"], record["passes"]) == (0, 0)
        elif record["task"] == "fact":
            assert record["recalled"] > 0, record
            assert record["first_ms"] > 0


def test_what_is_in_the_file_is_not_measured_again_and_what_is_missing_comes_out_the_same(
    answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = answers.read_bytes()
    capsys.readouterr()
    assert main(command(answers)) == 0
    assert answers.read_bytes() == before
    assert capsys.readouterr().err == "", "no conversation was read"

    lines = before.splitlines(keepends=True)
    interrupted = tmp_path / "interrupted.jsonl"
    interrupted.write_bytes(b"".join(lines[:-3]) + lines[-3][:40])
    assert main(command(interrupted)) == 0
    again, first = read(interrupted), read(answers)
    assert {key(r): r["reply"] for r in again} == {key(r): r["reply"] for r in first}
    assert len(again) == len(first)


def test_the_table_counts_the_right_answers(
    answers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(answers), "--table"]) == 0
    table = capsys.readouterr().out
    for way in ("off", "recall", *CHOSEN, "deep"):
        facts = [r for r in read(answers) if r["way"] == way and r["task"] == "fact"]
        right = sum(r["score"] for r in facts)
        assert f"| keydiff, {way} | {right:.0f} of 4: " in table
    assert "| full cache | " in table
    assert "240 tokens, 1/4" in table


def test_one_shot_answers_stand_beside_bounded_ones_and_share_the_full_caches(
    answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = tmp_path / "both.jsonl"
    both.write_bytes(answers.read_bytes())
    assert main([*command(both), "--tasks", "fact", "--one-shot"]) == 0
    bounded, added = read(answers), read(both)[len(read(answers)) :]
    assert {r["mode"] for r in bounded} == {None, "bounded"}
    assert {r["mode"] for r in added} == {"one-shot"}, "the full cache is not asked again"
    told = ("fact", "dialogue")  # --dialogue is asked for, too
    same = {key(r | {"mode": "one-shot"}) for r in bounded if r["mode"] and r["task"] in told}
    assert {key(r) for r in added} == same
    capsys.readouterr()
    assert main(["--out", str(both), "--table"]) == 0
    table = capsys.readouterr().out
    for name, records in (("keydiff, recall", bounded), ("keydiff, recall, one-shot", added)):
        facts = [r["score"] for r in records if (r["way"], r["task"]) == ("recall", "fact")]
        assert f"| {name} | {sum(facts):.0f} of 4: " in table


def test_a_file_without_modes_is_bounded(
    answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = tmp_path / "older.jsonl"
    lines = [{n: v for n, v in r.items() if n != "mode"} for r in read(answers)]
    older.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    before = older.read_bytes()
    capsys.readouterr()
    assert main(command(older)) == 0
    assert older.read_bytes() == before, "nothing is measured again"
    assert main(["--out", str(older), "--table"]) == 0
    table = capsys.readouterr().out
    assert main(["--out", str(answers), "--table"]) == 0
    assert capsys.readouterr().out == table


def test_a_name_stands_for_one_setting_in_a_file(answers: Path) -> None:
    other = command(answers)
    other[other.index("deep:passes=3")] = "deep:passes=1"
    before = answers.read_bytes()
    with pytest.raises(SystemExit, match="'deep' was measured with"):
        main(other)
    assert answers.read_bytes() == before


@pytest.mark.parametrize(
    "wrong",
    [
        ["--controls", "no such"],
        ["--tasks", "facts"],
        ["--settings", "a:depth=2"],
        ["--settings", "recall:passes=1"],
        ["--facts", "1"],
        ["--lengths", "100"],
        ["--policies", "no-such-policy"],
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_model_is_loaded(
    wrong: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["--out", str(tmp_path / "none.jsonl"), *wrong])
    assert refused.value.code == 2
    assert not (tmp_path / "none.jsonl").exists()
    assert "error:" in capsys.readouterr().err


def test_the_full_cache_replies_as_a_chat_completion_does(answers: Path) -> None:
    llm = Llama(bundled_model(), n_ctx=1024, n_threads=1, verbose=False)
    prose = Prose(lambda text: len(llm.tokenize(text.encode(), add_bos=False)))
    record = next(r for r in read(answers) if r["way"] == "full cache" and r["task"] == "fact")
    filler = record["length"]
    for _ in range(3):
        made = make_conversation(record["kind"], 2, filler, prose, random.Random("0 0 240"))
        messages = [*made.messages, {"role": "user", "content": made.questions[0].text}]
        reply = llm.create_chat_completion(messages, max_tokens=26, temperature=0.0)
        filler -= reply["usage"]["prompt_tokens"] - record["length"]
    assert record["n_prompt"] == reply["usage"]["prompt_tokens"]
    assert record["reply"] == reply["choices"][0]["message"]["content"]


# -- the controls --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache() -> BoundedCache:
    cache = BoundedCache(bundled_model(), "keydiff", 1024, 60, 64, 1)
    text = " ".join(
        f"The {thing} of the house is old." for thing in ["roof", "door", "wall", "gate"]
    )
    context = cache.llm.tokenize(f"My dog is called Arthur. {text * 8}".encode())
    cache.read(context, 60, 64, 8)
    return cache


def prompt(cache: BoundedCache, question: str) -> list[int]:
    cache.go_back()
    read = cache.llm.input_ids[: cache.llm.n_tokens].tolist()
    turn = f"<|end|><|user|>{question}<|end|><|assistant|>"
    return read + cache.llm.tokenize(turn.encode(), add_bos=False, special=True)


def held(cache: BoundedCache, question: list[int], way: Way, other: list[int]) -> np.ndarray:
    cache.go_back()
    cache.answer(question, way, 1, other)
    return np.array(cache.llm.kv_indices)


def test_a_snapshot_is_the_same_for_every_question(cache: BoundedCache) -> None:
    dog, gate = prompt(cache, "What is my dog called?"), prompt(cache, "Is the gate old?")
    first = [held(cache, dog, way, gate) for way in (OFF, RECALL)]
    again = [held(cache, dog, way, gate) for way in (OFF, RECALL)]
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(first[0], first[1])


def test_off_is_a_model_that_was_loaded_without_recall(cache: BoundedCache) -> None:
    gate = prompt(cache, "Is the gate old?")
    without = held(cache, gate, OFF, [])
    plain = Llama(
        bundled_model(), n_ctx=1024, kv_budget=60, reserve=64, recent=8, policy="keydiff",
        recall="off", n_threads=1, verbose=False,
    )  # fmt: skip
    assert plain.kv is not None
    assert cache.llm.kv is not None
    plain.kv.replace_limits(cache.llm.kv.limits)
    cache.go_back()
    n_context = cache.llm.n_tokens
    assert plain.kv.log is None
    plain.eval(gate[:n_context])
    plain.evict()
    plain.eval(gate[n_context:])
    np.testing.assert_array_equal(plain.kv_indices, without)


def test_a_questions_own_queries_by_hand_recall_what_the_model_recalls(cache: BoundedCache) -> None:
    dog, gate = prompt(cache, "What is my dog called?"), prompt(cache, "Is the gate old?")
    foreign = CONTROLS["foreign question"]
    model = held(cache, dog, RECALL, [])
    np.testing.assert_array_equal(held(cache, dog, foreign, dog), model)
    assert not np.array_equal(held(cache, dog, foreign, gate), model)


def test_random_rows_leave_what_the_policy_ranks_first(cache: BoundedCache) -> None:
    dog = prompt(cache, "What is my dog called?")
    before = held(cache, dog, OFF, [])
    random_rows = CONTROLS["random rows"]
    assert random_rows.settings is not None
    with_floor = dataclasses.replace(random_rows.settings, floor=0.5)
    drawn = held(cache, dog, dataclasses.replace(random_rows, settings=with_floor), [])
    assert drawn.shape == before.shape
    cache.go_back()
    cache.llm.eval(dog[cache.llm.n_tokens :])
    assert cache.llm.kv is not None
    cache.llm.kv.score()
    table = cache.llm.kv.snapshot()
    old = table.indices()[..., 4 : table.n_packed]  # but for the sinks
    best = np.argsort(-table.scores[..., 4 : table.n_packed], axis=-1)
    # half of these stay, but some may give way to what was recent before the question
    best = np.take_along_axis(old, best[..., : old.shape[-1] // 2 - 8], axis=-1)
    assert best.shape[-1] == 16
    for head in np.ndindex(*before.shape[:2]):
        now = set(drawn[head].tolist())
        assert {0, 1, 2, 3, *best[head].tolist()} <= now
        assert now - set(before[head].tolist()), "something came"


def rows(llm: Llama) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tokens that every head holds, their keys and values: [n_layer, n_head_kv, kept, ...]."""
    assert llm.kv is not None
    table = llm.kv.snapshot()
    positions = table.llama_positions()
    _, keys, values = llm.kv.cache.read(0, int(positions[-1]) + 1, len(positions))
    return table.indices(), keys, values


def test_one_shot_holds_rows_of_the_full_cache_also_those_that_a_question_recalls() -> None:
    bounded, one_shot, whole = (
        BoundedCache(bundled_model(), "keydiff", 1024, 60, 64, 1, one_shot=i > 0) for i in range(3)
    )
    text = " ".join(f"The {thing} of the house is old." for thing in THINGS)
    context = whole.llm.tokenize(f"My dog is called Arthur. {text * 8}".encode())
    whole.read(context, len(context), 64, 8)
    tokens, *full = rows(whole.llm)
    assert tokens.shape[-1] == len(context), "a budget of all tokens cuts nothing"
    for cache, equal in ((one_shot, True), (bounded, False)):
        cache.read(context, 60, 64, 8)
        assert cache.llm.kv_stats.evictions == 1 or not equal
        for way in (OFF, RECALL):
            dog = prompt(cache, "What is my dog called?")
            before = held(cache, dog, way, [])
            tokens, *parts = rows(cache.llm)
            assert tokens.shape == before.shape
            # of the conversation; the question is read on what is held
            n = int((tokens[0, 0] < len(context)).sum())
            assert (tokens[..., :n] < len(context)).all()
            for part, of_all in zip(parts, full, strict=True):
                want = np.take_along_axis(of_all, tokens[..., :n, None], axis=2)
                assert np.array_equal(part[..., :n, :], want) == equal
        assert cache.llm.kv_stats.recalls >= 1, "recalled"
        assert cache.llm.kv is not None
        assert cache.llm.kv.limits.cells == 60 + 64


# -- what is asked -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "answers", "reply", "score"),
    [
        ("fact", ("table",), "It is called Table.", 1.0),
        ("fact", ("table",), "tables", 0.0),
        ("fact", ("12",), "120 or 112", 0.0),
        ("all", ("a1", "b2", "c3", "d4"), "b2, then d4", 0.5),
        ("count", ("3",), "It occurs three times, not 4.", 1.0),
        ("count", ("3",), "4, or 3", 0.0),
        ("count", ("3",), "I see.", 0.0),
        ("count", ("13",), "13 times", 1.0),
    ],
)
def test_a_reply_is_scored_by_what_it_names(
    task: str, answers: tuple[str, ...], reply: str, score: float
) -> None:
    assert Question(task, 0, "", answers).score(reply) == score


@pytest.mark.parametrize("kind", KINDS)
def test_facts_are_about_different_things_and_all_are_said(kind: str) -> None:
    prose = Prose(lambda text: len(text) // 4)
    for seed in range(20):
        made = make_conversation(kind, 5, 500, prose, random.Random(seed))
        told = make_facts(kind, 5, random.Random(seed))
        text = " ".join(message["content"] for message in made.messages)
        facts = [q for q in made.questions if q.task == "fact"]
        assert all(fact.statement in text for fact in told)
        assert len({fact.value for fact in told}) == len({fact.question for fact in told}) == 5
        assert {(q.text, *q.answers) for q in facts} == {(f.question, f.value) for f in told}
        assert made.messages[-1]["role"] == "assistant"
        word = next(q for q in made.questions if q.task == "count")
        named = word.text.split('"')[1]
        tokens = "".join(c if c.isalnum() else " " for c in text.lower()).split()
        assert tokens.count(named) == int(word.answers[0])


def test_settings_are_read_from_a_line() -> None:
    wide, whole = parse_ways("wide:after=20,floor=0.25; whole:shared=1,passes=1")
    assert (wide.name, wide.settings.after, wide.settings.floor) == ("wide", 20, 0.25)
    assert (whole.settings.shared, whole.settings.passes) == (1.0, 1)
    assert whole.settings.after == BASE.after
