"""What a model is asked, and when its reply is right."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from kvp_edge.chat_prompt import Message

#: How many tokens the model makes of a text.
CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class Item:
    """One question about a long conversation.

    Attributes:
        messages: the conversation; the last message is the user's and ends in ``question``.
        question: what is asked. Everything before it can be evicted before the question is seen.
        answers: what the reply must name.
        match: "all": the score is the share of ``answers`` that the reply names (RULER's
            string_match_all); "any": 1 if it names one of them (string_match_part).
    """

    messages: list[Message]
    question: str
    answers: tuple[str, ...]
    match: Literal["all", "any"] = "all"

    def score(self, reply: str) -> float:
        """From 0 to 1. An answer counts when it stands in the reply as words of its own; case and
        the kind of white space do not matter."""
        found = [names(reply, answer) for answer in self.answers]
        return float(any(found)) if self.match == "any" else sum(found) / len(found)


def names(reply: str, answer: str) -> bool:
    """Whether ``answer`` stands in ``reply`` as words of its own."""
    words = r"\s+".join(map(re.escape, answer.split()))
    return re.search(rf"(?<!\w){words}(?!\w)", reply, re.IGNORECASE) is not None


@dataclass(frozen=True)
class Reading:
    """A text whose ending the model must find likely.

    Attributes:
        context: what is read first: a conversation, or plain text.
        ending: what comes then; a plain text goes on with it, a conversation's next message is it.
    """

    context: list[Message] | str
    ending: str


class Task(Protocol):
    """A family of items or readings, drawn from a seed.

    Attributes:
        name: what users call it.
        about: one sentence for ``kvp-edge eval --list``: what it asks, and how it differs from its
            original.
        reply_tokens: the most tokens that a reply needs (0: readings, which have no reply).
    """

    name: str
    about: str
    reply_tokens: int

    def make(
        self, n_items: int, n_tokens: int, count_tokens: CountTokens, seed: int
    ) -> Sequence[Item | Reading]:
        """``n_items`` of at most about ``n_tokens`` tokens; the same for the same arguments.

        Raises:
            ValueError: no item fits into so few tokens, or there are not so many; the message says
                which.
        """
