"""Records, statistics, reports and pictures of an evaluation."""

from __future__ import annotations

import base64
import itertools
import json
import math
import os
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvp_edge.errors import RecordError
from kvp_edge.evaluation import statistics
from kvp_edge.evaluation.grouping import group
from kvp_edge.evaluation.kept_tokens import KeptTokens, html_page, write_html
from kvp_edge.evaluation.kept_tokens_image import write_png
from kvp_edge.evaluation.plots import accuracy_plot, cost_per_head_plot, loss_increase_plot
from kvp_edge.evaluation.records import (
    Record,
    append_record,
    latest,
    parse_record,
    read_records,
)
from kvp_edge.evaluation.report import NOTHING, report
from kvp_edge.evaluation.statistics import Scores
from support.packages import needs


def record(**changes: Any) -> Record:
    """Of the full cache, or with a ``policy`` of a cache of 128 tokens."""
    bounded = changes.get("policy", "none") != "none"
    values: dict[str, Any] = {
        "mode": "one-shot",
        "question": "unseen",
        "granularity": "head",
        "type_k": "f16",
        "type_v": "f16",
        "length": 1024,
        "budget": 128 if bounded else None,
        "share": 0.125 if bounded else None,
        "policy": "none",
        "task": "niah",
        "item": 0,
        "seed": 0,
        "protected": True,
        "prompt": "0123456789abcdef",
        "n_prompt": 1010,
        "kept": 128,
        "dropped": 882,
        "evictions": 1,
        "reply": "It is 17.",
        "measure": "accuracy",
        "score": 1.0,
        "seconds": 0.5,
        "kv_bytes": 2**20,
    }
    return Record(**{**values, **changes})


def scores(*tasks: list[float]) -> Scores:
    return {f"task {t}": {(0, i): s for i, s in enumerate(task)} for t, task in enumerate(tasks)}


# -- records -------------------------------------------------------------------------------------


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    made = [record(), record(policy="keydiff", reply='ümläut "\u2028" \n', score=0.25)]
    for one in made:
        append_record(path, one)
    assert read_records(path) == made
    assert path.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize("cut", [1, 40, 2, 300])
def test_a_half_written_last_line_is_dropped_and_made_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "records.jsonl"
    first, second = record(item=0, reply="ü" * 40), record(item=1, reply="ü" * 40)
    append_record(path, first)
    append_record(path, second)
    path.write_bytes(path.read_bytes()[:-cut])
    whole = cut == 1  # only the line end is missing
    assert read_records(path) == ([first, second] if whole else [first])
    append_record(path, second)
    assert read_records(path) == ([first, second, second] if whole else [first, second])


def test_a_damaged_line_elsewhere_is_named(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    for item in range(3):
        append_record(path, record(item=item))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1][:50] + "\n" + lines[2])
    with pytest.raises(RecordError, match=r"records\.jsonl, line 2: this is not JSON") as raised:
        read_records(path)
    assert "--" not in str(raised.value)  # no option is needed to go on


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_a_file_of_records_has_the_permissions_of_any_other_file(tmp_path: Path) -> None:
    append_record(tmp_path / "records.jsonl", record())
    (tmp_path / "other").write_text("")
    modes = [(tmp_path / name).stat().st_mode for name in ("records.jsonl", "other")]
    assert modes[0] == modes[1]


def test_what_is_no_file_holds_no_records_and_new_files_cannot_be_run(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match="it is not a regular file"):
            read_records(path)
    with pytest.raises(OSError, match="it is not a regular file"):
        append_record(tmp_path / "fifo", record())
    old = os.umask(0o022)
    try:
        append_record(tmp_path / "records.jsonl", record())
    finally:
        os.umask(old)
    assert (tmp_path / "records.jsonl").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("line", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "7", "[]"])
