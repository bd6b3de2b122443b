"""The same vocabulary with special tokens that no message can spell: what messages hold is ordinary
text there, whatever llama.cpp does with special tokens."""

from __future__ import annotations

import os
import struct
from collections.abc import Collection
from pathlib import Path

import llama_cpp

#: In no text of these tests.
_UNSPELLED = "\x02"

#: What a file says of itself is in its first bytes.
_HEAD = 2**26

_ONLY_SPECIAL = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN


def renamed(text: str) -> str:
    """A token's text, as long as it was in bytes."""
    return _UNSPELLED * len(text[0].encode()) + text[1:]


def renamed_in(template: str) -> str:
    """A template that writes these tokens, if it writes no others than "<|...|>"."""
    return template.replace("<|", renamed("<|"))


def write_with_other_markers(path: str | Path, to: str | Path, keep: Collection[str] = ()) -> Path:
    """A copy of a GGUF file, for ``vocab_only=True``, with other texts of its control tokens, and
    with these in its chat template. The tokens to ``keep`` can be spelled still."""
    llm = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    vocab, template = llm._model.vocab, llm.metadata.get("tokenizer.chat_template")
    tokens, others = [], []
    for token in range(llama_cpp.llama_vocab_n_tokens(vocab)):
        text = llama_cpp.llama_vocab_get_text(vocab, token).decode()
        special = llama_cpp.llama_vocab_get_attr(vocab, token) & _ONLY_SPECIAL
        tokens.append(text)
        others.append(renamed(text) if special and text not in keep else text)
    llm.close()
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    head = _replace(head, *(b"".join(map(_string, texts)) for texts in (tokens, others)))
    if template is not None:
        head = _replace(head, _string(template), _string(renamed_in(template)))
    to = Path(to)
    to.write_bytes(head)
    os.truncate(to, os.path.getsize(path))
    return to


def _replace(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1
    return data.replace(old, new)


def _string(text: str) -> bytes:
    """As in GGUF files."""
    return struct.pack("<Q", len(text.encode())) + text.encode()
