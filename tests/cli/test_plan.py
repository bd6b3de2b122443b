"""kvp-edge plan: what it promises is what llama.cpp allocates, and no more would fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvp_edge import CacheOptions, Llama
from kvp_edge.cache.limits import CELL_UNIT
from kvp_edge.cache.type_table import Choice, Row, TypeTable
from kvp_edge.cache.types import KVTypes
from kvp_edge.cli import plan
from kvp_edge.planning import COMPARED, Fit, Missing, Planner
from makers.gguf_models import ModelShape
from support.command_line import Type
from support.plans import SLACK, assert_kept, command_of, loaded_as, row_of
from support.properties import examples

ENGINE = {"n_threads": 1, "n_threads_batch": 1, "repack": "off"}
OFF: dict[str, Any] = {"n_ctx": 4096, "kv_budget": 1, "recall": "off"}
MIB = 2**20


def planned(path: str, mib: float, length: int = 4096, **options: Any) -> Planner:
    asked = CacheOptions(**{**OFF, **options})
    return Planner(path, asked, ENGINE, length=length, memory=round(mib * MIB))


def allocated(llm: Llama) -> int:
    """Bytes of all buffers of llama.cpp's, as it reports them."""
    return llm.reported.weights + llm.reported.cells + llm.reported.compute


@pytest.mark.parametrize("types", [*COMPARED, "q8_0/q4_0", "f32"])
@examples(3)
@given(mib=st.floats(15, 30), recall=st.sampled_from(["off", "reply"]), length=st.integers(1, 4096))
def test_what_is_planned_is_allocated_and_more_does_not_fit(
    bundled_model: str, types: str, mib: float, recall: str, length: int
) -> None:
    with closing(planned(bundled_model, mib, length, recall=recall)) as planner:
        fit = planner.fit(KVTypes.parse("it", types))
    if isinstance(fit, Missing):
        assert fit.needs > mib * MIB
        return
    assert fit.total <= mib * MIB
    how: dict[str, Any] = {**ENGINE, "n_ctx": 4096, "recall": recall, "kv_type": types}

    def loaded(budget: str) -> Llama:
        return Llama(bundled_model, kv_budget=budget, verbose=False, **how)

    with closing(loaded(fit.budget)) as llm:
        assert llm.n_cells == fit.limits.cells
        got = llm.kv.limits  # type: ignore[union-attr]
        assert got == fit.limits
        for name in ("weights", "cells", "compute"):
            want = getattr(fit.footprint, name)
            assert getattr(llm.reported, name) == pytest.approx(want, abs=SLACK)
        assert allocated(llm) + fit.log <= mib * MIB + SLACK
        # nothing is dropped, and so nothing logged, of what fits into the cells
        assert bool(fit.log) == (recall == "reply" and length > llm.n_cells)
    if fit.limits.cells == 4096:  # all that can be used
        return
    more = (fit.limits.cells + CELL_UNIT) * fit.bytes_per_cell
    with closing(loaded(f"{more / 1024!r}KiB")) as llm:
        assert llm.n_cells == fit.limits.cells + CELL_UNIT
        assert allocated(llm) + fit.log > mib * MIB - SLACK or length <= llm.n_cells


def test_exactly_what_is_needed_is_enough_and_a_byte_less_is_not(bundled_model: str) -> None:
    with closing(planned(bundled_model, 9)) as planner:  # the weights, and nothing beside them
        least = planner.fit(KVTypes.parse("it", "q8_0"))
    assert isinstance(least, Missing)
    with closing(planned(bundled_model, least.needs / MIB)) as planner:
        fit = planner.fit(KVTypes.parse("it", "q8_0"))
        assert isinstance(fit, Fit)
        assert fit.total == least.needs
        assert fit.limits.cells == CELL_UNIT
    with closing(planned(bundled_model, (least.needs - 1) / MIB)) as planner:
        assert planner.fit(KVTypes.parse("it", "q8_0")) == least


@pytest.mark.parametrize("log_type", ["cache", "q4_0"])
@pytest.mark.parametrize("types", ["f16", "q8_0"])
def test_the_log_becomes_no_larger_than_planned(
    bundled_model: str, types: str, log_type: str
) -> None:
    length, options = 2500, {"recall": "reply", "kv_log_type": log_type}
    with closing(planned(bundled_model, 17.5, length, **options)) as planner:
        fit = planner.fit(KVTypes.parse("it", types))
    assert isinstance(fit, Fit)
    how = {**ENGINE, **options, "n_ctx": 4096, "kv_type": types, "verbose": False}
    with closing(Llama(bundled_model, kv_budget="1MiB", **how)) as llm:
        llm.eval([t % 300 for t in range(length)])
        stats = llm.kv_stats
        assert stats.logged > 0
        assert stats.log_bytes * length == fit.log * stats.logged  # bytes of a token
        assert stats.log_bytes <= fit.log


