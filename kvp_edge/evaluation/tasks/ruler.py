"""RULER (Hsieh et al., "What's the Real Context Size of Your Long-Context Language Models?",
arXiv:2404.06654; github.com/NVIDIA/RULER): its thirteen tasks as chats.

The wordings, the numbers of keys, values and hops, and the scoring are the published ones.
Differences in every task:

- RULER ends its prompts with the beginning of the reply ("The special magic number for ... is").
  In a chat the model begins the reply, so there is no such prefix, and replies may be longer.
- Solved examples, which RULER shows before `vt` and `cwe`, are left out.
- Keys are drawn from a smaller word list of our own, and prose is the bundled novel.
- `qa_1` and `qa_2` need a data folder and have other data (paragraphs.py).

So the figures can be compared with each other, but not with those that RULER publishes.
"""

from __future__ import annotations

from kvp_edge.evaluation.tasks.needles import NEEDLES
from kvp_edge.evaluation.tasks.variable_tracking import VARIABLE_TRACKING
from kvp_edge.evaluation.tasks.word_counts import COMMON_WORDS, FREQUENT_WORDS

#: Those that need no data.
WITHOUT_DATA = [*NEEDLES, VARIABLE_TRACKING, COMMON_WORDS, FREQUENT_WORDS]

#: All thirteen.
NAMES = (*(task.name for task in WITHOUT_DATA), "qa_1", "qa_2")
