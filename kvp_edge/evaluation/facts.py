"""Sentences for facts and questions, shared by the evaluation and the demo.

They are few, and of the kind that the bundled model was trained on, because it understands no
others. Traces have sentences of their own (kvp_edge/traces/frames.py).
"""

from __future__ import annotations

from typing import NamedTuple


class Wording(NamedTuple):
    """A sentence that states a value, and the question that asks for it. ``values`` says what kind
    of value: "numbers", "words" or "names"."""

    statement: str
    question: str
    values: str


#: Hidden in prose; ``{key}`` distinguishes them.
IN_PROSE = (
    Wording(
        "One of the special magic numbers for {key} is {value}.",
        "What is the special magic number for {key} mentioned in the text?",
        "numbers",
    ),
    Wording(
        "One of the special magic words for {key} is {value}.",
        "What is the special magic word for {key} mentioned in the text?",
        "words",
    ),
)

# Told in a turn of a chat; ``{key}`` is a thing or person of the user's.
CALLED = Wording("My {key} is called {value}.", "What is my {key} called?", "names")
FAVOURITE = Wording("My favourite {key} is {value}.", "What is my favourite {key}?", "words")
CODE = Wording("The code of my {key} is {value}.", "What is the code of my {key}?", "numbers")
