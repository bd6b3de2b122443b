"""A signal that asks to end is heeded wherever it comes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from kvp_edge.cli.ending import Ended, signals_call, signals_raise

needs_signals = pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="POSIX signals")


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]


@needs_signals
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_raises_and_what_was_there_before_is_put_back(number: signal.Signals) -> None:
    before, n_threads = handlers(), threading.active_count()
    with pytest.raises(Ended) as ended, signals_raise():
        os.kill(os.getpid(), number)
    assert ended.value.status == 128 + number
    assert handlers() == before
    assert threading.active_count() == n_threads
    assert signal.set_wakeup_fd(-1) == -1


@needs_signals
def test_without_a_signal_nothing_is_left_behind() -> None:
    before, n_threads = handlers(), threading.active_count()
    with signals_raise():
        pass
    assert (handlers(), threading.active_count()) == (before, n_threads)
    assert signal.set_wakeup_fd(-1) == -1


@needs_signals
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_calls_where_an_exception_would_be_lost(number: signal.Signals) -> None:
    told: list[Ended] = []
    heard, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    before = signal.set_wakeup_fd(wakeup)
    try:
        with signals_raise():
            outside = handlers()
            with signals_call(told.append):
                signal.set_wakeup_fd(-1)  # as an event loop does at its end
                os.kill(os.getpid(), number)
            assert [one.status for one in told] == [128 + number]
            assert handlers() == outside
            with pytest.raises(Ended):
                os.kill(os.getpid(), number)
        assert signal.set_wakeup_fd(before) == wakeup
    finally:
        signal.set_wakeup_fd(before)
        os.close(heard)
        os.close(wakeup)


def test_in_another_thread_there_are_no_signals_to_call_for() -> None:
    before, found = handlers(), []

    def enter() -> None:
        with signals_call(found.append):
            found.append(handlers() == before)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [True]


#: Another thread gets the signal, so the C function that the main thread waits in goes on waiting,
#: as one does that begins to wait just after a signal.
_MISSED = """
import ctypes, signal, threading, time
from kvp_edge.cli.ending import Ended, signals_raise
def hear():
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
with signals_raise():
    try:
        timer = threading.Timer(0.5, hear)
        timer.start()
        ctypes.CDLL(None).pause()
        print("went on")
    except Ended as ended:
        print(ended)
"""


@needs_signals
def test_a_signal_that_comes_just_before_a_wait_ends_it() -> None:
    command = [sys.executable, "-c", _MISSED]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == "ended by SIGTERM\n"
