"""Long generations: what is asked, what is read between replies, and the loss increase."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvp_edge.cli import main
from kvp_edge.errors import RecordError
from kvp_edge.evaluation import readers, run
from kvp_edge.evaluation.item import Continuation, Item, in_order, words_of
from kvp_edge.evaluation.readers import OWN
from kvp_edge.evaluation.records import (
    FULL,
    GOLDEN,
    ORACLE,
    PARTS,
    SHIFT,
    Record,
    parse_record,
    read_records,
)
from kvp_edge.evaluation.run import Run
from kvp_edge.evaluation.setting import Prompt, Setting
from kvp_edge.evaluation.tasks import GENERATION, TASKS
from kvp_edge.llama import Llama
from kvp_edge.measuring import MeasuringLlama
from kvp_edge.text.chat_prompt import Message, next_turn, prompt_tokens
from support.packages import needs

ENGINE: dict[str, Any] = {"verbose": False, "n_threads": 1, "n_threads_batch": 1}
LENGTH = 512


def words_and_signs(text: str) -> int:
    return len(re.findall(r"\w+|\W", text))


def items(name: str, count: int = 3, length: int = 1024) -> list[Item]:
    made = TASKS[name].make(count, length, words_and_signs, 0)
    assert all(isinstance(item, Item) for item in made)
    return made  # type: ignore[return-value]


def text_of(item: Item) -> str:
    return item.messages[-1]["content"].removesuffix(item.question)


@pytest.fixture(scope="module")
def llm(bundled_model: str) -> Iterator[Llama]:
    with closing(Llama(bundled_model, n_ctx=256, **ENGINE)) as made:
        yield made


@pytest.fixture(scope="module")
def full(bundled_model: str) -> Iterator[MeasuringLlama]:
    with closing(MeasuringLlama.whole(bundled_model, 1600, **ENGINE)) as made:
        yield made


@pytest.fixture(scope="module")
def asked(llm: Llama) -> list[Prompt]:
    """A quiz of several questions, and two endings that the model wrote."""
    return run.prompts(llm, TASKS, ["quiz", "continuation", "story"], LENGTH, 1, 0, ENGINE)


@pytest.fixture(scope="module")
def the_run(bundled_model: str) -> Run:
    return Run(bundled_model, 0, "f16", "f16", ENGINE)


def records(
    the_run: Run, asked: list[Prompt], policy: str, budget: int | None, mode: Any = "bounded"
) -> list[Record]:
    longest = max(prompt.longest for prompt in asked)
    how = Setting(mode, "unseen", "head", LENGTH, longest, budget, policy, True)
    return [replace(record, seconds=0.0) for record in the_run.records(how, asked)]


# -- what is asked ---------------------------------------------------------------------------------


def test_a_quiz_asks_for_every_fact_once_and_not_in_the_order_told() -> None:
    for item in items("quiz"):
        told = dict(re.findall(r"The door code that belongs to (\S+) is (\d{6})\.", text_of(item)))
        questions = [(item.question, item.answers), *((q.text, q.answers) for q in item.more)]
        asked = [re.sub(r"Please look up the door code of (\S+)\.", r"\1", q) for q, _ in questions]
        assert [(told[key],) for key in asked] == [answers for _, answers in questions]
        assert len(asked) == len(told) > 5
        assert sorted(asked) == sorted(told)
        assert asked != list(told)


def test_the_questions_of_a_quiz_are_about_half_of_it() -> None:
    for length in (512, 1024, 8192):
        for item in items("quiz", 2, length):
            later = sum(words_and_signs(q.text) + 12 for q in item.more)
            assert 0.35 < later / (later + words_and_signs(text_of(item))) < 0.6


def test_chains_lead_from_every_variable_to_its_number() -> None:
    for item in items("chains"):
        statements = re.findall(r"Let (\w+) = (\w+)\.", text_of(item))
        value: dict[str, tuple[str, ...]] = {}
        for new, old in statements:  # what a variable is assigned was told before
            value[new] = (old, *value.get(old, ()))
        questions = [(item.question, item.answers), *((q.text, q.answers) for q in item.more)]
        for question, answers in questions:
            name = re.fullmatch(r"Please find the value of (\w+)\.", question)
            assert name
            assert value[name[1]] == answers
            assert answers[-1].isdigit()
        assert len(questions) == len(statements)
        assert {len(answers) for _, answers in questions} == {1, 2, 3}


@pytest.mark.parametrize("length", [256, 1024, 4096])
def test_a_passage_comes_first_and_is_no_longer_than_a_reply_may_be(length: int) -> None:
    for item in items("copy", 5, length):
        passage = text_of(item).split("\n\n")[1]
        assert tuple(words_of(passage)) == item.answers
        assert 20 <= len(passage.split()) <= 200
        assert item.score(passage) == 1
        assert item.score(" ".join(passage.split()[::2])) == pytest.approx(0.5, abs=0.05)


def test_edits_count_only_the_words_that_were_to_change() -> None:
    for item in items("edits", 5):
        passage = text_of(item).split("\n\n")[1]
        new, old = re.findall(r'"(\w+)"', item.question)
        edited = re.sub(rf"\b{old}\b", new, passage, flags=re.IGNORECASE)
        assert edited != passage
        assert item.score(passage) == 0
        assert item.score(edited) == 1
        half = re.sub(rf"\b{old}\b", new, passage[: len(passage) // 2], flags=re.IGNORECASE)
        assert item.score(half) < 1


def test_sums_are_the_running_totals_of_the_boxes_in_order() -> None:
    for length in (256, 1024, 4096):
        for item in items("sums", 2, length):
            boxes = re.findall(r"Box number (\d+) holds (\d+) coins\.", text_of(item))
            coins = [int(n) for _, n in sorted(boxes, key=lambda box: int(box[0]))]
            assert [int(total) for total in item.answers] == list(accumulate(coins))
            assert len(coins) == min(length // 32, 32)
            steps = ", ".join(f"box {i}: +{n} = {t}" for i, (n, t) in enumerate(
                zip(coins, item.answers, strict=True), 1))  # fmt: skip
            assert item.score(steps) == 1


def test_all_long_generations_are_asked_for_by_one_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(GENERATION) == {
        "quiz", "chains", "copy", "edits", "sums", "continuation", "story"
    }  # fmt: skip
    assert main(["eval", "--tasks", "generation", "--lengths", "20", "--out", str(tmp_path)]) != 0
    assert "'quiz' does not fit into 20 tokens" in capsys.readouterr().err


# -- scores ----------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from("abc"), max_size=7), st.text("abc", min_size=1, max_size=7))
def test_words_in_order_are_the_longest_common_subsequence(found: list[str], wanted: str) -> None:
    def is_subsequence(part: list[str], of: list[str]) -> bool:
        rest = iter(of)
        return all(word in rest for word in part)

    subsets = [[w for i, w in enumerate(wanted) if n >> i & 1] for n in range(2 ** len(wanted))]
    best = max(len(part) for part in subsets if is_subsequence(part, found))
    assert in_order(found, list(wanted)) == best / len(wanted)


def test_every_question_needs_its_own_reply() -> None:
    (item,) = items("quiz", 1)
    replies = [", ".join(answers) for answers in (item.answers, *(q.answers for q in item.more))]
    assert item.score(*replies) == 1
    assert item.score(*reversed(replies)) < 0.3
    with pytest.raises(ValueError, match="argument 2"):
        item.score(*replies[1:])


# -- what is read ----------------------------------------------------------------------------------


def test_what_is_read_is_the_templates_tokenization_of_the_whole_conversation(
    llm: Llama, full: MeasuringLlama, asked: list[Prompt]
) -> None:
    prompt = asked[0]
    assert prompt.item is not None
    full.forget()
    full.read(prompt.tokens.tolist())
    replies = full.converse(prompt.turns, prompt.reply_tokens)
    messages: list[Message] = list(prompt.item.messages)
    for reply, question in zip(replies, prompt.item.more, strict=False):
        assert llm.tokenize(llm.detokenize(reply), add_bos=False) == reply
        messages += [
            {"role": "assistant", "content": full.text(reply)},
            {"role": "user", "content": question.text},
        ]
    want = [*prompt_tokens(llm, messages), *replies[-1]]
    assert full.input_ids[: full.n_tokens].tolist() == want
    assert full.n_tokens <= prompt.longest


@pytest.mark.parametrize("template", ["chatml", "llama-3", "gemma", "zephyr", "mistral-instruct"])
def test_a_turn_is_what_other_templates_write_there(bundled_model: str, template: str) -> None:
    with closing(Llama(bundled_model, n_ctx=256, chat_format=template, **ENGINE)) as llm:
        messages = [{"role": "user", "content": "One?"}]
        said = [("Two.", "Is KVPREPLY a word?"), ("Three, four.", "Five?")]
        read = llm.detokenize(prompt_tokens(llm, messages), special=True)
        for reply, question in said:
            turn = next_turn(llm, question)
            read += reply.encode() + llm.detokenize(turn, special=True)
            messages += [
                {"role": "assistant", "content": reply},
                {"role": "user", "content": question},
            ]
        assert read == llm.detokenize(prompt_tokens(llm, messages), special=True)


def test_a_quiz_of_another_question_is_another_prompt(asked: list[Prompt]) -> None:
    prompt = asked[0]
    other = replace(prompt, turns=prompt.turns[:-1])
    assert other.digest != prompt.digest
    assert other.longest == prompt.longest - len(prompt.turns[-1]) - prompt.reply_tokens


# -- endings that the model wrote --------------------------------------------------------------


def logits_of(model: str, tokens: list[int]) -> np.ndarray[Any, Any]:
    """llama.cpp's own, after every token."""
    plain = llama_cpp.Llama(model, n_ctx=len(tokens) + 8, logits_all=True, **ENGINE)
    plain.eval(tokens)
    logits = np.array(plain.scores[: len(tokens)], np.float64)
    plain.close()
    return logits


