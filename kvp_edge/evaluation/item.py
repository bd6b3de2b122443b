"""Questions and texts for a model, and the scoring of replies."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from kvp_edge.text.chat_prompt import Message

#: How many tokens the model makes of a text.
CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class Question:
    """One more question, asked when the model has replied to those before it."""

    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Item:
    """One question about a long conversation, or several, one after the other.

    Attributes:
        messages: the conversation; the last message is the user's and ends in ``question``.
        question: the question. Everything before it can be evicted before it is read.
        answers: what the reply must name.
        match: "all": the score is the share of ``answers`` that the reply names (RULER's
            string_match_all); "any": 1 if it names one of them (string_match_part); "order": the
            share of ``answers``, each a single word, that the reply has in their order (the longest
            common subsequence of words).
        more: the user's messages that follow, each after the model's own reply to the one before.
    """

    messages: list[Message]
    question: str
    answers: tuple[str, ...]
    match: Literal["all", "any", "order"] = "all"
    more: tuple[Question, ...] = ()

    def score(self, *replies: str) -> float:
        """From 0 to 1, the mean over all questions. An answer counts if the reply contains it as
        separate words; case and the kind of white space do not matter.

        Args:
            replies: one for each question.
        """
        asked = [self.answers, *(question.answers for question in self.more)]
        scores = [self._one(*pair) for pair in zip(replies, asked, strict=True)]
        return sum(scores) / len(scores)

    def _one(self, reply: str, answers: tuple[str, ...]) -> float:
        if self.match == "order":
            return in_order(words_of(reply), [answer.casefold() for answer in answers])
        found = [names(reply, answer) for answer in answers]
        return float(any(found)) if self.match == "any" else sum(found) / len(found)


def names(reply: str, answer: str) -> bool:
    """Whether ``reply`` contains ``answer`` as separate words."""
    words = r"\s+".join(map(re.escape, answer.split()))
    return re.search(rf"(?<!\w){words}(?!\w)", reply, re.IGNORECASE) is not None


def words_of(text: str) -> list[str]:
    """Words and numbers in lower case, without punctuation."""
    return re.findall(r"\w+(?:['\u2019-]\w+)*", text.casefold())


def in_order(found: Sequence[str], wanted: Sequence[str]) -> float:
    """The share of ``wanted``, of at least one word, that ``found`` has in this order: the length
    of their longest common subsequence."""
    longest = [0] * (len(wanted) + 1)  # with the first i wanted words
    for word in found:
        before = list(longest)
        for i, other in enumerate(wanted):
            longest[i + 1] = before[i] + 1 if word == other else max(before[i + 1], longest[i])
    return longest[-1] / len(wanted)


@dataclass(frozen=True)
class Reading:
    """A text whose ending's loss is measured.

    Attributes:
        context: what is read first: a conversation, or plain text.
        ending: what follows: the rest of a plain text, or the next message of a conversation.
    """

    context: list[Message] | str
    ending: str


@dataclass(frozen=True)
class Continuation:
    """A reading whose ending the model itself writes, with its full cache.

    Attributes:
        context: what is read first: plain text, which the model continues at temperature 1, or a
            conversation, to which it replies greedily.
        tokens: how many it writes after a plain text, or at most in each reply.
        questions: the user's messages that follow in a conversation, each after the model's own
            reply to the one before. Only the replies are measured.
        seed: of the draws.
    """

    context: list[Message] | str
    tokens: int
    questions: tuple[str, ...] = ()
    seed: int = 0


class Task(Protocol):
    """A family of items or of readings, drawn from a seed.

    Attributes:
        name: its name for users.
        about: one sentence for ``kvp-edge eval --list``: the question, and the differences from the
            original.
        reply_tokens: the most tokens that a reply needs (0: readings, which have no reply).
    """

    name: str
    about: str
    reply_tokens: int

    def make(
        self, n_items: int, n_tokens: int, count_tokens: CountTokens, seed: int
    ) -> Sequence[Item | Reading | Continuation]:
        """``n_items`` of at most about ``n_tokens`` tokens; the same for the same arguments.

        Raises:
            ValueError: no item fits into so few tokens, or there are too few items.
        """
