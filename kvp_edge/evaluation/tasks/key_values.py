"""The key-value retrieval of "Lost in the Middle" (Liu et al., arXiv:2307.03172, section 3).

Keys and values are the published ones; `lookup` (lookup.py) draws others, at any length.

A file has 500 JSON objects of 75 or of 140 pairs of UUIDs. In a conversation that is too short for
all pairs of an object, some of the others are left out; the pairs that stay keep their order.
"""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from kvp_edge.evaluation.item import Item
from kvp_edge.evaluation.tasks.data_files import reading
from kvp_edge.evaluation.tasks.filling import Draft, DrawnTask
from kvp_edge.evaluation.tasks.lookup import UUID_TOKENS, Pair, asked_for


@dataclass(frozen=True)
class _Object:
    """All pairs of an object, and the one that is asked for."""

    pairs: tuple[Pair, ...]
    asked: Pair


@lru_cache(maxsize=2)
def _read(path: Path) -> tuple[_Object, ...]:
    found: list[_Object] = []
    with reading(path, "key-value retrieval"), gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            entry = json.loads(line)
            pairs = tuple((str(key), str(value)) for key, value in entry["ordered_kv_records"])
            asked = (entry["key"], entry["value"])
            if asked not in pairs:
                raise ValueError(f"the pair asked for is not among those of object {len(found)}")
            found.append(_Object(pairs, asked))
        if not found:
            raise ValueError("it is empty")
    return tuple(found)


def pairs_task(n_pairs: int, path: Path) -> DrawnTask:
    """The task of one file, whose objects have ``n_pairs``."""

    def draw(rng: random.Random, n_tokens: int) -> Draft[Item]:
        """See ``DrawnTask.draw``."""
        chosen = rng.choice(_read(path))
        others = [pair for pair in chosen.pairs if pair != chosen.asked]
        rng.shuffle(others)

        def lay_out(n_pieces: int) -> Item:
            kept = {chosen.asked, *others[:n_pieces]}
            return asked_for(chosen.asked, [pair for pair in chosen.pairs if pair in kept])

        return Draft(lay_out, most=len(others))

    return DrawnTask(
        f"kv_{n_pairs}",
        f"a UUID's UUID in a JSON object of {n_pairs} pairs, or as many of them as fit; 'Lost in "
        "the Middle', with its own data",
        UUID_TOKENS,
        draw,
    )
