"""How many cells a cache has, and how they are spent: budget, reserve, sinks, recent window."""

from __future__ import annotations

import math
import operator
import re
from dataclasses import dataclass, replace

from kvp_edge.cache.protection import DEFAULT_SINKS, default_recent
from kvp_edge.errors import BudgetError

#: llama.cpp rounds n_ctx up to this (llama_context's constructor in src/llama-context.cpp).
CELL_UNIT = 256

MIN_DEFAULT_RESERVE = 256
DEFAULT_BATCH = 512
#: Beside a sliding window a batch is not made smaller than this to save cells or memory: a batch of
#: a few tokens would read a prompt as slowly as a reply is written.
MIN_WINDOW_BATCH = 32

_MEMORY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(KiB|MiB|GiB|KB|MB|GB)\s*", re.IGNORECASE)
_UNIT = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def round_up(n: int) -> int:
    """``n`` cells as llama.cpp makes them: a multiple of ``CELL_UNIT``."""
    return -(-n // CELL_UNIT) * CELL_UNIT


def _mib(n_bytes: int) -> str:
    """The budget to request for these bytes, rounded up."""
    return f"{math.ceil(n_bytes * 100 / 2**20) / 100:.2f}"


def _least_budget(sinks: int, recent: int | None) -> int:
    """The smallest budget that leaves something to evict."""
    if recent is not None:
        return sinks + recent + 1
    budget = sinks + 2
    while budget <= sinks + default_recent(budget):
        budget = sinks + default_recent(budget) + 1
    return budget


def _least_cells(budget: int, reserve: int | None, n_batch: int | None) -> int:
    """The fewest cells of a memory that have room for a budget."""
    if reserve is not None:
        return round_up(budget + reserve)
    # a fifth of them, rounded down, is the reserve: see ``CacheLimits.plan``
    return round_up(max((budget - 1) * 5 // 4 + 1, budget + (n_batch or 0)))


def _require_whole(name: str, number: int) -> None:
    try:
        operator.index(number)
    except TypeError:
        raise BudgetError(
            f"{name} must be a whole number of tokens, not {number!r} ({type(number).__name__})"
        ) from None


def memory_bytes(name: str, text: str) -> int:
    """The bytes that "256MiB" stands for.

    Raises:
        BudgetError: it is no amount of memory.
    """
    match = _MEMORY.fullmatch(text)
    if not match:
        raise BudgetError(f"{name} is memory, a text like '256MiB', not '{text}'")
    amount = float(match.group(1)) * _UNIT[match.group(2).lower()]
    if amount >= 2**63:  # inf among them
        raise BudgetError(f"{name}={text} is more memory than any machine has: lower it")
    return int(amount)


def budget_bytes(memory: str) -> int:
    """The bytes of a ``kv_budget`` that is memory.

    Raises:
        BudgetError: it is none.
    """
    match = _MEMORY.fullmatch(memory)
    if not match:
        raise BudgetError(
            "kv_budget must be a number of tokens (an int such as 512) or memory (a text "
            f"such as '256MiB'), not '{memory}'"
        )
    amount = float(match.group(1)) * _UNIT[match.group(2).lower()]
    if amount >= 2**63:  # of bytes, inf among them
        raise BudgetError(f"kv_budget={memory} is more memory than any machine has: lower it")
    return int(amount)


def parse_budget(text: str) -> int | str:
    """A command line's budget: a plain number is tokens (int), "256MiB" stays a string.

    Raises:
        BudgetError: neither of them.
    """
    if text.strip().isdigit():
        return int(text)
    if not _MEMORY.fullmatch(text):
        raise BudgetError(
            f"a budget is a number of tokens like 512, or memory like 256MiB, not '{text}'"
        )
    return text


@dataclass(frozen=True)
class CacheLimits:
    """The fixed numbers of one bounded cache, all in tokens (one token takes one cell).

    Attributes:
        n_ctx: logical context: the longest text that may be read and written.
        cells: cells that exist, a multiple of CELL_UNIT; never more tokens than this are held.
        budget: tokens kept after an eviction, the protected ones included.
        sinks: the first tokens, never evicted (StreamingLLM, arXiv:2309.17453).
        recent: the newest tokens, never evicted.
        n_batch: the most tokens read at once.

    Invariant: an eviction leaves at least ``n_batch`` free cells, so a batch always fits; or the
    logical context fits into the cells and nothing is ever evicted. The same holds in the window
    cache of a model with sliding-window layers. Evictions free nothing there, so it has cells for
    all that the next token sees of the window, and for a batch.
    """

    n_ctx: int
    cells: int
    budget: int
    sinks: int
    recent: int
    n_batch: int

    @property
    def reserve(self) -> int:
        """Free cells right after an eviction."""
        return self.cells - self.budget

    def with_cells(self, cells: int) -> CacheLimits:
        """The same budget, with evictions as soon as ``cells`` are full, budget < cells <= n_ctx.

        llama.cpp keeps its planned cells. A window cache stays large enough, since no batch becomes
        larger.
        """
        return replace(self, cells=cells, n_batch=min(self.n_batch, cells - self.budget))

    @classmethod
    def plan(
        cls,
        *,
        n_ctx: int,
        kv_budget: int | str,
        sinks: int = DEFAULT_SINKS,
        recent: int | None = None,
        reserve: int | None = None,
        n_batch: int | None = None,
        bytes_per_cell: int,
        window: int = 0,
    ) -> CacheLimits:
        """Turn what a user asks for into numbers that fit together.

        Args:
            n_ctx: logical context in tokens.
            kv_budget: tokens to keep, or the memory of the whole cache as "256MiB" ("MB", "GiB",
                ...); of memory, the reserve is taken first and the rest is the budget.
            sinks: first tokens to protect.
            recent: newest tokens to protect; a quarter of the budget, at most 256, when None.
            reserve: free cells after an eviction; when None a quarter of the budget, but at least
                256 and ``n_batch``: an eviction looks at every cell, so a larger cache should see
                fewer of them. Of memory it is a fifth of the cells, and at least ``n_batch``. What
                a window needs, and rounding the cells up to a multiple of 256, adds to it.
            n_batch: largest batch; when None, at most 512, and no more than fits into the reserve
                and beside the window.
            bytes_per_cell: K and V of one token over all layers, for budgets in bytes.
            window: tokens that a layer with a sliding window sees, the newest included; 0: no layer
                has one whose tokens must stay. llama.cpp keeps these layers in a cache of
                min(cells, 2 window + batch) cells (llama_kv_cache_iswa; ``cells`` with swa_full).

        Raises:
            BudgetError: the numbers contradict each other.
        """
        for name, number in {
            "n_ctx": n_ctx,
            "kv_budget": 0 if isinstance(kv_budget, str) else kv_budget,
            "sinks": sinks,
            "recent": recent or 0,
            "reserve": reserve or 0,
            "n_batch": n_batch or 0,
        }.items():
            _require_whole(name, number)
        if n_ctx < 1:
            raise BudgetError(f"n_ctx must be at least 1 token, not {n_ctx}")
        if sinks < 0:
            raise BudgetError(f"sinks must be at least 0, not {sinks}")
        if recent is not None and recent < 1:
            raise BudgetError(
                f"recent must be at least 1, not {recent}: the newest token is never evicted, "
                "because llama.cpp continues from it"
            )
        if reserve is not None and reserve < 1:
            raise BudgetError(f"reserve must be at least 1 free cell, not {reserve}")
        if n_batch is not None and n_batch < 1:
            raise BudgetError(f"n_batch must be at least 1 token, not {n_batch}")

        asked_reserve = reserve
        in_sight = max(0, window - 1)  # tokens read that the next one sees through the window
        if isinstance(kv_budget, str):
            least = round_up(max(1, in_sight + (n_batch or MIN_WINDOW_BATCH) if window else 1))
            cells = cls._cells_in(kv_budget, bytes_per_cell, least)
            if reserve is None:
                reserve = max(cells // 5, n_batch or 0)  # a quarter of what is left
            budget = cells - reserve
            if budget < 1:
                raise BudgetError(
                    f"kv_budget={kv_budget} gives {cells} cells, and the reserve takes "
                    f"{reserve}, so nothing could be kept. Give more memory or lower reserve"
                )
        else:
            if kv_budget < 1:
                raise BudgetError(f"kv_budget must be at least 1 token, not {kv_budget}")
            budget = kv_budget
            if reserve is None:
                reserve = max(MIN_DEFAULT_RESERVE, budget // 4, n_batch or 0)
            # a batch as large as without a window, but no more than the default reserve asks for
            beside = n_batch or min(MIN_DEFAULT_RESERVE, max(reserve, MIN_WINDOW_BATCH))
            cells = round_up(max(budget + reserve, in_sight + beside))
        # cells beyond the logical context could never be used
        cells = min(cells, round_up(n_ctx))
        never_full = cells >= n_ctx

        settled = default_recent(budget) if recent is None else recent
        if budget <= sinks + settled:
            protected = f"sinks + recent = {sinks} + {settled} = {sinks + settled}"
            least = _least_budget(sinks, recent)
            if isinstance(kv_budget, str):
                needed = _least_cells(least, asked_reserve, n_batch) * bytes_per_cell
                raise BudgetError(
                    f"kv_budget={kv_budget} keeps {budget} tokens beside a reserve of {reserve}: "
                    f"it must keep more than {protected}, which are never evicted. Give "
                    f"{_mib(needed)} MiB or more, or lower recent"
                )
            raise BudgetError(
                f"kv_budget={budget} must be larger than {protected}, which are never evicted. "
                f"Raise kv_budget to {least} or more, or lower recent"
            )
        recent = settled
        if never_full:
            batch = min(n_batch or DEFAULT_BATCH, cells)
        else:
            room = cells - budget
            if n_batch is not None and n_batch > room:
                raise BudgetError(
                    f"n_batch={n_batch} does not fit into the {room} cells that an eviction frees "
                    f"({cells} cells, kv_budget={budget}): raise reserve to {n_batch}, lower "
                    "n_batch, or leave n_batch out"
                )
            beside = cells - in_sight
            if beside < (n_batch or MIN_WINDOW_BATCH):
                needed = round_up(in_sight + (n_batch or MIN_WINDOW_BATCH))
                lower = f"lower n_batch to {beside}, " if beside >= MIN_WINDOW_BATCH else ""
                raise BudgetError(
                    f"kv_budget={kv_budget} gives {cells} cells, but the model's sliding "
                    f"window of {window} tokens and a batch of {n_batch or MIN_WINDOW_BATCH} "
                    f"need {needed}: give {_mib(needed * bytes_per_cell)} MiB, {lower}or use "
                    "granularity='token', which also drops tokens from the window"
                )
            batch = n_batch or min(DEFAULT_BATCH, room, beside)
        return cls(n_ctx, cells, budget, sinks, recent, batch)

    @staticmethod
    def _cells_in(memory: str, bytes_per_cell: int, least: int) -> int:
        size = budget_bytes(memory)
        cells = size // bytes_per_cell // CELL_UNIT * CELL_UNIT if bytes_per_cell else 0
        if cells == 0:
            beside = " beside the model's sliding window" if least > CELL_UNIT else ""
            raise BudgetError(
                f"kv_budget={memory} is too small: this model takes {bytes_per_cell} bytes "
                f"per token, and the smallest cache{beside} ({least} cells) takes "
                f"{_mib(least * bytes_per_cell)} MiB"
            )
        return cells
