"""The bundled novel, as filler.

It has about 16,000 words. Longer filler repeats it, which is good enough to hide a fact; texts
whose loss is measured (readings.py) never repeat.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

from kvp_edge.corpora import evaluation_prose

T = TypeVar("T")


@lru_cache
def sentences() -> tuple[str, ...]:
    """All of the novel's."""
    return tuple(re.split(r"(?<=[.!?]) +", " ".join(evaluation_prose().split())))


class Excerpt:
    """The novel from a random sentence on."""

    def __init__(self, rng: random.Random) -> None:
        self._start = rng.randrange(len(sentences()))

    def take(self, n_sentences: int) -> list[str]:
        """This many consecutive sentences."""
        novel = sentences()
        return [novel[(self._start + i) % len(novel)] for i in range(n_sentences)]


def spread(statements: Sequence[T], depths: Sequence[float], filler: Sequence[T]) -> list[T]:
    """The filler with each statement put in at its depth: 0 before the first piece, 1 after the
    last."""
    places = [round(depth * len(filler)) for depth in depths]
    pieces: list[T] = []
    for i in range(len(filler) + 1):
        pieces += [s for s, place in zip(statements, places, strict=True) if place == i]
        pieces += filler[i : i + 1]
    return pieces
