"""What came back before a reply, in words."""

from __future__ import annotations

from collections.abc import Callable

from kvp_edge.cache.recall import Recall
from kvp_edge.cli.shown import on_one_line

_PASSAGES, _CHARACTERS = 8, 60  # told at most, and of each


def line(event: Recall, by_head: bool) -> str:
    """How much came back, if anything did.

    Args:
        by_head: every head holds its own tokens.
    """
    n = max(1, event.n_tokens)
    tokens = "dropped token" if n == 1 else "dropped tokens"
    return f"[kvp: {n} {tokens}{' per head' if by_head else ''} came back for this reply]"


def passages(event: Recall, text_of: Callable[[int, int], str]) -> list[str]:
    """What many heads took back most of, as it stands in the text, one line for each passage.

    Args:
        text_of: the text of the tokens [start, end).
    """
    return [f'  "{_shortened(text_of(*one))}"' for one in event.largest_spans(_PASSAGES)]


def _shortened(text: str) -> str:
    text = on_one_line(text)
    return text if len(text) <= _CHARACTERS else text[: _CHARACTERS - 3] + "..."
