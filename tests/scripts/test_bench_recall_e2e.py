"""scripts/bench_recall_e2e.py: made conversations are sound, and every part measures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bench_models import Bench
from kvp_edge import Llama
from kvp_edge.bundled import bundled_model
from scripts.bench_recall_e2e import converse, main, recalling


@pytest.fixture(scope="module")
def made() -> Iterator[Llama]:
    """A conversation of 1,300 tokens in 512 cells."""
    bench = Bench(bundled_model(), False, 1)
    llm = recalling(bench, 512)
    converse(bench, llm, 1300)
    yield llm
    llm.close()


def test_a_made_conversation_is_one_after_an_eviction(made: Llama) -> None:
    kv, stats = made.kv, made.kv_stats
    assert kv is not None
    assert kv.snapshot().adds_up(kv.empty_table())
    assert (stats.seen, stats.kept, stats.logged, stats.lost) == (1300, 256, 1300, 0)
    held = made.kv_indices
    assert held.shape[-1] == 256
    assert (held[..., -kv.limits.recent :] == np.arange(1300 - kv.limits.recent, 1300)).all()
    assert not np.array_equal(held[0, 0], held[1, 0]), "every head holds its own"


def test_it_goes_on(made: Llama) -> None:
    made.eval([5, 6, 7])
    assert np.isfinite(made.newest_logits()).all()
    event = made.recall()
    assert event is not None
    assert event.n_rows > 0


def tables(printed: str) -> list[list[list[str]]]:
    """The cells of the lines of each table, without its head."""
    found = [part.splitlines() for part in printed.strip().split("\n\n")[1:]]
    assert all(len({line.count("|") for line in table}) == 1 for table in found)
    return [[[c.strip() for c in line[1:-1].split("|")] for line in t[2:]] for t in found]


def command(*more: str) -> list[str]:
    numbers = ["--lengths", "700", "--queries", "9", "--cells", "512", "--repeat", "1"]
    return [*numbers, "--tokens", "2", "--threads", "1", *more]


def test_every_part_prints_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = ("--parts", "log", "recall", "write")
    assert main(command("--kv-log", str(tmp_path / "kv.log"), *parts)) == 0
    log, recall, write = tables(capsys.readouterr().out)
    # keys and values of 5 layers and 2 KV heads of size 64; blocks of 32 take 64, 34 or 18 bytes
    assert [row[:2] for row in log] == [["f16", "2,560"], ["q8_0", "1,360"], ["q4_0", "720"]]
    assert [row[:2] for row in recall] == [["700", "9"]]
    assert recall[0][4] in "12", "passes"
    assert [row[0] for row in write] == [
        *("full, 700 tokens", "bounded, 700 tokens"),
        *("fresh chat, as many cells", "fresh chat, 64 tokens"),
    ]


@pytest.mark.slow
def test_the_memory_of_a_process_with_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command("--parts", "memory")) == 0
    (memory,) = tables(capsys.readouterr().out)
    assert [row[:3] for row in memory] == [
        ["700", "off", "0"],
        ["700", "memory", "2"],
        ["700", "file", "2"],
    ]
    assert all(float(row[4]) > 0 for row in memory)
