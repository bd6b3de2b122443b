"""RULER's most frequent words (arXiv:2404.06654, section 3.3): `cwe` and `fwe`.

No sentence contains the answer: it is spread over the whole text, so dropping a part loses some of
the count. RULER shows a solved example before `cwe`; in a chat the question alone says what to do.
"""

from __future__ import annotations

import math
import random
import re
import string

from kvp_edge.evaluation.item import Item
from kvp_edge.evaluation.tasks import words
from kvp_edge.evaluation.tasks.filling import Draft, DrawnTask, conversation
from kvp_edge.evaluation.tasks.novel import sentences

COMMON = 10

_COMMON_OPENING = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{text}"
)
_COMMON_QUESTION = "Question: What are the 10 most common words in the above list?"


def draw_common_words(rng: random.Random, n_tokens: int) -> Draft[Item]:
    """Ten words that occur 30 times each, and as many others as fit that occur 3 times each; in
    fewer than 4,096 tokens 6 times and once. (See ``DrawnTask.draw``.)"""
    often, seldom = (30, 3) if n_tokens >= 4096 else (6, 1)
    novel = sorted(set(re.findall(r"\b[a-z]{4,9}\b", " ".join(sentences()))))
    # A novel has no more words than that; longer lists go on with compounds ("gentleteapot").
    count = min(n_tokens // 8, words.MOST)
    compounds = [pair.replace("-", "") for pair in words.draw("words", count, rng)]
    pool = [*rng.sample(novel, len(novel)), *compounds]
    common, uncommon = pool[:COMMON], pool[COMMON:]
    order = rng.getrandbits(64)

    def lay_out(n_pieces: int) -> Item:
        listed = common * often + uncommon[:n_pieces] * seldom
        random.Random(order).shuffle(listed)
        text = " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
        messages = conversation(_COMMON_OPENING.format(text=text), _COMMON_QUESTION)
        return Item(messages, _COMMON_QUESTION, tuple(common))

    return Draft(lay_out, most=len(uncommon))


_FREQUENT_OPENING = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. {text}"
)
_FREQUENT_QUESTION = (
    "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three "
    "most frequently appeared words in the above coded text?"
)

#: From this many words on, no two of the four most frequent ones are equally frequent.
_FEWEST = 80


def draw_frequent_words(rng: random.Random, n_tokens: int) -> Draft[Item]:
    """Words of six random letters; the k-th comes in proportion to k^-2 (a zeta distribution), and
    the first, which would be more than half of the text, is replaced by dots. (See
    ``DrawnTask.draw``.)"""
    # RULER takes one word for every 50 tokens; the rarest of them come less than once, not at all.
    n_words = max(n_tokens // 50, 8)
    drawn = {"".join(rng.choices(string.ascii_lowercase, k=6)): None for _ in range(n_words)}
    coded = ["...", *drawn]
    order = rng.getrandbits(64)
    zeta = math.pi**2 / 6

    def lay_out(n_pieces: int) -> Item:
        total = _FEWEST + n_pieces
        text = [w for k, w in enumerate(coded, 1) for _ in range(int(total / k**2 / zeta))]
        random.Random(order).shuffle(text)
        messages = conversation(_FREQUENT_OPENING.format(text=" ".join(text)), _FREQUENT_QUESTION)
        return Item(messages, _FREQUENT_QUESTION, tuple(coded[1:4]))

    return Draft(lay_out)


# RULER allows 120 and 50 tokens after "The top 10 words ... are:"; here the reply says that itself.
COMMON_WORDS = DrawnTask(
    "cwe",
    "the 10 most common words of a numbered list; RULER's, without its solved example",
    160,
    draw_common_words,
)
FREQUENT_WORDS = DrawnTask(
    "fwe",
    "the 3 most frequent words of a text of made-up words; as in RULER",
    96,
    draw_frequent_words,
)
