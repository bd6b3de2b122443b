"""What is read, and what is asked or measured after it.

``look-ups`` are the conversations of recall_eval, each with several questions; all other tasks are
those of ``kvp-edge eval``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from kvp_edge.cli.demo_tasks import Prose
from kvp_edge.evaluation.item import Task
from kvp_edge.evaluation.run import prompts
from kvp_edge.evaluation.tasks import GENERATION, TASKS, data_tasks
from kvp_edge.llama import Llama
from recall_eval.conversations import KINDS
from recall_eval.prompts import fitting_conversation, prompt_of, rng_of, shared_context

LOOK_UPS = "look-ups"

#: What is measured, where there is the data for it.
DEFAULT = (LOOK_UPS, "qa_1", "episode", "dialogues", "meetings", "books")

#: Tokens of an ending that are measured. What was dropped is missed most at its beginning.
ENDING = 128


@dataclass(frozen=True)
class Question:
    """One question, asked right after the context.

    Attributes:
        tokens: of the question, with what the chat template writes around it.
        score: of a reply, 1 if it is right.
        most: tokens of a reply.
    """

    tokens: list[int]
    score: Callable[[str], float]
    most: int


@dataclass(frozen=True)
class Item:
    """A text, of which tokens are dropped, and what comes after it.

    Attributes:
        task, number: which.
        context: what is read, then cut.
        questions: each asked by itself; none of a text.
        ending: the beginning of what follows in a text; empty if there are questions.
    """

    task: str
    number: int
    context: list[int]
    questions: tuple[Question, ...] = ()
    ending: tuple[int, ...] = ()

    @property
    def after(self) -> int:
        """The most tokens that are read after the context."""
        return max((len(q.tokens) + q.most for q in self.questions), default=len(self.ending))


def known_tasks(data: Path | None) -> dict[str, Task | None]:
    """The tasks by name; None: LOOK_UPS, which is none of ``kvp-edge eval``. Those
    with a long generation are left out: here a reply's beginning is measured."""
    found = {**TASKS, **(data_tasks(data) if data else {})}
    return {LOOK_UPS: None, **{n: t for n, t in found.items() if n not in GENERATION}}


def make_items(
    llm: Llama, tasks: dict[str, Task | None], length: int, count: int, n_facts: int, seed: int
) -> Iterator[Item]:
    """``count`` items of each task, one of each in turn, so that what is measured first is a little
    of all.

    Raises:
        ValueError: a task has too few items of this length.
    """
    of_tasks: list[Sequence[Item]] = []
    for name, task in tasks.items():
        if task is None:
            of_tasks.append(_fact_items(llm, length, count, n_facts, seed))
        else:
            of_tasks.append(_task_items(llm, name, task, length, count, seed))
    for row in zip_longest(*of_tasks):
        yield from (item for item in row if item is not None)


def _fact_items(llm: Llama, length: int, count: int, n_facts: int, seed: int) -> list[Item]:
    prose = Prose(lambda text: len(llm.tokenize(text.encode(), add_bos=False)))
    items = []
    for number in range(count):

        def rng(number: int = number) -> random.Random:
            return rng_of(seed, number, length)

        kind = KINDS[number % len(KINDS)]
        made = fitting_conversation(llm, kind, n_facts, length, prose, rng)
        asked = [question for question in made.questions if question.task == "fact"]
        whole = {question.text: prompt_of(llm, made, question.text) for question in asked}
        context = shared_context(llm, whole)
        questions = [Question(whole[q.text][len(context) :], q.score, q.max_tokens) for q in asked]
        items.append(Item(LOOK_UPS, number, context, tuple(questions)))
    return items


def _task_items(
    llm: Llama, name: str, task: Task, length: int, count: int, seed: int
) -> list[Item]:
    items = []
    for prompt in prompts(llm, {name: task}, [name], length, count, seed):
        tokens, border = prompt.tokens.tolist(), prompt.border
        context, rest = tokens[:border], tokens[border:]
        if prompt.item is None:
            items.append(Item(name, prompt.number, context, ending=tuple(rest[:ENDING])))
        else:
            asked = Question(rest, prompt.item.score, prompt.reply_tokens)
            items.append(Item(name, prompt.number, context, (asked,)))
    return items
