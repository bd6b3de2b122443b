"""RULER's variable tracking (arXiv:2404.06654, section 3.2).

A variable is assigned a number, a second variable the first one, and so on. The assignments are
hidden in this order in repeated noise, and the question asks for all variables that have the
number. RULER shows a solved example first; here the question alone says what to do, and the tokens
go to the text instead.
"""

from __future__ import annotations

import random
import string
from itertools import pairwise

from kvp_edge.evaluation.item import Item
from kvp_edge.evaluation.tasks.filling import Draft, DrawnTask, conversation
from kvp_edge.evaluation.tasks.needles import NOISE
from kvp_edge.evaluation.tasks.novel import spread

HOPS = 4

_OPENING = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{text}"
)
_QUESTION = "Question: Find all variables that are assigned the value {value} in the text above."


def draw(rng: random.Random, n_tokens: int) -> Draft[Item]:
    """See ``DrawnTask.draw``."""
    names: list[str] = []
    while len(names) < HOPS + 1:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        names += [name] if name not in names else []
    value = str(rng.randrange(10_000, 100_000))
    statements = [f"VAR {names[0]} = {value}."]
    statements += [f"VAR {new} = VAR {old}." for old, new in pairwise(names)]
    depths = sorted(rng.random() for _ in statements)
    question = _QUESTION.format(value=value)

    def lay_out(n_pieces: int) -> Item:
        noise = [NOISE[i % len(NOISE)] for i in range(n_pieces)]
        text = " ".join(spread(statements, depths, noise))
        return Item(conversation(_OPENING.format(text=text), question), question, tuple(names))

    return Draft(lay_out)


VARIABLE_TRACKING = DrawnTask(
    "vt",
    "all variables of a chain of 5 assignments hidden in noise; RULER's, without a solved example",
    128,
    draw,
)
