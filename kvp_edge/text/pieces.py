"""The text of one token."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp


def token_text(vocab: Any, token: int) -> bytes:
    """llama_cpp's token_to_piece returns its whole buffer, and cuts long tokens to 32 bytes."""
    size = 32
    while True:
        buffer = ctypes.create_string_buffer(size)
        n = llama_cpp.llama_token_to_piece(vocab, token, buffer, size, 0, True)
        if n >= 0:
            return buffer.raw[:n]
        size = -n
