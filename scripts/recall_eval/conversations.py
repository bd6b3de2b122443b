"""Conversations with facts about different things, and what is asked about them.

The sentences are the demo's (kvp_edge.cli.demo_tasks). Everything is drawn from a seed.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kvp_edge.cli.demo_tasks import (
    ACKNOWLEDGEMENTS,
    SMALL_TALK,
    WORDS,
    Message,
    Prose,
    draw_value,
    things,
)
from kvp_edge.evaluation import facts

#: Facts hidden in one long message, and facts told in turns of their own.
KINDS = ("prose", "chat")

#: Tokens of prose in a turn between facts.
_TALK = 200

_ALL = {
    "prose": "List all the special magic numbers and special magic words mentioned in the text.",
    "chat": "List everything that I told you about myself: all names, favourites and codes.",
}
_COUNT = 'How often does the word "{word}" occur in all of the text above? Answer with a number.'
_NUMBERS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
]


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        task: "fact": one of the facts; "count": of a word; "all": every fact.
        number: which of the task's questions.
        text: the user's message.
        answers: what a reply must name; every one of them counts the same.
    """

    task: str
    number: int
    text: str
    answers: tuple[str, ...]

    @property
    def max_tokens(self) -> int:
        """How long a reply may be: a list takes longer than a name."""
        return 96 if self.task == "all" else 26

    def score(self, reply: str) -> float:
        """The share of the answers that the reply names; of a count, whether its first number is
        the right one."""
        if self.task == "count":
            named = re.findall(rf"\b(?:\d+|{'|'.join(_NUMBERS)})\b", reply.lower())[:1]
            return float([_digits(n) for n in named] == list(self.answers))
        found = [re.search(rf"\b{re.escape(a)}\b", reply, re.IGNORECASE) for a in self.answers]
        return sum(map(bool, found)) / len(self.answers)


def _digits(number: str) -> str:
    return str(_NUMBERS.index(number)) if number in _NUMBERS else number


@dataclass(frozen=True)
class Fact:
    """What is said once, the question for it, and the answer."""

    statement: str
    question: str
    value: str


@dataclass(frozen=True)
class Conversation:
    """Messages up to a reply of the assistant, and the questions, each of which may come next."""

    kind: str
    messages: list[Message]
    questions: list[Question]


def make_facts(kind: str, n: int, rng: random.Random) -> list[Fact]:
    """``n`` facts about different things, no two of the same value."""
    if kind == "prose":
        told = [(key, rng.choice(facts.IN_PROSE)) for key in rng.sample(WORDS.split(), n)]
    else:
        told = rng.sample(things(), n)
    taken = {key for key, _ in told}
    made = []
    for key, wording in told:
        value = draw_value(wording.values, rng)
        while value in taken:
            value = draw_value(wording.values, rng)
        taken.add(value)
        made.append(
            Fact(
                wording.statement.format(key=key, value=value),
                wording.question.format(key=key),
                value,
            )
        )
    return made


def make_conversation(
    kind: str,
    n_facts: int,
    filler: int,
    prose: Prose,
    rng: random.Random,
) -> Conversation:
    """A conversation with ``n_facts`` facts and about ``filler`` tokens of prose.

    Args:
        kind: of KINDS.
        rng: the facts are drawn first, so they are those of ``make_facts``.
    """
    told = make_facts(kind, n_facts, rng)
    messages = (
        _hidden(told, filler, prose, rng) if kind == "prose" else _told(told, filler, prose, rng)
    )
    asked = rng.sample(told, n_facts)
    questions = [Question("fact", i, f.question, (f.value,)) for i, f in enumerate(asked)]
    questions.append(_word_count(messages, told, rng))
    questions.append(Question("all", 0, _ALL[kind], tuple(f.value for f in told)))
    return Conversation(kind, messages, questions)


def _hidden(told: Sequence[Fact], filler: int, prose: Prose, rng: random.Random) -> list[Message]:
    sentences = prose.sentences(filler, rng)
    for fact in told:
        sentences.insert(rng.randrange(len(sentences)), fact.statement)
    return [_user(" ".join(sentences)), _assistant(rng.choice(ACKNOWLEDGEMENTS))]


def _told(told: Sequence[Fact], filler: int, prose: Prose, rng: random.Random) -> list[Message]:
    turns = [(fact.statement, rng.choice(ACKNOWLEDGEMENTS)) for fact in told]
    n_talk = max(1, filler // _TALK)
    for _ in range(n_talk):
        talk = " ".join(prose.sentences(max(1, filler // n_talk - 20), rng))
        turns.insert(rng.randrange(len(turns) + 1), (rng.choice(SMALL_TALK), talk))
    return [message for said, reply in turns for message in (_user(said), _assistant(reply))]


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _word_count(messages: Sequence[Message], told: Sequence[Fact], rng: random.Random) -> Question:
    """About a word of the prose that occurs a few times, so that no one place tells how often."""
    text = " ".join(message["content"] for message in messages).lower()
    said = " ".join(fact.statement for fact in told).lower()
    counts = Counter(word for word in re.findall(r"\b[a-z]{5,}\b", text) if word not in said)
    # small models like to answer 3
    few = [word for word, n in counts.items() if 4 <= n <= 9]
    word = rng.choice(few or [counts.most_common(1)[0][0]])
    return Question("count", 0, _COUNT.format(word=word), (str(counts[word]),))
