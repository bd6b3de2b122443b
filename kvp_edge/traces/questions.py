"""Questions for traces: facts hidden in prose or told in chat turns, asked for at the end.

The sentences are those of the demo (kvp_edge/traces/facts.py); the words are others, so that
the demo's questions remain new to a policy that was trained on these.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources

from kvp_edge.text.chat_prompt import Message
from kvp_edge.traces import facts

_TOLD = {
    "aunt goat pony cousin nephew niece tutor cook gardener tailor landlord captain": facts.CALLED,
    "dish game month smell toy cake shop river street chair stone dance poem plant": (
        facts.FAVOURITE
    ),
    "trunk cabinet vault drawer chest cellar workshop stable boat account desk tent": facts.CODE,
}

_REPLIES = ("Okay.", "Thank you.", "I will remember.", "Understood.")
_TALK = ("Read me something.", "What comes next?", "Please continue.", "And then?")

_WORDS = (
    "acorn apron barrel bell berry blade bone border brass bread brick brush button cabin camel "
    "canal candy canvas cave chalk chapel cherry cliff cloud coach coal comet coral crane crown "
    "dagger dragon drum eagle fence ferry field flame flute fountain glove grape harp hawk hazel "
    "hill ivory jewel kite lake lamp leaf lily maple mask mill moon nest oak oar olive orchid owl "
    "palace parrot pearl pine plum pond prism pyramid quill rope sail sand shell shield sugar "
    "sword temple tiger vase wheel willow wolf"
)
_NAMES = (
    "Albert Andrew Bella Bernard Cecil Charles Diana Edith Emma Ernest Esther Felix Fiona Gerald "
    "Grace Harold Hilda Irene Ivan Jane Joan Joseph Judith Karl Kate Lena Leonard Lilian Louis "
    "Mabel Mark Miriam Nancy Neil Nora Olive Oscar Owen Patrick Pauline Quentin Roland Ruth "
    "Samuel Sophia Stella Theodore Ursula Victor Vera Wilfred Winifred"
)


@dataclass(frozen=True)
class Task:
    """A conversation whose last message ends in ``question``, and the right reply."""

    messages: list[Message]
    question: str
    answer: str


def shipped_prose() -> str:
    """The bundled novel."""
    return (resources.files("kvp_edge") / "data" / "prose.txt").read_text(encoding="utf-8")


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

    def make(self, n_tokens: int) -> Task:
        """A conversation of about ``n_tokens`` tokens of prose beside its facts."""
        kind = self._rng.choice((1, 4, 0))
        return self._told(6, n_tokens) if kind == 0 else self._hidden(kind, n_tokens)

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

    def _value(self, pool: str) -> str:
        if pool == "numbers":
            return str(self._rng.randrange(100_000, 1_000_000))
        return self._rng.choice((_WORDS if pool == "words" else _NAMES).split())

    def _hidden(self, n_facts: int, n_tokens: int) -> Task:
        statement, question, pool = self._rng.choice(facts.IN_PROSE)
        keys = self._rng.sample(_WORDS.split(), n_facts)
        values = [self._value(pool) for _ in keys]
        sentences = self._prose(n_tokens)
        for key, value in zip(keys, values, strict=True):
            place = self._rng.randrange(len(sentences) + 1)
            sentences.insert(place, statement.format(key=key, value=value))
        question = question.format(key=keys[0])
        text = " ".join([*sentences, question])
        return Task([{"role": "user", "content": text}], question, values[0])

    def _told(self, n_facts: int, n_tokens: int) -> Task:
        things = [(key, told) for keys, told in _TOLD.items() for key in keys.split()]
        stated = [
            (key, told, self._value(told.values)) for key, told in self._rng.sample(things, n_facts)
        ]
        turns = [
            (told.statement.format(key=key, value=value), self._rng.choice(_REPLIES))
            for key, told, value in stated
        ]
        n_talk = max(1, n_tokens // 200)
        for _ in range(n_talk):
            talk = " ".join(self._prose(n_tokens // n_talk)) or "Nothing."
            turns.insert(self._rng.randrange(len(turns) + 1), (self._rng.choice(_TALK), talk))
        key, told, value = stated[0]
        question = told.question.format(key=key)
        messages = [
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        return Task([*messages, {"role": "user", "content": question}], question, value)
