"""Listen to llama.cpp's log while a model is loaded.

llama.cpp reports why a file was refused, and how large the KV cache became, only in its log.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import llama_cpp

_ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR in ggml.h

# src/llama-kv-cache.cpp: "size = %7.2f MiB (%6u cells, ..."; one line for each cache
_KV_SIZE = re.compile(r"size =\s*([0-9.]+) MiB \(\s*([0-9]+) cells")


class LlamaLog:
    """The lines heard, and what can be learned from them."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, str]] = []

    def first_error(self) -> str | None:
        """llama.cpp's first error line, without its function name; None when it reported none."""
        for level, text in self.lines:
            if level == _ERROR_LEVEL and text.strip():
                return re.sub(r"^[a-z_0-9]+: (error loading model: )?", "", text.strip())
        return None

    def kv_mib(self) -> list[tuple[float, int]]:
        """(MiB, cells) of every KV cache that was made, as llama.cpp reports them."""
        found = (_KV_SIZE.search(text) for _, text in self.lines)
        return [(float(m.group(1)), int(m.group(2))) for m in found if m]


@contextmanager
def listen(*, pass_on: bool) -> Iterator[LlamaLog]:
    """Collect log lines inside the ``with`` block.

    Args:
        pass_on: also hand each line to whoever listened before.
    """
    log = LlamaLog()
    previous = llama_cpp.llama_log_callback()
    previous_data = ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(previous), ctypes.byref(previous_data))

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def hear(level: int, text: bytes, user_data: Any) -> None:
        log.lines.append((level, text.decode(errors="replace")))
        if pass_on and previous:
            previous(level, text, previous_data)

    llama_cpp.llama_log_set(hear, None)
    try:
        yield log
    finally:
        llama_cpp.llama_log_set(previous, previous_data)
