"""The tasks of ``kvp-edge eval``.

To add one: a ``DrawnTask`` in a file here (lookup.py is the shortest), a line in ``TASKS``, a row
in docs/evaluation.md.

One idea per module. ``needles``, ``variable_tracking``, ``word_counts`` and ``paragraphs`` are
those of RULER (``ruler`` lists the differences); ``lookup``, ``key_values``, ``recall`` and
``episodes`` also have questions; in ``quiz``, ``chains``, ``copying`` and ``sums`` the model writes
a long reply (``generation``). ``readings``, ``dialogues`` and ``meetings`` have no question, but
measure the loss of an ending; in ``continuation`` the model itself writes it. ``filling`` brings
all of them to the requested length.
"""

from __future__ import annotations

from pathlib import Path

from kvp_edge.corpora import (
    BOOK_FILES,
    MEETING_FILES,
    PAIR_FILES,
    QUESTION_FILE,
    for_evaluation,
)
from kvp_edge.evaluation.item import Task
from kvp_edge.evaluation.tasks import generation, key_values, paragraphs, ruler
from kvp_edge.evaluation.tasks.dialogues import Dialogues, collections_in
from kvp_edge.evaluation.tasks.episodes import EPISODES
from kvp_edge.evaluation.tasks.lookup import LOOKUP
from kvp_edge.evaluation.tasks.meetings import Meetings
from kvp_edge.evaluation.tasks.readings import Books
from kvp_edge.evaluation.tasks.recall import RECALL

#: The names of RULER's thirteen.
RULER = ruler.NAMES

#: The names of those with a long generation.
GENERATION = tuple(task.name for task in generation.GENERATION)

#: Tasks that need no data, by name.
TASKS: dict[str, Task] = {
    **{task.name: task for task in (*RECALL, *EPISODES, *LOOKUP, *ruler.WITHOUT_DATA)},
    "books": Books(),
    **{task.name: task for task in generation.GENERATION},
}


def data_tasks(folder: Path) -> dict[str, Task]:
    """Tasks whose data is in the folder, by name. (``books`` then reads the folder's books.)

    Args:
        folder: laid out as kvp_edge/corpora.py says. Every part of it may be missing, and books to
            train on are left out.
    """
    tasks: list[Task] = []
    if (path := folder / QUESTION_FILE).is_file():
        tasks += paragraphs.paragraph_tasks(path)
    tasks += [
        key_values.pairs_task(n, path)
        for n, file in PAIR_FILES.items()
        if (path := folder / file).is_file()
    ]
    if paths := list(filter(for_evaluation, folder.glob(BOOK_FILES))):
        tasks.append(Books(paths))
    if collections := collections_in(folder):
        tasks.append(Dialogues(collections))
    if paths := list(folder.glob(MEETING_FILES)):
        tasks.append(Meetings(paths))
    return {task.name: task for task in tasks}
