"""Listen to llama.cpp's log while a model is loaded.

llama.cpp reports why a file was refused, and how large the KV cache became, only in its log.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import llama_cpp

_ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR in ggml.h

# src/llama-kv-cache.cpp: "size = %7.2f MiB (%6u cells, ..."; one line for each cache
_KV_SIZE = re.compile(r"size =\s*([0-9.]+) MiB \(\s*([0-9]+) cells")

# src/llama-model.cpp, src/llama-context.cpp: "%12s model buffer size = %8.2f MiB", for each device
_BUFFER_SIZE = re.compile(r"(model|compute|output) buffer size =\s*([0-9.]+) MiB")


@dataclass(frozen=True)
class Footprint:
    """Bytes that llama.cpp allocates for a model and its context, on all devices together, as it
    reports them: to a hundredth of a MiB for each buffer.

    Attributes:
        weights: of the model; a file that is mapped into memory counts.
        cells: keys and values.
        compute: what a batch takes while it is computed, and its logits.
    """

    weights: int
    cells: int
    compute: int

    @property
    def total(self) -> int:
        return self.weights + self.cells + self.compute


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

    def kv_bytes(self) -> int:
        """Bytes of all KV caches together."""
        return round(sum(mib for mib, _ in self.kv_mib()) * 2**20)

    def footprint(self) -> Footprint:
        """What was allocated meanwhile."""
        mib = {"model": 0.0, "compute": 0.0, "output": 0.0}
        for _, text in self.lines:
            if match := _BUFFER_SIZE.search(text):
                mib[match.group(1)] += float(match.group(2))
        compute = round((mib["compute"] + mib["output"]) * 2**20)
        return Footprint(round(mib["model"] * 2**20), self.kv_bytes(), compute)


class _Ears:
    """llama.cpp has one log callback per process. Ours is made once and never freed, because
    another thread may be about to call it when it is removed. Each thread hears its own lines;
    those of other threads go to the previous callback."""

    def __init__(self) -> None:
        self._callback = llama_cpp.llama_log_callback(self._hear)
        self._installing = threading.RLock()
        self._listeners = 0
        self._previous: Any = None
        self._mine = threading.local()

    def _hear(self, level: int, text: bytes, user_data: Any) -> None:
        listening: list[tuple[LlamaLog, bool]] = getattr(self._mine, "listening", [])
        pass_on = True
        for log, passes in reversed(listening):
            log.lines.append((level, text.decode(errors="replace")))
            if not passes:
                pass_on = False
                break
        previous = self._previous
        if pass_on and previous:
            previous(level, text, user_data)

    @contextmanager
    def listen(self, log: LlamaLog, pass_on: bool) -> Iterator[None]:
        listening = self._mine.__dict__.setdefault("listening", [])
        with self._installing:
            if self._listeners == 0:
                self._install()
            self._listeners += 1
        try:
            listening.append((log, pass_on))
            yield
        finally:
            listening[:] = [listener for listener in listening if listener[0] is not log]
            with self._installing:
                self._listeners -= 1
                if self._listeners == 0:
                    self._take_out()

    def _install(self) -> None:
        previous, data = _current()
        self._previous = previous
        # Another thread may read callback and data between two writes. So the data stay the same,
        # and our callback passes them on.
        llama_cpp.llama_log_set(self._callback, data)

    def _take_out(self) -> None:
        current, data = _current()
        if _address(current) == _address(self._callback):  # else somebody listens since
            llama_cpp.llama_log_set(self._previous, data)


def _current() -> tuple[Any, ctypes.c_void_p]:
    callback, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(callback), ctypes.byref(data))
    return callback, data


def _address(callback: Any) -> int | None:
    return ctypes.cast(callback, ctypes.c_void_p).value


_ears = _Ears()


@contextmanager
def listen(*, pass_on: bool) -> Iterator[LlamaLog]:
    """Collect the lines that this thread's calls log inside the ``with`` block.

    Args:
        pass_on: also hand each line to whoever listened before.
    """
    log = LlamaLog()
    with _ears.listen(log, pass_on):
        yield log
