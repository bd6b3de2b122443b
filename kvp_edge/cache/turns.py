"""Turn isolation: new turns do not push out what was kept of finished turns.

After FlowKV (arXiv:2505.15347), which compresses a turn once, when it is finished, and lets the
cache grow. Here the cells are fixed, so tokens of finished turns that have stayed in an eviction
are "settled", and:

    Of the room that the protected tokens leave in the budget, settled tokens keep up to three
    quarters, or more where the newer tokens do not fill the last one; newer tokens get the rest.
    Settled tokens and newer ones are ranked apart: none of the one kind takes the place of one of
    the other.

So a new turn always has a quarter of the room, and settled tokens are dropped only when there are
too many of them.
"""

from __future__ import annotations

import numpy as np

from kvp_edge.arrays import BoolArray, FloatArray, IntArray, Rows
from kvp_edge.binding import ranking
from kvp_edge.cache.table import Table


def settled_before(table: Table) -> int:
    """Tokens before this index are settled: their turn is finished, and they are older than the
    tail, so they were kept in an eviction."""
    return min(table.newest_turn, table.tail)


def settled_share(n_settled: int, n_newer: int, room: int) -> int:
    """How many settled tokens are kept if there is room for this many unprotected tokens."""
    return min(n_settled, room - min(n_newer, -(-room // 4)))


def choose_tokens(
    scores: FloatArray, unit: IntArray, protected: BoolArray, budget: int, settled: BoolArray
) -> BoolArray:
    """ranking.choose_tokens for settled and newer tokens apart; the latter also get what settled
    units were too large for.

    Args:
        settled: bool [n]; the first so many tokens.
    """
    n = int(settled.sum())
    if n == 0:
        return ranking.choose_tokens(scores, unit, protected, budget)
    old = _settled_budget(protected, n, budget)
    first = ranking.choose_tokens(scores[..., :n], unit[:n], protected[:n], old)
    left = max(0, budget - int(first.sum()))
    rest = ranking.choose_tokens(scores[..., n:], unit[n:], protected[n:], left)
    return np.concatenate((first, rest))


def choose_rows(
    scores: FloatArray, unit: IntArray, protected: BoolArray, n_keep: int, settled: BoolArray
) -> Rows:
    """ranking.choose_rows for settled and newer rows apart.

    Args:
        settled: bool [..., n]; the first so many rows of each head.
    """
    counts = settled.sum(axis=-1)
    if not counts.any():
        return ranking.choose_rows(scores, unit, protected, n_keep)
    keep = np.empty((*counts.shape, n_keep), np.int32)
    for head in np.ndindex(counts.shape):
        n = int(counts[head])
        old = _settled_budget(protected[head], n, n_keep)
        for part, most, kept in (
            (slice(0, n), old, keep[head][:old]),
            (slice(n, None), n_keep - old, keep[head][old:]),
        ):
            if most > 0:
                kept[:] = part.start + ranking.choose_rows(
                    scores[head][part], unit[head][part], protected[head][part], most
                )
    return keep


def _settled_budget(protected: BoolArray, n: int, budget: int) -> int:
    """How many of the first ``n`` tokens stay, the protected ones included."""
    n_protected, n_first = int(protected.sum()), int(protected[:n].sum())
    n_newer = len(protected) - n - (n_protected - n_first)
    return n_first + settled_share(n - n_first, n_newer, max(0, budget - n_protected))
