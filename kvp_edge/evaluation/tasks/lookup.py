"""Look-up in a list of keys and values, nothing of which can be guessed or left out.

`lookup` is the key-value retrieval of "Lost in the Middle" (Liu et al., arXiv:2307.03172, section
3), generated at any length instead of with 75, 140 or 300 pairs (key_values.py reads those of 75
and 140). `pairs` is the same with words and numbers, which a small model can do.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from kvp_edge.evaluation.item import Item
from kvp_edge.evaluation.tasks import words
from kvp_edge.evaluation.tasks.filling import Draft, DrawnTask, conversation
from kvp_edge.evaluation.tasks.novel import spread

Pair = tuple[str, str]

#: The most tokens of a reply with a UUID.
UUID_TOKENS = 96

_ORDER = (
    "Extract the value corresponding to the specified key in the JSON object below.\n\n"
    "JSON data:\n{{{records}}}\n"
)


def asked_for(pair: Pair, pairs: Sequence[Pair]) -> Item:
    """The question for the value of one of the pairs, which are a JSON object."""
    key, value = pair
    context = _ORDER.format(records=",\n ".join(f'"{k}": "{v}"' for k, v in pairs))
    question = f'Key: "{key}"\nCorresponding value:'
    return Item(conversation(context, question), question, (value,))


def draw_lookup(rng: random.Random, n_tokens: int) -> Draft[Item]:
    """UUIDs of UUIDs in a JSON object. (See ``DrawnTask.draw``.)"""
    # No tokenizer makes fewer than 8 tokens of a record.
    count = min(n_tokens // 8 + 1, words.MOST)
    keys, values = words.draw("uuids", count, rng), words.draw("uuids", count, rng)
    pairs = list(zip(keys, values, strict=True))
    depth = rng.random()

    def lay_out(n_pieces: int) -> Item:
        return asked_for(pairs[0], spread(pairs[:1], [depth], pairs[1 : n_pieces + 1]))

    return Draft(lay_out, most=count - 1)


def draw_pairs(rng: random.Random, n_tokens: int) -> Draft[Item]:
    """Numbers of words, one pair a sentence. (See ``DrawnTask.draw``.)"""
    # As many keys as possible are single words; longer lists go on with pairs of words.
    keys = [*rng.sample(words.WORDS, len(words.WORDS)), *words.draw("words", words.MOST, rng)]
    values = words.draw("numbers", len(keys), rng)
    records = [f"{key}: {value}." for key, value in zip(keys, values, strict=True)]
    question = f"What is the value of {keys[0]}?"
    depth = rng.random()

    def lay_out(n_pieces: int) -> Item:
        listed = spread(records[:1], [depth], records[1 : n_pieces + 1])
        context = f"Read this list. {' '.join(listed)}"
        return Item(conversation(context, question), question, (values[0],))

    return Draft(lay_out, most=len(records) - 1)


LOOKUP = [
    DrawnTask(
        "lookup",
        "a UUID's UUID in a JSON object; 'Lost in the Middle', with as many pairs as fit",
        UUID_TOKENS,
        draw_lookup,
    ),
    DrawnTask(
        "pairs",
        "a word's number in a list; like 'lookup', with pairs that a small model can copy",
        32,
        draw_pairs,
    ),
]
