"""Texts whose endings are measured: how the loss grows without the dropped tokens.

There is no question that shows which token matters, and every token of the ending is measured, so
small differences show. The ending is prose here, a reply in dialogues.py, an answer in meetings.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from kvp_edge.corpora import evaluation_prose
from kvp_edge.evaluation.item import CountTokens, Reading
from kvp_edge.evaluation.tasks.filling import Draft, fill, length, rng_of

#: The last quarter of an excerpt is its ending.
_CONTEXT_SHARE = 0.75

_FEWEST_WORDS = 8

#: The fractional parts of its multiples are spread evenly over 0 to 1, however many there are.
_GOLDEN = 0.618034


class Books:
    """Excerpts of plain texts, in which line ends and blank lines count as spaces.

    Args:
        paths: the texts; none: the bundled novel.
    """

    name = "books"
    reply_tokens = 0

    def __init__(self, paths: Sequence[Path] = ()) -> None:
        self._paths = sorted(paths)
        whose = "your books" if paths else "the shipped novel"
        self.about = f"loss of the last quarter of an excerpt of {whose}"

    def make(
        self, n_items: int, n_tokens: int, count_tokens: CountTokens, seed: int
    ) -> list[Reading]:
        """One excerpt of every text in turn. Those of the same text begin at places spread evenly
        over it, but may overlap when they are many. (See ``kvp_edge.evaluation.item.Task``.)"""
        rng = rng_of(self.name, seed)
        texts: list[Path | None] = [*self._paths] or [None]
        rng.shuffle(texts)
        first_place = rng.random()
        readings: list[Reading] = []
        while len(readings) < n_items:
            if not texts:
                raise ValueError(f"'books' has no text of which {n_tokens} tokens are a part")
            number = len(readings)
            text = texts[number % len(texts)]
            draft = excerpt(_words(text), (first_place + number * _GOLDEN) % 1)
            reading = fill(draft, n_tokens, count_tokens)
            if reading is None or length(reading, count_tokens) < 0.9 * n_tokens:
                texts.remove(text)  # it is too short
            else:
                readings.append(reading)
        return readings


def excerpt(words: Sequence[str], place: float) -> Draft[Reading]:
    """Words in a row, from the beginning of a sentence; ``place`` from 0 (the text's beginning) to
    1 (its end)."""

    def lay_out(n_pieces: int) -> Reading:
        count = n_pieces + _FEWEST_WORDS
        start = int(place * max(len(words) - count, 0))
        while start > 0 and not words[start - 1].endswith((".", "!", "?", '."', '!"', '?"')):
            start -= 1
        cut = start + round(count * _CONTEXT_SHARE)
        context, ending = words[start:cut], words[cut : start + count]
        return Reading(" ".join(context), " " + " ".join(ending))

    return Draft(lay_out, most=max(len(words) - _FEWEST_WORDS, 0))


@lru_cache(maxsize=4)
def _words(path: Path | None) -> tuple[str, ...]:
    text = path.read_text(encoding="utf-8") if path else evaluation_prose()
    return tuple(text.split())


def read_on(
    name: str,
    drafts: Sequence[Draft[Reading]],
    n_items: int,
    n_tokens: int,
    count_tokens: CountTokens,
) -> list[Reading]:
    """The first ``n_items`` drafts that fit and whose context, which is all that a cache can lose,
    has at least half of ``n_tokens``.

    Raises:
        ValueError: there are too few.
    """
    readings: list[Reading] = []
    for draft in drafts:
        if len(readings) == n_items:
            break
        reading = fill(draft, n_tokens, count_tokens)
        if reading is None:
            continue
        if length(replace(reading, ending=""), count_tokens) >= n_tokens / 2:
            readings.append(reading)
    if len(readings) < n_items:
        raise ValueError(
            f"'{name}' has {len(readings)} conversations for {n_tokens} tokens (at least half of "
            f"them before the ending), not {n_items}"
        )
    return readings
