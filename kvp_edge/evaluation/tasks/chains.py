"""Chains of variables: each is assigned the one before it, and the model writes down its way to the
number.

RULER's variable tracking (variable_tracking.py) asks for the names of one chain. Here every
variable of several chains is asked for, one by one, and a reply follows the chain: each step looks
up what the model itself has just written.
"""

from __future__ import annotations

import random
from itertools import product

from kvp_edge.evaluation.item import Item, Question
from kvp_edge.evaluation.tasks.filling import Draft, DrawnTask
from kvp_edge.evaluation.tasks.novel import Excerpt, spread

#: A number, the variable that has it, and two that have it from others.
VARIABLES = 3

#: Names are a letter and a number; the bundled model was trained on these.
_LETTERS = "ABCDKMNPSTXYZ"

_OPENING = "Find every value step by step, from one variable to the next."
_STATEMENT = "Let {new} = {old}."
_QUESTION = "Please find the value of {name}."

_STATEMENTS_PER_SENTENCE = 3


def draw(rng: random.Random, n_tokens: int) -> Draft[Item]:
    """See ``DrawnTask.draw``. A piece is a chain and its questions, and some prose."""
    every = [f"{a}{b}" for a, b in product(_LETTERS, range(100, 1000))]
    names = rng.sample(every, len(every) // VARIABLES * VARIABLES)
    chains = [names[i : i + VARIABLES] for i in range(0, len(names), VARIABLES)]
    values = [str(number) for number in rng.sample(range(100_000, 1_000_000), len(chains))]
    order = rng.getrandbits(64)
    excerpt = Excerpt(rng)

    def lay_out(n_pieces: int) -> Item:
        told = list(zip(chains[: n_pieces + 1], values, strict=False))
        count = len(told) * VARIABLES
        shuffled = random.Random(order)
        # any order in which each chain's own assignments come one after the other
        owners = [chain for chain, _ in told for _ in chain]
        shuffled.shuffle(owners)
        coming = {
            chain[0]: iter(zip(chain, [value, *chain], strict=False)) for chain, value in told
        }
        steps = [next(coming[chain[0]]) for chain in owners]
        statements = [_STATEMENT.format(new=new, old=old) for new, old in steps]
        prose = excerpt.take(count // _STATEMENTS_PER_SENTENCE)
        text = " ".join(spread(statements, [i / count for i in range(count)], prose))
        asked = [
            Question(_QUESTION.format(name=name), (*reversed(chain[:i]), value))
            for chain, value in told
            for i, name in enumerate(chain)
        ]
        shuffled.shuffle(asked)
        first, *more = asked
        messages = [{"role": "user", "content": f"{_OPENING} {text} {first.text}"}]
        return Item(messages, first.text, first.answers, more=tuple(more))

    return Draft(lay_out, most=len(chains) - 1)


CHAINS = DrawnTask(
    "chains",
    "variables assigned from each other in prose; the value of each, step by step",
    64,
    draw,
)