def test_the_ending_of_a_quiz_is_the_full_caches_likeliest_tokens(
    asked: list[Prompt], bundled_model: str
) -> None:
    prompt = asked[1]
    assert prompt.measured is not None
    tokens = prompt.tokens.tolist()
    assert len(prompt.measured) == len(tokens) - prompt.border
    at = np.flatnonzero(prompt.measured) + prompt.border
    logits = logits_of(bundled_model, tokens)
    of_own = logits[at - 1, prompt.tokens[at]]
    assert (of_own >= logits[at - 1].max(axis=1) - 0.05).all()  # sums in another order
    assert 0.2 < prompt.measured.mean() < 0.8


def test_a_story_is_drawn_from_the_full_caches_own_distribution(
    asked: list[Prompt], bundled_model: str
) -> None:
    prompt = asked[2]
    assert len(prompt.tokens) == LENGTH
    assert prompt.measured is not None
    assert prompt.measured.all()
    logits = logits_of(bundled_model, prompt.tokens.tolist())[prompt.border - 1 : -1]
    log = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    p = np.exp(log)
    loss = -log[np.arange(len(log)), prompt.tokens[prompt.border :]]
    entropy = -(p * log).sum(axis=1)
    variance = (p * log**2).sum(axis=1) - entropy**2
    assert abs((loss - entropy).sum()) < 4 * np.sqrt(variance.sum())


