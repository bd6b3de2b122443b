"""What the bundled model reads for its traces: the tasks and novels it was trained on, or, for the
comparison, held-out ones (other words, names, wordings and books)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kvp_edge.llama import Llama
from kvp_edge.trace_sources import Cut, Piece
from scripts.train_model.prepare import Corpus
from scripts.train_model.tasks import CHATS
from scripts.train_model.wordings import MOST

# Shares of the traces; "reading" is plain prose.
MIX = {
    "needle": 0.2,
    "queries": 0.1,
    "values": 0.12,
    "variables": 0.12,
    "lookup": 0.12,
    "facts": 0.2,
    "copying": 0.02,
    "reading": 0.12,
}
SHORTEST = 0.25  # of the longest trace


@dataclass(frozen=True)
class GeneratedChats:
    """`count` traces of different lengths; the future is all questions with their answers, or the
    last quarter of a piece of prose."""

    corpus: Corpus
    count: int
    held_out: bool

    def about(self) -> dict[str, Any]:
        kind = "held-out chats" if self.held_out else "generated chats"
        return {"kind": kind, "count": self.count, "mix": MIX}

    def pieces(self, llm: Llama, cut: Cut) -> Iterator[Piece]:
        text = 'The secret code of Anne-Marie was 481220: "Never!" he said.'
        if llm.tokenize(text.encode(), add_bos=False) != self.corpus.tokenizer.encode(text).ids:
            raise SystemExit("The tokenizer in --model-run is not the model's: name its own run.")
        maker = self.corpus.maker(self.held_out)
        if not self.held_out:
            maker.phrases, maker.invented, maker.free = MOST, 0.4, 0.2
        for number in range(self.count):
            maker.seed(cut.seed, number)
            while True:
                task = maker.rng.choices(list(MIX), list(MIX.values()))[0]
                length = maker.rng.randint(int(SHORTEST * cut.length), cut.length)
                if task == "reading":
                    ids, _ = maker.reading(length)
                    yield Piece(ids, len(ids) * 3 // 4, 0, f"reading {number}")
                    break
                if (item := CHATS[task](maker, length)) is not None:
                    ids, _ = item.flatten()
                    yield Piece(ids[: cut.length], len(item.context), 0, f"{task} {number}")
                    break
