"""Small episodes in the prose of a novel, asked for as a reader would ask.

The sentences fit the bundled novel: pedlars, coves, wagers, debts at the inn. They are neither
RULER's nor those of traces (kvp_edge/traces/frames.py) or of the bundled model's training, and have
names, things and places of their own. So they show what a policy is worth on questions of a form
that nothing was tuned to. An answer is a name, a thing, a place or a number.
"""

from __future__ import annotations

import random
import re
from functools import partial
from typing import NamedTuple

from kvp_edge.evaluation.item import Item
from kvp_edge.evaluation.tasks.filling import Draft, DrawnTask
from kvp_edge.evaluation.tasks.novel import Excerpt, spread


class Episode(NamedTuple):
    """A sentence that tells something, and questions about it, each with the slot of its answer.
    A digit tells slots of one kind apart."""

    told: str
    asked: tuple[tuple[str, str], ...]


WORDINGS = (
    Episode(
        "That same week a pedlar by the name of {name} sold the landlord's wife her first {thing}.",
        (
            ("What did the pedlar {name} sell at the inn?", "thing"),
            ("A pedlar once brought a {thing} into the house; who was he?", "name"),
        ),
    ),
    Episode(
        "Old {name} wagered {count} guineas with the curate that no boat would come round to "
        "{place} before the thaw, and lost.",
        (
            ("How many guineas did old {name} lose to the curate?", "count"),
            ("Of what harbour did {name} believe that no boat would reach it?", "place"),
        ),
    ),
    Episode(
        "Nobody but the blacksmith knew that {name} had buried a {thing} under the gallows at "
        "{place}.",
        (
            ("What lay buried under the gallows at {place}?", "thing"),
            ("Near what village had {name} dug a hole at night?", "place"),
            ("Who put the {thing} into the ground?", "name"),
        ),
    ),
    Episode(
        "The hermit of {place} kept {count} goats and spoke to no one except {name}, who brought "
        "him salt.",
        (
            ("How large was the hermit's herd of goats?", "count"),
            ("With whom alone would the hermit of {place} converse?", "name"),
        ),
    ),
    Episode(
        "In the great storm {name} the ferryman swam ashore at {place} with nothing saved but a "
        "{thing}.",
        (
            ("What did {name} the ferryman save from the storm?", "thing"),
            ("Upon which shore did {name} swim to safety?", "place"),
        ),
    ),
    Episode(
        "It was whispered in the kitchen that {name} had refused the hand of {name2}, all for the "
        "sake of a borrowed {thing}.",
        (
            ("Whose proposal had {name} turned down?", "name2"),
            ("Over what borrowed article did the match with {name2} come to nothing?", "thing"),
        ),
    ),
    Episode(
        "When the {trade} fell ill, his apprentice {name} walked the {count} miles to {place} for "
        "a surgeon.",
        (
            ("How many miles did {name} go on foot to find a surgeon?", "count"),
            ("Where did a surgeon live who would come to the {trade}?", "place"),
            ("Whose master was it that {name} walked so far for?", "trade"),
        ),
    ),
    Episode(
        "The parish clerk paid {name} {count} shillings to carve a {thing} into the church door.",
        (
            ("What figure did {name} carve for the church?", "thing"),
            ("What was {name} paid in shillings for the carving?", "count"),
        ),
    ),
    Episode(
        "Before he turned {trade}, {name} had been cabin boy on a brig out of {place}.",
        (
            ("To what trade did {name} turn after the sea?", "trade"),
            ("Out of which port had the brig of {name} sailed?", "place"),
        ),
    ),
    Episode(
        "The widow {name} hid {count} silver spoons in the well the night the dragoons rode "
        "through {place}.",
        (
            ("How many spoons went down the well of the widow {name}?", "count"),
            ("Through which hamlet were the dragoons riding when {name} hid her spoons?", "place"),
        ),
    ),
    Episode(
        "There was a {thing} hanging over the chimney that had been {name}'s until the card game "
        "with {name2}.",
        (
            ("What had {name} gambled away to {name2}?", "thing"),
            ("Against whom did {name} lose at cards?", "name2"),
        ),
    ),
    Episode(
        "{name} the {trade} swore to have seen {count} lanterns upon the cliff of {place} on the "
        "eve of the wreck.",
        (
            ("How many lanterns shone upon the cliff before the wreck?", "count"),
            ("By what craft did the witness {name} live?", "trade"),
            ("Above which place was a light shown on the eve of the wreck?", "place"),
        ),
    ),
    Episode(
        "The twins {name} and {name2} were never again on speaking terms once their father had "
        "left the {thing} to the younger.",
        (
            ("Which heirloom set the twins {name} and {name2} against each other?", "thing"),
            ("Who was the twin with whom {name} would not speak?", "name2"),
        ),
    ),
    Episode(
        "At the fair of {place} a bear got loose, and it was {name} who quieted it with a {thing}.",
        (
            ("Who had the courage to quiet the bear?", "name"),
            ("By means of what was the loose bear quieted?", "thing"),
            ("At whose fair did a bear break loose?", "place"),
        ),
    ),
    Episode(
        "My mother always held that the ghost on the stairs was {name}, a {trade} hanged at "
        "{place} in her grandmother's day.",
        (
            ("Whose ghost was said to walk the stairs?", "name"),
            ("What had the ghost been in life, before the hanging at {place}?", "trade"),
            ("Where had they hanged the man who haunted the house?", "place"),
        ),
    ),
    Episode(
        "For {count} nights running {name} sat up in the stable beside a lame mare that nobody but "
        "{name2} could afterwards ride.",
        (
            ("How many nights did {name} watch beside the mare?", "count"),
            ("What rider alone did the mare that {name} nursed put up with?", "name2"),
        ),
    ),
)

