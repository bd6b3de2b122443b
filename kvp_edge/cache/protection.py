"""What an eviction must not drop, unless the user says otherwise: the first tokens and the newest.

A protected token takes a place that would go to a chosen one, so the recent window shrinks with the
budget. Two uses pull at it: a question finds its answer among older tokens, and a text goes on from
its newest ones.
"""

from __future__ import annotations

DEFAULT_SINKS = 4

#: The largest recent window by default, in tokens.
MOST_RECENT = 256


def default_recent(budget: int) -> int:
    """How many of the newest tokens are protected in a budget of so many: a quarter, at most
    ``MOST_RECENT``, and at least the one that llama.cpp continues from.

    With ``DEFAULT_SINKS`` something is left to choose in every budget of 6 tokens or more.
    """
    return max(1, min(MOST_RECENT, budget // 4))