def test_what_the_cells_hold_just_so_needs_no_log(bundled_model: str) -> None:
    f16 = KVTypes.parse("it", "f16")
    with closing(planned(bundled_model, 17)) as planner:
        fit = planner.fit(f16)
    assert isinstance(fit, Fit)
    full = fit.limits.cells
    with closing(planned(bundled_model, 17, full, recall="reply")) as planner:
        same = planner.fit(f16)
    assert isinstance(same, Fit)
    assert (same.limits, same.log) == (fit.limits, 0)
    with closing(planned(bundled_model, 17, full + 1, recall="reply")) as planner:
        less = planner.fit(f16)
    assert isinstance(less, Fit)
    assert less.limits.cells < full
    assert less.log == (full + 1) * 2560


def test_a_log_past_its_limit_loses_tokens(bundled_model: str) -> None:
    options = {"recall": "reply", "kv_log_limit": "100KiB"}
    with closing(planned(bundled_model, 18, 3000, **options)) as planner:
        fit = planner.fit(KVTypes.parse("it", "f16"))
    assert isinstance(fit, Fit)
    assert (fit.log, fit.lost) == (40 * 2560, 2960)


def test_a_log_in_a_file_takes_no_memory(bundled_model: str) -> None:
    options = {"recall": "reply", "kv_log": "chat.kvlog"}
    with closing(planned(bundled_model, 18, 3000, **options)) as planner:
        fit = planner.fit(KVTypes.parse("it", "f16"))
    assert isinstance(fit, Fit)
    assert (fit.log, fit.lost) == (0, 0)
    assert not Path("chat.kvlog").exists()


def test_types_that_cannot_be_are_told(random_model: Callable[..., Any], kvp: Type) -> None:
    path = str(random_model(ModelShape("llama", head_dim=48)).path)
    with closing(planned(path, 64, n_ctx=4096)) as planner:
        fit = planner.fit(KVTypes.parse("it", "q8_0"))
        assert isinstance(fit, Missing)
        assert "48 numbers, which are no whole blocks" in fit.why
        assert isinstance(planner.fit(KVTypes.parse("it", "f16")), Fit)
    got = kvp("plan", path, "--memory", "64MiB", "--threads", "1")
    assert "q8_0 is not possible: the model's heads" in got.out
    assert got.status == 0
    got = kvp("plan", path, "--memory", "64MiB", "--threads", "1", "--kv-type", "q8_0")
    assert "q8_0 is not possible: the model's heads" in got.err
    assert got.status == 2


