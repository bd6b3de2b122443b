"""Books to token arrays, tokenizer and word pools, cached in the output folder."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from .books import read_library
from .config import Recipe
from .tasks import Prose, TaskMaker
from .tokenizer import (
    WordPools,
    encode_long,
    load_pools,
    save_pools,
    train_tokenizer,
    word_pools,
)


@dataclass(frozen=True)
class Corpus:
    """Everything the tasks are made of; token arrays are uint16 [n]."""

    tokenizer: Tokenizer
    train_pools: WordPools
    held_out_pools: WordPools
    train_ids: np.ndarray
    held_out_ids: np.ndarray
    held_out_chars: int

    def maker(self, held_out: bool) -> TaskMaker:
        """Task maker for training, or for evaluation with nothing seen in training."""
        pools = self.held_out_pools if held_out else self.train_pools
        ids = self.held_out_ids if held_out else self.train_ids
        kept = self.held_out_pools.words + self.held_out_pools.names
        return TaskMaker(self.tokenizer, pools, Prose(ids, self.tokenizer), held_out, kept)


def prepare(books: Path, out: Path, recipe: Recipe) -> Corpus:
    """Read, tokenise and split the books, or load what an earlier run left in `out`."""
    names = ("tokenizer.json", "pools.json", "train.npy", "held_out.npy")
    tokenizer_file, pools_file, train_file, held_out_file = (out / name for name in names)
    if not held_out_file.exists():
        out.mkdir(parents=True, exist_ok=True)
        print(f"Preparing the books of '{books}' ...", file=sys.stderr)
        library = read_library(books, recipe.max_books)
        texts, held_out = list(library.train.values()), list(library.held_out.values())
        tokenizer = train_tokenizer(texts, recipe.model.vocab_size, recipe.tokenizer_chars)
        tokenizer.save(str(tokenizer_file))
        save_pools(pools_file, *word_pools(texts, tokenizer))
        for file, part in ((train_file, texts), (held_out_file, held_out)):
            ids = [token for text in part for token in encode_long(tokenizer, text)]
            np.save(file, np.array(ids, np.uint16))  # the held-out file last: it marks the end
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    held_out_ids = np.load(held_out_file)
    return Corpus(
        tokenizer,
        *load_pools(pools_file),
        np.load(train_file),
        held_out_ids,
        held_out_chars=len(tokenizer.decode(held_out_ids.tolist())),
    )
