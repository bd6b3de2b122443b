"""What messages hold stays text: none of it becomes a marker of the chat template.

llama_cpp renders a chat to one text, in which llama.cpp finds special tokens wherever they are
spelled: a message with "<|im_end|>" in it ends its own turn. Here such tokens are found only where
the template writes them:

    What messages, tools and calls hold is sealed before it is rendered (kvp_edge.text.seals).

    A rendered text is cut at its special tokens as llama.cpp does it, but at none that begins where
    a seal was. The pieces between them are tokenized with ``special=False``.

A chat in which nothing spells a special token is neither copied nor cut: llama.cpp tokenizes it.

What llama.cpp calls user defined ("<tool_call>", "<think>") it takes from any text, and it is
ordinary text here, too. Some templates have such tokens for markers (gpt-oss): those in brackets
that the template writes between messages are guarded as well, but for messages of the assistant.
Replies are full of them, and must be read as the tokens that were written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import llama_cpp
from llama_cpp.llama_chat_format import chat_formatter_to_chat_completion_handler

from kvp_edge.text.chat_markers import template_markers
from kvp_edge.text.formatters import formatter_of
from kvp_edge.text.pieces import token_text
from kvp_edge.text.seals import Seals, unsealed
from kvp_edge.text.special_tokens import SpecialTokens

_SPACE = b" \t\n\v\f\r"  # C's isspace
_NORMAL, _BYTE = 4, 32  # enum llama_token_attr in llama.h

#: Of a text: a special token, or [start, end) of what is no special token.
_Part = int | tuple[int, int]


class PlainContents:
    """A chat handler under which what messages hold stays text.

    Args:
        handler: llama_cpp's chat completion handler.
        vocab: llama_vocab pointer.
        tokenize: (text, add_bos, special) -> tokens: llama.cpp's tokenizer.
        seal: kvp_edge.text.seals.new_seal; the same for as long as texts are compared.

    Attributes:
        handler: as it was given.
        sealing: does the same, with seals in what messages hold.
        guarded: the special tokens that only the template writes: token -> text.
    """

    def __init__(
        self,
        handler: Callable[..., Any],
        vocab: Any,
        tokenize: Callable[[bytes, bool, bool], list[int]],
        seal: str,
    ) -> None:
        self._vocab = vocab
        self._special = special = SpecialTokens.of(vocab)
        self._tokenize = tokenize
        self._seal = seal.encode()
        # somebody's own handler may do more than to write a prompt
        markers = template_markers(handler) if formatter_of(handler) is not None else []
        self.guarded = special.of_markers(markers)
        control = [text for token, text in self.guarded.items() if special.is_control(token)]
        self.handler = handler
        self.sealing = _sealing(handler, Seals(self.guarded.values(), control, seal))

    def is_sealed(self, text: bytes) -> bool:
        return self._seal in text

    def tokens(self, text: bytes, add_bos: bool) -> list[int]:
        """Those of a text that the handler rendered, special ones included."""
        plain, closed = unsealed(text, self._seal)
        tokens, end = self._added(add_bos)
        for part in self._parts(plain, closed):
            if isinstance(part, int):
                tokens.append(part)
            else:
                tokens += self._ordinary(self._tokenize(plain[slice(*part)], False, False))
        return tokens + end

    def _added(self, add_bos: bool) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and behind a text."""
        added = self._tokenize(b"", add_bos, True)
        n_before = int(
            llama_cpp.llama_vocab_get_add_bos(self._vocab)
            or llama_cpp.llama_vocab_type(self._vocab) == llama_cpp.LLAMA_VOCAB_TYPE_WPM
        )
        return added[:n_before], added[n_before:]

    def _parts(self, text: bytes, closed: set[int]) -> list[_Part]:
        """As tokenizer_st_partition cuts a text (src/llama-vocab.cpp), but no guarded token begins
        at a ``closed`` byte."""
        parts: list[_Part] = [(0, len(text))] if text else []
        for token, special in self._longest_first:
            if special in text:
                not_at = closed if token in self.guarded else frozenset[int]()
                parts = [p for part in parts for p in self._cut(text, part, token, not_at)]
        return parts

    @cached_property
    def _longest_first(self) -> list[tuple[int, bytes]]:
        return sorted(self._special.texts.items(), key=lambda item: -len(item[1]))

    def _cut(
        self, text: bytes, part: _Part, token: int, not_at: set[int] | frozenset[int]
    ) -> Iterator[_Part]:
        """A part, cut at every place of one special token."""
        if isinstance(part, int):
            yield part
            return
        (start, end), special = part, self._special.texts[token]
        at = text.find(special, start, end)
        while at >= 0:
            if at in not_at:
                at = text.find(special, at + 1, end)
                continue
            before = at
            if self._special.strips_before(token):
                before = start + len(text[start:at].rstrip(_SPACE))
            if before > start:
                yield start, before
            yield token
            start = at + len(special)
            if self._special.strips_behind(token):
                start = end - len(text[start:end].lstrip(_SPACE))
            at = text.find(special, start, end)
        if start < end:
            yield start, end

    # -- tokens that are guarded, and come about all the same --------------------------------

    def _ordinary(self, tokens: list[int]) -> list[int]:
        """The same text without guarded tokens. Some vocabularies merge ordinary tokens to one;
        and those that llama.cpp takes from any text are here."""
        if self._never.isdisjoint(tokens):
            return tokens
        return [t for token in tokens for t in self._spelled(token)]

    @cached_property
    def _never(self) -> set[int]:
        """What is unknown to the vocabulary may be in any text."""
        return {token for token in self.guarded if not self._special.is_unknown(token)}

    def _spelled(self, token: int) -> list[int]:
        """A token; of a guarded one its text in others, each as long as possible."""
        if token not in self._never:
            return [token]
        text, tokens = self.guarded[token], list[int]()
        while text:
            n = next((n for n in range(len(text), 0, -1) if text[:n] in self._by_text), 0)
            tokens += [self._by_text[text[:n]]] if n else []
            text = text[n or 1 :]  # the vocabulary cannot write this byte at all
        return tokens

    @cached_property
    def _by_text(self) -> dict[bytes, int]:
        """The ordinary tokens; of those with the same text the first normal one."""
        found: dict[bytes, int] = {}
        for attribute in (_NORMAL, _BYTE):
            for token in range(llama_cpp.llama_vocab_n_tokens(self._vocab)):
                has = llama_cpp.llama_vocab_get_attr(self._vocab, token)
                if has & attribute and token not in self.guarded:
                    found.setdefault(token_text(self._vocab, token), token)
        return found


def _sealing(handler: Callable[..., Any], seals: Seals) -> Callable[..., Any]:
    """A handler that does the same, with seals. What llama_cpp itself makes of tools (grammars, the
    names in its result) has none: they are set where the prompt is written. Handlers that write it
    by themselves get messages with seals."""
    formatter = formatter_of(handler)
    if formatter is not None:
        sealed = chat_formatter_to_chat_completion_handler(lambda **how: formatter(**seals.on(how)))
        return sealed  # type: ignore[no-any-return]  # llama_cpp is untyped

    def handle(*, messages: Any, **how: Any) -> Any:
        return handler(**seals.on({"messages": messages}), **how)

    return handle
