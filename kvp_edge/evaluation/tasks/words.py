"""Words, numbers and identifiers for keys and values.

None of the words is one that policies are trained on (kvp_edge/traces/vocabulary.py).
"""

from __future__ import annotations

import random
import uuid
from typing import Literal

Kind = Literal["words", "numbers", "uuids"]

_ADJECTIVES = (
    "ancient angry autumn bitter blue bold brave bright brisk broad broken calm careful "
    "cheerful clever cloudy cold common cool crimson curious dark deep distant dusty eager "
    "early easy empty fair faint famous fancy fierce firm flat foreign fresh gentle giant glad "
    "golden grand green grey happy harsh heavy hidden hollow honest humble idle jolly keen kind "
    "lazy light little lively lonely loud lucky mellow merry mighty modern narrow noble patient "
    "plain polite proud quick quiet rapid rare "
)

_NOUNS = (
    "apple arrow badger balcony banana barber basin bather beaver bishop blossom boulder "
    "bracelet branch breeze bubble buffalo cabbage cactus carrot cathedral chimney circus "
    "clover cobbler compass cottage cricket crystal curtain daisy dolphin donkey doorway "
    "elephant envelope falcon farmer fiddle finger forest fortress galaxy garlic giraffe "
    "glacier goblet granite guitar hammock hamster hedgehog helmet horizon hunter iceberg igloo "
    "insect ivy jaguar jungle kettle kingdom kitten ladder lagoon leopard lizard lobster magnet "
    "mammoth mansion market mason monkey mosaic mustard napkin needle notebook octopus "
    "onion orchestra otter oyster pancake panther parade pebble pelican pencil penguin pigeon "
    "pilot pirate pistol potato puzzle python rabbit raven receipt rocket salmon sandal "
    "sculptor shepherd shovel signal spinach squirrel statue submarine sunset teapot thistle "
    "tomato trumpet turtle umbrella vampire walnut weasel whistle wizard "
)

#: Single words.
WORDS = tuple((_ADJECTIVES + _NOUNS).split())

#: How many keys or values of one kind there are at most in an item.
MOST = 9_000


def draw(kind: Kind, count: int, rng: random.Random) -> list[str]:
    """Different keys or values: adjective-noun pairs, numbers of 7 digits, or random UUIDs, at most
    `MOST`."""
    if kind == "numbers":
        return [str(number) for number in rng.sample(range(1_000_000, 10_000_000), count)]
    if kind == "uuids":
        return [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(count)]
    adjectives, nouns = _ADJECTIVES.split(), _NOUNS.split()
    chosen = rng.sample(range(len(adjectives) * len(nouns)), count)
    return [f"{adjectives[pair // len(nouns)]}-{nouns[pair % len(nouns)]}" for pair in chosen]
