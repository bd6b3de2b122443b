"""What a chat template and a person have written into a conversation, found in its tokens."""

from __future__ import annotations

import re
import warnings
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

from kvp_edge.arrays import IntArray
from kvp_edge.errors import BudgetError
from kvp_edge.text.chat_head import Head
from kvp_edge.text.chat_markers import template_markers
from kvp_edge.text.pieces import token_text
from kvp_edge.text.spans import LOOK_BACK, Span, find_spans

#: Before the text of a guarded token. UTF-8 has no such byte.
_GUARDED = b"\xff"


class ChatText:
    """Reads token ids as the text they stand for.

    Args:
        vocab: llama_vocab pointer.
        handler: returns llama_cpp's chat completion handler, asked for once, when it is needed.
        keep_whole: one of KEEP_WHOLE.
        needs_turns: warn if the chat template has no markers between messages.
        guarded: returns the special tokens that only the template writes, token -> text; asked for
            once, too.
    """

    def __init__(
        self,
        vocab: Any,
        handler: Callable[[], Any],
        keep_whole: str,
        needs_turns: bool,
        guarded: Callable[[], Mapping[int, bytes]] = dict,
    ) -> None:
        self._vocab = vocab
        self._handler = handler
        self._keep_whole = keep_whole
        self._needs_turns = needs_turns
        self._ask_guarded = guarded
        self._pieces: dict[int, bytes] = {}

    def piece(self, token: int) -> bytes:
        """A token's text, special tokens included. That of a guarded one begins with a byte that is
        in no text: it is not the same as its text in other tokens."""
        piece = self._pieces.get(token)
        if piece is None:
            piece = token_text(self._vocab, token)
            if token in self._guarded:
                piece = _GUARDED + piece
            self._pieces[token] = piece
        return piece

    @cached_property
    def _guarded(self) -> Mapping[int, bytes]:
        return self._ask_guarded()

    @cached_property
    def _in_pieces(self) -> list[bytes]:
        """The markers as they are in ``piece``s, longest first."""
        if not self._guarded:
            return self.markers
        texts = sorted(self._guarded.values(), key=len, reverse=True)
        guarded = re.compile(b"|".join(map(re.escape, texts)))
        return [guarded.sub(lambda found: _GUARDED + found[0], marker) for marker in self.markers]

    @cached_property
    def markers(self) -> list[bytes]:
        """What the chat template writes between messages (kvp_edge.text.chat_markers)."""
        markers = template_markers(self._handler())
        if self._needs_turns and not markers:
            warnings.warn(
                "isolate_turns has no effect: this model's chat template has no markers "
                "between messages, so turns cannot be told apart",
                stacklevel=2,
            )
        return markers

    def spans(self, ids: Sequence[int] | IntArray, start: int, end: int) -> list[Span]:
        """Spans that hold any of the tokens [start, end) of a conversation; see SpanFinder."""
        # a marker that reaches into the range begins no more tokens before it than it has bytes
        first = max(0, start - max(LOOK_BACK, *map(len, self._in_pieces), 0))
        pieces = [self.piece(int(token)) for token in ids[first:end]]
        found = find_spans(pieces, self._in_pieces, self._keep_whole, start - first)
        return [(first + a, first + b, kind) for a, b, kind in found]

    def protected(
        self, head: Head | None, tokens: Sequence[int], protectable: Callable[[int], int]
    ) -> int:
        """How many of the first tokens of a chat are to be protected: those of its head, without
        the definitions of tools if these do not fit.

        Args:
            protectable: see EvictionManager.protectable.

        Raises:
            BudgetError: the system prompt does not fit.
        """
        if head is not None and head.first is not None:
            with_tools = self.tokens_of(head, tokens)
            try:
                if with_tools is not None:
                    protectable(with_tools)
                    return with_tools
            except BudgetError as error:
                warnings.warn(f"the definitions of tools are not protected: {error}", stacklevel=2)
            head = head._replace(first=None)
        length = 0 if head is None else self.tokens_of(head, tokens)
        if length is None:
            warnings.warn(
                "the chat template does not show the system prompt to the model, so there is "
                "nothing to protect",
                stacklevel=2,
            )
        return length or 0

    def tokens_of(self, head: Head, tokens: Sequence[int]) -> int | None:
        """How many of the first tokens of a chat hold its head; None if it is not there."""
        n = 128
        while True:  # it is one of the first things in a long chat
            pieces = [self.piece(token) for token in tokens[:n]]
            end = head.end(b"".join(pieces), self._in_pieces)
            if end is not None:
                return bisect_left(list(accumulate(map(len, pieces))), end) + 1 if end else 0
            if n >= len(tokens):
                return None
            n *= 2
