"""A conversation in tokens, and the setting in which it is read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kvp_edge.arrays import TokenIds
from kvp_edge.cache.options import EVALUATED, OPTIONS
from kvp_edge.errors import OptionError
from kvp_edge.evaluation.item import Item

#: What the cache's options may be in an evaluation, (): anything of their type. What is decided
#: anew for each model cannot be compared.
CHOICES = {
    name: tuple(choice for choice in OPTIONS[name].choices if choice != "auto")
    for name in EVALUATED
}

#: The smallest budget: sinks, newest tokens, and a few to choose.
SMALLEST = 16


@dataclass(frozen=True)
class Prompt:
    """An item or reading in tokens of the model.

    Attributes:
        task, number: which item.
        tokens: int32 [n], the conversation without its reply; of a reading the ending, too.
        border: where the question begins, or the ending.
        item: None for a reading.
        reply_tokens: the most tokens of a reply.
        turns: of an item with several questions, what is read after every reply but the last.
        measured: of a reading, bool [n - border]: which tokens of the ending count. None: all.
    """

    task: str
    number: int
    tokens: TokenIds
    border: int
    item: Item | None
    reply_tokens: int
    turns: tuple[tuple[int, ...], ...] = ()
    measured: npt.NDArray[np.bool_] | None = None

    @property
    def longest(self) -> int:
        """Tokens of the conversation with the longest replies, and one to spare."""
        turns = sum(len(turn) + self.reply_tokens for turn in self.turns)
        return len(self.tokens) + self.reply_tokens + turns + 1

    @cached_property
    def digest(self) -> str:
        read = np.concatenate((self.tokens, *self.turns), dtype=np.int32)
        return hashlib.sha256(read.tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Setting:
    """How a conversation is read.

    Attributes:
        length: tokens of a conversation, approximately.
        longest: tokens of the longest one, with its reply.
        budget: most tokens kept at any time (bounded), or after the eviction (one-shot). None: all.
        protected: whether the first and the newest tokens stay, whatever their score.
        granularity, keep_whole, isolate_turns: see kvp_edge.cache.options.CacheOptions.
    """

    mode: Literal["bounded", "one-shot"]
    question: Literal["unseen", "seen"]
    granularity: str
    length: int
    longest: int
    budget: int | None
    policy: str
    protected: bool
    keep_whole: str = OPTIONS["keep_whole"].default
    isolate_turns: bool = OPTIONS["isolate_turns"].default

    def __post_init__(self) -> None:
        for name in EVALUATED:
            if CHOICES[name] and getattr(self, name) not in CHOICES[name]:
                raise OptionError(
                    f"{name} must be {' or '.join(map(repr, CHOICES[name]))} in an evaluation, not "
                    f"'{getattr(self, name)}'"
                )
        if self.mode == "bounded" and self.question == "seen":
            raise ValueError(
                "--question seen needs --mode one-shot: in bounded mode tokens are dropped "
                "before the question is read"
            )

    @property
    def how(self) -> dict[str, Any]:
        """The options of the cache that an evaluation compares, as arguments of kvp_edge.Llama."""
        return {name: getattr(self, name) for name in EVALUATED}

    def cut(self, prompt: Prompt) -> int:
        """The number of tokens read before tokens are dropped: up to the question, or with it if
        seen."""
        seen = self.question == "seen" and prompt.item is not None
        return len(prompt.tokens) if seen else prompt.border


def budget_of(share: str, length: int) -> int:
    """Tokens for "1/8" or "0.125" of ``length``, or for a whole number like "512".

    Raises:
        ValueError: neither of them, or too few tokens.
    """
    try:
        number = Fraction(share)
    except (ValueError, ZeroDivisionError):
        number = Fraction(0)
    if number <= 0 or (number > 1 and number.denominator != 1):
        raise ValueError(
            "a budget must be a fraction of the length such as 1/8, or a number of tokens "
            f"such as 512, not '{share}'"
        )
    budget = int(number) if number.denominator == 1 and number > 1 else int(number * length)
    if budget < SMALLEST:
        raise ValueError(
            f"a budget of {share} is {budget} of {length} tokens, but at least {SMALLEST} are "
            "needed: raise --budgets or --lengths"
        )
    return budget
