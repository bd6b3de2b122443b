"""What comes back before a reply: the command line tells it, and does nothing else with it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvp_edge.arrays import FloatArray
from kvp_edge.cache import recall
from kvp_edge.cache.recall import Recall
from kvp_edge.cli import options, parse, recalled
from kvp_edge.cli.chat import Chat
from makers.command import COMMAND
from support.command_line import FEW_CELLS, GREEDY, Type
from support.interrupt import interrupted
from support.more_than_softmax import write_more_than_a_softmax

#: A policy that keeps nothing old: what is known of it came back.
SHORT = [*FEW_CELLS, *GREEDY, "--policy", "recency", "--max-tokens", "30"]
CAME_BACK = re.compile(r"^\[kvp: (\d+) dropped tokens per head came back for this reply\]$", re.M)


@pytest.fixture(scope="module")
def talk(book: str) -> list[str]:
    """Two facts, and so much talk after them that a small cache drops both."""
    words = book.split()
    told = [" ".join(words[at : at + 100]) for at in range(0, 600, 100)]
    return ["My dog is called Ralph.", "My sister is called Clara.", *told]


QUESTIONS = ["What is my dog called?", "What is my sister called?"]


def test_a_chat_answers_from_what_was_dropped_and_says_that_it_came_back(
    kvp: Type, talk: list[str]
) -> None:
    typed = "\n".join([*talk, *QUESTIONS, "/stats", ""])
    got = kvp("chat", *SHORT, typed=typed)
    assert "Ralph" in got.replies[-2]
    assert "Clara" in got.replies[-1]
    assert CAME_BACK.search(got.err)
    assert got.stats[-1]["log"] > 0
    assert re.search(r"\d+ logged \(\d+\.\d MiB\), \d+ recalled", got.err)

    without = kvp("chat", *SHORT, "--recall", "off", typed=typed)
    assert "Ralph" not in without.replies[-2]
    assert not CAME_BACK.search(without.err)
    assert "log" not in without.err
    assert len(without.err.splitlines()) == len(without.replies) + 1  # with that of /stats


@pytest.mark.parametrize("how", [[], ["--recall", "always", "--recall-every", "2"]])
def test_the_line_stands_before_the_reply_and_none_within(talk: list[str], how: list[str]) -> None:
    done = subprocess.run(
        [*COMMAND, "chat", *SHORT, *how],
        input="\n".join([*talk, QUESTIONS[0]]),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=True,
    )
    line, reply, status = done.stdout.splitlines()[-3:]
    assert CAME_BACK.fullmatch(line)
    assert "Ralph" in reply
    assert status.startswith("[kvp: ")


def test_verbose_shows_the_text_that_came_back(kvp: Type, talk: list[str]) -> None:
    got = kvp("chat", *SHORT, "--verbose", typed="\n".join([*talk, QUESTIONS[0]]))
    shown = [re.findall(r'^  "(.*)"$', part, re.M) for part in CAME_BACK.split(got.err)[2::2]]
    assert len(shown) == len(CAME_BACK.findall(got.err)) > 1
    assert all(0 < len(one) <= 8 for one in shown)
    assert any("is called Ralph" in text for one in shown for text in one)


def test_run_says_it_too_below_its_progress_bar(kvp: Type, talk: list[str]) -> None:
    got = kvp("run", *SHORT, "--progress", "-f", "-", "-p", QUESTIONS[0], typed=" ".join(talk))
    assert "Ralph" in got.out
    assert CAME_BACK.fullmatch(got.err.rpartition("\r")[2].splitlines()[0])


def test_json_of_run_has_it_as_numbers_alone(kvp: Type, talk: list[str]) -> None:
    got = kvp("run", *SHORT, "--json", "-f", "-", "-p", QUESTIONS[0], typed=" ".join(talk))
    assert got.err == ""
    cache = json.loads(got.out)["kv_cache"]
    assert (cache["recall"], cache["recalls"]) == ("reply", 1)
    assert cache["recalled"] > 0


def test_always_recalls_while_the_reply_is_written(kvp: Type, talk: list[str]) -> None:
    options = ["run", *SHORT, "--json", "--recall", "always", "-f", "-", "-p", QUESTIONS[0]]
    seldom, often = (
        json.loads(kvp(*options, "--recall-every", n, typed=" ".join(talk)).out)["kv_cache"]
        for n in ("64", "2")
    )
    assert seldom["recall"] == often["recall"] == "always"
    assert seldom["recalls"] == 1
    assert often["recalls"] > 1


def test_nothing_is_said_where_nothing_was_dropped(kvp: Type) -> None:
    got = kvp("chat", *SHORT, typed="My dog is called Ralph.\nWhat is my dog called?\n")
    assert len(got.stats) == len(got.err.splitlines()) == 2
    assert got.stats[-1]["log"] == 0


def test_ctrl_c_during_a_recall_is_one_before_the_reply(
    talk: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    args = parse(["chat", *SHORT]).options
    with closing(options.load(options.model_path(args), None, args)) as llm:
        chat = Chat(llm, args)
        for line in talk:
            assert chat.hear(line)
        before = chat.contents()
        answered: list[bool] = []
        ask: Callable[[], None] = lambda: answered.append(chat.hear(QUESTIONS[0]))  # noqa: E731
        capsys.readouterr()
        assert interrupted(ask, 3, recall.__file__)
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err == "\nStopped before the reply began. The conversation is unchanged.\n"
        assert answered == [False]
        assert chat.contents()["messages"] == before["messages"]
        assert chat.hear(QUESTIONS[0])
        assert "Ralph" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (["--recall", "never"], "--recall must be 'auto', 'reply', 'always' or 'off', not 'never'"),
        (["--recall-every", "0"], "--recall-every must be at least 1 token, not 0"),
        (["--kv-log-limit", "lots"], "--kv-log-limit is memory, a text like '256MiB', not 'lots'"),
        (["--kv-log-type", "f8"], "--kv-log-type must be 'cache', "),
    ],
)
def test_wrong_options_of_recall_are_a_sentence(kvp: Type, option: list[str], says: str) -> None:
    got = kvp("chat", *option)
    assert (got.status, got.out) == (2, "")
    assert got.err.startswith(f"kvp-edge: {says}")


def test_recall_that_a_model_does_not_allow_is_refused_by_its_option(
    kvp: Type, tmp_path: Path
) -> None:
    model = tmp_path / "capped.gguf"
    write_more_than_a_softmax(model, "gemma2")
    cells = ["--kv-budget", "64", "--recent", "16", "--n-ctx", "2000", "--threads", "1"]
    got = kvp("chat", str(model), *cells, "--recall", "reply")
    assert (got.status, got.out) == (2, "")
    assert "Use --recall off" in got.err
    assert kvp("chat", str(model), *cells).status == 0  # auto


# -- in words --------------------------------------------------------------------------------------

N = 40
CHOICE: Any = SimpleNamespace(share=0.5, n_asked=9, ms=2.0)


def event(share: FloatArray) -> Recall:
    return Recall(share, n_rows=1, share=0.5, n_asked=9, passes=1, ms=2.0)


def test_what_came_back_is_counted_per_head() -> None:
    before = np.array([[[0, 1, 39], [0, 2, 39]]], np.int32)
    now = np.array([[[0, 7, 39], [0, 2, 39]]], np.int32)
    came = Recall.of(before, now, N, [CHOICE, CHOICE])
    assert came.heads.tolist() == [0.5 if i == 7 else 0.0 for i in range(N)]
    assert (came.n_rows, came.spans) == (1, ((7, 8),))
    assert (came.share, came.n_asked, came.passes, came.ms) == (0.5, 9, 2, 4.0)
    none = Recall.of(now, now, N, [CHOICE])
    assert (none.n_rows, none.n_tokens, none.spans) == (0, 0, ())


def test_at_token_granularity_all_heads_are_one() -> None:
    before, now = np.array([0, 39], np.int32), np.array([0, 7, 8, 39], np.int32)
    came = Recall.of(before, now, N, [CHOICE])
    assert (came.n_tokens, came.spans) == (2, ((7, 9),))
    assert recalled.line(came, by_head=False) == (
        "[kvp: 2 dropped tokens came back for this reply]"
    )


def test_a_single_token_of_a_single_head_is_still_one() -> None:
    share = np.zeros(N, np.float32)
    share[3] = 0.01
    assert recalled.line(event(share), by_head=True) == (
        "[kvp: 1 dropped token per head came back for this reply]"
    )
    assert recalled.passages(event(share), lambda *_: "dog") == ['  "dog"']  # no head more took it
    assert recalled.passages(event(np.zeros(N, np.float32)), lambda *_: "dog") == []


def test_passages_are_few_short_and_harmless() -> None:
    share = np.zeros(N, np.float32)
    share[::2] = 0.5
    share[20:22] = 1.0
    shown = recalled.passages(event(share), lambda a, b: f"\x1b]0;{a}-{b}\n" + "x" * 100)
    assert len(shown) == 8
    assert '  "␛]0;20-23␊' in " ".join(shown)
    for one in shown:
        assert len(one) == 64
        assert "\n" not in one
        assert "\x1b" not in one
