"""``kvp-edge learn``: from a model to a policy that chats use, in one command."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.packages import needs

torch = needs("torch", "train")
needs("safetensors", "train")


from kvp_edge.cli import main  # noqa: E402
from kvp_edge.policies.policy_of_model import own_policy  # noqa: E402
from kvp_edge.policy_file import read_info  # noqa: E402


@pytest.fixture
def model(tmp_path: Path, bundled_model: str) -> Path:
    path = tmp_path / "models" / "mine.gguf"
    path.parent.mkdir()
    shutil.copy(bundled_model, path)
    return path


def learn(model: Path, out: Path, *more: str) -> list[str]:
    small = ["--tasks", "6", "--length", "256", "--steps", "3", "--threads", "1"]
    return ["learn", str(model), "--out", str(out), *small, *more]


def test_a_model_learns_a_policy_and_chats_use_it(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], load: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    # there is no shipped policy for a copy of the small model, as for a model of one's own
    monkeypatch.setattr("kvp_edge.policies.policy_of_model._shipped", lambda: tmp_path / "nothing")
    assert own_policy(model) is None
    assert main(learn(model, tmp_path / "out")) == 0
    policy = capsys.readouterr().out.splitlines()[-1]
    assert Path(policy).parent == model.parent
    assert own_policy(model) == policy
    assert load(str(model), n_ctx=512, kv_budget=400).kv_stats.policy == "learned"

    # the same command again trains nothing, and puts a lost copy back
    Path(policy).unlink()
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.safetensors")}
    assert main(learn(model, tmp_path / "out")) == 0
    assert Path(policy).exists()
    assert made == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.safetensors")}


def test_a_policy_that_loses_more_than_a_rule_is_told_of(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    assert main(learn(model, tmp_path / "out")) == 0
    report = tmp_path / "out" / "regression-layer" / "report.json"
    numbers = json.loads(report.read_text())
    lost = [0.02 for _ in numbers["policy"]["lost"]]
    numbers["policy"].update(lost=lost, token_lost=0.02)
    for rule in ("keydiff", "knorm", "recency", "random"):
        numbers[rule].update(lost=lost, token_lost=0.01)  # as good in heads
    cases = [
        ({}, None),
        ({"knorm": 0.019}, "knorm"),
        ({"knorm": 0.019, "recency": 0.01}, "recency"),
    ]
    capsys.readouterr()
    for better, told in cases:
        for rule, value in better.items():
            numbers[rule]["lost"] = [value for _ in lost]
        report.write_text(json.dumps(numbers))
        assert main(learn(model, tmp_path / "out")) == 0
        said = capsys.readouterr().err
        assert ("loses less attention than the trained policy" in said) == (told is not None)
        assert told is None or f"--policy {told}" in said


def test_the_objective_learned_last_is_the_one_that_chats_use(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    for objective in ("global", "kvp"):
        assert main(learn(model, tmp_path / "out", "--objective", objective)) == 0
        policy = capsys.readouterr().out.splitlines()[-1]
        assert read_info(policy).objective == objective
        assert own_policy(model) == policy


def test_the_policy_stays_where_it_is_if_the_model_s_folder_cannot_be_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)

    def refuse(target: object, data: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("kvp_edge.cli.learn.write_whole", refuse)
    assert main(learn(model, tmp_path / "out")) == 0
    told = capsys.readouterr()
    assert Path(told.out.splitlines()[-1]).parent == tmp_path / "out" / "regression-layer"
    assert "Permission denied" in told.err
    assert "--policy" in told.err


def test_learning_with_other_traces_in_the_same_folder_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    assert main(learn(model, tmp_path / "out")) == 0
    assert main(learn(model, tmp_path / "out", "--seed", "1")) == 2
    assert "has traces of another run (seed 0 instead of 1)" in capsys.readouterr().err


def test_an_estimate_counts_what_is_read_and_leaves_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(learn(model, tmp_path / "out", "--estimate", "--buffer", "1MiB")) == 0
    told = capsys.readouterr().out
    assert re.match(
        r"6 traces, 1\d\d\d tokens: reading them takes about \d+ seconds? here, .*\n"
        r"\d\.\d MiB of traces, of which 1\.0 MiB are in memory at a time and none on disk$",
        told,
    )
    assert not (tmp_path / "out").exists()


def test_nothing_but_checkpoints_is_stored_and_labels_can_be_learned(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    labels = ["--objective", "kvp", "--future", "repeat", "--importance", "peak+repeated"]
    assert main(learn(model, tmp_path / "out", *labels)) == 0
    found = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")}
    assert {"manifest.json", "kvp-head/best.safetensors", "kvp-head/last.safetensors"} <= found
    assert not [name for name in found if "trace" in name]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--importance", "repeated", "--future", "text"], "needs --future repeat"),
        (["--future", "later", "questions"], "--future questions is not used"),
        (["--objective", "global", "--importance", "later"], "must be sum or peak"),
        (["--importance", "some"], "importance must be sum or peak or later or repeated"),
        (["--buffer", "much"], "--buffer is memory"),
        (["--buffer", "1KiB"], "a buffer of 0.0 MiB is too small"),
    ],
)
def test_what_cannot_be_learned_is_refused_at_once(
    options: list[str], says: str, model: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(learn(model, tmp_path / "out", *options)) == 2
    assert says in capsys.readouterr().err
