"""Neighbouring tokens that are kept or dropped together: markers, and words or sentences.

Half a name or a third of a clause says little. So SkipKV (arXiv:2512.07993) ranks whole sentences;
a word is the smallest such unit.
"""

from __future__ import annotations

import codecs
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate

from kvp_edge.text.chat_markers import complete_markers, token_spans

#: Kinds of spans: part of a text; a chat-template marker, or a prefix of one at the end of the
#: conversation; a complete marker that begins a turn.
TEXT, MARKER, TURN = range(3)

#: (start, end, kind): the tokens start .. end - 1.
Span = tuple[int, int, int]

KEEP_WHOLE = ("tokens", "words", "sentences")

MAX_WORD, MAX_SENTENCE = 16, 64

#: Tokens before the first new one that decide which span it belongs to: enough for a word that is
#: too long, and for a character that is split over tokens.
LOOK_BACK = 64

_SCRIPTS_WITHOUT_SPACES = "\u0e00"  # Thai is the first; most of what has none comes after it

# the first bytes of a character of which the text ends before the others
_CUT_OFF = rb"(?:(?:[\xc2-\xdf]|[\xe0-\xef][\x80-\xbf]?|[\xf0-\xf4][\x80-\xbf]{0,2})\Z)?"
_SPACE = rb"(?:\s|\xc2\xa0|\xe3\x80\x80)"
_CLOSERS = "\"')]}»”’」』）】"  # noqa: RUF001
_CLOSING = b"(?:" + b"|".join(re.escape(c.encode()) for c in _CLOSERS) + b")*" + _CUT_OFF
_WIDE_STOP = b"(?:" + b"|".join(c.encode() for c in "。！？") + b")+"  # noqa: RUF001
_SENTENCE_END = re.compile(
    rb"[.!?]+" + _CLOSING + rb"(?=" + _SPACE + rb"|\Z)|" + _WIDE_STOP + _CLOSING + rb"|[\r\n]"
)


def words(pieces: Sequence[bytes]) -> list[tuple[int, int]]:
    """Words of two to MAX_WORD tokens.

    Two neighbouring tokens are of one word if the characters on both sides of the border between
    them, or the one that it divides, are alphanumeric and below U+0E00: of a script that writes
    spaces. A longer run of such tokens (a hash, say) is no word.

    Args:
        pieces: the text of each token. A character may be spread over several.

    Returns:
        [start, end) spans of tokens, ascending, disjoint. A word that ends before the last token is
        final, whatever text follows.
    """
    inside = _in_words(b"".join(pieces))
    found: list[tuple[int, int]] = []
    start, at = 0, 0
    for token in range(1, len(pieces) + 1):
        at += len(pieces[token - 1])
        # what comes after the end is not known, but what comes before it may go on
        joined = at > 0 and inside[at - 1] and (at == len(inside) or inside[at])
        if token == len(pieces) or not joined:
            if 2 <= token - start <= MAX_WORD:
                found.append((start, token))
            start = token
    return found


def _in_words(text: bytes) -> list[bool]:
    """For each byte whether its character can be part of a word. A character cut off at the end of
    the text counts as one that can."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(text[-3:])
    n_open = len(decoder.getstate()[0])
    inside: list[bool] = []
    for char in text[: len(text) - n_open].decode("utf-8", "surrogateescape"):
        n_bytes = len(char.encode("utf-8", "surrogateescape"))
        inside += [char < _SCRIPTS_WITHOUT_SPACES and char.isalnum()] * n_bytes
    return inside + [True] * n_open


def sentences(pieces: Sequence[bytes]) -> list[tuple[int, int]]:
    """Sentences of a text, with the white space behind them.

    A sentence ends with . ! or ? and closing quotes and brackets, if white space or nothing
    follows; with a full-width stop; and at the end of a line. So "e.g. this" is two sentences.
    Sentences longer than MAX_SENTENCE tokens are cut into runs of that many.

    Args:
        pieces: as for ``words``.

    Returns:
        [start, end) spans of tokens, ascending, that cover all tokens. Those before the last are
        final, whatever text follows.
    """
    text = b"".join(pieces)
    ends = list(accumulate(map(len, pieces)))
    found: list[tuple[int, int]] = []
    start = 0
    while start < len(pieces):
        most = min(start + MAX_SENTENCE, len(pieces))
        stop = _SENTENCE_END.search(text, ends[start] - len(pieces[start]))
        end = bisect_left(ends, stop.end()) + 1 if stop else most
        while end < most and not pieces[end].strip():
            end += 1
        found.append((start, min(end, most)))
        start = found[-1][1]
    return found


_FINDERS: dict[str, Callable[[Sequence[bytes]], list[tuple[int, int]]]] = {
    "words": words,
    "sentences": sentences,
}


def find_spans(
    pieces: Sequence[bytes], markers: Sequence[bytes], keep_whole: str, start: int
) -> list[Span]:
    """Spans that hold any of the tokens from ``start`` on.

    Args:
        pieces: the text of each token, special tokens included, from LOOK_BACK and the longest
            marker's bytes before ``start`` on.
        markers: see template_markers.
        keep_whole: one of KEEP_WHOLE: what else besides markers. Words and sentences end at
            markers.
        start: where a sentence begins, or a marker; anywhere for words.

    Returns:
        Ascending, disjoint.
    """
    complete = {first for first, _ in complete_markers(pieces, markers)}
    found: list[Span] = []
    finder = _FINDERS.get(keep_whole)
    at = start if finder is sentences else 0
    for first, last in [*token_spans(pieces, markers), (len(pieces), len(pieces))]:
        if finder is not None and at < first:
            found += [(at + a, at + b, TEXT) for a, b in finder(pieces[at:first])]
        at = max(at, last)
        if not complete.isdisjoint(range(first, last)):
            found.append((first, last, TURN))
        elif first < last:  # at the very end; tokens without text may follow
            at = len(pieces)
            found.append((first, at, MARKER))
    return [span for span in found if span[1] > start]
