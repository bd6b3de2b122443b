"""scripts/eval_memory.py: caches of so many bytes, whatever their types, and what each loses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from kvp_edge import Llama
from kvp_edge.bundled import bundled_model
from kvp_edge.cache.type_table import parse_table
from label_eval.items import known_tasks, make_items
from memory_eval.records import key
from memory_eval.settings import LEAST_RESERVE, limits_in
from scripts.eval_memory import main
from support.packages import needs

Records = list[dict[str, Any]]


def command(out: Path, *more: str) -> list[str]:
    return [
        *("--out", str(out), "--length", "500", "--items", "1", "--facts", "2", "--threads", "1"),
        *("--tasks", "look-ups,books", "--types", "f16,q8_0,q8_0/q4_0", "--shares", "1,2,4"),
        *more,
    ]


def read(path: Path) -> Records:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("memory") / "measured.jsonl"
    assert main(command(out)) == 0
    return out


def test_every_cache_is_measured_once_without_and_with_recall(measured: Path) -> None:
    found = read(measured)
    assert len({key(one) for one in found}) == len(found)
    asked = {(r["task"], r["question"]) for r in found}
    assert asked == {("look-ups", 0), ("look-ups", 1), ("books", 0)}
    assert all(r["score"] == 1 for r in found if r["share"] == 1 and r["types"] == "f16")
    settings = {(types, share) for types in ("f16", "q8_0", "q8_0/q4_0") for share in (1, 2, 4)}
    for what in asked:
        mine = [r for r in found if (r["task"], r["question"]) == what]
        without = [(r["types"], r["share"]) for r in mine if not r["recall"]]
        assert sorted(without) == sorted(settings)
        assert {(r["types"], r["share"]) for r in mine if r["recall"]} == {
            (types, share) for types, share in settings if share > 1
        }


def test_all_types_get_the_same_bytes_to_one_cell(measured: Path) -> None:
    found = read(measured)
    full = {r["task"]: r["bytes"] / r["cells"] for r in found if r["types"] == "f16"}
    for record in found:
        if record["share"] > 1:
            given = full[record["task"]] * record["context"] / record["share"]
            assert record["bytes"] <= given < record["bytes"] + record["bytes"] / record["cells"]
    small = [r for r in found if r["share"] == 4]
    assert all(r["cells"] < r["context"] for r in small), "else nothing is dropped"
    smaller = [r["cells"] for r in found if r["types"] == "q8_0/q4_0" and r["share"] == 4]
    larger = [r["cells"] for r in found if r["types"] == "f16" and r["share"] == 4]
    assert all(many > 2 * few for many, few in zip(smaller, larger, strict=True))


def test_the_full_cache_loses_what_llama_cpp_loses(measured: Path) -> None:
    """An independent reference: llama_cpp's own class, on the same text."""

    full = next(r for r in read(measured) if r["task"] == "books" and r["types"] == "f16")
    llm = llama_cpp.Llama(bundled_model(), n_ctx=1024, logits_all=True, n_threads=1, verbose=False)
    words = Llama(bundled_model(), vocab_only=True, verbose=False)
    tasks = {"books": known_tasks(None)["books"]}
    (item,) = make_items(words, tasks, 500, 1, 2, 0)
    llm.eval([*item.context, *item.ending])
    logits = llm.scores[len(item.context) - 1 : llm.n_tokens - 1].astype(np.float64)
    chosen = logits[np.arange(len(item.ending)), list(item.ending)]
    loss = float((np.logaddexp.reduce(logits, axis=1) - chosen).mean())
    assert full["loss"] == pytest.approx(loss, abs=0.01)  # flash attention rounds otherwise
    assert len(item.ending) == len(full["reply"])
    llm.close()
    words.close()


def test_what_fits_loses_nothing_but_by_its_type(tmp_path: Path) -> None:
    out = tmp_path / "fits.jsonl"
    arguments = command(out, "--tasks", "books", "--types", "q4_0", "--shares", "1,2")
    assert main(arguments) == 0
    all_tokens, half = (r for r in read(out) if r["types"] == "q4_0" and not r["recall"])
    assert (all_tokens["share"], half["share"]) == (1, 2)
    assert half["cells"] > half["context"]
    assert half["loss"] == pytest.approx(all_tokens["loss"], abs=0.02)  # other batches


def test_an_interrupted_run_goes_on_where_it_stopped(measured: Path, tmp_path: Path) -> None:
    lines = measured.read_bytes().splitlines(keepends=True)
    out = tmp_path / "half.jsonl"
    out.write_bytes(b"".join(lines[: len(lines) // 2]) + lines[-1][:20])
    assert main(command(out)) == 0
    assert {key(r): r["loss"] for r in read(out)} == pytest.approx(
        {key(r): r["loss"] for r in read(measured)}, abs=1e-6
    )


def test_tables_compare_types_at_equal_bytes(
    measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(measured), "--table"]) == 0
    printed = capsys.readouterr().out
    assert "### look-ups" in printed
    assert "### books" in printed
    assert "| more than f16 | recall | 1/2 | 1/4 |" in printed
    assert "| q8_0/q4_0 | on |" in printed


def test_the_shipped_file_gets_rows_and_keeps_its_choice(tmp_path: Path) -> None:
    out, shipped = tmp_path / "two.jsonl", tmp_path / "kv_types.json"
    arguments = command(out, "--tasks", "books", "--items", "2", "--types", "f16,q8_0")
    assert main(arguments) == 0
    choice = [{"types": "q8_0"}]
    old = {"commands": [], "date": "", "rows": [], "speeds": []}
    old |= {"choice": choice, "choice_on_device": choice}
    shipped.write_text(json.dumps(old), encoding="utf-8")
    assert main(["--out", str(out), "--ship", str(shipped)]) == 0
    table = parse_table(shipped.read_bytes())
    assert [c.types for c in table.choice] == ["q8_0"]
    assert {(r.types, r.share, r.recall) for r in table.rows} == {
        ("q8_0", 1.0, False),
        *((t, s, r) for t in ("f16", "q8_0") for s in (0.5, 0.25) for r in (False, True)),
    }
    assert all(r.items == 2 and r.low <= r.loss_increase <= r.high for r in table.rows)
    assert "--types f16,q8_0" in table.commands[0]


def test_the_picture_is_drawn(measured: Path, tmp_path: Path) -> None:
    needs("matplotlib", "train")
    picture = tmp_path / "memory.png"
    assert main(["--out", str(measured), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--types", "q3_k"), "--types must be"),
        (("--log-types", "q3_k"), "no type 'q3_k'"),
        (("--tasks", "chess"), "no task 'chess'"),
        (("--shares", "16"), "is less than 40"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    more: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(command(tmp_path / "none.jsonl", *more))
    assert said in capsys.readouterr().err


def test_two_policies_in_one_file_are_refused(measured: Path, tmp_path: Path) -> None:
    out = tmp_path / "mixed.jsonl"
    first, *rest = read(measured)
    lines = [json.dumps(r) + "\n" for r in ({**first, "policy": "another"}, *rest)]
    out.write_text("".join(lines), encoding="utf-8")
    with pytest.raises(SystemExit, match="several policies"):
        main(["--out", str(out), "--table"])


@pytest.mark.parametrize("cells", [40, 79, 80, 81, 1000])
def test_cells_are_spent_on_budget_and_reserve(cells: int) -> None:
    budget, reserve = limits_in(cells)
    assert budget + reserve == cells
    assert reserve == max(LEAST_RESERVE, cells // 5)
