"""Facts that the user tells, and asks for at the end: in a text, or in earlier turns of the chat.

The sentences are those of the demo (kvp_edge/evaluation/facts.py).
"""

from __future__ import annotations

import random
from functools import partial

from kvp_edge.evaluation import facts
from kvp_edge.evaluation.item import Item
from kvp_edge.evaluation.tasks import words
from kvp_edge.evaluation.tasks.filling import Draft, DrawnTask
from kvp_edge.evaluation.tasks.novel import Excerpt, spread
from kvp_edge.text.chat_prompt import Message

#: What facts are told about in a chat.
_TOLD = {
    "dog cat horse rabbit brother sister uncle boss friend neighbour doctor teacher": facts.CALLED,
    "colour food book song sport drink season animal city flower fruit tree bird tool": (
        facts.FAVOURITE
    ),
    "safe locker bike phone garage alarm suitcase office door gate shed": facts.CODE,
}

_NAMES = (
    "Adam Agnes Alice Anthony Arthur Barbara Bertha Caroline Clara Daniel David Dorothy Edward "
    "Eleanor Ellen Emily Frances Frank George Harriet Helen Henry Hugh Isabel Jacob Julia Laura "
    "Lewis Lucy Margaret Martha Matthew Oliver Peter Philip Rachel Ralph Richard Rose Sarah Simon "
    "Stephen Susan Thomas Walter"
)

_ACKNOWLEDGEMENTS = ("Okay.", "Good to know.", "I see.", "Noted.")
_REQUESTS = ("Tell me something.", "Go on.", "What do you think?", "Read this.")

#: How many sentences of the novel the assistant tells in a turn.
_SENTENCES_PER_TURN = 6


def draw_in_prose(rng: random.Random, n_tokens: int, n_facts: int) -> Draft[Item]:
    """Facts of one form in a message of prose, one asked for. (See ``DrawnTask.draw``.)"""
    fact = rng.choice(facts.IN_PROSE)
    values = _values(fact.values, n_facts, rng)
    keys = rng.sample([word for word in words.WORDS if word not in values], n_facts)
    told = [fact.statement.format(key=k, value=v) for k, v in zip(keys, values, strict=True)]
    depths = [rng.random() for _ in told]
    question = fact.question.format(key=keys[0])
    excerpt = Excerpt(rng)

    def lay_out(n_pieces: int) -> Item:
        text = " ".join([*spread(told, depths, excerpt.take(n_pieces)), question])
        return Item([{"role": "user", "content": text}], question, (values[0],))

    return Draft(lay_out)


def draw_told(rng: random.Random, n_tokens: int, n_facts: int) -> Draft[Item]:
    """Facts told in turns of their own, with turns of prose between them, one asked for. (See
    ``DrawnTask.draw``.)"""
    things = [(key, fact) for keys, fact in _TOLD.items() for key in keys.split()]
    chosen = rng.sample(things, n_facts)
    values = {kind: _values(kind, n_facts, rng) for kind in ("numbers", "words", "names")}
    stated = [(fact, key, values[fact.values].pop()) for key, fact in chosen]
    told = [
        (fact.statement.format(key=key, value=value), rng.choice(_ACKNOWLEDGEMENTS))
        for fact, key, value in stated
    ]
    depths = [rng.random() for _ in told]
    asked, key, value = stated[0]
    question = asked.question.format(key=key)
    requests = rng.sample(_REQUESTS, len(_REQUESTS))
    excerpt = Excerpt(rng)

    def lay_out(n_pieces: int) -> Item:
        prose = excerpt.take(n_pieces)
        talk = [
            (requests[turn % len(requests)], " ".join(prose[at : at + _SENTENCES_PER_TURN]))
            for turn, at in enumerate(range(0, n_pieces, _SENTENCES_PER_TURN))
        ]
        messages: list[Message] = [
            {"role": role, "content": text}
            for turn in spread(told, depths, talk)
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        return Item([*messages, {"role": "user", "content": question}], question, (value,))

    return Draft(lay_out)


def _values(kind: str, count: int, rng: random.Random) -> list[str]:
    """Different values of a kind."""
    if kind == "numbers":
        return [str(number) for number in rng.sample(range(100_000, 1_000_000), count)]
    return rng.sample(words.WORDS if kind == "words" else _NAMES.split(), count)


RECALL = [
    DrawnTask(
        "fact",
        "a fact in a message of prose; as in the demo",
        32,
        partial(draw_in_prose, n_facts=1),
    ),
    DrawnTask(
        "facts",
        "4 facts in a message of prose, one asked for; as in the demo",
        32,
        partial(draw_in_prose, n_facts=4),
    ),
    DrawnTask(
        "recall",
        "6 facts told in earlier turns, with turns of prose between, one asked for; as in the demo",
        32,
        partial(draw_told, n_facts=6),
    ),
]