def test_a_line_of_another_kind_of_json_is_refused(line: str) -> None:
    with pytest.raises(RecordError, match="not (a )?JSON"):
        parse_record(line)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seconds": 10**400}, "'seconds' cannot be 1000"),
        ({"score": math.nan}, "'score' cannot be nan"),
        ({"score": 1.5}, "not between 0 and 1"),
        ({"score": "1"}, "'score' cannot be '1'"),
        ({"item": True}, "'item' cannot be True"),
        ({"mode": "both"}, "'mode' must be bounded or one-shot"),
        ({"budget": 128}, "policy 'none'"),
        ({"policy": "learned"}, "policy 'none'"),
    ],
)
def test_a_wrong_value_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        parse_record(json.dumps({**asdict(record()), **change}))


def test_a_missing_name_is_named_and_an_unknown_one_ignored() -> None:
    values = {**asdict(record()), "later": 1}
    assert parse_record(json.dumps(values)) == record()
    del values["task"]
    with pytest.raises(RecordError, match="task missing"):
        parse_record(json.dumps(values))


def test_records_from_before_there_was_a_choice_kept_tokens_and_isolated_no_turns() -> None:
    values = asdict(record())
    del values["keep_whole"], values["isolate_turns"]
    assert parse_record(json.dumps(values)) == record(keep_whole="tokens", isolate_turns=False)
    with pytest.raises(RecordError, match="'keep_whole' must be tokens or words or sentences"):
        parse_record(json.dumps({**values, "keep_whole": "pages"}))


def test_what_stays_whole_and_isolated_turns_are_settings_of_their_own() -> None:
    changes: tuple[dict[str, Any], ...] = ({}, {"keep_whole": "words"}, {"isolate_turns": True})
    made = [record(policy="learned", **change) for change in changes]
    groups = group([record(), *made])
    assert [str(found.setting).partition("tokens")[2] for found in groups] == [
        "",
        ", turns isolated",
        ", whole words",
    ]
    assert all(found.full for found in groups)


def test_keys_tell_settings_and_items_apart_but_not_outcomes() -> None:
    one = record(policy="learned")
    same: dict[str, Any] = {"score": 0.0, "seconds": 9.0, "reply": "?", "kept": 1}
    assert replace(one, **same).key() == one.key()
    for change in (
        {"mode": "bounded"},
        {"question": "seen"},
        {"granularity": "token"},
        {"type_k": "q8_0"},
        {"type_v": "q8_0"},
        {"length": 2048},
        {"budget": 64},
        {"policy": "keydiff"},
        {"task": "vt"},
        {"item": 1},
        {"seed": 1},
        {"protected": False},
        {"keep_whole": "words"},
        {"isolate_turns": True},
        {"prompt": "fedcba9876543210"},
    ):
        assert record(**{"policy": "learned", **change}).key() != one.key()


def test_one_record_of_the_full_cache_stands_for_all_ways_to_drop() -> None:
    one = record()
    assert record(mode="bounded", granularity="token", protected=False).key() == one.key()
    assert record(length=2048).key() != one.key()


def test_the_later_of_two_records_counts() -> None:
    assert latest([record(score=0.0), record(item=1), record(score=1.0)]) == [
        record(score=1.0),
        record(item=1),
    ]


# -- statistics ----------------------------------------------------------------------------------


def test_the_bootstrap_matches_the_enumeration_of_all_resamples() -> None:
    values = [0.0, 0.1, 0.5, 0.9]
    other = [0.3, 0.6, 0.0]
    # all ways to draw n - 1 of n, for each task, all equally likely
    exact = [
        (np.mean(a) + np.mean(b)) / 2
        for a in itertools.product(values, repeat=3)
        for b in itertools.product(other, repeat=2)
    ]
    arrays = [np.array(values)[:, None], np.array(other)[:, None]]
    drawn = statistics.resampled(arrays, 100_000)[:, 0]
    assert drawn.mean() == pytest.approx(np.mean(exact), abs=1e-3)
    assert drawn.std() == pytest.approx(np.std(exact), rel=5e-3)
    for q in (0.025, 0.25, 0.5, 0.75, 0.975):
        assert np.quantile(drawn, q) == pytest.approx(np.quantile(exact, q), abs=0.011)
    # drawing n - 1 is right because of this: the variance of a mean, without bias
    unbiased = (np.var(values, ddof=1) / 4 + np.var(other, ddof=1) / 3) / 4
    assert np.var(exact) == pytest.approx(unbiased)


