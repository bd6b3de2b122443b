"""As much filler as fits: conversations of a given number of tokens, for any tokenizer.

A task draws everything that chance decides (facts, places, order) once, and leaves the amount of
filler open: that is a `Draft`. `fill` then looks for the largest amount that fits. It measures
whole conversations, which is exact for every tokenizer, and needs few measurements because their
length grows evenly with the filler.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from kvp_edge.evaluation.item import CountTokens, Item, Reading
from kvp_edge.text.chat_prompt import Message

Made = TypeVar("Made", Item, Reading)

#: What chat templates write beside the messages (a default system prompt and the opening of the
#: reply), and around each message. A single message thus leaves 40 tokens free.
TEMPLATE_TOKENS = 34
MESSAGE_TOKENS = 6

#: A conversation that uses this share of its tokens is long enough; a little more is aimed at.
ENOUGH = 0.98
_AIM = 0.99

#: How often an item that turns out too long is drawn again.
_DRAWS = 32


@dataclass(frozen=True)
class Draft(Generic[Made]):
    """A conversation whose amount of filler is still open.

    Attributes:
        lay_out: the conversation with so many pieces of filler; 0 is the shortest that there is.
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
        # beside its answers a reply is taken to be half as long as its question
        around = sum(count_tokens(question.text) // 2 for question in made.more)
        return _chat_length(asked, count_tokens) + around
    if isinstance(made.context, str):
        return count_tokens(made.context) + count_tokens(made.ending)
    return _chat_length([m["content"] for m in made.context] + [made.ending], count_tokens)


def _chat_length(texts: list[str], count_tokens: CountTokens) -> int:
    return TEMPLATE_TOKENS + sum(MESSAGE_TOKENS + count_tokens(text) for text in texts)


def fill(draft: Draft[Made], n_tokens: int, count_tokens: CountTokens) -> Made | None:
    """The draft with about as much filler as ``n_tokens`` allow; None if it does not even fit
    without."""
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
        if tries < 8:  # as if the pieces to come were like those so far, and none less than a token
            per_piece = max((tokens - bare) / pieces, 1)
            guess = fits + int((_AIM * n_tokens - used) / per_piece)
        else:  # they are not: halve what is left
            guess = min((fits + too_many) // 2, 2 * fits + 1)
    return best


def rng_of(name: str, seed: int, number: int = 0) -> random.Random:
    """Chance for one item. It depends on nothing else, so that the first items stay the same when
    more are asked for."""
    return random.Random(f"{name}/{seed}/{number}")


@dataclass
class DrawnTask:
    """A task whose items are drawn one by one.

    Attributes:
        name, about, reply_tokens: see ``kvp_edge.evaluation.item.Task``.
        draw: the draft of an item, for chance and for the number of tokens that it will be filled
            up to.
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
