"""For which words of a question passages came back."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import llama_cpp

from kvp_edge.server.served import ServedLlama

#: Words at most, the newest: to ask of each what it attends to takes a pass over the log.
_WORDS = 16

#: Bytes by which the end of a question is found.
_TAIL = 60


@dataclass(frozen=True)
class Word:
    """
    Attributes:
        index: of its first token in the conversation.
        text: of all of them.
        attention: how much of its attention goes to what came back; all heads on average.
    """

    index: int
    text: str
    attention: float


def asked_by(llm: ServedLlama, question: str, go_on: Callable[[], bool]) -> list[Word]:
    """The words whose queries asked for what came back before the last reply, in their order.

    Args:
        llm: nobody else uses it.
        question: words of the chat template around it are left out.
        go_on: asked before every word; the words until then are returned.
    """
    event, asked, kv = llm.turn.recalled, llm.turn.asked, llm.kv
    if event is None or asked is None or kv is None or kv.log is None:
        return []
    first = int(asked.indices[0])
    if int(asked.indices[-1]) >= kv.seen:  # the conversation has gone back since
        return []
    found: list[Word] = []
    within = _within(llm, question, first, first + len(asked))
    for start, end in words(llm, *within)[-_WORDS:]:
        if not go_on():
            break
        attention = kv.attention_to(event.heads[:first], asked[start - first : end - first])
        found.append(Word(start, _text(llm, range(start, end)), attention))
    return found


def words(llm: ServedLlama, start: int, end: int) -> list[tuple[int, int]]:
    """The words among the conversation's tokens [start, end), as [start, end) each: tokens that
    begin with a space begin one. Markers of the chat template and mere punctuation are none."""
    found: list[tuple[int, int]] = []
    open_ = False
    for i in range(start, end):
        text = _text(llm, (i,))
        if _is_marker(llm, i) or not any(c.isalnum() for c in text):
            open_ = False
            continue
        if open_ and not text[0].isspace():
            found[-1] = found[-1][0], i + 1
        else:
            found.append((i, i + 1))
        open_ = not text[-1].isspace()
    return found


def _within(llm: ServedLlama, question: str, start: int, end: int) -> tuple[int, int]:
    """Those of the tokens [start, end) that are of the question, which may begin before them; all,
    if it is not there."""
    text = question.strip().encode()
    ends = list(accumulate(len(llm.piece([int(llm.input_ids[i])])) for i in range(start, end)))
    said = llm.piece([int(llm.input_ids[i]) for i in range(start, end)])
    tail = text[-_TAIL:]
    at = said.rfind(tail) if tail else -1
    if at < 0:
        return start, end
    last = bisect_left(ends, at + len(tail))
    begins = said.rfind(text)
    first = bisect_right(ends, begins) if begins >= 0 else 0
    return start + first, min(start + last + 1, end)


def _text(llm: ServedLlama, tokens: Sequence[int]) -> str:
    return llm.piece([int(llm.input_ids[i]) for i in tokens]).decode(errors="replace")


def _is_marker(llm: ServedLlama, i: int) -> bool:
    return bool(llama_cpp.llama_vocab_is_control(llm.vocab, int(llm.input_ids[i])))