def test_difference_and_ratio_match_plain_loops() -> None:
    rng = np.random.default_rng(5)
    a, b = (
        {t: {(0, i): 1 + float(rng.random()) for i in range(n)} for t, n in (("x", 12), ("y", 7))}
        for _ in range(2)
    )
    gaps, ratios = [], []
    for _ in range(3000):
        above = below = 0.0
        for task, n in (("x", 12), ("y", 7)):
            for i in rng.integers(n, size=n - 1).tolist():
                above += a[task][0, i] / (n - 1) / 2
                below += b[task][0, i] / (n - 1) / 2
        gaps.append(above - below)
        ratios.append(above / below)
    for found, loop in ((statistics.difference(a, b), gaps), (statistics.ratio(a, b), ratios)):
        assert found.n == 19
        assert found.low == pytest.approx(np.quantile(loop, 0.025), abs=0.02)
        assert found.high == pytest.approx(np.quantile(loop, 0.975), abs=0.02)
    tasks = [(np.mean(list(a[t].values())), np.mean(list(b[t].values()))) for t in a]
    above, below = np.mean(tasks, 0)
    assert statistics.difference(a, b).value == pytest.approx(above - below)
    assert statistics.ratio(a, b).value == pytest.approx(above / below)


def test_intervals_cover_the_truth_at_their_rate() -> None:
    rng = np.random.default_rng(11)
    sizes, truth = (40, 15, 25), 0.1
    rounds, covered = 400, 0
    for _ in range(rounds):
        # what is hard for one policy is hard for the other; skewed noise of the difference
        hard = [rng.normal(size=n) for n in sizes]
        gaps = [rng.exponential(0.3, size=n) - 0.3 + truth for n in sizes]
        first = scores(*[(h + g).tolist() for h, g in zip(hard, gaps, strict=True)])
        second = scores(*[h.tolist() for h in hard])
        covered += not statistics.difference(first, second, resamples=500).excludes(truth)
    # 95 %, within three standard errors of 400 rounds and a little for skewness
    assert 0.91 < covered / rounds < 0.985


def test_wilson_intervals_cover_shares_near_one() -> None:
    rng = np.random.default_rng(2)
    for truth in (0.5, 0.9, 0.97):
        found = [statistics.wilson(int(r), 30) for r in rng.binomial(30, truth, size=2000)]
        assert 0.92 < np.mean([not one.excludes(truth) for one in found]) <= 1
    five = statistics.wilson(5, 5)
    assert (five.value, five.high, five.n) == (1, 1, 5)
    assert five.low == pytest.approx(0.5655, abs=1e-4)  # 5 / (5 + 1.96 squared)


def test_answers_that_are_all_right_still_have_an_interval() -> None:
    found = statistics.mean(scores([1, 1, 1, 1], [1, 1, 1, 1]))
    assert (found.value, found.high) == (1, 1)
    assert 0.6 < found.low < 0.9


def test_identical_policies_differ_by_nothing() -> None:
    same = scores([0, 1, 1, 0.3], [0.2, 0.9, 1 / 3])
    found = statistics.difference(same, same)
    assert found.value == found.low == found.high == 0
    assert not found.excludes(0)
    assert statistics.ratio(same, same).value == 1


def test_pairing_cancels_what_is_hard_for_both() -> None:
    easy = scores([0.1, 0.9, 0.5, 0.3, 0.7], [0.2, 0.8, 0.4])
    hard = {task: {i: s - 0.1 for i, s in found.items()} for task, found in easy.items()}
    gap = statistics.difference(easy, hard)
    assert gap.value == gap.low == gap.high == pytest.approx(0.1)
    assert gap.excludes(0)
    alone = statistics.mean(easy)
    assert alone.high - alone.low > 0.2