def test_draws_are_the_same_for_a_seed_and_other_ones_for_another(full: MeasuringLlama) -> None:
    drawn = []
    for seed in (1, 1, 2):
        full.forget()
        full.read(list(range(300, 340)))
        drawn.append(full.draw(30, np.random.default_rng(seed)))
        assert full.n_tokens == 70
    assert drawn[0] == drawn[1] != drawn[2]
    assert full.draw(0, np.random.default_rng(0)) == []


def test_a_model_that_says_nothing_has_no_ending_to_measure(bundled_model: str, llm: Llama) -> None:
    class Silent:
        name, about, reply_tokens = "silent", "", 0

        def make(self, *_: object) -> list[Continuation]:
            return [Continuation([{"role": "user", "content": "Hello."}], 0, ("And now?",))]

    with pytest.raises(ValueError, match="2 replies before the first token"):
        run.prompts(llm, {"silent": Silent()}, ["silent"], 64, 1, 0, ENGINE)


# -- loss increase ---------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 20), min_size=1, max_size=60))
def test_the_parts_of_an_ending_average_to_its_mean(losses: list[float]) -> None:
    parts = readers._by_part(np.array(losses))
    if len(losses) < PARTS:
        assert parts == []
    else:
        weights = [len(part) for part in np.array_split(losses, PARTS)]
        assert np.average(parts, weights=weights) == pytest.approx(np.mean(losses), abs=1e-5)


