"""Write what a policy for a model that others made reads, from a data folder:

    python -m scripts.train_policy.texts --data DATA --out build/texts --count 20

Two files, for `kvp-edge learn MODEL --text build/texts/texts.txt --chats build/texts/chats.jsonl`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

from kvp_edge.corpora import (
    BOOK_FILES,
    TRAINING_DIALOGUE_FILES,
    TRAINING_MEETING_FILES,
    for_training,
)
from kvp_edge.evaluation.tasks.dialogues import Exchange, read_dialogues
from kvp_edge.text.chat_prompt import Message

#: More than the longest tokens have, so that a text of so many characters is long enough.
_CHARACTERS_PER_TOKEN = 6


def write_texts(folder: Path, out: Path, count: int, length: int, seed: int) -> tuple[Path, Path]:
    """Write ``count`` excerpts of books as plain text, and three times as many chats: of people, of
    meetings that the user tells of, and about excerpts.

    Args:
        folder: the data folder.
        length: tokens that each must have.

    Returns:
        The files of texts and of chats.

    Raises:
        ValueError: the folder lacks one of these kinds.
    """
    rng = Random(seed)
    n = length * _CHARACTERS_PER_TOKEN
    excerpts = _excerpts(sorted(filter(for_training, folder.glob(BOOK_FILES))), n, rng)
    texts, chats = out / "texts.txt", out / "chats.jsonl"
    texts.write_text("\n".join(next(excerpts) for _ in range(count)), encoding="utf-8")
    kinds = (_chained(folder, n, rng), _meetings(folder, n, rng), map(_about, excerpts))
    with chats.open("w", encoding="utf-8") as file:
        for _ in range(count):
            for kind in kinds:
                file.write(json.dumps(next(kind)) + "\n")
    return texts, chats


def _excerpts(books: list[Path], n: int, rng: Random) -> Iterator[str]:
    """Endless: n characters of a book, from the beginning of a word."""
    if not books:
        raise ValueError(f"the data folder has no {BOOK_FILES}")
    while True:
        text = " ".join(rng.choice(books).read_text(encoding="utf-8", errors="replace").split())
        start = text.find(" ", rng.randrange(max(1, len(text) - n))) + 1
        yield text[start : start + n]


def _about(excerpt: str) -> list[Message]:
    """The user reads half of it out, and the assistant goes on."""
    half = excerpt.find(" ", len(excerpt) // 3)
    return _chat([(excerpt[:half], excerpt[half + 1 :])])


def _chained(folder: Path, n: int, rng: Random) -> Iterator[list[Message]]:
    """Endless: short dialogues, one after the other, of n characters."""
    collections = [
        read_dialogues(tuple(sorted(folder.glob(pattern)))) for pattern in TRAINING_DIALOGUE_FILES
    ]
    if not all(collections):
        raise ValueError(f"the data folder lacks one of {', '.join(TRAINING_DIALOGUE_FILES)}")
    while True:
        collection, chain = rng.choice(collections), list[Exchange]()
        while sum(len(said) + len(reply) for said, reply in chain) < n:
            chain += rng.choice(collection)
        yield _chat(chain)


def _meetings(folder: Path, n: int, rng: Random) -> Iterator[list[Message]]:
    """Endless: a stretch of a transcript of n characters, whose last turns the assistant tells."""
    lines = (folder / TRAINING_MEETING_FILES).read_text(encoding="utf-8").splitlines()
    meetings = [
        [
            f"{turn['speaker']}: {turn['content']}"
            for turn in json.loads(line)["meeting_transcripts"]
        ]
        for line in lines
    ]
    while True:
        turns = rng.choice(meetings)
        start = rng.randrange(len(turns))
        text = "\n".join(turns[start:])[:n]
        half = text.find("\n", len(text) // 3)
        if half > 0 and len(text) > n // 2:
            yield _chat([(text[:half], text[half + 1 :])])


def _chat(exchanges: list[Exchange]) -> list[Message]:
    return [
        {"role": role, "content": text}
        for exchange in exchanges
        for role, text in zip(("user", "assistant"), exchange, strict=True)
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.train_policy.texts", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--data", type=Path, required=True, help="the data folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--count", type=int, default=20, help="texts, and a third of the chats")
    parser.add_argument("--length", type=int, default=1024, help="tokens of each, at least")
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args(arguments)
    chosen.out.mkdir(parents=True, exist_ok=True)
    try:
        for path in write_texts(chosen.data, chosen.out, chosen.count, chosen.length, chosen.seed):
            print(path)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
