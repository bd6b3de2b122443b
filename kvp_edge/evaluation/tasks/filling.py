"""Fills conversations up to a given number of tokens, for any tokenizer.

A task draws everything random (facts, places, order) once, and leaves the amount of filler open:
that is a `Draft`. `fill` then finds the largest amount that fits. It measures whole conversations,
which is exact for every tokenizer, and needs few measurements because length grows evenly with
filler.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from kvp_edge.evaluation.item import CountTokens, Item, Reading
from kvp_edge.text.chat_prompt import Message

Made = TypeVar("Made", Item, Reading)

#: Tokens of a chat template besides the messages (a default system prompt, the opening of the
#: reply), and around each message. A single message thus leaves 40 tokens free.
TEMPLATE_TOKENS = 34
MESSAGE_TOKENS = 6

#: A conversation that uses this share of its tokens is long enough; the target is a little more.
ENOUGH = 0.98
_AIM = 0.99

#: How often an item that turns out too long is drawn again.
_DRAWS = 32


@dataclass(frozen=True)
class Draft(Generic[Made]):
    """A conversation whose amount of filler is not decided yet.

    Attributes:
        lay_out: the conversation with this many pieces of filler; 0 gives the shortest.
        most: how many pieces there are.
    """

    lay_out: Callable[[int], Made]
    most: int = 1_000_000


def conversation(context: str, question: str) -> list[Message]:
    """One message of the user's: the context, a line end, the question."""
    return [{"role": "user", "content": f"{context}\n{question}"}]


def length(made: Item | Reading, count_tokens: CountTokens) -> int:
    """The tokens of a conversation, with room for a chat template, or of a plain text."""
    if isinstance(made, Item):
        asked = [m["content"] for m in made.messages]
        for question in made.more:
            asked += [question.text, " ".join(question.answers)]
        # besides its answers, a reply is assumed to be half as long as its question
        around = sum(count_tokens(question.text) // 2 for question in made.more)
        return _chat_length(asked, count_tokens) + around
    if isinstance(made.context, str):
        return count_tokens(made.context) + count_tokens(made.ending)
    return _chat_length([m["content"] for m in made.context] + [made.ending], count_tokens)


def _chat_length(texts: list[str], count_tokens: CountTokens) -> int:
    return TEMPLATE_TOKENS + sum(MESSAGE_TOKENS + count_tokens(text) for text in texts)


def fill(draft: Draft[Made], n_tokens: int, count_tokens: CountTokens) -> Made | None:
    """The draft with about as much filler as fits into ``n_tokens``; None if it does not fit even
    without filler."""
    best = draft.lay_out(0)
    used = bare = length(best, count_tokens)
    if used > n_tokens:
        return None
    fits, too_many = 0, draft.most + 1  # the answer lies from the one to before the other
    guess, tries = 16, 0
    while fits + 1 < too_many and used < ENOUGH * n_tokens:
        pieces = min(max(guess, fits + 1), too_many - 1)
        made = draft.lay_out(pieces)
        tokens = length(made, count_tokens)
        if tokens <= n_tokens:
            best, fits, used = made, pieces, tokens
        else:
            too_many = pieces
        tries += 1
        if tries < 8:  # assume that further pieces are like those so far, at least a token each
            per_piece = max((tokens - bare) / pieces, 1)
            guess = fits + int((_AIM * n_tokens - used) / per_piece)
        else:  # they are not: halve what is left
            guess = min((fits + too_many) // 2, 2 * fits + 1)
    return best


def rng_of(name: str, seed: int, number: int = 0) -> random.Random:
    """The random generator of one item. It depends on nothing else, so that more items do not
    change the first."""
    return random.Random(f"{name}/{seed}/{number}")


@dataclass
class DrawnTask:
    """A task whose items are drawn one by one.

    Attributes:
        name, about, reply_tokens: see ``kvp_edge.evaluation.item.Task``.
        draw: the draft of an item, given a random generator and the number of tokens to fill.
    """

    name: str
    about: str
    reply_tokens: int
    draw: Callable[[random.Random, int], Draft[Item]]

    def make(self, n_items: int, n_tokens: int, count_tokens: CountTokens, seed: int) -> list[Item]:
        """See ``kvp_edge.evaluation.item.Task``."""
        return [
            self._item(rng_of(self.name, seed, number), n_tokens, count_tokens)
            for number in range(n_items)
        ]

    def _item(self, rng: random.Random, n_tokens: int, count_tokens: CountTokens) -> Item:
        shortest = []
        for _ in range(_DRAWS):
            draft = self.draw(rng, n_tokens)
            item = fill(draft, n_tokens, count_tokens)
            if item is not None:
                return item
            shortest.append(length(draft.lay_out(0), count_tokens))
        raise ValueError(
            f"'{self.name}' does not fit into {n_tokens} tokens: without any filler it has "
            f"{min(shortest)} with this model's tokenizer"
        )
