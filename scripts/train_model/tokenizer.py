"""Byte-level BPE tokenizer that llama.cpp reads as `tokenizer.ggml.pre = llama-bpe`.

Vocabulary: special tokens, the 256 bytes, merges learned from the training books, and all two- and
three-digit numbers, so that a six-digit value is two tokens.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, USER, ASSISTANT, END, SYSTEM = range(5)
SPECIAL_TOKENS = ("<s>", "<|user|>", "<|assistant|>", "<|end|>", "<|system|>")

# The split llama.cpp uses for `llama-bpe` (src/llama-vocab.cpp): words with their leading space,
# digits in groups of at most three, runs of punctuation, line breaks.
PRE_TOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHUNK = 20_000  # characters handed to the tokenizer at a time


def train_tokenizer(texts: list[str], vocab_size: int, max_chars: int) -> Tokenizer:
    """Learn `vocab_size` tokens from evenly spread chunks of `texts`, `max_chars` in all."""
    chunks = [text[i : i + _CHUNK] for text in texts for i in range(0, len(text), _CHUNK)]
    stride = max(1, len(chunks) * _CHUNK // max_chars)
    numbers = [f"{n}{d}" for n in range(10) for d in range(10)]
    numbers += [f"{n:02d}{d}" for n in range(100) for d in range(10)]
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS) - len(numbers),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Digits are left out of the learned merges because every short number is added below.
    tokenizer.train_from_iterator((re.sub(r"\d", "", c) for c in chunks[::stride]), trainer)

    state = json.loads(tokenizer.to_str())
    learned = sorted(state["model"]["vocab"], key=state["model"]["vocab"].__getitem__)
    tokens = [*SPECIAL_TOKENS, *learned, *numbers]
    state["model"]["vocab"] = {token: i for i, token in enumerate(tokens)}
    state["model"]["merges"] += [[number[:-1], number[-1]] for number in numbers]
    state["added_tokens"] = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, token in enumerate(SPECIAL_TOKENS)
    ]
    return Tokenizer.from_str(json.dumps(state))


def encode_long(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a whole book in pieces that end at paragraph breaks."""
    pieces, start = [], 0
    while start < len(text):
        stop = text.find("\n", start + _CHUNK)
        stop = len(text) if stop < 0 else stop + 1
        pieces.append(text[start:stop])
        start = stop
    encoded = tokenizer.encode_batch(pieces, add_special_tokens=False)
    return [token for piece in encoded for token in piece.ids]


@dataclass(frozen=True)
class WordPools:
    """Words and names that serve as keys and values of the tasks; training and held-out apart."""

    words: list[str]
    names: list[str]

    def to_json(self) -> dict[str, list[str]]:
        return {"words": self.words, "names": self.names}


def word_pools(texts: list[str], tokenizer: Tokenizer) -> tuple[WordPools, WordPools]:
    """(training pool, held-out pool): every fifth word and name is kept for evaluation only."""
    counts = Counter(w for t in texts for w in re.findall(r"(?<=[a-z,] )[A-Za-z]+\b", t))
    lower = [w for w, _ in counts.most_common() if w.islower() and 4 <= len(w) <= 9]
    upper = [
        w
        for w, _ in counts.most_common()
        if w[0].isupper() and w[1:].islower() and len(w) > 2 and w.lower() not in counts
    ]

    def short(candidates: list[str], most_tokens: int) -> list[str]:
        return [w for w in candidates if len(tokenizer.encode(" " + w).ids) <= most_tokens]

    # The most frequent words are skipped: a key such as "that" would be all over the filler.
    words, names = sorted(short(lower, 2)[300:2300]), sorted(short(upper, 3)[:500])
    held_out = WordPools(words[4::5], names[4::5])
    taken = {*held_out.words, *held_out.names}
    return WordPools(
        [w for w in words if w not in taken], [n for n in names if n not in taken]
    ), held_out


def save_pools(path: Path, train: WordPools, held_out: WordPools) -> None:
    path.write_text(json.dumps({"train": train.to_json(), "held_out": held_out.to_json()}))


def load_pools(path: Path) -> tuple[WordPools, WordPools]:
    data = json.loads(path.read_text())
    return WordPools(**data["train"]), WordPools(**data["held_out"])
