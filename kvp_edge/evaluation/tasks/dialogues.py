"""Chats of people and of assistants: the loss of their last reply.

Three collections in a data folder, each in turn, as far as they are there
(kvp_edge/corpora.py names the files):

- OpenAssistant (arXiv:2304.07327), of every tree the thread of the best-ranked replies;
- Topical-Chat (arXiv:2308.11995), in which the one who begins is the user;
- Taskmaster-4 (arXiv:2403.10704), orders of coffee.

Most of them are too short. So a conversation here chains several of one collection, as if a user
changed the subject without clearing the chat; the first may lack its beginning.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

from kvp_edge.corpora import DIALOGUE_FILES
from kvp_edge.evaluation.item import CountTokens, Reading
from kvp_edge.evaluation.tasks.data_files import reading
from kvp_edge.evaluation.tasks.filling import Draft, rng_of
from kvp_edge.evaluation.tasks.readings import read_on

Exchange = tuple[str, str]  # what the user says, and the reply
Dialogue = list[Exchange]


def collections_in(folder: Path) -> list[tuple[Path, ...]]:
    """The files of every collection that the folder has."""
    found = [sorted(folder.glob(pattern)) for pattern in DIALOGUE_FILES]
    return [tuple(paths) for paths in found if paths]


class Dialogues:
    """Readings of chained dialogues."""

    name = "dialogues"
    about = "loss of the last reply of a chat, chained from several short ones on other things"
    reply_tokens = 0

    def __init__(self, collections: list[tuple[Path, ...]]) -> None:
        self._collections = collections

    def make(
        self, n_items: int, n_tokens: int, count_tokens: CountTokens, seed: int
    ) -> list[Reading]:
        """See ``kvp_edge.evaluation.item.Task``."""
        rng = rng_of(self.name, seed)
        orders = []
        for paths in self._collections:
            dialogues = list(read_dialogues(paths))
            rng.shuffle(dialogues)
            most = sum(map(len, dialogues)) - 1
            orders.append([_chained(dialogues, i, most) for i in range(len(dialogues))])
        in_turn = [draft for drafts in zip_longest(*orders) for draft in drafts if draft]
        return read_on(self.name, in_turn, n_items, n_tokens, count_tokens)


def _chained(dialogues: list[Dialogue], last: int, most: int) -> Draft[Reading]:
    """The last ``n_pieces`` exchanges and one more: of the dialogue with the number ``last``, and
    where it is too short, of those before it."""

    def lay_out(n_pieces: int) -> Reading:
        chain: Dialogue = []
        at = last
        while len(chain) < n_pieces + 1:
            chain = dialogues[at] + chain
            at -= 1  # before the first comes the last one
        *earlier, (request, ending) = chain[-n_pieces - 1 :]
        said = [text for exchange in earlier for text in exchange]
        messages = [
            {"role": ("user", "assistant")[i % 2], "content": text}
            for i, text in enumerate([*said, request])
        ]
        return Reading(messages, ending)

    return Draft(lay_out, most)


@lru_cache(maxsize=4)
def read_dialogues(paths: tuple[Path, ...]) -> tuple[Dialogue, ...]:
    """All dialogues of a collection's files, in their order."""
    found = []
    for path in paths:
        with reading(path, "dialogues"), path.open(encoding="utf-8") as file:
            if path.suffix == ".jsonl":
                entries = [json.loads(line) for line in file]
            else:
                content = json.load(file)
                entries = list(content.values()) if isinstance(content, dict) else content
            found += [dialogue for entry in entries if (dialogue := exchanges(_said(entry)))]
    return tuple(found)


def _said(entry: dict[str, Any]) -> list[tuple[str, str]]:
    """Who says what, in any of the collections."""
    if "prompt" in entry:  # OpenAssistant
        return list(_thread(entry["prompt"]))
    if "utterances" in entry:  # Taskmaster
        return [(turn["speaker"], turn["text"]) for turn in entry["utterances"]]
    turns = entry["content"]  # Topical-Chat
    return [
        ("user" if turn["agent"] == turns[0]["agent"] else "assistant", turn["message"])
        for turn in turns
    ]


def _thread(message: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    """A message and its best-ranked replies."""
    while message:
        yield ("user" if message["role"] == "prompter" else "assistant"), message["text"]
        # A reply that was not ranked comes after those that were.
        ranked = [(r["rank"] if r.get("rank") is not None else 99, r) for r in message["replies"]]
        message = min(ranked, key=lambda pair: pair[0])[1] if ranked else None


def exchanges(said: Iterable[tuple[str, str]]) -> Dialogue:
    """The dialogue as requests and replies. Consecutive messages of one speaker become one; a reply
    without a request, or a request without a reply, is left out."""
    messages: list[tuple[str, str]] = []
    for who, text in said:
        if not text.strip() or (who != "user" and not messages):
            continue
        if messages and messages[-1][0] == who:
            messages[-1] = (who, f"{messages[-1][1]}\n{text.strip()}")
        else:
            messages.append((who, text.strip()))
    texts = [text for _, text in messages]
    return list(zip(texts[::2], texts[1::2], strict=False))
