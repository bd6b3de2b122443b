"""A quiz: facts are told, then asked for one after the other, each after the model's own reply.

Questions and replies grow with the facts, to about half of the conversation. While the model
replies, it must not lose the facts that will be asked for later.
"""

from __future__ import annotations

import random

from kvp_edge.evaluation.item import Item, Question
from kvp_edge.evaluation.tasks import words
from kvp_edge.evaluation.tasks.filling import Draft, DrawnTask
from kvp_edge.evaluation.tasks.novel import Excerpt, spread

_FACT = "The door code that belongs to {key} is {value}."
_QUESTION = "Please look up the door code of {key}."

#: A sentence of prose is about as long as two or three questions with their replies.
_FACTS_PER_SENTENCE = 3


def draw(rng: random.Random, n_tokens: int) -> Draft[Item]:
    """See ``DrawnTask.draw``. A piece is a fact and its question, and some prose."""
    # As many keys as possible are single words; longer quizzes go on with pairs of words.
    keys = [*rng.sample(words.WORDS, len(words.WORDS)), *words.draw("words", words.MOST, rng)]
    values = [str(number) for number in rng.sample(range(100_000, 1_000_000), len(keys))]
    turn = [rng.random() for _ in keys]  # when a fact is asked for
    excerpt = Excerpt(rng)

    def lay_out(n_pieces: int) -> Item:
        count = n_pieces + 1
        facts = [_FACT.format(key=keys[i], value=values[i]) for i in range(count)]
        prose = excerpt.take(count // _FACTS_PER_SENTENCE)
        text = " ".join(spread(facts, [i / count for i in range(count)], prose))
        first, *more = [
            Question(_QUESTION.format(key=keys[i]), (values[i],))
            for i in sorted(range(count), key=turn.__getitem__)
        ]
        messages = [{"role": "user", "content": f"{text} {first.text}"}]
        return Item(messages, first.text, first.answers, more=tuple(more))

    return Draft(lay_out, most=len(keys) - 1)


QUIZ = DrawnTask(
    "quiz",
    "facts in a message of prose, all asked for, one after the other: half of the conversation is "
    "questions and replies",
    32,
    draw,
)
