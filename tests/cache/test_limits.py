"""Budget, reserve, sinks and recent window: numbers that fit together, or a sentence."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvp_edge.cache.limits import CELL_UNIT, CacheLimits, memory_bytes, parse_budget
from kvp_edge.cache.protection import default_recent
from kvp_edge.errors import BudgetError


def plan(**kwargs: object) -> CacheLimits:
    return CacheLimits.plan(**{"n_ctx": 100_000, "bytes_per_cell": 2048, **kwargs})  # type: ignore[arg-type]


def test_cells_are_budget_plus_reserve_rounded_up_to_llama_cpps_unit() -> None:
    assert plan(kv_budget=512).cells == 768
    assert plan(kv_budget=513).cells == 1024
    assert plan(kv_budget=4096).cells == 4096 + 1024
    assert plan(kv_budget=100, reserve=28).cells == 256


def test_rounding_goes_to_the_reserve() -> None:
    limits = plan(kv_budget=100, reserve=28)
    assert limits.budget == 100
    assert limits.reserve == 156


def test_memory_is_all_cells_and_never_more_than_asked() -> None:
    limits = plan(kv_budget="2MiB")
    assert limits.cells == 1024
    assert limits.cells * 2048 <= 2 * 2**20
    assert plan(kv_budget="2.2MB").cells == 1024
    assert plan(kv_budget="1GiB", n_ctx=10**6).cells == 2**30 // 2048


def test_the_smallest_memory_that_holds_256_cells_is_accepted_and_one_byte_less_refused() -> None:
    assert plan(kv_budget="512KiB").cells == 256
    with pytest.raises(BudgetError, match=r"too small.*0\.50 MiB"):
        plan(kv_budget="511KiB")


@pytest.mark.parametrize("name", ["n_ctx", "kv_budget", "sinks", "recent", "reserve", "n_batch"])
def test_a_number_of_tokens_is_whole(name: str) -> None:
    asked = {"kv_budget": 512, name: 64}
    for wrong in (64.0, 64.5, b"64"):  # 4096 / 64 is a float, too
        with pytest.raises(BudgetError, match=f"^{name} must be a whole number of tokens"):
            plan(**{**asked, name: wrong})
    assert plan(**{**asked, name: np.int64(300)})


@pytest.mark.parametrize("bytes_per_cell", [2048, 2051, 23040])  # 256 of the last: 5.625 MiB
@pytest.mark.parametrize("window", [0, 300])
def test_the_memory_that_a_refusal_names_is_enough(bytes_per_cell: int, window: int) -> None:
    asked = {"bytes_per_cell": bytes_per_cell, "window": window}
    kib = 1 + (CELL_UNIT * bytes_per_cell / 2**10 if window else 0)
    with pytest.raises(BudgetError) as refused:
        plan(kv_budget=f"{kib:.3f}KiB", **asked)
    named = re.findall(r"[\d.]+ MiB", str(refused.value))[-1]
    assert plan(kv_budget=named, **asked).cells == (512 if window else 256)


def test_there_are_never_more_cells_than_the_logical_context_can_use() -> None:
    limits = plan(kv_budget=4096, n_ctx=600)
    assert limits.cells == 768


def test_budget_must_exceed_what_is_protected() -> None:
    with pytest.raises(BudgetError, match="larger than sinks \\+ recent = 4 \\+ 60 = 64"):
        plan(kv_budget=64, recent=60)
    assert plan(kv_budget=65, recent=60).budget == 65


@given(st.integers(6, 10**6))
def test_from_six_tokens_on_a_budget_protects_less_than_all_of_it_by_itself(budget: int) -> None:
    limits = plan(kv_budget=budget, n_ctx=10**7)
    assert (limits.budget, limits.sinks) == (budget, 4)
    assert 1 <= limits.recent <= 256
    assert limits.sinks + limits.recent < budget


def test_the_default_recent_window_is_a_quarter_of_the_budget_and_at_most_256() -> None:
    budgets = (1, 3, 4, 7, 8, 62, 1023, 1024, 1027, 1028, 10**6)
    recent = (1, 1, 1, 1, 2, 15, 255, 256, 256, 256, 256)
    assert tuple(map(default_recent, budgets)) == recent


def test_a_budget_of_five_tokens_leaves_nothing_beside_the_sinks_and_the_newest() -> None:
    with pytest.raises(
        BudgetError, match="larger than sinks \\+ recent = 4 \\+ 1 = 5.* to 6 or more"
    ):
        plan(kv_budget=5)
    assert plan(kv_budget=6).recent == 1
    assert plan(kv_budget=5, sinks=3).recent == 1
    assert plan(kv_budget=2, sinks=0).recent == 1


def test_what_a_user_asks_to_protect_wins() -> None:
    limits = plan(kv_budget=512, sinks=9, recent=300)
    assert (limits.sinks, limits.recent) == (9, 300)


@pytest.mark.parametrize("sinks", [4, 100, 900, 2000])
@pytest.mark.parametrize("recent", [None, 300, 509])
def test_the_budget_that_a_refusal_names_is_the_smallest(sinks: int, recent: int | None) -> None:
    asked = {"sinks": sinks, "recent": recent, "n_ctx": 10_000}
    with pytest.raises(BudgetError, match="^kv_budget=4 must be larger than sinks") as refused:
        plan(kv_budget=4, **asked)
    named = int(re.findall(r"Raise kv_budget to (\d+) or more", str(refused.value))[0])
    assert plan(kv_budget=named, **asked).budget == named
    with pytest.raises(BudgetError):
        plan(kv_budget=named - 1, **asked)


@pytest.mark.parametrize(("sinks", "recent"), [(202, 3), (4, 300), (4, 508), (900, 300)])
@pytest.mark.parametrize("more", [{}, {"reserve": 77}, {"n_batch": 200}])
def test_a_memory_without_room_for_what_is_protected_is_told_as_memory(
    sinks: int, recent: int, more: dict[str, int]
) -> None:
    asked = {"sinks": sinks, "recent": recent, "n_ctx": 10_000, "bytes_per_cell": 1024, **more}
    with pytest.raises(BudgetError, match="^kv_budget=256KiB keeps") as refused:
        plan(kv_budget="256KiB", **asked)
    named = re.findall(r"Give ([\d.]+) MiB or more", str(refused.value))[0]
    cells = plan(kv_budget=f"{named}MiB", **asked).cells
    assert cells == round(float(named) * 1024)
    if cells > CELL_UNIT:
        with pytest.raises(BudgetError):
            plan(kv_budget=f"{cells - CELL_UNIT}KiB", **asked)


def test_an_impossible_memory_is_named() -> None:
    with pytest.raises(BudgetError, match="^kv_log_limit=99999999999999GiB is more memory than"):
        memory_bytes("kv_log_limit", "99999999999999GiB")


def test_a_batch_that_an_eviction_cannot_make_room_for_is_refused() -> None:
    assert plan(kv_budget=500, reserve=12).n_batch == 12
    assert plan(kv_budget=500, reserve=12, n_batch=12).n_batch == 12
    with pytest.raises(BudgetError, match="n_batch=13 does not fit into the 12 cells"):
        plan(kv_budget=500, reserve=12, n_batch=13)


def test_a_batch_may_be_large_when_nothing_is_ever_evicted() -> None:
    assert plan(kv_budget=512, n_ctx=512, reserve=1, n_batch=512).n_batch == 512


def test_beside_a_sliding_window_there_are_cells_for_it_and_a_batch() -> None:
    # 511 tokens in sight of the next one, and a batch of 256 or 257
    assert plan(kv_budget=128, window=512).cells == 768
    assert plan(kv_budget=512, window=512) == plan(kv_budget=512)
    assert plan(kv_budget=400, window=512).n_batch == 257
    assert plan(kv_budget=128, window=1024).cells == 1280
    assert plan(kv_budget=128, window=1024).budget == 128
    # exactly at the limit, and one token more
    assert plan(kv_budget=100, reserve=100, n_batch=100, window=157).cells == 256
    assert plan(kv_budget=100, reserve=100, n_batch=100, window=158).cells == 512
    assert plan(kv_budget=100, reserve=100, n_batch=101, window=157).cells == 512


def test_no_window_or_one_of_a_single_token_needs_no_cells() -> None:
    assert plan(kv_budget=512, window=0) == plan(kv_budget=512, window=1) == plan(kv_budget=512)


def test_a_window_that_fits_beside_a_small_reserve_adds_no_cells() -> None:
    asked = {"kv_budget": 100, "reserve": 60}
    assert plan(**asked, window=24) == plan(**asked)
    beside = plan(**asked, window=197)  # 196 in sight, and a batch of 60
    assert (beside.cells, beside.n_batch) == (256, 60)
    assert plan(**asked, window=198).cells == 512


def test_a_text_that_fits_into_the_cells_needs_none_for_a_window() -> None:
    assert plan(kv_budget=128, n_ctx=600, window=4096).cells == 768
    assert plan(kv_budget="1MiB", n_ctx=512, window=4096).cells == 512


def test_memory_without_room_for_the_window_is_refused_and_the_memory_named_is_enough() -> None:
    asked = {"n_ctx": 100_000, "bytes_per_cell": 2**20, "window": 1024}
    with pytest.raises(BudgetError, match=r"window of 1024 tokens .* batch of 32 need 1280: .*"):
        plan(**{**asked, "kv_budget": "1024MiB"})
    limits = plan(**{**asked, "kv_budget": "1280MiB"})
    assert (limits.cells, limits.n_batch) == (1280, 256)


def test_a_batch_without_room_beside_the_window_is_refused_and_the_largest_named() -> None:
    asked = {"kv_budget": "768MiB", "bytes_per_cell": 2**20, "window": 512, "reserve": 300}
    with pytest.raises(BudgetError, match=r"need 1024: give 1024.00 MiB, lower n_batch to 257,"):
        plan(**asked, n_batch=258)
    assert plan(**asked, n_batch=257).n_batch == 257


@pytest.mark.parametrize(
    "wrong",
    [
        {"kv_budget": 0},
        {"kv_budget": -5},
        {"kv_budget": "lots"},
        {"kv_budget": "0MiB"},
        {"kv_budget": 512, "sinks": -1},
        {"kv_budget": 512, "recent": 0},
        {"kv_budget": 512, "reserve": 0},
        {"kv_budget": 512, "n_batch": 0},
        {"kv_budget": 512, "n_ctx": 0},
        {"kv_budget": "1MiB", "reserve": 512},
    ],
)
def test_impossible_numbers_are_refused_with_the_value(wrong: dict[str, object]) -> None:
    with pytest.raises(BudgetError, match=r"\d|lots"):
        plan(**wrong)


@given(
    n_ctx=st.integers(1, 20_000),
    kv_budget=st.one_of(st.integers(1, 6000), st.integers(1, 60).map(lambda m: f"{m}MiB")),
    sinks=st.integers(0, 600),
    recent=st.none() | st.integers(1, 600),
    reserve=st.none() | st.integers(1, 3000),
    n_batch=st.none() | st.integers(1, 3000),
    window=st.just(0) | st.integers(1, 6000),
)
def test_whatever_is_accepted_keeps_the_invariants(
    n_ctx: int,
    kv_budget: int | str,
    sinks: int,
    recent: int | None,
    reserve: int | None,
    n_batch: int | None,
    window: int,
) -> None:
    asked = {
        "n_ctx": n_ctx,
        "kv_budget": kv_budget,
        "sinks": sinks,
        "recent": recent,
        "reserve": reserve,
        "window": window,
    }
    try:
        limits = plan(**asked, n_batch=n_batch)
    except BudgetError:
        return
    assert limits.cells % CELL_UNIT == 0
    assert limits.budget > limits.sinks + limits.recent
    assert limits.n_batch >= 1
    assert limits.cells >= n_ctx or limits.budget + limits.n_batch <= limits.cells
    assert limits.cells >= n_ctx or max(0, window - 1) + limits.n_batch <= limits.cells
    if isinstance(kv_budget, int):
        assert limits.budget == kv_budget  # a window takes nothing from what is kept
        assert plan(**asked, n_batch=limits.n_batch) == limits  # as a copy of the model is made


def test_a_budget_on_the_command_line_is_tokens_or_memory() -> None:
    assert parse_budget("512") == 512
    assert parse_budget("256MiB") == "256MiB"
    with pytest.raises(BudgetError, match="'12x'"):
        parse_budget("12x")
