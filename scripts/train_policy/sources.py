"""What the bundled model reads for its traces: the tasks and novels it was trained on, or, for the
comparison, held-out ones (other words, names, wordings and books)."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from kvp_edge.llama import Llama
from kvp_edge.traces.sources import Cut, Piece
from scripts.train_model.prepare import Corpus
from scripts.train_model.tasks import CHATS, Prose
from scripts.train_model.wordings import ALL

# Shares of the traces; "reading" is plain prose.
MIX = {
    "needle": 0.18,
    "queries": 0.08,
    "listing": 0.10,
    "variables": 0.08,
    "names": 0.04,
    "lookup": 0.16,
    "facts": 0.18,
    "told": 0.06,
    "copying": 0.02,
    "reading": 0.10,
}
SHORTEST = 0.25  # of the longest trace
REFRAINS = 0.15  # share of the chats whose prose is a refrain


class Refrain(Prose):
    """A few sentences over and over, so that what stands between them is all there is to keep."""

    def __init__(self, prose: Prose, rng: Random) -> None:
        text = prose.ending(rng, 80)
        self.stop = prose.stop
        self.sentences = text[prose.gaps(text)[0] % len(text) :]

    def ending(self, rng: Random, length: int) -> list[int]:
        return (self.sentences * (length // len(self.sentences) + 1))[-length:]

    anywhere = ending


@dataclass(frozen=True)
class GeneratedChats:
    """`count` traces of different lengths; the future is all questions with their answers, or the
    last quarter of a piece of prose."""

    corpus: Corpus
    count: int
    held_out: bool

    def about(self) -> dict[str, Any]:
        kind = "held-out chats" if self.held_out else "generated chats"
        return {"kind": kind, "count": self.count, "mix": MIX, "refrains": REFRAINS}

    def pieces(self, llm: Llama, cut: Cut) -> Iterator[Piece]:
        text = 'The secret code of Anne-Marie was 481220: "Never!" he said.'
        if llm.tokenize(text.encode(), add_bos=False) != self.corpus.tokenizer.encode(text).ids:
            raise SystemExit("The tokenizer in --model-run is not the model's: name its own run.")
        maker = self.corpus.maker(self.held_out)
        prose = maker.prose
        if not self.held_out:
            maker.phrases, maker.free, maker.loose = ALL, 0.2, 0.2
            # Words of one or two pieces alone would teach a policy to drop the other pieces.
            maker.invented, maker.long = 0.6, 0.6
        for number in range(self.count):
            maker.seed(cut.seed, number)
            while True:
                task = maker.rng.choices(list(MIX), list(MIX.values()))[0]
                length = maker.rng.randint(int(SHORTEST * cut.length), cut.length)
                maker.prose = prose
                if maker.rng.random() < REFRAINS and task != "reading":
                    maker.prose = Refrain(prose, maker.rng)
                if task == "reading":
                    ids, _ = maker.reading(length)
                    yield Piece(ids, len(ids) * 3 // 4, 0, f"reading {number}")
                    break
                if (item := CHATS[task](maker, length)) is not None:
                    ids, _ = item.flatten()
                    yield Piece(ids[: cut.length], len(item.context), 0, f"{task} {number}")
                    break
