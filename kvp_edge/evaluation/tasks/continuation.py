"""Endings that the model writes itself, whose loss is measured when tokens are dropped.

The full cache writes, and every policy reads what was written (../continuations.py): the increase
of the loss is measured along a generation as long as the context. In `continuation` the context is
facts, and the ending is the full cache's own replies to many questions about them, so early text
matters to the last token. In `story` it is prose, of which little matters.
"""

from __future__ import annotations

from dataclasses import replace

from kvp_edge.evaluation.item import Continuation, CountTokens, Task
from kvp_edge.evaluation.tasks.filling import rng_of
from kvp_edge.evaluation.tasks.quiz import QUIZ
from kvp_edge.evaluation.tasks.readings import Books


class QuizContinuation:
    """The quiz, with the full cache's own replies."""

    name = "continuation"
    about = (
        "loss of the full cache's own replies to a quiz, along the conversation: facts in prose, "
        "all asked for"
    )
    reply_tokens = 0

    def make(
        self, n_items: int, n_tokens: int, count_tokens: CountTokens, seed: int
    ) -> list[Continuation]:
        """See ``kvp_edge.evaluation.item.Task``."""
        quizzes = replace(QUIZ, name=self.name).make(n_items, n_tokens, count_tokens, seed)
        return [
            Continuation(
                quiz.messages, QUIZ.reply_tokens, tuple(question.text for question in quiz.more)
            )
            for quiz in quizzes
        ]


class Story:
    """Excerpts of the novel, which the model goes on with for as many tokens."""

    name = "story"
    about = (
        "loss of the full cache's own continuation of an excerpt, which is as long as the excerpt"
    )
    reply_tokens = 0

    def make(
        self, n_items: int, n_tokens: int, count_tokens: CountTokens, seed: int
    ) -> list[Continuation]:
        """See ``kvp_edge.evaluation.item.Task``."""
        try:
            excerpts = Books().make(n_items, n_tokens // 2, count_tokens, seed)
        except ValueError as error:
            raise ValueError(
                f"'{self.name}' reads an excerpt of half of {n_tokens} tokens: {error}"
            ) from error
        made = []
        for number, excerpt in enumerate(excerpts):
            text = f"{excerpt.context}{excerpt.ending}"
            tokens = n_tokens - count_tokens(text) - 1  # one begins a text
            draws = rng_of(self.name, seed, number).getrandbits(32)
            made.append(Continuation(text, tokens, seed=draws))
        return made


CONTINUATIONS: list[Task] = [QuizContinuation(), Story()]
