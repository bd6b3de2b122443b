"""The recipe of the bundled model's policy, in its smallest size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from support.packages import needs

torch = needs("torch", "train")
for package in ("matplotlib", "safetensors", "tokenizers"):
    needs(package, "train")


from kvp_edge.policy_file import read_policy  # noqa: E402
from kvp_edge.traces.format import TraceSet  # noqa: E402
from scripts.train_model import config  # noqa: E402
from scripts.train_model.export import write_gguf  # noqa: E402
from scripts.train_model.model import Model  # noqa: E402
from scripts.train_model.prepare import Corpus, prepare  # noqa: E402
from scripts.train_policy.__main__ import SMOKE_TRACES, main  # noqa: E402
from scripts.train_policy.loss_increase import main as loss_increase  # noqa: E402
from support.books import write_books  # noqa: E402


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpus")


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_books(tmp_path_factory.mktemp("books"))


@pytest.fixture(scope="module")
def corpus(books: Path, corpus_folder: Path) -> Corpus:
    return prepare(books, corpus_folder, config.SMOKE)


@pytest.fixture(scope="module")
def untrained(corpus: Corpus, corpus_folder: Path) -> Path:
    """A model with the corpus' tokenizer and random weights."""
    torch.manual_seed(0)
    path = corpus_folder / "untrained.gguf"
    write_gguf(path, Model(config.SMOKE.model), corpus.tokenizer, 512, {}, "f16")
    return path


@pytest.mark.parametrize("objective", ["kvp", "foresight", "global"])
def test_one_command_makes_traces_policy_and_comparison_and_goes_on_where_it_stopped(
    books: Path, corpus_folder: Path, untrained: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], objective: str,
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    command = ["--smoke", "--books", str(books), "--model-run", str(corpus_folder)]
    command += ["--model", str(untrained), "--out", str(tmp_path), "--threads", "1"]
    command += ["--objective", objective]
    main(command)
    policy = Path(capsys.readouterr().out.splitlines()[-1])
    info, _ = read_policy(policy)
    assert (info.architecture, info.objective) == ("qwen3", objective)
    seen, held_out = TraceSet(tmp_path / "traces"), TraceSet(tmp_path / "held-out-traces")
    assert len(seen) == len(held_out) == SMOKE_TRACES
    assert not {t.source for t in seen if list(t.tokens) in [list(h.tokens) for h in held_out]}
    figures = json.loads((tmp_path / objective / "comparison.json").read_text())
    n_heads = config.SMOKE.model.n_layer * config.SMOKE.model.n_head_kv
    assert all(len(found["cost"]) == n_heads for found in figures.values())
    # nothing ranks better than the oracle, head by head
    for found in figures.values():
        assert all(c >= 1 - 1e-5 for c in found["cost"])
    assert figures["oracle"]["lost"] == pytest.approx([0] * n_heads, abs=1e-6)
    assert "| layer, head |" in (tmp_path / objective / "comparison.md").read_text()
    assert (tmp_path / objective / "cost-per-head.png").read_bytes().startswith(b"\x89PNG")

    told = policy.with_suffix(".md").read_text()
    assert told.startswith(f"# {info.name}\n")
    mean = np.mean(figures["policy"]["cost"])
    assert f"| **this policy** | {mean:.2f} |" in told
    assert "Measured on held-out traces." in told
    assert f"--objective {objective} --seed 1 --smoke" in told

    times = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*traces/trace-*")}
    checkpoint = (tmp_path / objective / "best.safetensors").stat().st_mtime_ns
    main(command)
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.glob("*traces/trace-*")}
    assert (tmp_path / objective / "best.safetensors").stat().st_mtime_ns == checkpoint


def test_what_evictions_cost_held_out_texts_is_told_policy_by_policy(
    books: Path, corpus_folder: Path, untrained: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    command = ["--smoke", "--books", str(books), "--model-run", str(corpus_folder)]
    main([*command, "--model", str(untrained), "--out", str(tmp_path), "--threads", "1"])
    policy = capsys.readouterr().out.splitlines()[-1]
    numbers = tmp_path / "numbers.json"
    loss_increase(
        ["--traces", str(tmp_path / "held-out-traces"), "--model", str(untrained), "--budget", "40",
         "--every", "16", "--threads", "1", "--out", str(numbers),
         "--policies", f"{policy},snapkv,recency,golden"]
    )  # fmt: skip
    found = json.loads(numbers.read_text())
    assert list(found) == [policy, "snapkv", "recency", "golden"]
    table = capsys.readouterr().out
    texts = int(table.split()[0])
    assert texts > 0
    assert all(len(rises) == texts for rises in found.values())
    assert f"| {Path(policy).stem} | {np.mean(found[policy]):+.4f}" in table


def test_the_tokenizer_of_another_run_is_refused(untrained: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other_books = write_books(tmp_path / "books")
    text = (other_books / "Nobody_Second_1901.txt").read_text()
    (other_books / "Nobody_Second_1901.txt").write_text(text.replace("The ", "Secret code was "))
    command = ["--smoke", "--books", str(other_books), "--model-run", str(other)]
    with pytest.raises(SystemExit, match="not the model's"):
        main([*command, "--model", str(untrained), "--out", str(tmp_path / "out")])
