"""What an eviction must not drop, unless the user says otherwise: the first tokens and the newest.

A protected token takes a place that would go to a chosen one, so the recent window shrinks with the
budget. Two uses pull at it: a question finds its answer among older tokens, and a text goes on from
its newest ones. Measured on SmolLM2-135M with a budget of 1/16 of some 1,100 tokens, in nats per
token more than with a quarter of it as recent window, without recall and with
(docs/results/memory.md):

    recent    questions       dialogues       books
    1/2       +0.01, +0.07    -0.02, -0.17    +0.02, -0.05
    1/8       -0.03, -0.22    +0.02, -0.10    -0.01, +0.02
    1/16      -0.04, -0.33    +0.01, +0.24     0.00, +0.01

With 2 or 3 texts each, none is better for all three. At 1/4 and 1/8 differences are smaller still.
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
