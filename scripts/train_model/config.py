"""Sizes and schedules: everything that decides the result, besides the books and the seed."""

from dataclasses import dataclass
from typing import Any

from .model import ModelConfig


@dataclass(frozen=True)
class Stage:
    """One stretch of training with sequences of one length.

    `length` tokens per sequence, `batch` sequences per step, `tokens` in all, `mix` task -> share,
    `other_weight` the loss weight of tokens that are not answers, `predicted` the share of tokens
    that enter the loss (all answers and a random choice of the others), `rates` the learning rate
    at the start and the end of the stage as shares of its peak (linear in between), `invented` the
    share of made-up words in the tasks, `wordings` which ones they use (see
    wordings.py), `free` the share of statements in no wording at all, `new_words` that of
    nouns and joining words from outside the wordings, `loose` that of wordings with small words
    thrown in (see TaskMaker).
    """

    length: int
    batch: int
    tokens: int
    mix: dict[str, float]
    other_weight: float = 0.5
    predicted: float = 0.9
    rates: tuple[float, float] = (1.0, 1.0)
    invented: float = 0.0
    wordings: str = "few"
    free: float = 0.0
    new_words: float = 0.0
    loose: float = 0.0

    @property
    def steps(self) -> int:
        return max(1, self.tokens // (self.length * self.batch))

    @property
    def predictions(self) -> int:
        """Number of tokens per step that enter the loss."""
        return int(self.predicted * self.length * self.batch)


@dataclass(frozen=True)
class Recipe:
    """One size of run; learning rates are peaks."""

    model: ModelConfig
    stages: tuple[Stage, ...]
    max_books: int | None = None
    tokenizer_chars: int = 10_000_000
    matrix_lr: float = 0.01  # Muon
    embed_lr: float = 0.008  # AdamW
    norm_lr: float = 0.003
    gain_lr: float = 0.001  # the final norm, which starts small
    warmup_steps: int = 50
    momentum: float = 0.95
    weight_decay: float = 0.05
    evaluation_items: int = 200
    save_every: int = 200  # steps

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)


# Looking back must pay from the first step: short sequences, many repeats.
_FIRST = {"repeated": 0.35, "associations": 0.35, "reading": 0.3}
_SKILLS = {
    "needle": 0.10,
    "queries": 0.05,
    "values": 0.15,
    "variables": 0.15,
    "lookup": 0.10,
    "facts": 0.11,
    "copying": 0.03,
    "repeated": 0.03,
    "associations": 0.03,
    "reading": 0.25,
}
# With the look-up heads in place, most of what is left to learn is English and wordings.
_PROSE = {
    "needle": 0.08,
    "queries": 0.05,
    "values": 0.14,
    "variables": 0.14,
    "lookup": 0.08,
    "facts": 0.10,
    "copying": 0.02,
    "repeated": 0.02,
    "associations": 0.02,
    "reading": 0.35,
}
# Lists of values are learned last.
_LATE = {
    "needle": 0.08,
    "queries": 0.05,
    "values": 0.21,
    "variables": 0.14,
    "lookup": 0.09,
    "facts": 0.11,
    "copying": 0.02,
    "reading": 0.30,
}
_LAST = {
    "needle": 0.08,
    "queries": 0.05,
    "values": 0.18,
    "variables": 0.11,
    "lookup": 0.12,
    "facts": 0.14,
    "told": 0.06,
    "copying": 0.01,
    "reading": 0.25,
}
# What is hard: several values of one key, reverse look-ups, sentences of any form.
_HARD = {
    "needle": 0.10,
    "queries": 0.08,
    "listing": 0.14,
    "successions": 0.05,
    "variables": 0.05,
    "names": 0.08,
    "lookup": 0.14,
    "facts": 0.11,
    "told": 0.03,
    "packed": 0.08,
    "copying": 0.01,
    "reading": 0.13,
}
# And hardest: all values of a key, all names of a value, any word between key and value.
_LISTS = {
    "needle": 0.06,
    "queries": 0.06,
    "listing": 0.24,
    "successions": 0.02,
    "names": 0.14,
    "lookup": 0.08,
    "joined": 0.14,
    "facts": 0.11,
    "told": 0.02,
    "packed": 0.04,
    "reading": 0.09,
}
# A skill that the last stretch leaves out fades (two hops fell from 96 % to 64 %): so all of them.
_ALL = {
    "needle": 0.08,
    "queries": 0.09,
    "listing": 0.15,
    "successions": 0.01,
    "variables": 0.14,
    "names": 0.06,
    "lookup": 0.06,
    "joined": 0.11,
    "facts": 0.13,
    "told": 0.02,
    "packed": 0.03,
    "reading": 0.12,
}
# Length and million tokens of one round through all lengths.
_ROUND = ((4096, 0.123), (2048, 0.123), (1024, 0.164), (512, 0.205), (256, 0.205))
_LONG_ROUND = ((4096, 0.246), (2048, 0.205), (1024, 0.205), (512, 0.164), (256, 0.164))
_Row = tuple[int, float, dict[str, float], float, float, tuple[float, float], dict[str, Any]]


