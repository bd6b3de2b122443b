"""Questions for traces: facts told in prose, in listings or in chat turns, asked for at the end.

Frames (frames.py), words (vocabulary.py) and prose are training's own: the evaluation and the demo
have others, so what a policy learns of them here cannot help it there.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvp_edge.text.chat_prompt import Message
from kvp_edge.traces import frames, vocabulary
from kvp_edge.traces.frames import FRAMES, LISTINGS, Frame, Listing

#: Facts in a text: the one asked for, and others of the same frame or of any frame.
_FACTS = (1, 4, 6)

#: Lines of a listing; and no more than one for so many tokens.
_LINES = (4, 20)
_TOKENS_PER_LINE = 24

#: Tokens of prose in a turn between facts.
_TALK = 200


def fingerprint() -> str:
    """Of frames and words: other ones make other tasks of the same seed."""
    made = repr((FRAMES, LISTINGS, frames.ASIDES, frames.TELLINGS, frames.HANDINGS, frames.REPLIES,
                 frames.REQUESTS, frames.PAIRS_OF_QUESTIONS, vocabulary.WORDS))  # fmt: skip
    return hashlib.sha256(made.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Task:
    """A conversation whose last message ends in ``question``, and the right reply."""

    messages: list[Message]
    question: str
    answer: str


@dataclass(frozen=True)
class Fact:
    """What is told, piece by piece (one or more sentences' worth each), and what can be asked.

    Attributes:
        pieces: clauses, or whole listings if ``listed``.
        asked: questions and their answers.
        listed: the only piece is a listing.
    """

    pieces: tuple[str, ...]
    asked: tuple[tuple[str, str], ...]
    listed: bool = False


class TaskMaker:
    """Draws tasks from a seed.

    Args:
        prose: what lies between the facts.
        count_tokens: how many tokens the model makes of a text.
        seed: same seed, same tasks (for the same tokenizer).
    """

    def __init__(self, prose: str, count_tokens: Callable[[str], int], seed: int) -> None:
        self._sentences = re.split(r"(?<=[.!?]) +", " ".join(prose.split()))
        self._count = count_tokens
        self._sizes: dict[int, int] = {}
        self._rng = random.Random(seed)
        self._taken: set[str] = set()

    def make(self, n_tokens: int) -> Task:
        """A conversation of about ``n_tokens`` tokens of prose beside its facts."""
        self._taken = set()
        facts = self._facts(n_tokens)
        question, answer = self._question(facts)
        self._rng.shuffle(facts)
        tell = self._rng.choice((self._in_prose, self._in_prose, self._in_turns))
        *before, last = tell(facts, n_tokens)
        if last["role"] == "assistant" and self._rng.random() < 0.6:
            before, last = self._asked_before(facts, question, [*before, last])
        if last["role"] == "user":
            joint = "\n\n" if facts[0].listed else self._rng.choice((" ", "\n\n"))
            messages = [*before, {"role": "user", "content": last["content"] + joint + question}]
        else:
            messages = [*before, last, {"role": "user", "content": question}]
        return Task(messages, question, answer)

    def _asked_before(
        self, facts: Sequence[Fact], last: str, messages: list[Message]
    ) -> tuple[list[Message], Message]:
        """Other questions first, each with its answer: the messages, and the last of them."""
        asked = [pair for fact in facts for pair in fact.asked if pair[0] not in last]
        for question, answer in self._rng.sample(asked, min(len(asked), self._rng.randint(1, 4))):
            messages = [*messages, _user(question), _assistant(answer)]
        return messages[:-1], messages[-1]

    # -- facts

    def _facts(self, n_tokens: int) -> list[Fact]:
        """The first is asked for."""
        if self._rng.random() < 0.2:
            return [self._listing(self._rng.choice(LISTINGS), n_tokens)]
        n_facts = self._rng.choice(_FACTS)
        first = self._rng.choice(FRAMES)
        if self._rng.random() < 0.5:
            chosen = [first] * n_facts
        else:
            others = [frame for frame in FRAMES if frame is not first]
            chosen = [first, *self._rng.sample(others, n_facts - 1)]
        return [self._fact(frame) for frame in chosen]

    def _fact(self, frame: Frame) -> Fact:
        filled = {slot: self._new(kind) for slot, kind in frame.slots.items()}
        pieces = tuple(self._rng.choice(part).format(**filled) for part in frame.parts)
        return Fact(pieces, self._asked(frame.questions, filled))

    def _listing(self, listing: Listing, n_tokens: int) -> Fact:
        fewest, most = _LINES
        room = max(fewest, min(most, n_tokens // _TOKENS_PER_LINE))
        kinds = (listing.key, listing.value)
        free = min(len(vocabulary.WORDS.get(kind, range(most))) for kind in kinds)
        n_lines = self._rng.randint(fewest, min(room, free))
        rows = [{kind: self._new(kind) for kind in kinds} for _ in range(n_lines)]
        line = self._rng.choice(listing.lines)
        text = "\n".join([self._rng.choice(listing.headings), *(line.format(**r) for r in rows)])
        return Fact((text,), self._asked(listing.questions, self._rng.choice(rows)), listed=True)

    def _asked(
        self, questions: dict[str, tuple[str, ...]], filled: dict[str, str]
    ) -> tuple[tuple[str, str], ...]:
        """A question for every slot that can be asked for, with its answer."""
        return tuple(
            (self._rng.choice(ways).format(**filled), filled[slot])
            for slot, ways in questions.items()
        )

    def _new(self, kind: str) -> str:
        """A word or value that this task does not have yet."""
        while (drawn := vocabulary.draw(kind, self._rng)) in self._taken:
            pass
        self._taken.add(drawn)
        return drawn

    def _question(self, facts: Sequence[Fact]) -> tuple[str, str]:
        """About the first fact, or about two facts at once."""
        first, answer = self._rng.choice(facts[0].asked)
        if len(facts) == 1 or self._rng.random() < 0.8:
            return first, answer
        second, other = self._rng.choice(facts[1].asked)
        both = self._rng.choice(frames.PAIRS_OF_QUESTIONS).format(first=first, second=second)
        return both, f"{answer} and {other}"

    # -- telling them

    def _in_prose(self, facts: Sequence[Fact], n_tokens: int) -> list[Message]:
        """In one message of prose. The question follows in the same message, or in the next."""
        text = self._prose(n_tokens)
        for fact in facts:
            for piece in fact.pieces:
                told = f"\n\n{piece}\n\n" if fact.listed else self._sentence(piece)
                text.insert(self._rng.randrange(len(text) + 1), told)
        read = re.sub(r" *\n\n *", "\n\n", " ".join(text)).strip()
        if self._rng.random() < 0.5:
            return [_user(read)]
        handed = f"{self._rng.choice(frames.HANDINGS)}\n\n{read}"
        return [_user(handed), _assistant(self._rng.choice(frames.REPLIES))]

    def _in_turns(self, facts: Sequence[Fact], n_tokens: int) -> list[Message]:
        """In turns of their own, with turns of prose between them."""
        turns: list[tuple[str, str]] = []
        for fact in facts:
            for piece in fact.pieces:
                if fact.listed:
                    said = f"{self._rng.choice(frames.HANDINGS)}\n{piece}"
                else:
                    said = _capital(self._rng.choice(frames.TELLINGS).format(fact=piece))
                turns.append((said, self._rng.choice(frames.REPLIES)))
        n_talk = max(1, n_tokens // _TALK)
        for _ in range(n_talk):
            talk = " ".join(self._prose(n_tokens // n_talk)) or "There is nothing left of it."
            place = self._rng.randrange(len(turns) + 1)
            turns.insert(place, (self._rng.choice(frames.REQUESTS), talk))
        return [message for said, reply in turns for message in (_user(said), _assistant(reply))]

    def _sentence(self, clause: str) -> str:
        """The clause as a sentence, or in the middle of one."""
        if self._rng.random() < 0.4:
            return self._rng.choice(frames.ASIDES).format(fact=clause)
        return _capital(f"{clause}.")

    def _prose(self, n_tokens: int) -> list[str]:
        """Consecutive sentences of at most ``n_tokens`` tokens, from a random place on."""
        at = self._rng.randrange(len(self._sentences))
        taken: list[str] = []
        while len(taken) < len(self._sentences):
            if at not in self._sizes:
                self._sizes[at] = self._count(" " + self._sentences[at])
            n_tokens -= self._sizes[at]
            if n_tokens < 0:
                break
            taken.append(self._sentences[at])
            at = (at + 1) % len(self._sentences)
        return taken


def _capital(sentence: str) -> str:
    """With a capital letter, unless it begins with an identifier."""
    plain = sentence.split(maxsplit=1)[0].isalpha()
    return sentence[0].upper() + sentence[1:] if plain else sentence


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}
