"""Tokenizes only the new end of a text that was tokenized before.

A chat is one text that grows at every turn. llama.cpp's tokenizer reads all of it each time, and
takes more than twice as long for twice the text. But it first cuts a text at special tokens and
tokenizes the parts separately (tokenizer_st_partition in src/llama-vocab.cpp), so:

    If no special token can overlap the special token S ("isolated"), then wherever S occurs,
    tokens(before S + S + behind S) = tokens(before S) + tokens(S + behind S).

For then S is found whatever surrounds it, and no other special token reaches across its ends. White
space that special tokens strip is on one side of the cut, too, if S strips none before it and has
none at its ends.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np

from kvp_edge.arrays import TokenIds
from kvp_edge.text.special_tokens import SpecialTokens

#: Shorter texts are not worth remembering.
WORTH_BYTES = 4096


def marks(vocab: object, template: bytes, whole: bytes = b"") -> list[bytes]:
    """Where texts may be cut: the isolated special tokens that a chat template writes.

    Args:
        vocab: a llama_vocab.
        template: what the template writes around messages.
        whole: nothing may be cut within this text.

    Returns:
        Their texts; none if the tokenizer adds tokens of its own at the end of texts.
    """
    if llama_cpp.llama_vocab_type(vocab) == llama_cpp.LLAMA_VOCAB_TYPE_WPM:
        return []
    if llama_cpp.llama_vocab_get_add_eos(vocab):
        return []
    special = SpecialTokens.of(vocab)
    others = [*special.texts.values(), whole]
    return [
        text
        for token, text in special.texts.items()
        if text in template and not special.strips_before(token) and isolated(text, others)
        if len(text.decode(errors="replace")) > 1  # a seal (text/seals.py) is within longer ones
    ]


def isolated(text: bytes, specials: Iterable[bytes]) -> bool:
    """Whether a text can be cut before each ``text`` it holds.

    Args:
        text: of one special token.
        specials: of all of them; ``text`` once.
    """
    if not text or text.strip() != text:
        return False
    others = [other for other in specials if other]
    return others.count(text) == 1 and not any(_can_overlap(text, other) for other in others)


def _can_overlap(a: bytes, b: bytes) -> bool:
    """Whether the two can overlap in some text; if they are equal, overlap partly."""
    if a != b and (a in b or b in a):
        return True
    shorter = min(len(a), len(b))
    return any(a[:n] == b[-n:] or b[:n] == a[-n:] for n in range(1, shorter))


class PromptTokens(list[int]):
    """A list that is not changed while it is used, so that nothing needs to be copied to add
    nothing. llama_cpp puts prompts together from parts, most of which are empty.

    Attributes:
        ids: the same tokens, int32 [n]; None: not known.
    """

    ids: TokenIds | None = None

    def __add__(self, other: Any) -> Any:
        return super().__add__(other) if other else self

    def __radd__(self, other: list[int]) -> list[int]:
        return other + self.copy() if other else self


@dataclass
class _Known:
    """A text and its tokens. Whoever has it may change it, and nobody else has it."""

    text: bytes
    add_bos: bool
    tokens: PromptTokens  # with ids, which are never changed in place
    cuts: list[tuple[int, int]]  # bytes and tokens before each piece but the first


class TokenMemory:
    """The tokens of the text that was tokenized last. Threads may share it.

    Args:
        tokenize: (text, add_bos) -> tokens, special ones included; exact, and slow.
        marks: texts of isolated special tokens, at least one.
        piece: bytes that are tokenized at once, at least.
    """

    def __init__(
        self,
        tokenize: Callable[[bytes, bool], list[int]],
        marks: list[bytes],
        piece: int = 1024,
    ) -> None:
        self._tokenize = tokenize
        self._piece = piece
        self._mark = re.compile(b"|".join(map(re.escape, marks)))
        self._longest = max(map(len, marks))
        # At most one. To take it out and to put it back are single steps, so a thread or a signal
        # handler that comes in between finds nothing, and remembers nothing.
        self._known: deque[_Known] = deque(maxlen=1)
        self._lent: _Known | None = None

    def tokens(self, text: bytes, add_bos: bool) -> list[int]:
        """What ``tokenize`` gives for a text, but tokenizing only what is new."""
        known = self._read(text, add_bos)
        tokens = known.tokens.copy()
        self._known.append(known)
        return tokens

    def lend(self, text: bytes, add_bos: bool) -> PromptTokens:
        """``tokens`` without a copy. It must not be changed, nor lent again, until
        ``take_back``, and not be used after that. Others who ask meanwhile find nothing
        remembered."""
        self._lent = self._read(text, add_bos)
        return self._lent.tokens

    def take_back(self) -> None:
        """What was lent, if anything was."""
        known, self._lent = self._lent, None
        if known is not None:
            self._known.append(known)

    def ids(self, tokens: list[int]) -> TokenIds | None:
        """The same tokens as int32 [n], if they are those given last."""
        known = self._take()
        if known is None:
            return None
        ids = known.tokens.ids if known.tokens == tokens else None
        self._known.append(known)
        return ids

    def _read(self, text: bytes, add_bos: bool) -> _Known:
        known = self._take()
        if known is None or known.add_bos != add_bos:
            known = _Known(b"", add_bos, PromptTokens(), [])
        same = _equal_beginning(known.text, text) - self._longest
        del known.cuts[_count(known.cuts, same) :]
        at, n_known = known.cuts[-1] if known.cuts else (0, 0)
        tokens = known.tokens
        del tokens[n_known:]
        for start, end in self._pieces(text, at):
            if start > at:
                known.cuts.append((start, len(tokens)))
            tokens += self._tokenize(text[start:end], add_bos and start == 0)
        new = np.asarray(tokens[n_known:], np.int32)
        tokens.ids = new if tokens.ids is None else np.concatenate((tokens.ids[:n_known], new))
        known.text = text
        return known

    def _take(self) -> _Known | None:
        try:
            return self._known.pop()
        except IndexError:
            return None

    def _pieces(self, text: bytes, start: int) -> Iterable[tuple[int, int]]:
        """``text`` from ``start`` on, cut before some of its marks."""
        for mark in self._mark.finditer(text, start):
            if mark.start() >= start + self._piece:
                yield start, mark.start()
                start = mark.start()
        yield start, len(text)


def _count(cuts: list[tuple[int, int]], most: int) -> int:
    """How many of the cuts have at most so many bytes before them."""
    n = len(cuts)
    while n > 0 and cuts[n - 1][0] > most:
        n -= 1
    return n


def _equal_beginning(a: bytes, b: bytes) -> int:
    """How many of the first bytes are equal."""
    n = min(len(a), len(b))
    if b.startswith(a) or n == 0:  # a chat that went on, most often
        return n
    differ = np.flatnonzero(np.frombuffer(a, np.uint8, n) != np.frombuffer(b, np.uint8, n))
    return int(differ[0]) if len(differ) else n
