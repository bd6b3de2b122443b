"""Copying: an early passage is repeated at the end, unchanged or with a word replaced.

Each word of the reply follows from the one before it and its place in the passage. No part of the
passage may be dropped, and the part needed next moves on with every word.
"""

from __future__ import annotations

import random
import re
from collections import Counter

from kvp_edge.evaluation.item import Item, words_of
from kvp_edge.evaluation.tasks import words
from kvp_edge.evaluation.tasks.filling import Draft, DrawnTask, conversation
from kvp_edge.evaluation.tasks.novel import Excerpt

_OPENING = "Memorize the first paragraph of this text.\n\n{passage}\n\n{filler}\n"
_COPY = "Please write down the first paragraph again, word for word."
_EDIT = (
    'Please write down the first paragraph again, word for word, but with "{new}" in place of '
    '"{old}" everywhere.'
)

#: The passage has a word for every so many tokens of the conversation, but at most _MOST.
_TOKENS_PER_WORD = 8
_FEWEST, _MOST = 20, 200


def draw_copy(rng: random.Random, n_tokens: int) -> Draft[Item]:
    """The passage as it is. (See ``DrawnTask.draw``.)"""
    excerpt = Excerpt(rng)
    passage = _passage(excerpt, n_tokens)

    def lay_out(n_pieces: int) -> Item:
        messages = conversation(_context(excerpt, passage, n_pieces), _COPY)
        return Item(messages, _COPY, tuple(words_of(" ".join(passage))), "order")

    return Draft(lay_out)


def draw_edits(rng: random.Random, n_tokens: int) -> Draft[Item]:
    """The passage with its most frequent word of three letters or more replaced. What counts are
    the replaced words, each with the words beside it. (See ``DrawnTask.draw``.)"""
    excerpt = Excerpt(rng)
    passage = _passage(excerpt, n_tokens)
    old = Counter(re.findall(r"\b[a-z]{3,}\b", " ".join(passage).casefold())).most_common(1)[0][0]
    new = rng.choice([word for word in words.WORDS if word not in " ".join(passage).casefold()])
    is_old = re.compile(rf"\b{old}\b", re.IGNORECASE)
    edited = [is_old.sub(new, word) for word in " ".join(passage).split()]
    places = [i for i, word in enumerate(edited) if new in words_of(word)]
    phrases = [" ".join(edited[max(i - 1, 0) : i + 2]) for i in places]
    answers = tuple(dict.fromkeys(re.sub(r"^\W+|\W+$", "", phrase) for phrase in phrases))
    question = _EDIT.format(old=old, new=new)

    def lay_out(n_pieces: int) -> Item:
        messages = conversation(_context(excerpt, passage, n_pieces), question)
        return Item(messages, question, answers)

    return Draft(lay_out)


def _passage(excerpt: Excerpt, n_tokens: int) -> list[str]:
    """The fewest sentences with the requested number of words, without one that would exceed _MOST
    words."""
    wanted = min(max(n_tokens // _TOKENS_PER_WORD, _FEWEST), _MOST)
    sentences = excerpt.take(1)
    while len(" ".join(sentences).split()) < wanted:
        sentences = excerpt.take(len(sentences) + 1)
        if len(" ".join(sentences).split()) > _MOST:
            return sentences[:-1]
    return sentences


def _context(excerpt: Excerpt, passage: list[str], n_sentences: int) -> str:
    filler = excerpt.take(len(passage) + n_sentences)[len(passage) :]
    return _OPENING.format(passage=" ".join(passage), filler=" ".join(filler))


# The longest passages have about 300 tokens.
_TOKENS = 512

COPYING = [
    DrawnTask(
        "copy",
        "a paragraph, written down again after other text; the share of its words in their order",
        _TOKENS,
        draw_copy,
    ),
    DrawnTask(
        "edits",
        "a paragraph, written down again with one word replaced; the share of the replaced places",
        _TOKENS,
        draw_edits,
    ),
]
