"""What ends a command from outside."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = ("SIGTERM", "SIGHUP")  # the second one does not exist everywhere


class Ended(BaseException):
    """A signal has asked the process to end. No Exception: nothing that goes wrong is meant."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.status = 128 + number  # as a shell tells it


@contextmanager
def signals_raise() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise ``Ended``, where they would end the process on the spot. A
    signal that is ignored (nohup) stays ignored."""
    with _handling(_raise, *_SIGNALS):
        yield


@contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, Ctrl-C and the signals that ask to end have no effect: for a short last work."""
    with _handling(signal.SIG_IGN, "SIGINT", *_SIGNALS):
        yield


def _raise(number: int, _frame: Any) -> None:
    raise Ended(number)


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
