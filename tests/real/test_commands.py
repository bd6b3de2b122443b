"""What users type, as processes of their own, with models of their own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kvp_edge.cache.limits import memory_bytes
from makers.command import COMMAND
from support.command_line import STATUS
from support.plans import assert_kept
from support.real_models import ALL, GEMMA

pytestmark = pytest.mark.real

FEW_CELLS = ["--kv-budget", "512", "--recent", "64", "--threads", "1"]


def kvp_edge(*argv: str, typed: str = "", folder: Path) -> tuple[str, str]:
    """Standard output and error of a command that must end well."""
    done = subprocess.run(
        [*COMMAND, *argv], input=typed, capture_output=True, text=True, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize("name", ALL)
def test_demo_compares_policies(
    name: str, real_model: Callable[[str], str], tmp_path: Path
) -> None:
    options = ["--items", "1", "--length", "700", "--threads", "1", "--json"]
    out, _ = kvp_edge("demo", real_model(name), *options, folder=tmp_path)
    rows = {row["cache"]: row for row in json.loads(out)}
    assert {"full context", "drop oldest half", "keydiff", "knorm", "recency"} <= set(rows)
    assert all(row["items"] == 1 for row in rows.values())
    full = rows["full context"]
    assert full["dropped"] == 0
    assert rows["keydiff"]["dropped"] > 0
    assert rows["keydiff"]["kv_bytes"] < full["kv_bytes"]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "asked",
    [
        ["--memory", "700MiB", "--recall", "off"],
        ["--memory", "900MiB", "--length", "6000"],
        ["--memory", "1GiB", "--n-ctx", "20000", "--kv-log", "chat.kvlog"],
    ],
)
def test_a_plan_is_what_llama_cpp_allocates(
    name: str,
    asked: list[str],
    real_model: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, _ = kvp_edge("plan", real_model(name), *asked, "--threads", "1", folder=tmp_path)
    monkeypatch.chdir(tmp_path)
    assert_kept(out, memory_bytes("--memory", asked[1]))


@pytest.mark.parametrize("name", ALL)
def test_a_piped_chat_answers_each_line(
    name: str, real_model: Callable[[str], str], tmp_path: Path
) -> None:
    typed = "My dog is called Rex.\nWhat is my dog called?\n"
    options = [*FEW_CELLS, "--temperature", "0", "--max-tokens", "20"]
    out, err = kvp_edge("chat", real_model(name), *options, typed=typed, folder=tmp_path)
    assert out.strip()
    if name != GEMMA:  # a base model without a chat template
        assert len(STATUS.findall(err)) == 2
        assert "Rex" in out.splitlines()[-1]


@pytest.mark.parametrize("name", ALL)
def test_run_reads_a_file_longer_than_its_cache(
    name: str, real_model: Callable[[str], str], tmp_path: Path, book: str
) -> None:
    (tmp_path / "book.txt").write_text(book[:5200], encoding="utf-8")
    options = [*FEW_CELLS, "--temperature", "0", "--max-tokens", "12", "--json"]
    asked = ["-f", "book.txt", "-p", "Who is speaking?"]
    out, _ = kvp_edge("run", real_model(name), *asked, *options, folder=tmp_path)
    answer = json.loads(out)
    assert answer["answer"].strip()
    assert answer["kv_cache"]["evictions"] > 0
    assert answer["kv_cache"]["kept"] <= 768


@pytest.mark.parametrize("name", ALL)
def test_eval_writes_a_report(name: str, real_model: Callable[[str], str], tmp_path: Path) -> None:
    what = ["--items", "1", "--lengths", "512", "--tasks", "fact", "--policies", "keydiff"]
    options = ["--out", "report", "--threads", "1"]
    kvp_edge("eval", real_model(name), *what, *options, folder=tmp_path)
    (report,) = (tmp_path / "report").glob("*.md")
    assert "keydiff" in report.read_text(encoding="utf-8")
