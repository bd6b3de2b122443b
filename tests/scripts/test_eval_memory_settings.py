"""scripts/eval_memory.py: what is protected, how recall is set, and texts that are cut once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvp_edge.bundled import bundled_model
from kvp_edge.cache.recall import RecallSettings
from kvp_edge.cache.types import F16
from memory_eval.records import key, read
from memory_eval.settings import Setting, limits_in
from memory_eval.subject import ASKING, Subject
from scripts.eval_memory import main

NARROW = "after=0,before=0"


def command(out: Path, *more: str) -> list[str]:
    return [
        *("--out", str(out), "--length", "500", "--items", "1", "--facts", "2", "--threads", "1"),
        *("--tasks", "look-ups,books", "--types", "f16", "--shares", "6", "--policy", "keydiff"),
        *("--one-shot", *more),
    ]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("settings") / "measured.jsonl"
    assert main(command(out, "--recents", "4,16", "--recalls", NARROW)) == 0
    assert main(command(out, "--log-types", "q4_0")) == 0
    return out


def test_every_setting_is_measured_once_in_every_way_of_recall(measured: Path) -> None:
    found = [r for r in read(measured) if r["share"] > 1]
    assert len({key(r) for r in found}) == len(found)
    assert {(r["task"], r["question"]) for r in found} == {
        *(("look-ups", 0), ("look-ups", 1), ("books", 0))
    }
    assert {(r["recent"], r["log_type"], r["recall"]) for r in found} == {
        *((4, "cache", False), (4, "cache", True), (4, "cache", NARROW)),
        *((16, "cache", False), (16, "cache", True), (16, "cache", NARROW)),
        *((4, "q4_0", False), (4, "q4_0", True)),
    }
    assert all(r["one_shot"] for r in found)


def test_the_log_and_how_it_is_asked_count_only_with_recall(measured: Path) -> None:
    loss = {
        (r["question"], r["recent"], r["log_type"], r["recall"]): r["loss"]
        for r in read(measured)
        if r["task"] == "look-ups" and r["share"] > 1
    }
    for question in (0, 1):
        off, on = loss[question, 4, "cache", False], loss[question, 4, "cache", True]
        assert loss[question, 4, "q4_0", False] == off
        assert loss[question, 4, "q4_0", True] != on, "its rows are rounded"
        assert loss[question, 4, "cache", NARROW] > on + 0.2, "an answer stands behind the words"
        assert loss[question, 16, "cache", False] != off, "other rows were kept"


def test_a_smaller_log_takes_fewer_bytes(measured: Path) -> None:
    found = read(measured)
    whole, small = (
        {r["log_bytes"] for r in found if (r["log_type"], r["recent"], r["share"]) == (log, 4, 6)}
        for log in ("cache", "q4_0")
    )
    assert max(small) < min(whole)


def test_tables_compare_with_the_defaults(
    measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(measured), "--table"]) == 0
    printed = capsys.readouterr().out.splitlines()
    at = printed.index("| more than by default | recall | 1/6 |")
    rows = [line.split(" | ")[0] for line in printed[at + 2 : printed.index("", at)]]
    assert set(rows) == {
        *("| f16, one-shot", "| f16, recent 1/16, one-shot", "| f16, log q4_0, one-shot")
    }, "the default is compared only by how it recalls"
    assert len(rows) == 6


def test_a_file_from_before_there_was_one_shot_is_of_bounded_readings(
    measured: Path, tmp_path: Path
) -> None:
    record = read(measured)[0]
    del record["one_shot"]
    old = tmp_path / "old.jsonl"
    old.write_text(json.dumps(record) + "\n", encoding="utf-8")
    assert read(old)[0]["one_shot"] is False


def test_an_unknown_setting_of_recall_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(command(tmp_path / "none.jsonl", "--recalls", "afterwards=4"))
    assert "no recall setting 'afterwards'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def subject() -> Iterator[Subject]:
    types = F16
    made: dict[str, Any] = {"policy": "keydiff", "kv_log_type": "cache"}
    threads = {"n_threads": 1, "n_threads_batch": 1}
    with closing(Subject(bundled_model(), types, 500, **made, **threads)) as subject:
        yield subject


def text(subject: Subject, n: int = 400) -> list[int]:
    return np.random.default_rng(n).integers(300, subject.n_vocab(), n).tolist()


def test_a_cut_text_holds_its_sinks_its_newest_and_what_was_read_since(subject: Subject) -> None:
    context = text(subject)
    setting = Setting(F16, 4, recent=8, sinks=9, log_type="cache", one_shot=True)
    subject.begin(context, setting, 100 * subject.bytes_per_cell)
    budget, _ = limits_in(100)
    held, cut = subject.kv_indices, len(context) - ASKING
    assert held.shape[-1] == budget + ASKING
    assert (held[..., :9] == np.arange(9)).all()
    assert (held[..., -ASKING - budget // 8 :] == np.arange(cut - budget // 8, 400)).all()


def test_a_text_is_read_once_and_another_setting_finds_it_as_if_it_were_read_again(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, reply = text(subject), text(subject, 20)
    types = F16
    first = Setting(types, 4, recent=2, sinks=1, log_type="cache", one_shot=True)
    then = Setting(types, 8, recent=16, sinks=4, log_type="cache", one_shot=True)
    n_bytes = 60 * subject.bytes_per_cell

    def measure() -> list[float]:
        subject.begin(context, then, n_bytes)
        return [subject.loss([], reply, how) for how in (None, RecallSettings(), None)]

    subject.begin(text(subject, 300), first, n_bytes)
    fresh = measure()
    assert fresh[0] == fresh[2] != fresh[1]
    subject.begin(context, first, 2 * n_bytes)
    with monkeypatch.context() as patched:
        patched.setattr(subject, "forget", lambda: pytest.fail("it is read again"))
        assert measure() == fresh
