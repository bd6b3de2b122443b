"""QMSum (Zhong et al., arXiv:2104.05938; github.com/Yale-LILY/QMSum): questions about meetings.

A data folder's ``meetings/qmsum/*.jsonl`` has transcripts, and questions about parts of them with
answers of a few sentences. A free answer would need a judge, but the loss of the published answer
does not. The user's message is a stretch of the transcript that includes the part in question, and
then the question.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from kvp_edge.evaluation.item import CountTokens, Reading
from kvp_edge.evaluation.tasks.data_files import reading
from kvp_edge.evaluation.tasks.filling import Draft, conversation, rng_of
from kvp_edge.evaluation.tasks.readings import read_on

_OPENING = (
    "Read this part of a meeting's transcript. I will ask you about it afterwards.\n\n{text}\n"
)
_QUESTION = "Answer in a few sentences: {question}"


class Meetings:
    """Readings of answers about meetings."""

    name = "meetings"
    about = "loss of QMSum's answer to a question about a part of a meeting's transcript"
    reply_tokens = 0

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = sorted(paths)

    def make(
        self, n_items: int, n_tokens: int, count_tokens: CountTokens, seed: int
    ) -> list[Reading]:
        """See ``kvp_edge.evaluation.item.Task``."""
        questions = [question for path in self._paths for question in _read(path)]
        rng = rng_of(self.name, seed)
        rng.shuffle(questions)
        drafts = [_draft(question, rng.random()) for question in questions]
        return read_on(self.name, drafts, n_items, n_tokens, count_tokens)


@dataclass(frozen=True)
class _Question:
    """A question about the turns from ``first`` to before ``end`` of a meeting."""

    turns: tuple[str, ...]
    first: int
    end: int
    text: str
    answer: str


@lru_cache(maxsize=4)
def _read(path: Path) -> tuple[_Question, ...]:
    with reading(path, "QMSum"), path.open(encoding="utf-8") as lines:
        return tuple(question for line in lines for question in _questions(line))


def _questions(line: str) -> Iterator[_Question]:
    """The questions about a part of a meeting. General ones are about all of it, so a part cannot
    answer them."""
    meeting = json.loads(line)
    turns = tuple(
        _turn(turn["speaker"], turn["content"]) for turn in meeting["meeting_transcripts"]
    )
    for query in meeting["specific_query_list"]:
        spans = [int(end) for span in query["relevant_text_span"] for end in span]
        first, end = (min(spans), max(spans) + 1) if spans else (0, len(turns))
        yield _Question(turns, first, end, query["query"].strip(), query["answer"].strip())


def _turn(speaker: str, said: str) -> str:
    """A turn without the transcribers' marks ("{disfmarker}") and the spaces before full stops."""
    said = " ".join(re.sub(r"\{\w+\}", " ", said).split())
    return f"{speaker}: " + re.sub(r" (?=[.,?!])", "", said)


def _draft(asked: _Question, share_before: float) -> Draft[Reading]:
    """The turns that the question is about, and others: a share of them before, the rest after. If
    one side has too few, the other gets more."""
    question = _QUESTION.format(question=asked.text)
    n_after = len(asked.turns) - asked.end

    def lay_out(n_pieces: int) -> Reading:
        before = min(asked.first, int(n_pieces * share_before))
        after = min(n_after, n_pieces - before)
        before = min(asked.first, n_pieces - after)
        text = "\n".join(asked.turns[asked.first - before : asked.end + after])
        return Reading(conversation(_OPENING.format(text=text), question), asked.answer)

    return Draft(lay_out, most=asked.first + n_after)
