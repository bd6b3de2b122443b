"""kvp_edge.evaluation.estimate: what is counted beforehand is what a run reads and writes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from kvp_edge.cli import main, parse
from kvp_edge.cli.demo import Demo
from kvp_edge.evaluation import estimate, run
from kvp_edge.evaluation.estimate import Speed, Work, duration, measure, parts
from kvp_edge.evaluation.records import FULL, GOLDEN, ORACLE, SHIFT
from kvp_edge.evaluation.run import Job, Run
from kvp_edge.evaluation.setting import Prompt, Setting
from kvp_edge.evaluation.tasks import TASKS
from kvp_edge.llama import Llama

ENGINE: dict[str, Any] = {"verbose": False, "n_threads": 1, "n_threads_batch": 1}
LENGTH = 400


class Count:
    """Tokens that models have read in batches and one by one."""

    def __init__(self) -> None:
        self.read = self.written = 0

    @property
    def work(self) -> Work:
        return Work(self.read, self.written)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Count:
    """Of all models in this process."""
    count, evaluate = Count(), Llama.eval

    def counting(self: Llama, tokens: Sequence[int]) -> None:
        if len(tokens) == 1:
            count.written += 1
        else:
            count.read += len(tokens)
        evaluate(self, tokens)

    monkeypatch.setattr(Llama, "eval", counting)
    return count


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """No token ends a reply, so that all are as long as they may become."""
    monkeypatch.setattr(llama_cpp, "llama_vocab_is_eog", lambda *_: False)


@pytest.fixture(scope="module")
def asked(bundled_model: str) -> list[Prompt]:
    """A question, a text with an ending, and several questions one after the other."""
    with closing(Llama(bundled_model, n_ctx=256, **ENGINE)) as llm:
        return run.prompts(llm, TASKS, ["fact", "books", "quiz"], LENGTH, 1, seed=0)


@pytest.fixture(scope="module")
def the_run(bundled_model: str) -> Run:
    return Run(bundled_model, 0, "f16", "f16", ENGINE)


def jobs(asked: list[Prompt], mode: Any, question: Any = "unseen") -> list[Job]:
    longest = max(prompt.longest for prompt in asked)
    base = Setting(mode, question, "head", LENGTH, longest, None, FULL, True)
    settings = [(FULL, None), ("keydiff", 64), ("keydiff", 48), (SHIFT, 64), (ORACLE, 64)]
    return [(replace(base, policy=p, budget=b), asked) for p, b in [*settings, (GOLDEN, 48)]]


def total(todo: Sequence[estimate.Part]) -> Work:
    return sum((part.work for part in todo), Work())


@pytest.mark.usefixtures("endless")
@pytest.mark.parametrize(
    ("mode", "question"), [("bounded", "unseen"), ("one-shot", "unseen"), ("one-shot", "seen")]
)
def test_what_is_counted_is_what_a_run_reads_and_writes(
    the_run: Run, asked: list[Prompt], counted: Count, mode: str, question: str
) -> None:
    todo = jobs(asked, mode, question)
    expected = total(parts(todo))
    assert len(list(run.run_all(the_run, todo, 1))) == 6 * len(asked)
    assert counted.work == expected


@pytest.mark.usefixtures("endless")
def test_a_run_that_goes_on_counts_only_what_is_missing(
    the_run: Run, asked: list[Prompt], counted: Count
) -> None:
    todo = jobs(asked, "one-shot")
    # the first conversation lacks one policy, the second nothing, the third all but one policy
    left = [(todo[1][0], [asked[0], asked[2]]), (todo[4][0], [asked[2]])]
    expected = total(parts(left))
    assert len(list(run.run_all(the_run, left, 1))) == 3
    assert counted.work == expected
    assert parts([]) == []


@pytest.mark.usefixtures("endless")
@pytest.mark.parametrize("mode", ["bounded", "one-shot"])
def test_drawing_is_counted_too(
    the_run: Run, asked: list[Prompt], counted: Count, mode: str
) -> None:
    drawn = [(setting, asked[:1]) for setting, _ in jobs(asked, mode)[1:3]]
    expected = total(parts([], drawn))
    assert len(list(the_run.all_kept_tokens(drawn))) == 2
    assert counted.work == expected


def test_replies_that_end_early_write_less(
    the_run: Run, asked: list[Prompt], counted: Count
) -> None:
    todo = jobs(asked[:1], "bounded")[:2]
    expected = total(parts(todo))
    list(run.run_all(the_run, todo, 1))
    assert counted.read == expected.read
    assert 0 < counted.written < expected.written


def test_workers_are_told_the_same_though_their_jobs_are_cut_by_task(asked: list[Prompt]) -> None:
    for mode in ("bounded", "one-shot"):
        whole = jobs(asked, mode)
        cut = [(setting, [prompt]) for setting, todo in whole for prompt in todo]
        as_told = [(p.name, p.conversations, p.work, p.cells) for p in parts(whole)]
        assert [(p.name, p.conversations, p.work, p.cells) for p in parts(cut)] == as_told


# -- speed ---------------------------------------------------------------------------------------


@pytest.fixture
def read() -> list[list[int]]:
    return []


def test_without_time_a_little_is_read_all_the_same(read: list[list[int]]) -> None:
    tokens = list(range(1000))
    speed = measure(lambda batch: read.append(list(batch)), tokens, 0.0)
    assert [t for batch in read for t in batch] == tokens[: speed.over]
    assert [len(batch) for batch in read] == [16, 64] + [1] * 16
    assert speed.reading > 0
    assert speed.writing > 0


@pytest.mark.parametrize("n", [3, 4, 17, 40, 97, 500])
def test_with_time_the_whole_conversation_is_read_in_order(read: list[list[int]], n: int) -> None:
    speed = measure(lambda batch: read.append(list(batch)), list(range(n)), 60.0)
    assert [t for batch in read for t in batch] == list(range(n))
    assert speed.over == n
    assert len(read[-1]) == 1


def test_time_is_that_of_reading_and_of_writing() -> None:
    assert (Work(300, 20) + Work(700, 5)).at(Speed(100.0, 5.0, 96)) == 15.0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "1 second"),
        (0.4, "1 second"),
        (4.2, "5 seconds"),
        (31.0, "35 seconds"),
        (59.9, "60 seconds"),
        (60.0, "1 minute"),
        (80 * 60.0, "80 minutes"),
        (2.5 * 3600, "2.5 hours"),
        (100 * 3600, "100.0 hours"),
    ],
)
def test_durations_are_rough_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


# -- the commands --------------------------------------------------------------------------------

COMMAND = ["eval", "--threads", "1", "--lengths", "400", "--tasks", "fact", "--items", "2"]


def test_the_estimate_reads_nothing_but_to_measure_and_a_finished_run_has_nothing_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = [*COMMAND, "--policies", "keydiff", "--budgets", "1/4", "--out", str(out)]
    assert main([*command, "--estimate"]) == 0
    printed = capsys.readouterr().out
    assert not out.exists()
    lines = printed.splitlines()
    names = [line.split("  ")[0] for line in lines[2:5]]
    assert names == ["full cache, length 400", "keydiff, 100 tokens, length 400", "total"]
    assert "Nothing was run" in printed
    assert main(command) == 0
    said = capsys.readouterr()
    assert "this will take" not in said.err  # a matter of seconds
    assert main([*command, "--estimate"]) == 0
    assert "Nothing is left to do" in capsys.readouterr().out
    assert len((out / "records.jsonl").read_text().splitlines()) == 4


def test_a_long_run_says_so_at_its_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Speed(0.5, 0.1, 96)
    monkeypatch.setattr(estimate, "measure", lambda *_: slow)
    command = [*COMMAND, "--policies", "keydiff", "--budgets", "1/4", "--out", str(tmp_path)]
    assert main(command) == 0
    said = capsys.readouterr().err
    found = re.search(r"this will take up to (\d+) minutes here", said)
    assert found is not None, said
    assert 60 < int(found[1]) < 90  # about 1,600 tokens at 0.5, and 128 at 0.1 a second


def test_the_demo_counts_what_it_reads_and_writes(
    counted: Count,
) -> None:
    command = parse(["demo", "--items", "1", "--length", "600", "--threads", "1"])
    demo = Demo(command.options)
    work, counted.read, counted.written = demo.work(), 0, 0
    assert f"{work.read:,} tokens to read" in demo.how_long()
    demo.rows()
    assert 0 <= work.read - counted.read <= 3 * 64, "but for what the recall read again"
    assert 0 < counted.written <= work.written
