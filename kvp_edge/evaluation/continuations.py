"""Endings that the model itself writes, with its full cache.

Every policy then reads exactly these tokens, and its loss on them is compared with that of the full
cache that wrote them: the loss increase, as in ForesightKV's reward (arXiv:2602.03203), over the
whole generation. The tokens are the generated ones, even if a tokenizer would split their text
differently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt

from kvp_edge.evaluation.item import Continuation
from kvp_edge.measuring import MeasuringLlama

#: The tokens of the context, those between the replies, and what is to be written.
Start = tuple[list[int], list[list[int]], Continuation]

#: All tokens, how many of them are the context, and which of the others the model wrote.
Written = tuple[list[int], int, npt.NDArray[np.bool_]]


def write_all(model_path: str, starts: Sequence[Start], engine: Mapping[str, Any]) -> list[Written]:
    """Write the endings; the model is loaded only if there are any.

    Args:
        model_path: GGUF file.
        starts: see Start.
        engine: the other arguments of kvp_edge.Llama.

    Returns:
        For each start all tokens, where its ending begins, and bool [tokens of the ending]: which
        of them the model wrote.

    Raises:
        ValueError: all replies of a conversation are empty.
    """
    if not starts:
        return []
    longest = max(
        len(context) + sum(map(len, turns)) + (len(turns) + 1) * made.tokens
        for context, turns, made in starts
    )
    with closing(MeasuringLlama.whole(model_path, longest + 1, **engine)) as subject:
        return [_write(subject, *start) for start in starts]


def _write(
    subject: MeasuringLlama, context: list[int], turns: list[list[int]], made: Continuation
) -> Written:
    subject.forget()
    subject.read(context)
    if isinstance(made.context, str):
        replies = [subject.draw(made.tokens, np.random.default_rng(made.seed))]
    else:
        replies = subject.converse(turns, made.tokens)
    ending, own = list(replies[0]), [True] * len(replies[0])
    for turn, reply in zip(turns, replies[1:], strict=True):
        ending += [*turn, *reply]
        own += [False] * len(turn) + [True] * len(reply)
    if not any(own):
        raise ValueError(
            f"the model ends each of its {len(replies)} replies before the first token, so there "
            "is no ending to measure: leave out the tasks of continuations"
        )
    return [*context, *ending], len(context), np.array(own, np.bool_)
