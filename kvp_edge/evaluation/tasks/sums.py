"""Running sums: numbers told in a text are added up one after the other, in writing.

Each step needs the model's own last total and the next number. This is for larger models: the
bundled one cannot add.
"""

from __future__ import annotations

import random
from itertools import accumulate

from kvp_edge.evaluation.item import Item
from kvp_edge.evaluation.tasks.filling import Draft, DrawnTask, conversation
from kvp_edge.evaluation.tasks.novel import Excerpt, spread

_OPENING = (
    "Some numbers of coins are told in the following text. Make sure to memorize them.\n{text}"
)
_STATEMENT = "Box number {i} holds {n} coins."
_QUESTION = (
    "Please add up the coins of all boxes, box by box in the order of their numbers, and write "
    "down the running total after each box."
)

#: There is a box per this many tokens, but at most _MOST.
_TOKENS_PER_BOX = 32
_FEWEST, _MOST = 4, 32


def draw(rng: random.Random, n_tokens: int) -> Draft[Item]:
    """See ``DrawnTask.draw``."""
    count = min(max(n_tokens // _TOKENS_PER_BOX, _FEWEST), _MOST)
    coins = [rng.randint(2, 19) for _ in range(count)]
    boxes = [_STATEMENT.format(i=i, n=n) for i, n in enumerate(coins, 1)]
    depths = [rng.random() for _ in boxes]
    totals = tuple(str(total) for total in accumulate(coins))
    excerpt = Excerpt(rng)

    def lay_out(n_pieces: int) -> Item:
        text = " ".join(spread(boxes, depths, excerpt.take(n_pieces)))
        return Item(conversation(_OPENING.format(text=text), _QUESTION), _QUESTION, totals, "order")

    return Draft(lay_out)


SUMS = DrawnTask(
    "sums",
    "up to 32 numbers in prose, added up with the running total after each; the share of totals in "
    "their order",
    768,
    draw,
)
