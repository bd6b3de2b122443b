"""Long generation: tasks whose answer is a long text that the model itself writes.

Tokens that it wrote are dropped like those that it read. `quiz` and `chains` ask many questions,
`copy`, `edits` and `sums` ask for one long reply, and the readings of continuation.py measure the
loss of what the full cache wrote. None of them needs data.
"""

from __future__ import annotations

from kvp_edge.evaluation.item import Task
from kvp_edge.evaluation.tasks.chains import CHAINS
from kvp_edge.evaluation.tasks.continuation import CONTINUATIONS
from kvp_edge.evaluation.tasks.copying import COPYING
from kvp_edge.evaluation.tasks.quiz import QUIZ
from kvp_edge.evaluation.tasks.sums import SUMS

GENERATION: list[Task] = [QUIZ, CHAINS, *COPYING, SUMS, *CONTINUATIONS]