@pytest.fixture(scope="module")
def of_full(the_run: Run, asked: list[Prompt]) -> list[Record]:
    return records(the_run, asked, FULL, None)


@pytest.mark.parametrize("policy", [OWN, "h2o", SHIFT, ORACLE, GOLDEN])
def test_a_budget_for_everything_costs_no_loss_and_no_answer(
    the_run: Run, asked: list[Prompt], of_full: list[Record], policy: str
) -> None:
    everything = max(prompt.longest for prompt in asked)
    for one, other in zip(of_full, records(the_run, asked, policy, everything), strict=True):
        assert (other.dropped, other.reply) == (0, one.reply)
        assert other.score == pytest.approx(one.score, abs=2e-3)
        assert other.losses == pytest.approx(one.losses, abs=5e-3)
        assert len(one.losses) == (0 if one.measure == "accuracy" else PARTS)


def test_oracles_lose_less_than_recency_on_what_is_still_to_be_written(
    the_run: Run, asked: list[Prompt], of_full: list[Record]
) -> None:
    short = asked[:2]
    found = {name: records(the_run, short, name, 96) for name in (ORACLE, GOLDEN, "recency")}
    for name in (ORACLE, GOLDEN):
        assert found[name][0].score > found["recency"][0].score
        assert found[name][1].score < found["recency"][1].score
        assert found[name][1].score - of_full[1].score < 1
    assert found[ORACLE] != found[GOLDEN]


@pytest.mark.parametrize("mode", ["bounded", "one-shot"])
def test_golden_eviction_finds_the_same_twice(the_run: Run, asked: list[Prompt], mode: str) -> None:
    first = records(the_run, asked[1:2], GOLDEN, 96, mode)
    assert first == records(the_run, asked[1:2], GOLDEN, 96, mode)


# -- records, report, command ----------------------------------------------------------------------


def test_a_record_from_before_there_were_parts_is_read(of_full: list[Record]) -> None:
    for record in of_full:
        values = asdict(record)
        del values["losses"]
        assert parse_record(json.dumps(values)) == replace(record, losses=[])


@pytest.mark.parametrize("losses", [[1.0], ["1"] * PARTS, 1.0, [float("nan")] * PARTS])
def test_wrong_losses_of_parts_are_named(of_full: list[Record], losses: Any) -> None:
    with pytest.raises(RecordError, match="losses"):
        replace(of_full[1], losses=losses)


def test_the_command_goes_on_and_tells_the_increase_along_the_ending(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = [
        "eval", "--threads", "1", "--lengths", "256", "--budgets", "1/4", "--items", "2",
        "--tasks", "quiz,continuation", "--out", str(out), "--policies", "keydiff,golden",
    ]  # fmt: skip
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "| policy | first quarter | second quarter | third quarter | last quarter |" in printed
    assert "`golden` ranks tokens by the largest block of attention" in printed
    found = read_records(out / "records.jsonl")
    assert len(found) == 12
    lines = (out / "records.jsonl").read_text().splitlines(keepends=True)
    (out / "records.jsonl").write_text("".join(lines[:7]) + lines[7][:90])
    assert main(command) == 0
    again = capsys.readouterr()
    assert "5 of them still to do" in again.err
    now = read_records(out / "records.jsonl")
    assert [replace(r, seconds=0) for r in now] == [replace(r, seconds=0) for r in found]
    needs("matplotlib", "train")
    assert (out / "loss-increase.png").stat().st_size > 5000
