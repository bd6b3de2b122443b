"""Functions to call when ggml aborts the process.

When a device that holds a model or its cache fails (an error of a GPU driver, an RPC server that
went away), ggml calls ggml_abort() (ggml/src/ggml.c) in whatever thread it is in. That calls one
callback of the process (ggml_set_abort_callback in ggml.h), and then abort(): nothing in the
process can go on, but the callback can still write down what must not be lost.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import sys
import threading
from collections.abc import Callable
from typing import Any

from llama_cpp import llama_cpp

#: How long another failing thread waits for the first one to finish its calls.
_PATIENCE_S = 60.0

_Callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p)  # ggml_abort_callback_t


def before_abort(do: Callable[[str], None]) -> Callable[[], None]:
    """Have ``do(message)`` called with ggml's message just before ggml ends the process.

    It is called in the thread that failed, which may not be a Python thread, while other threads
    may wait inside llama.cpp for ever. It must not call llama.cpp. The newest registered function
    is called first, and each only once, even if several threads fail. An exception is printed to
    stderr, and the others are still called. Then ggml's message is printed as usual (without a
    backtrace), and the process ends by SIGABRT.

    Returns:
        A function that takes ``do`` back; calling it again has no effect. When the last one is
        taken back, ggml ends the process as it did before.
    """
    return _process.before_abort(do)


def _set_callback(callback: Any) -> Any:
    """ggml_set_abort_callback of the ggml that llama.cpp runs on. libllama depends on it, so its
    symbols are found there; opened by name, a wheel's second copy of the file would be another."""
    # Windows does not look into what a library depends on, but finds a loaded one by its name.
    library = ctypes.CDLL("ggml-base.dll") if sys.platform == "win32" else llama_cpp._lib
    function = library["ggml_set_abort_callback"]
    function.argtypes, function.restype = [_Callback], _Callback
    return function(callback)


def _say(text: str) -> None:
    with contextlib.suppress(Exception):
        print(text, file=sys.stderr, flush=True)


class _Process:
    """Everything that ``before_abort`` was given; there is one, since ggml has one callback."""

    def __init__(self) -> None:
        self._todo: dict[object, Callable[[str], None]] = {}
        self._callback = _Callback(self._at_abort)  # lives as long as ggml may call it: for ever
        self._previous: Any = None  # ggml's callback before ours; None while ours is not installed
        # re-entrant: a Llama may be collected, and take back, at any time
        self._changing = threading.RLock()
        self._failed = threading.Lock()  # taken by the first failure, for ever
        self._failed_in: int | None = None  # the thread it came from
        self._all_said = threading.Event()
        atexit.register(self._uninstall)  # later there is no Python to call

    def before_abort(self, do: Callable[[str], None]) -> Callable[[], None]:
        key = object()
        with self._changing:
            self._todo[key] = do
            if self._previous is None:
                self._previous = _set_callback(self._callback)

        def take_back() -> None:
            with self._changing:
                self._todo.pop(key, None)
                if not self._todo:
                    self._uninstall()

        return take_back

    def _uninstall(self) -> None:
        with self._changing:
            if self._previous is not None:
                _set_callback(self._previous)
                self._previous = None

    def _at_abort(self, message: bytes) -> None:
        text = message.decode(errors="replace")
        if not self._failed.acquire(blocking=False):
            _say(text)
            if self._failed_in != threading.get_ident():
                self._all_said.wait(_PATIENCE_S)  # returning would end the process too early
            return
        self._failed_in = threading.get_ident()
        for do in reversed(list(self._todo.values())):
            try:
                do(text)
            except BaseException as error:  # whatever it is, call the others
                _say(f"{type(error).__name__}: {error}")
        if self._previous:
            self._previous(message)
        else:
            _say(text)
        self._all_said.set()


_process = _Process()
