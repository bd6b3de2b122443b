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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import llama_cpp
import numpy as np

from kvp_edge.arrays import IntArray

#: Shorter texts are not worth remembering.
WORTH_BYTES = 4096

# enum llama_token_attr in llama.h: what the tokenizer cuts texts at
_UNKNOWN, _CONTROL, _USER_DEFINED = 1, 8, 16
_STRIPS_BEFORE = 128  # LSTRIP
_VOCAB_TYPE_WPM = 3  # ends texts with a token of its own


def marks(vocab: object, template: bytes) -> list[bytes]:
    """Where texts may be cut: the isolated special tokens that a chat template writes.

    Args:
        vocab: a llama_vocab.
        template: what the template writes around messages.

    Returns:
        Their texts; none if the tokenizer adds tokens of its own at the end of texts.
    """
    if llama_cpp.llama_vocab_type(vocab) == _VOCAB_TYPE_WPM:
        return []
    if llama_cpp.llama_vocab_get_add_eos(vocab):
        return []
    attributes = map(
        partial(llama_cpp.llama_vocab_get_attr, vocab),
        range(llama_cpp.llama_vocab_n_tokens(vocab)),
    )
    special = {
        token: attribute
        for token, attribute in enumerate(attributes)
        if attribute & (_UNKNOWN | _CONTROL | _USER_DEFINED)
    }
    texts = {token: llama_cpp.llama_vocab_get_text(vocab, token) for token in special}
    return [
        text
        for token, text in texts.items()
        if text in template and not special[token] & _STRIPS_BEFORE
        if isolated(text, texts.values())
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


@dataclass(frozen=True)
class _Known:
    """A text and its tokens."""

    text: bytes
    add_bos: bool
    tokens: list[int]
    ids: IntArray  # the same
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
        self._known = _Known(b"", False, [], np.empty(0, np.int32), [])

    def tokens(self, text: bytes, add_bos: bool) -> list[int]:
        """What ``tokenize`` gives for a text, but tokenizing only what is new."""
        known = self._known  # read once: another thread may put another one in its place
        at, n_known, cuts = 0, 0, known.cuts[:0]
        if known.add_bos == add_bos:
            same = _equal_beginning(known.text, text) - self._longest
            cuts = known.cuts[: _count(known.cuts, same)]
            if cuts:
                at, n_known = cuts[-1]
        tokens = known.tokens[:n_known]
        for start, end in self._pieces(text, at):
            if start > at:
                cuts.append((start, len(tokens)))
            tokens += self._tokenize(text[start:end], add_bos and start == 0)
        ids = np.concatenate((known.ids[:n_known], np.asarray(tokens[n_known:], np.int32)))
        self._known = _Known(text, add_bos, tokens, ids, cuts)
        return tokens.copy()

    def ids(self, tokens: list[int]) -> IntArray | None:
        """The same tokens as int32 [n], if they are those given last."""
        known = self._known
        return known.ids if known.tokens == tokens else None

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
    n = min(len(a), len(b))
    if n == 0:
        return 0
    differ = np.flatnonzero(np.frombuffer(a, np.uint8, n) != np.frombuffer(b, np.uint8, n))
    return int(differ[0]) if len(differ) else n
