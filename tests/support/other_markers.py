"""The same vocabulary with special tokens that no message can spell: what messages hold is ordinary
text there, whatever llama.cpp does with special tokens."""

from __future__ import annotations

import os
import struct
from collections.abc import Collection
from pathlib import Path

import gguf

#: In no text of these tests.
_UNSPELLED = "\x02"


def renamed(text: str) -> str:
    """A token's text, as long as it was in bytes."""
    return _UNSPELLED * len(text[0].encode()) + text[1:]


def renamed_in(template: str) -> str:
    """A template that writes these tokens, if it writes no others than "<|...|>"."""
    return template.replace("<|", renamed("<|"))


def write_with_other_markers(path: str | Path, to: str | Path, keep: Collection[str] = ()) -> Path:
    """A copy of a GGUF file, for ``vocab_only=True``: it has what the file says of itself, its chat
    template too, and no tensors. The tokens to ``keep`` can be spelled still."""
    reader = gguf.GGUFReader(path)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    with open(path, "rb") as file:
        head = file.read(reader.data_offset)
    for text, kind in zip(tokens, types, strict=True):
        if kind == gguf.TokenType.CONTROL and text not in keep:
            head = head.replace(_string(text), _string(renamed(text)))
    template = reader.fields.get("tokenizer.chat_template")
    if template is not None:
        text = template.contents()
        head = head.replace(_string(text), _string(renamed_in(text)))
    to = Path(to)
    to.write_bytes(head)
    os.truncate(to, os.path.getsize(path))
    return to


def _string(text: str) -> bytes:
    """As in GGUF files."""
    return struct.pack("<Q", len(text.encode())) + text.encode()