def _mixed_lengths(
    lengths: tuple[tuple[int, float], ...], rounds: int, first_rate: float, *rest: Any
) -> list[_Row]:
    """Long and short sequences by turns, while the learning rate falls from `first_rate` to 0.

    A last stretch of long sequences alone costs skill at short ones: there, a question near the
    beginning of a chat is taken for a remark, because in long chats only remarks stand there.
    """
    rows: list[_Row] = []
    whole = rounds * sum(millions for _, millions in lengths)
    done = 0.0
    for length, millions in lengths * rounds:
        rates = (first_rate * (1 - done / whole), first_rate * (1 - (done + millions) / whole))
        mix, other_weight, predicted, sentences = rest
        rows.append((length, millions, mix, other_weight, predicted, rates, sentences))
        done += millions
    return rows


def schedule(scale: float, batch_tokens: int) -> tuple[Stage, ...]:
    """Lengths from 64 to 4,096; `scale` multiplies the tokens, `batch_tokens` is one step."""
    full, first = (1.0, 1.0), dict[str, Any]()
    many, more, most = (
        {"invented": 0.4, "wordings": wordings, "free": 0.35}
        for wordings in ("many", "more", "most")
    )
    loose = {**most, "new_words": 0.5, "loose": 0.4}
    final = {**loose, "wordings": "all"}
    plan: tuple[_Row, ...] = (
        (64, 1.2, _FIRST, 0.2, 0.5, full, first),
        (128, 0.8, _FIRST, 0.3, 0.5, full, first),
        (256, 1.3, _SKILLS, 0.5, 0.5, full, first),
        (256, 3.2, _PROSE, 0.5, 0.9, full, first),
        (256, 12.35, _LATE, 0.5, 0.9, full, {**many, "free": 0.0}),
        (256, 5.0, _LAST, 0.5, 0.9, full, many),
        (512, 6.0, _LAST, 0.5, 0.9, (1.0, 0.7), more),
        (1024, 2.5, _LAST, 0.5, 0.9, (0.7, 0.5), most),
        *_mixed_lengths(_ROUND, 6, 0.5, _LAST, 0.5, 0.9, most),
        *_mixed_lengths(_ROUND, 2, 0.3, _LAST, 0.5, 0.9, {**most, "new_words": 0.5}),
        (256, 4.0, _HARD, 0.25, 0.6, (0.6, 0.6), loose),
        (512, 3.0, _HARD, 0.25, 0.6, (0.6, 0.5), loose),
        (1024, 2.0, _HARD, 0.25, 0.6, (0.5, 0.4), loose),
        *_mixed_lengths(_LONG_ROUND, 6, 0.4, _HARD, 0.3, 0.7, loose),
        (256, 4.5, _LISTS, 0.25, 0.6, (0.5, 0.5), loose),
        (512, 1.2, _LISTS, 0.25, 0.6, (0.5, 0.45), loose),
        (1024, 0.6, _LISTS, 0.25, 0.6, (0.45, 0.4), loose),
        *_mixed_lengths(_LONG_ROUND, 2, 0.4, _LISTS, 0.3, 0.7, loose),
        (256, 1.5, _ALL, 0.25, 0.6, (0.5, 0.5), final),
        (512, 0.5, _ALL, 0.25, 0.6, (0.5, 0.45), final),
        (1024, 0.4, _ALL, 0.25, 0.6, (0.45, 0.4), final),
        *_mixed_lengths(_LONG_ROUND, 2, 0.4, _ALL, 0.3, 0.7, final),
    )
    return tuple(
        Stage(
            length,
            max(1, batch_tokens // length),
            int(millions * scale * 1e6),
            mix,
            other_weight,
            predicted,
            rates,
            **sentences,
        )
        for length, millions, mix, other_weight, predicted, rates, sentences in plan
    )


FULL_CPU = Recipe(ModelConfig(), schedule(1.0, 4096))
FULL_CUDA = Recipe(ModelConfig(), schedule(20.0, 65_536))
SMOKE = Recipe(
    ModelConfig(vocab_size=2048, width=64, n_layer=2, n_head=2, n_head_kv=1, ff_width=128),
    (
        Stage(64, 8, 64 * 8 * 12, _FIRST),
        Stage(256, 2, 256 * 2 * 8, _SKILLS, invented=0.4, wordings="most", free=0.35),
        Stage(256, 2, 256 * 2 * 4, _HARD, invented=0.4, free=0.35, new_words=0.5, loose=0.4),
    ),
    max_books=2,
    tokenizer_chars=300_000,
    warmup_steps=4,
    evaluation_items=4,
    save_every=5,
)
