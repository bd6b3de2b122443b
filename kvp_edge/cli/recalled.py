"""What came back before a reply, in words.

Each head holds its own tokens, so hardly any token of a large model is dropped by all heads at
once, nor brought back by all. So tokens are counted per head, and a passage is told if many heads
took it back.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvp_edge.arrays import BoolArray, FloatArray, TokenIndices
from kvp_edge.cache.selection import spans
from kvp_edge.cli.shown import on_one_line

#: A passage consists of tokens that this share of the heads took back, if there are any.
_MANY = 0.25
_PASSAGES, _CHARACTERS = 8, 60  # told at most, and of each


def shares(before: TokenIndices, now: TokenIndices, seen: int) -> FloatArray:
    """The share of the heads that took each token back: f32 [seen].

    Args:
        before, now: what was and what is held: Llama.kv_indices.
        seen: tokens of the conversation.
    """
    came = _held(now, seen) & ~_held(before, seen)
    share: FloatArray = came.mean(axis=0, dtype=np.float32)
    return share


def _held(indices: TokenIndices, seen: int) -> BoolArray:
    """bool [heads, seen]; at token granularity all heads are one."""
    rows = indices.reshape(-1, indices.shape[-1])
    held = np.zeros((len(rows), seen), np.bool_)
    np.put_along_axis(held, rows, True, axis=1)
    return held


def line(share: FloatArray, by_head: bool) -> str:
    """How much came back, if anything did.

    Args:
        share: see ``shares``.
        by_head: every head holds its own tokens.
    """
    n = max(1, round(float(share.sum())))
    tokens = "dropped token" if n == 1 else "dropped tokens"
    return f"[kvp: {n} {tokens}{' per head' if by_head else ''} came back for this reply]"


def passages(share: FloatArray, text_of: Callable[[int, int], str]) -> list[str]:
    """What many heads took back most of, as it stands in the text, one line for each passage.

    Args:
        share: see ``shares``.
        text_of: the text of the tokens [start, end).
    """
    many = np.flatnonzero(share >= min(_MANY, share.max())) if share.any() else np.empty(0)
    found = spans(many.astype(np.int32))
    most = sorted(found, key=lambda one: -float(share[slice(*one)].sum()))[:_PASSAGES]
    return [f'  "{_shortened(text_of(*one))}"' for one in sorted(most)]


def _shortened(text: str) -> str:
    text = on_one_line(text)
    return text if len(text) <= _CHARACTERS else text[: _CHARACTERS - 3] + "..."
