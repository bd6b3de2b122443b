"""The same text in other tokens.

A model may spell a word in other tokens than the tokenizer does. A chat keeps its replies as text,
so the next prompt may have other ids for the same text. If the cache cannot be rewound to the point
where the ids differ, the conversation would be read again from its start, for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np

from kvp_edge.arrays import TokenIds


def begin_as_known(
    known: Sequence[int], tokens: Sequence[int], piece: Callable[[int], bytes]
) -> list[int]:
    """``tokens`` with its beginning in tokens of ``known``, as far as both are the same text.

    Args:
        known: tokens that were read.
        tokens: tokens to be read now.
        piece: the text of a token, special tokens included.

    Returns:
        Tokens of the same text as ``tokens``.
    """
    known_pieces, new_pieces = [piece(t) for t in known], [piece(t) for t in tokens]
    text, new_text = b"".join(known_pieces), b"".join(new_pieces)
    new_ends = {end: i for i, end in enumerate(accumulate(map(len, new_pieces)), 1)}
    n_known = n_new = at = 0
    for i, end in enumerate(accumulate(map(len, known_pieces)), 1):
        if text[at:end] != new_text[at:end]:
            break
        if end in new_ends:
            n_known, n_new = i, new_ends[end]
        at = end
    return [*known[:n_known], *tokens[n_new:]]


def n_equal(one: TokenIds, other: TokenIds) -> int:
    """The length of the longest equal beginning of two texts, int32 [n] each."""
    n = min(len(one), len(other))
    differ = np.flatnonzero(one[:n] != other[:n])
    return int(differ[0]) if len(differ) else n