def test_only_common_items_are_compared() -> None:
    first = {"a": {(0, 0): 1.0, (0, 1): 0.0, (0, 2): 1.0}, "b": {(0, 0): 1.0}}
    second = {"a": {(0, 2): 0.0, (0, 0): 0.0, (1, 1): 1.0}}
    found = statistics.difference(first, second)
    assert (found.value, found.n) == (1, 2)
    with pytest.raises(ValueError, match="no item that both have"):
        statistics.difference(first, {"c": {(0, 0): 1.0}})


def test_one_item_of_a_task_gives_no_interval() -> None:
    found = statistics.difference(scores([1.0], [0.5, 0.7]), scores([0.2], [0.5, 0.1]))
    assert found.value == pytest.approx(0.55)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert not found.excludes(0)


def test_the_same_seed_gives_the_same_interval_and_another_seed_nearly() -> None:
    rng = np.random.default_rng(0)
    one = scores(rng.random(50).tolist())
    assert statistics.mean(one) == statistics.mean(one)
    other = statistics.mean(one, seed=1)
    assert statistics.mean(one) != other
    assert statistics.mean(one).low == pytest.approx(other.low, abs=0.01)


def test_the_gate_opens_at_exactly_its_threshold() -> None:
    full = {
        "at": {(0, i): float(i < 8) for i in range(10)},
        "at, in thirds": {(0, i): s for i, s in enumerate([1.0, 1.0, 0.7, 0.7, 0.6])},
        "below": {(0, i): float(i < 79) for i in range(100)},
        "above": {(0, i): 1.0 for i in range(3)},
    }
    assert statistics.gate(full) == (["at", "at, in thirds", "above"], ["below"])
    assert statistics.gate(full, 0.79)[1] == []


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_a_policy_is_compared_to_every_baseline_and_the_best_is_named(better: Any) -> None:
    sign = 1 if better == "higher" else -1
    found = statistics.compare(
        "learned",
        {
            "bad": scores([sign * 0.1, sign * 0.2, sign * 0.1]),
            "learned": scores([sign * 0.9, sign * 0.8, sign * 0.7]),
            "good": scores([sign * 0.9, sign * 0.7, sign * 0.5]),
            "lucky, but not finished": scores([sign * 1.0]),
        },
        better=better,
    )
    assert found is not None
    assert found.best == "good"
    assert found.against["good"].value == pytest.approx(sign * 0.1)
    assert found.items == {"bad": 1, "good": 1, "lucky, but not finished": pytest.approx(1 / 3)}
    assert statistics.compare("learned", {"learned": scores([1.0])}) is None
    assert statistics.compare("learned", {"good": scores([1.0])}) is None


# -- the report ----------------------------------------------------------------------------------

RIGHT = {  # of 20 items of each task: the full cache, learned, keydiff
    "easy": (20, 15, 10),
    "fine": (16, 12, 12),
    "hopeless": (5, 5, 1),
}


@pytest.fixture(scope="module")
def small() -> list[Record]:
    made = []
    for task, right in RIGHT.items():
        for policy, n in zip(("none", "learned", "keydiff"), right, strict=True):
            made += [
                record(policy=policy, task=task, item=i, score=float(i < n)) for i in range(20)
            ]
    for i in range(20):
        base = 2 + 0.1 * (i % 5)
        for policy, more in (("none", 0.0), ("learned", 0.25), ("keydiff", 0.25 + 0.01 * i)):
            made.append(
                record(policy=policy, task="book", item=i, measure="loss", score=base + more)
            )
    return made