_LISTS = {
    "name": (
        "Ambrose Amos Barnaby Bartholomew Cordelia Dorcas Ezra Gideon Hepzibah Horatio Jasper "
        "Jemima Jethro Jonas Keziah Lavinia Mehitabel Millicent Obadiah Phoebe Prudence Rosamund "
        "Rufus Selina Septimus Silas Tabitha Thomasina Tobias Zachary"
    ),
    "thing": (
        "bellows candlestick cutlass drumstick figurehead gridiron hourglass inkstand locket "
        "lute musket nightcap pewter-jug prayerbook quadrant saddlebag sextant snuffbox spyglass "
        "tankard thimble tinderbox waistcoat weathercock"
    ),
    "place": (
        "Blackmere Brackwater Coldharbour Cragfoot Fennimore Gullhaven Holmcastle Kestrelby "
        "Longreach Marlstone Netherby Oxcombe Penhallow Ravensea Saltmarsh Thornby Trewithen "
        "Ullathorne Wexcombe Windhover"
    ),
    "trade": (
        "cartwright chandler cooper drover falconer farrier gamekeeper glazier milliner ostler "
        "poacher ropemaker saddler sexton shipwright tanner thatcher tinker wheelwright woodcutter"
    ),
}


def _kind(slot: str) -> str:
    return slot.rstrip("0123456789")


def _slots(text: str) -> list[str]:
    return re.findall(r"\{(\w+)\}", text)


def draw(rng: random.Random, n_tokens: int, n_episodes: int) -> Draft[Item]:
    """Different episodes in a message of prose, one of them asked for; no name, thing, place, trade
    or number comes twice. (See ``DrawnTask.draw``.)"""
    chosen = rng.sample(WORDINGS, n_episodes)
    pools = {kind: rng.sample(text.split(), len(text.split())) for kind, text in _LISTS.items()}
    pools["count"] = [str(number) for number in rng.sample(range(12, 100), 4 * n_episodes)]
    filled = [{slot: pools[_kind(slot)].pop() for slot in _slots(e.told)} for e in chosen]
    told = [e.told.format(**those) for e, those in zip(chosen, filled, strict=True)]
    wording, slot = rng.choice(chosen[0].asked)
    question, answer = wording.format(**filled[0]), filled[0][slot]
    depths = [rng.random() for _ in told]
    excerpt = Excerpt(rng)

    def lay_out(n_pieces: int) -> Item:
        text = " ".join([*spread(told, depths, excerpt.take(n_pieces)), question])
        return Item([{"role": "user", "content": text}], question, (answer,))

    return Draft(lay_out)


EPISODES = [
    DrawnTask(
        "episode",
        "an episode told in the prose of the novel, asked for as a reader would; 16 wordings of "
        "its own",
        48,
        partial(draw, n_episodes=1),
    ),
    DrawnTask(
        "episodes",
        "6 different episodes told in the prose of the novel, one asked for as a reader would",
        48,
        partial(draw, n_episodes=6),
    ),
]
