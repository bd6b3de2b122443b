"""Questions about one of many paragraphs: RULER's `qa_1` and `qa_2` with other data.

RULER (arXiv:2404.06654, section 3.4) takes questions of SQuAD and of HotpotQA and hides their
paragraphs among those of other questions. These tasks take both from the Natural Questions file of
"Lost in the Middle" (arXiv:2307.03172; github.com/nelson-liu/lost-in-the-middle,
qa_data/nq-open-oracle.jsonl.gz): 2,655 questions, each with the Wikipedia paragraph that answers
it.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from kvp_edge.evaluation.item import Item, names
from kvp_edge.evaluation.tasks.data_files import reading
from kvp_edge.evaluation.tasks.filling import Draft, DrawnTask, conversation
from kvp_edge.evaluation.tasks.novel import spread

_ORDER_ONE = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words."
)
_ORDER_TWO = (
    "Answer both questions based on the given documents. Only give me the answers and do not "
    "output any other words."
)


@dataclass(frozen=True)
class Paragraph:
    """A paragraph, and a question that it answers in one of several ways."""

    text: str
    question: str
    answers: tuple[str, ...]

    def names_any(self, answers: Sequence[str]) -> bool:
        """Whether the text contains one of the answers."""
        text = " ".join(self.text.lower().split())
        # Quick check: most answers do not occur.
        return any(" ".join(a.lower().split()) in text and names(text, a) for a in answers)


@lru_cache(maxsize=2)
def read_paragraphs(path: Path) -> tuple[Paragraph, ...]:
    """All of the file's paragraphs that contain their answer word for word."""
    found = []
    with reading(path, "questions"), gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            entry = json.loads(line)
            gold = entry["ctxs"][0]
            text = f"{gold['title']}\n{gold['text'].strip()}"
            paragraph = Paragraph(text, entry["question"].strip(), tuple(entry["answers"]))
            if paragraph.names_any(paragraph.answers):
                found.append(paragraph)
    return tuple(found)


@dataclass(frozen=True)
class Paragraphs:
    """Items whose paragraphs come from one file.

    Attributes:
        path: the file.
        n_asked: how many questions are asked at once.
    """

    path: Path
    n_asked: int

    def draw(self, rng: random.Random, n_tokens: int) -> Draft[Item]:
        """See ``DrawnTask.draw``."""
        every = read_paragraphs(self.path)
        # Of two answers the score is the share that the reply names, so each must have one form.
        askable = [p for p in every if self.n_asked == 1 or len(p.answers) == 1]
        if len(askable) < self.n_asked:
            raise ValueError(f"{self.path} has too few questions")
        asked = rng.sample(askable, self.n_asked)
        answers = tuple(dict.fromkeys(answer for p in asked for answer in p.answers))
        # No other paragraph may answer the question, so none that names an answer is hay. (No
        # paragraph has fewer than 8 tokens, so more of them would not fit.)
        drawn = rng.sample(every, min(n_tokens // 8 + 1, len(every)))
        hay = [p.text for p in drawn if not p.names_any(answers)]
        depths = [rng.random() for _ in asked]
        order, question = _wording([p.question for p in asked])

        def lay_out(n_pieces: int) -> Item:
            documents = spread([p.text for p in asked], depths, hay[:n_pieces])
            text = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(documents, 1))
            context = f"{order}\n\nThe following are given documents.\n\n{text}\n"
            messages = conversation(context, question)
            return Item(messages, question, answers, "any" if self.n_asked == 1 else "all")

        return Draft(lay_out, most=len(hay))


def _wording(questions: list[str]) -> tuple[str, str]:
    """The instruction, before and after the documents, and then the questions."""
    if len(questions) == 1:
        return _ORDER_ONE, f"{_ORDER_ONE}\n\nQuestion: {questions[0]}"
    numbered = [f"Question {i}: {question}" for i, question in enumerate(questions, 1)]
    return _ORDER_TWO, "\n".join([f"{_ORDER_TWO}\n", *numbered])


def paragraph_tasks(path: Path) -> list[DrawnTask]:
    """The tasks of this file."""
    return [
        DrawnTask(
            "qa_1",
            "a question about one of many paragraphs; RULER's, with Natural Questions instead of "
            "SQuAD",
            64,
            Paragraphs(path, n_asked=1).draw,
        ),
        DrawnTask(
            "qa_2",
            "two questions at once, about two of many paragraphs; in place of RULER's two-hop "
            "questions (HotpotQA), whose paragraphs must be combined: here they need not be",
            96,
            Paragraphs(path, n_asked=2).draw,
        ),
    ]