def section(text: str, heading: str) -> str:
    """From a heading that begins so to the next."""
    found = re.search(rf"^#+ {re.escape(heading)}.*?(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"no section '{heading}'"
    return found[0]


def row(text: str, name: str, column: int = 0) -> list[str]:
    """The cells behind the first row that has ``name`` at ``column``."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[column] == name:
            return cells[column + 1 :]
    raise AssertionError(f"no row '{name}'")


def numbers(cell: str) -> list[float]:
    return [float(n) for n in re.findall(r"[-+]?\d+\.\d+", cell)]


def test_the_report_averages_the_tasks_that_the_full_cache_can_do(small: list[Record]) -> None:
    text = report(small)
    part = section(text, "Accuracy in %, mean over 2 tasks")
    assert "easy, fine. Full cache: 90.0 [" in part
    assert numbers(row(part, "learned")[0])[0] == 67.5  # (75 + 60) / 2
    assert numbers(row(part, "keydiff")[0])[0] == 55.0
    share = section(text, "Retained share")
    assert numbers(row(share, "learned")[0])[0] == 75.0  # 67.5 of 90
    assert numbers(row(share, "keydiff")[0])[0] == 61.1


def test_the_report_compares_with_a_paired_interval(small: list[Record]) -> None:
    part = section(report(small), "learned against each baseline: accuracy")
    gap, items, reading = row(part, "**keydiff** (best)", 1)
    value, low, high = numbers(gap)
    # easy: 5 of 20 items differ by 1; fine: none. The spread of the mean, by its formula:
    spread = math.sqrt(np.var([1] * 5 + [0] * 15, ddof=1) / 20) / 2
    assert value == 12.5
    assert high - low == pytest.approx(100 * 2 * 1.96 * spread, rel=0.1)
    assert (items, reading) == ("40", "better")


def test_the_report_shows_and_marks_tasks_left_out(small: list[Record]) -> None:
    text = report(small)
    part = section(text, "Task by task")
    assert [numbers(cell)[0] for cell in row(part, "hopeless †")[1:]] == [25.0, 25.0, 5.0]
    assert [numbers(cell)[0] for cell in row(part, "easy")[1:]] == [100.0, 75.0, 50.0]
    assert row(section(text, "Full cache"), "hopeless")[0].endswith("†")
    assert "†" not in section(report(small, threshold=0.25), "Task by task")
    nothing = report([r for r in small if r.task == "hopeless"])
    assert "there is nothing to average or compare" in nothing


def test_the_report_measures_readings_against_the_full_cache(small: list[Record]) -> None:
    part = section(report(small), "Readings")
    assert row(part, "learned") == ["+0.250 [+0.250, +0.250]"]  # paired: the same for every text
    value, low, high = numbers(row(part, "keydiff")[0])
    assert value == pytest.approx(0.345)
    assert low < value < high
    gap, _, reading = row(
        section(report(small), "learned against each baseline: loss"), "**keydiff** (best)", 1
    )
    assert numbers(gap)[0] == -0.095
    assert reading == "better"


def test_the_full_cache_is_compared_in_every_mode_and_granularity(small: list[Record]) -> None:
    changes: dict[str, Any] = {"mode": "bounded", "granularity": "token"}
    more = [replace(r, **changes) for r in small if not r.is_full]
    text = report(small + more)
    assert text.count("### Retained share") == 2
    assert text.count("Full cache: 90.0 [") == 2


def test_the_order_of_records_does_not_matter(small: list[Record]) -> None:
    shuffled = list(small)
    np.random.default_rng(0).shuffle(shuffled)
    assert report(shuffled, resamples=500) == report(small, resamples=500)


def test_an_unfinished_policy_says_so(small: list[Record]) -> None:
    some = [r for r in small if r.policy != "keydiff" or r.item % 2]
    text = report(some)
    assert "(20/40 items)" in row(section(text, "Accuracy"), "keydiff")[0]
    assert "50% of the policy's" in section(text, "learned against each baseline: accuracy")


def test_without_the_full_cache_the_report_says_so(small: list[Record]) -> None:
    text = report([r for r in small if not r.is_full])
    assert "no records of the full cache" in text
    assert "mean over 3 tasks" in text
    assert "Retained share" not in text


def test_the_full_cache_alone_is_reported(small: list[Record]) -> None:
    text = report([r for r in small if r.is_full])
    assert "There are no records of a bounded cache yet." in text
    assert numbers(row(text, "fine")[0])[0] == 80.0


def test_few_items_are_warned_of_and_the_oracle_is_no_baseline(small: list[Record]) -> None:
    more = [replace(r, policy="oracle") for r in small if r.policy == "learned"]
    text = report([r for r in small + more if r.item < 4])
    assert "fewer than 10 items" in text
    assert "It is not a baseline" in text
    assert "oracle" not in section(text, "learned against each baseline")


def test_the_loss_increase_is_told_by_quarters_of_the_ending(tmp_path: Path) -> None:
    made = []
    for i in range(12):
        base = [2 + 0.1 * i] * 8
        for policy, more in (("none", 0.0), ("learned", 0.5), ("keydiff", 1.0)):
            losses = [b + more * part for part, b in enumerate(base)]
            made.append(
                record(
                    policy=policy, task="told", item=i, measure="loss", losses=losses,
                    score=float(np.mean(losses)),
                )
            )  # fmt: skip
    part = section(report(made), "Readings")
    quarters = section(part, "Readings").split("Along the ending, budget 128 (0.125):")[1]
    assert [numbers(cell)[0] for cell in row(quarters, "learned")] == [0.25, 1.25, 2.25, 3.25]
    assert row(quarters, "keydiff")[3] == "+6.500 [+6.500, +6.500]"  # paired
    some = [replace(r, losses=[]) if r.item % 2 and r.policy == "learned" else r for r in made]
    assert "Along the ending" in report(some)
    older = [replace(r, losses=[]) for r in made]
    assert "Along the ending" not in report(older)
    with pytest.raises(ValueError, match="nothing to plot"):
        loss_increase_plot(older, "never.png")
    needs("matplotlib", "train")
    loss_increase_plot(some, tmp_path / "increase.png", resamples=200)
    assert is_png(tmp_path / "increase.png")


def test_no_records_give_a_sentence() -> None:
    assert NOTHING in report([])
    assert group([]) == []
    with pytest.raises(ValueError, match="nothing to plot"):
        accuracy_plot([], "never.png")


def test_different_prompts_of_one_item_are_refused(small: list[Record]) -> None:
    foreign = [replace(r, prompt="f" * 16) if r.policy == "keydiff" else r for r in small]
    with pytest.raises(RecordError, match="item 0 of .* has different prompts"):
        report(foreign)


# -- pictures ------------------------------------------------------------------------------------


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_plots_are_drawn(tmp_path: Path, small: list[Record]) -> None:
    needs("matplotlib", "train")
    more = [replace(r, budget=256, share=0.25) for r in small if not r.is_full]
    accuracy_plot(small + more, tmp_path / "accuracy.png", resamples=200)
    assert is_png(tmp_path / "accuracy.png")
    costs = {name: np.linspace(1, 3, 10).reshape(5, 2) for name in ("learned", "keydiff")}
    cost_per_head_plot(costs, tmp_path / "costs.png")
    assert is_png(tmp_path / "costs.png")
    with pytest.raises(ValueError, match="the same for all policies"):
        cost_per_head_plot({**costs, "knorm": np.ones((2, 5))}, tmp_path / "costs.png")


def test_without_matplotlib_a_sentence_tells_what_to_install(
    monkeypatch: pytest.MonkeyPatch, small: list[Record]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'kvp_edge\[train\]'"):
        accuracy_plot(small, "never.png")


TEXTS = ["", "<script>", "alert('&amp;')", "\n", " a\tb ", "\x00{{title}}", "ü\ud800", "</div>"]


@pytest.fixture
def shown() -> KeptTokens:
    rng = np.random.default_rng(0)
    n = len(TEXTS)
    protected = np.arange(n) < 2
    kept = (rng.random((3, 2, n)) < 0.4) | protected
    kept[:, :, 3], kept[:, :, 4] = False, True
    return KeptTokens(TEXTS, kept, protected, "Task <b>1</b>", rng.normal(size=kept.shape))


class Page(HTMLParser):
    """Checks that elements are closed in order; collects tokens, options and data."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: list[str] = []
        self.classes: list[str] = []
        self.options: list[str] = []
        self.links: list[str] = []
        self.title = self.data = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag == "span" and ("div", {"id": "text"}) in self.open:
            self.tokens.append("")
            self.classes.append(found["class"] or "")
        if tag == "option":
            self.options.append(found["value"] or "")
        if tag not in ("meta", "br"):
            self.open.append((tag, found))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tags = [tag for tag, _ in self.open]
        if ("div", {"id": "text"}) in self.open:
            assert "span" in tags  # nothing stands between tokens
            self.tokens[-1] += data
        elif "title" in tags:
            self.title += data
        elif self.open and self.open[-1][1].get("id") == "data":
            self.data += data


def test_the_page_is_well_formed_and_holds_every_token_once(shown: KeptTokens) -> None:
    page = Page(html_page(shown))
    # as they are, but for what HTML or UTF-8 cannot hold
    assert page.tokens == [t.replace("\x00", "␀").replace("\ud800", "?") for t in TEXTS]
    assert page.title == "Task <b>1</b>"
    assert page.links == []
    # views: the share of heads, and each of 3 x 2 heads; all of them colour the same tokens
    assert page.options == ["-1", *map(str, range(6))]


def test_the_page_escapes_what_looks_like_a_script(shown: KeptTokens) -> None:
    page = html_page(shown)
    assert page.count("<script") == page.count("</script>") == 2  # data and code
    assert "&lt;script&gt;" in page
    assert "\ufffd" not in page


def test_the_page_shades_tokens_and_carries_what_each_head_kept(shown: KeptTokens) -> None:
    page = Page(html_page(shown))
    assert page.classes[0] == "h10 p"
    assert page.classes[3:5] == ["h0", "h10"]
    data = json.loads(page.data)
    assert (data["n"], data["layers"], data["heads"]) == (8, 3, 2)
    bits = np.frombuffer(base64.b64decode(data["kept"]), np.uint8).reshape(6, data["stride"])
    kept = np.unpackbits(bits, axis=1)[:, :8].astype(bool).reshape(3, 2, 8)
    np.testing.assert_array_equal(kept, shown.kept)
    assert shown.scores is not None
    ranks = np.frombuffer(base64.b64decode(data["ranks"]), np.uint8).reshape(3, 2, 8)
    np.testing.assert_array_equal(ranks.argmax(-1), shown.scores.argmax(-1))
    assert set(ranks[0, 0]) == {0, 14, 29, 43, 57, 71, 86, 100}


def test_four_thousand_tokens_and_64_heads_are_a_small_page(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    kept = rng.random((8, 8, 4096)) < 0.1
    write_html(KeptTokens([" word"] * 4096, kept, kept[0, 0]), tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 300_000


def test_the_picture_is_drawn(tmp_path: Path, shown: KeptTokens) -> None:
    needs("matplotlib", "train")
    # only what its font has, so that no warning hides another
    texts = [text.replace("\ud800", "$") for text in TEXTS]
    write_png(replace(shown, texts=texts), tmp_path / "kept.png")
    assert is_png(tmp_path / "kept.png")
    with pytest.raises(ValueError, match="no passage of a text of 8 tokens"):
        write_png(shown, tmp_path / "kept.png", passage=(3, 9))


def test_shapes_that_do_not_fit_are_refused() -> None:
    kept, protected = np.zeros((1, 2, 3), bool), np.zeros(3, bool)
    with pytest.raises(ValueError, match="there are no tokens"):
        KeptTokens([], kept[:, :, :0], protected[:0])
    with pytest.raises(ValueError, match=r"\[n_layer, n_head_kv, 2\]"):
        KeptTokens(["a", "b"], kept, protected)
    with pytest.raises(ValueError, match="'protected' must be"):
        KeptTokens(["a", "b", "c"], kept, protected[:2])
    with pytest.raises(ValueError, match="'scores' must be"):
        KeptTokens(["a", "b", "c"], kept, protected, scores=np.zeros((1, 2, 2)))