@pytest.mark.parametrize(
    "asked",
    [
        ["--memory", "18MiB"],
        ["--memory", "18MiB", "--recall", "off", "--flash-attn"],
        ["--memory", "30MiB", "--length", "3000"],
        ["--memory", "64MiB"],
        ["--memory", "18MiB", "--kv-log", "chat.kvlog", "--recent", "100", "--sinks", "8"],
        ["--memory", "17MiB", "--n-ctx", "2048", "--type-k", "q8_0", "--recall", "off"],
        ["--memory", "17MiB", "--kv-type", "q5_0/q4_0", "--recall", "off"],
    ],
)
def test_the_printed_command_allocates_what_the_plan_says(
    kvp: Type, asked: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    got = kvp("plan", *asked, "--threads", "1", "--repack", "off")
    assert (got.status, got.err) == (0, "")
    argv = command_of(got.out)
    for word in asked:
        assert word in argv or word in ("--memory", "--length", asked[1], "3000")
    assert_kept(got.out, round(float(asked[1].removesuffix("MiB")) * MIB))


def test_a_plan_says_when_all_fits(kvp: Type) -> None:
    got = kvp("plan", "--memory", "64MiB", "--threads", "1")
    assert "All 4096 tokens fit in full: nothing is dropped." in got.out
    row = row_of(got.out, "f16")
    assert (row["cells"], row["kept"], row["share"], row["log"]) == (4096, 4096, 100, 0)
    assert re.search(r"^f16 \(auto\) .* none +none$", got.out, re.MULTILINE)
    less = kvp("plan", "--memory", "18MiB", "--recall", "off", "--threads", "1")
    assert "in full" not in less.out
    assert "none" not in less.out


def test_where_nothing_fits_it_says_what_is_missing(kvp: Type) -> None:
    got = kvp("plan", "--memory", "12MiB", "--threads", "1")
    assert got.status == 2
    found = re.search(r"takes ([\d.]+) MiB, which is ([\d.]+) MiB more", got.err)
    assert found is not None
    assert float(found[1]) - float(found[2]) == pytest.approx(12, abs=0.02)
    assert "--kv-log FILE" in got.err
    assert kvp("plan", "--memory", f"{float(found[1]) + 0.01}MiB", "--threads", "1").status == 0


@pytest.mark.parametrize(("layers", "chosen"), [(0, "q4_1/q4_0"), (1, "q5_1/q4_0")])
def test_types_that_would_be_chosen_are_compared_on_a_device_too(
    bundled_model: str, monkeypatch: pytest.MonkeyPatch, layers: int, chosen: str
) -> None:
    table = TypeTable([], "", [], [Choice("q4_1/q4_0")], [Choice("q5_1/q4_0")])
    monkeypatch.setattr("kvp_edge.planning.shipped_table", lambda: table)
    monkeypatch.setattr("llama_cpp.llama_supports_gpu_offload", lambda: True)
    engine = {**ENGINE, "n_gpu_layers": layers}
    asked = CacheOptions(**OFF)
    with closing(Planner(bundled_model, asked, engine, length=4096, memory=MIB)) as planner:
        named = {str(one) for one in planner.types()}
    assert named == {*COMPARED, chosen}


def test_types_that_are_asked_for_are_marked_or_what_they_lack_is_said(kvp: Type) -> None:
    asked = ["--kv-type", "f32", "--recall", "off", "--threads", "1"]
    got = kvp("plan", "--memory", "18MiB", *asked)
    assert re.search(r"^f32 \(asked\) ", got.out, re.MULTILINE)
    assert "(auto)" not in got.out
    assert "--kv-type f32" in got.out.splitlines()[-1]
    less = kvp("plan", "--memory", "10MiB", *asked)
    assert less.status == 2
    assert re.search(r"^q4_0 +\d+ ", less.out, re.MULTILINE)  # others fit
    assert re.search(r"takes [\d.]+ MiB, which is [\d.]+ MiB more", less.err)


def test_weights_that_alone_are_too_large_are_not_loaded(
    kvp: Type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Planner, "_load", None)
    got = kvp("plan", "--memory", "8MiB")
    assert got.status == 2
    assert "the file has 8.58 MiB of weights; 0.58 MiB are missing for them alone." in got.out


def told(printed: str) -> tuple[list[str], list[float]]:
    """Its words, and its numbers with a point."""
    number = r"\d+\.\d+"
    return re.sub(number, "", printed).split(), [float(n) for n in re.findall(number, printed)]


def test_a_model_larger_than_the_machine_is_planned_from_its_file(
    kvp: Type, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = kvp("plan", "--memory", "30MiB", "--threads", "1")
    monkeypatch.setattr("kvp_edge.planning._machine_memory", lambda: 1)
    monkeypatch.setattr(Planner, "_load", None)
    got = kvp("plan", "--memory", "30MiB", "--threads", "1")
    words, numbers = told(got.out)
    expected_words, expected = told(whole.out.replace("llama.cpp reports", "the file has"))
    assert words == expected_words
    assert numbers == pytest.approx(expected, abs=0.011)  # the log of llama.cpp has two decimals


def test_where_the_choice_does_not_fit_another_is_named(kvp: Type) -> None:
    """The log of q8_0/f16 does not fit."""
    got = kvp("plan", "--memory", "32MiB", "--length", "20000", "--threads", "1")
    assert got.status == 0
    assert "(auto)" not in got.out
    assert "What kvp-edge chooses by itself does not fit, so this is q8_0/q4_0" in got.out
    argv = command_of(got.out)
    _, cells, types = loaded_as(argv)
    assert types == "q8_0/q4_0"
    assert cells == row_of(got.out, "q8_0/q4_0")["cells"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--memory", "lots"], "--memory is memory, a text like '256MiB', not 'lots'"),
        (["--memory", "1GiB", "--length", "300", "--n-ctx", "299"], "--length 300 is more than"),
        (["--memory", "1GiB", "--kv-type", "q3"], "--kv-type must be auto, a type"),
        (["none.gguf", "--memory", "1GiB"], "'none.gguf' not found"),
        (["--memory", "1GiB", "--recent", "5000"], "sinks + recent"),
    ],
)
def test_what_cannot_be_planned_is_refused(kvp: Type, asked: list[str], said: str) -> None:
    got = kvp("plan", *asked)
    assert got.status == 2
    assert said in got.err


def test_large_compute_buffers_are_told_where_flash_attention_makes_them_smaller(kvp: Type) -> None:
    asked = ["--memory", "30MiB", "--length", "100000", "--kv-log", "log", "--threads", "1"]
    without, with_it = (kvp("plan", *asked, *more) for more in ([], ["--flash-attn"]))
    assert "With --flash-attn they are smaller" in without.out
    assert "With --flash-attn they are smaller" not in with_it.out
    less, more = (row_of(got.out, "f16")["cells"] for got in (without, with_it))
    assert less < more
    assert "x 1.00" in without.out, "f16 is what the speeds are relative to"
    assert "x 1.00" not in with_it.out, "which were measured without flash attention"


def test_losses_are_means_of_the_nearest_share(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(share: float, recall: bool, increase: float) -> Row:
        return Row("m", "t", 4096, share, recall, "q8_0", 9, increase, 0, 1)

    rows = [row(0.1, True, 0.25), row(0.1, True, 0.75), row(0.5, True, 9), row(0.5, False, 2)]
    table = TypeTable([], "", rows, [Choice("q8_0")])
    monkeypatch.setattr(plan, "shipped_table", lambda: table)
    assert plan._loss("q8_0", 0.12, recall=True) == "+0.500"
    assert plan._loss("q8_0", 0.12, recall=False) == "+2.000"
    assert plan._loss("q4_0", 0.12, recall=True) == "not measured"
    assert plan._loss("f16", 1.0, recall=True) == "none"
