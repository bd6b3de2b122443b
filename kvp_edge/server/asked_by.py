"""For which words of a question passages came back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import llama_cpp

from kvp_edge.server.served import ServedLlama

#: Words at most, the newest: to ask of each what it attends to takes a pass over the log.
_WORDS = 16


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


def asked_by(llm: ServedLlama, go_on: Callable[[], bool]) -> list[Word]:
    """The words whose queries asked for what came back before the last reply, in their order.

    Args:
        llm: nobody else uses it.
        go_on: asked before every word; the words until then are returned.
    """
    event, asked, kv = llm.turn.recalled, llm.turn.asked, llm.kv
    if event is None or asked is None or kv is None or kv.log is None:
        return []
    first = int(asked.indices[0])
    if int(asked.indices[-1]) >= kv.seen:  # the conversation has gone back since
        return []
    found: list[Word] = []
    for start, end in words(llm, first, first + len(asked))[-_WORDS:]:
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


def _text(llm: ServedLlama, tokens: Sequence[int]) -> str:
    return llm.piece([int(llm.input_ids[i]) for i in tokens]).decode(errors="replace")


def _is_marker(llm: ServedLlama, i: int) -> bool:
    return bool(llama_cpp.llama_vocab_is_control(llm.vocab, int(llm.input_ids[i])))
