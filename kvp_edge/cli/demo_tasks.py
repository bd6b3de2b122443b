"""The demo's questions: facts hidden in a novel's prose or told in earlier chat turns.

Everything is drawn from a seed. The sentences are in kvp_edge/evaluation/facts.py.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from kvp_edge.corpora import evaluation_prose
from kvp_edge.evaluation import facts

Message = dict[str, str]


#: Facts told in chat turns are about these.
PERSONAL = {
    "dog cat horse parrot rabbit brother sister uncle boss friend neighbour doctor teacher": (
        facts.CALLED
    ),
    "colour food book song sport drink season animal city flower fruit tree bird tool": (
        facts.FAVOURITE
    ),
    "safe locker bike phone garage alarm suitcase office door gate shed": facts.CODE,
}

ACKNOWLEDGEMENTS = ("Okay.", "Good to know.", "I see.", "Noted.")
SMALL_TALK = ("Tell me something.", "Go on.", "What do you think?", "Read this.")

#: Where values and the keys of facts in prose are drawn from.
WORDS = (
    "anchor autumn basket beacon blanket bottle bridge bucket butter candle carpet castle "
    "cellar copper corner cotton curtain desert engine feather forest garden hammer harbour "
    "honey island jacket kettle ladder lantern lemon marble meadow mirror mountain needle "
    "orange orchard paper pepper pillow planet pocket powder ribbon river saddle shadow silver "
    "spider summer table thunder timber tobacco tower tunnel velvet village violet wagon window "
    "winter "
)
NAMES = (
    "Adam Agnes Alice Anthony Arthur Barbara Basil Bertha Caroline Charlotte Clara Daniel David "
    "Dorothy Edmund Edward Eleanor Elizabeth Ellen Emily Frances Frank George Harriet Helen "
    "Henry Hugh Isabel Jacob James Julia Laura Lewis Lucy Margaret Maria Martha Matthew Oliver "
    "Paul Peter Philip Rachel Ralph Richard Robert Rose Sarah Simon Stephen Susan Thomas Walter "
    "William "
)


@dataclass(frozen=True)
class Item:
    """One question. ``messages`` is the whole conversation, the question last."""

    kind: str
    messages: list[Message]
    answer: str

    def is_right(self, reply: str) -> bool:
        """Whether the reply names the answer, as a word of its own."""
        return re.search(rf"\b{re.escape(self.answer)}\b", reply, re.IGNORECASE) is not None


class Prose:
    """The shipped novel as a source of filler, measured in tokens of the model at hand."""

    def __init__(self, count_tokens: Callable[[str], int]) -> None:
        self._sentences = re.split(r"(?<=[.!?]) +", " ".join(evaluation_prose().split()))
        self._sizes = [count_tokens(" " + s) for s in self._sentences]

    def sentences(self, n_tokens: int, rng: random.Random) -> list[str]:
        """Consecutive sentences of at least ``n_tokens`` tokens, from a random place on."""
        at = rng.randrange(len(self._sentences))
        taken: list[str] = []
        while n_tokens > 0:
            taken.append(self._sentences[at])
            n_tokens -= self._sizes[at]
            at = (at + 1) % len(self._sentences)
        return taken


def draw_value(pool: str, rng: random.Random) -> str:
    """A value of the kind that a Wording names."""
    if pool == "numbers":
        return str(rng.randrange(100_000, 1_000_000))
    return rng.choice((WORDS if pool == "words" else NAMES).split())


def things() -> list[tuple[str, facts.Wording]]:
    """What facts in chat turns can be about, with the sentences for it."""
    return [(key, fact) for keys, fact in PERSONAL.items() for key in keys.split()]


def hidden_in_prose(n_facts: int, n_tokens: int, prose: Prose, rng: random.Random) -> Item:
    """``n_facts`` facts spread over one message of prose, the question about one of them."""
    fact = rng.choice(facts.IN_PROSE)
    keys = rng.sample(WORDS.split(), n_facts)
    values = [draw_value(fact.values, rng) for _ in keys]
    sentences = prose.sentences(n_tokens, rng)
    for key, value in zip(keys, values, strict=True):
        place = rng.randrange(len(sentences))
        sentences.insert(place, fact.statement.format(key=key, value=value))
    text = " ".join([*sentences, fact.question.format(key=keys[0])])
    kind = "1 fact in prose" if n_facts == 1 else f"{n_facts} facts in prose"
    return Item(kind, [{"role": "user", "content": text}], values[0])


def told_in_chat(n_facts: int, n_tokens: int, prose: Prose, rng: random.Random) -> Item:
    """``n_facts`` facts told in turns of their own, prose between them, the question at the end."""
    told = [
        (key, fact, draw_value(fact.values, rng)) for key, fact in rng.sample(things(), n_facts)
    ]
    turns = [
        [fact.statement.format(key=key, value=value), rng.choice(ACKNOWLEDGEMENTS)]
        for key, fact, value in told
    ]
    n_talk = max(1, n_tokens // 200)
    for _ in range(n_talk):
        talk = " ".join(prose.sentences(n_tokens // n_talk - 20, rng))
        turns.insert(rng.randrange(len(turns) + 1), [rng.choice(SMALL_TALK), talk])
    key, fact, value = told[0]
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    messages.append({"role": "user", "content": fact.question.format(key=key)})
    return Item(f"{n_facts} facts told in chat", messages, value)


def make_items(
    n_items: int, n_tokens: int, count_tokens: Callable[[str], int], seed: int
) -> list[Item]:
    """Questions of three kinds in turn, each conversation about ``n_tokens`` long.

    Args:
        n_items: how many.
        n_tokens: length of a conversation, in tokens.
        count_tokens: how many tokens the model makes of a text.
        seed: same seed, same questions (for the same tokenizer).
    """
    rng = random.Random(seed)
    prose = Prose(count_tokens)
    makers = ((hidden_in_prose, 1), (hidden_in_prose, 4), (told_in_chat, 6))
    items = []
    for i in range(n_items):
        make, n_facts = makers[i % len(makers)]
        items.append(make(n_facts, n_tokens, prose, rng))
    return items
