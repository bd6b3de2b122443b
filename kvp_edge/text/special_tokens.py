"""The special tokens of a vocabulary: those that a text may spell out.

llama.cpp's tokenizer first cuts a text at the texts of special tokens (tokenizer_st_partition in
src/llama-vocab.cpp). There are two kinds:

    control: taken only with ``special=True``: "<|im_end|>". What is unknown ("<unk>") counts too.
    added:   taken from any text: "<tool_call>", or a run of spaces ("user defined" in GGUF).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import llama_cpp

# enum llama_token_attr in llama.h
_UNKNOWN, _CONTROL, _ADDED = 1, 8, 16
_STRIPS_BEFORE, _STRIPS_BEHIND = 128, 256  # LSTRIP, RSTRIP


@dataclass(frozen=True)
class SpecialTokens:
    """Token -> its text, and token -> its attributes; all special tokens that have a text."""

    texts: Mapping[int, bytes]
    attributes: Mapping[int, int]

    @classmethod
    def of(cls, vocab: Any) -> SpecialTokens:
        """
        Args:
            vocab: llama_vocab pointer.
        """
        found = {
            token: attribute
            for token in range(llama_cpp.llama_vocab_n_tokens(vocab))
            if (attribute := llama_cpp.llama_vocab_get_attr(vocab, token))
            & (_UNKNOWN | _CONTROL | _ADDED)
        }
        texts = {token: llama_cpp.llama_vocab_get_text(vocab, token) for token in found}
        texts = {token: text for token, text in texts.items() if text}
        return cls(texts, {token: found[token] for token in texts})

    def is_control(self, token: int) -> bool:
        """Whether it is taken only with ``special=True``."""
        return bool(self.attributes[token] & (_UNKNOWN | _CONTROL))

    def is_unknown(self, token: int) -> bool:
        """Whether it stands for what the vocabulary cannot write, too."""
        return bool(self.attributes[token] & _UNKNOWN)

    def strips_before(self, token: int) -> bool:
        """Whether white space before it is left out."""
        return bool(self.attributes[token] & _STRIPS_BEFORE)

    def strips_behind(self, token: int) -> bool:
        """Whether white space behind it is left out."""
        return bool(self.attributes[token] & _STRIPS_BEHIND)

    def of_markers(self, markers: Iterable[bytes]) -> dict[int, bytes]:
        """Those that make the markers of a chat template: all control tokens, and of the added ones
        those in brackets that the template writes ("<|start|>" of gpt-oss). Token -> its text."""
        written = b"\0".join(markers)
        return {
            token: text
            for token, text in self.texts.items()
            if self.is_control(token) or (_in_brackets(text) and text in written)
        }


def _in_brackets(text: bytes) -> bool:
    """Not so a line end, or a word, which templates write between markers."""
    return len(text) > 2 and text[:1] + text[-1:] in (b"<>", b"[]")
