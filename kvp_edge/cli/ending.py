"""What ends a command from outside."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

_SIGNALS = ("SIGTERM", "SIGHUP")  # the second one does not exist everywhere
_PATIENCE_S = 0.2


class Ended(BaseException):
    """A signal has asked the process to end. No Exception: nothing that goes wrong is meant."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.status = 128 + number  # as a shell tells it


@contextmanager
def signals_raise() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise ``Ended``, where they would end the process on the spot. A
    signal that is ignored (nohup) stays ignored."""
    came = threading.Event()

    def end(number: int, _frame: Any) -> None:
        came.set()
        raise Ended(number)

    main = threading.current_thread() is threading.main_thread()
    repeats = main and hasattr(signal, "pthread_kill")  # not on Windows
    with _handling(end, *_SIGNALS), _repeating(came.wait) if repeats else nullcontext():
        yield


@contextmanager
def signals_call(tell: Callable[[Ended], object]) -> Iterator[None]:
    """Inside, they call this instead: in an event loop an exception out of nowhere may be lost.

    The event loop may set a wake-up of its own, which is taken back at the end.
    """
    if threading.current_thread() is not threading.main_thread():  # which has no handlers
        yield
        return
    wakeup = signal.set_wakeup_fd(-1)
    try:
        with _handling(lambda number, _frame: tell(Ended(number)), *_SIGNALS):
            yield
    finally:
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, Ctrl-C and the signals that ask to end have no effect: for a short last work."""
    with _handling(signal.SIG_IGN, "SIGINT", *_SIGNALS):
        yield


@contextmanager
def _repeating(handled: Callable[[float], bool]) -> Iterator[None]:
    """Inside, a signal is sent again until its handler has run.

    Python runs handlers between two of its own steps. A signal that comes after the last of them
    and before C code begins to wait (the line editor for a key) would be heeded only after that.

    Args:
        handled: waits for so many seconds at most; whether the handler has run.
    """
    heard, told = os.pipe()
    os.set_blocking(told, False)
    waiting = threading.get_ident()

    def repeat() -> None:
        while numbers := os.read(heard, 1):  # nothing when the other end is closed
            number = numbers[0]
            if signal.Signals(number).name in _SIGNALS and not handled(_PATIENCE_S):
                signal.pthread_kill(waiting, number)  # which is told here, too

    before = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    thread = threading.Thread(target=repeat, name="kvp-edge signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(told)
        thread.join()
        os.close(heard)


@contextmanager
def _handling(handler: Any, *names: str) -> Iterator[None]:
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
