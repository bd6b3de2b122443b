"""RULER's needles in a haystack (arXiv:2404.06654, section 3.1 and appendix B).

Sentences of one form, "One of the special magic numbers for KEY is: VALUE.", are hidden in a text,
and the values of some keys are asked for. The eight tasks differ in what the text is (noise, prose,
or nothing but such sentences), in what keys and values are, and in how many of them there are.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from kvp_edge.evaluation.item import Item
from kvp_edge.evaluation.tasks import words
from kvp_edge.evaluation.tasks.filling import Draft, DrawnTask, conversation
from kvp_edge.evaluation.tasks.novel import Excerpt, spread

#: The sentences that make up the repeated noise.
NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)

_NEEDLE = "One of the special magic {kind} for {key} is: {value}."

_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will "
    "quiz you about the {kind} afterwards.",
    "What is the special magic {kind} for {keys} mentioned in the provided text?",
)
_SEVERAL = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I "
    "will quiz you about the {kind} afterwards.",
    "What are all the special magic {kind} for {keys} mentioned in the provided text?",
)


@dataclass(frozen=True)
class Needles:
    """What one of the tasks hides, and in what."""

    haystack: Literal["noise", "prose", "needles"] = "prose"
    key_kind: words.Kind = "words"
    value_kind: words.Kind = "numbers"
    keys: int = 1
    values_per_key: int = 1
    keys_asked: int = 1

    def draw(self, rng: random.Random, n_tokens: int) -> Draft[Item]:
        """See ``DrawnTask.draw``."""
        n_told = self.keys * self.values_per_key
        n_asked = self.keys_asked * self.values_per_key
        # No tokenizer makes fewer than 8 tokens of a needle.
        n_hay = min(n_tokens // 8, words.MOST - n_told) if self.haystack == "needles" else 0
        keys = words.draw(self.key_kind, self.keys + n_hay, rng)
        values = words.draw(self.value_kind, n_told + n_hay, rng)
        each = [key for key in keys[: self.keys] for _ in range(self.values_per_key)]
        needles = [
            _NEEDLE.format(kind=self.value_kind, key=key, value=value)
            for key, value in zip(each + keys[self.keys :], values, strict=True)
        ]
        told, hay = needles[:n_told], needles[n_told:]
        depths = [rng.random() for _ in told]
        excerpt = Excerpt(rng)

        def filler(n_pieces: int) -> list[str]:
            if self.haystack == "needles":
                return hay[:n_pieces]
            if self.haystack == "noise":
                return [NOISE[i % len(NOISE)] for i in range(n_pieces)]
            return excerpt.take(n_pieces)

        kind = self.value_kind if n_asked > 1 else self.value_kind.removesuffix("s")
        *first, last = keys[: self.keys_asked]
        named = f"{', '.join(first)}, and {last}" if first else last
        opening, asking = _SEVERAL if n_asked > 1 else _ONE
        question = asking.format(kind=kind, keys=named)

        def lay_out(n_pieces: int) -> Item:
            # A haystack of needles has one on every line; the others are running text.
            joint = "\n" if self.haystack == "needles" else " "
            text = joint.join(spread(told, depths, filler(n_pieces)))
            messages = conversation(f"{opening.format(kind=kind)}\n{text}", question)
            return Item(messages, question, tuple(values[:n_asked]))

        return Draft(lay_out, most=n_hay) if n_hay else Draft(lay_out)


# RULER lets a reply be 128 tokens long.
_TOKENS = 128

NEEDLES = [
    DrawnTask(name, about, _TOKENS, needles.draw)
    for name, about, needles in (
        (
            "niah_single_1",
            "a number hidden in repeated noise sentences, asked for by its key; as in RULER",
            Needles(haystack="noise"),
        ),
        (
            "niah_single_2",
            "a number hidden in prose; RULER's, with a novel instead of essays",
            Needles(),
        ),
        (
            "niah_single_3",
            "a UUID hidden in prose; RULER's, with a novel instead of essays",
            Needles(value_kind="uuids"),
        ),
        (
            "niah_multikey_1",
            "4 keys' numbers hidden in prose, one asked for; RULER's, with a novel instead of "
            "essays",
            Needles(keys=4),
        ),
        (
            "niah_multikey_2",
            "a text of nothing but keys' numbers, one asked for; as in RULER",
            Needles(haystack="needles"),
        ),
        (
            "niah_multikey_3",
            "a text of nothing but UUIDs of UUIDs, one asked for; as in RULER",
            Needles(haystack="needles", key_kind="uuids", value_kind="uuids"),
        ),
        (
            "niah_multivalue",
            "4 numbers of one key hidden in prose, all asked for; RULER's, with a novel instead of "
            "essays",
            Needles(values_per_key=4),
        ),
        (
            "niah_multiquery",
            "4 keys' numbers hidden in prose, all asked for; RULER's, with a novel instead of "
            "essays",
            Needles(keys=4, keys_asked=4),
        ),
    )
]
