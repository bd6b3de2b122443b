"""Runs something in a child process that may crash or never return."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

_SIGNALS = {one.value: one.name for one in signal.Signals}
_CRASHES = {"SIGILL", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGABRT", "SIGTRAP", "SIGSYS"}
#: Windows ends a process with the number of the exception: 0xC000001D is an illegal instruction.
_FIRST_EXCEPTION = 0x80000000


@dataclass(frozen=True)
class Trial:
    """What a child wrote, and how it ended.

    Attributes:
        lines: of its standard output, up to where it ended.
        failed: "" if it ended by itself with status 0; otherwise how it ended, for example
            "SIGILL".
        crashed: its own action ended it, or never returned. False also if something else ended it,
            such as Linux when memory runs out.
    """

    lines: list[str]
    failed: str = ""
    crashed: bool = False


def interpreter() -> str | None:
    """The Python that can run a script in a child process.

    None if ``sys.executable`` is not Python: a frozen app would start itself again, and a program
    with embedded Python would start whatever it is.
    """
    name = os.path.basename(sys.executable or "").lower()
    ours = name.startswith(("python", "pypy")) and not name.startswith("pythonservice")
    return None if getattr(sys, "frozen", False) or not ours else sys.executable


def attempt(command: Sequence[str], limit_s: float) -> Trial:
    """Run a command without a shell, without input, and in its own session, so that only this
    process gets Ctrl-C and a closed terminal. It is killed after ``limit_s`` seconds.

    Raises:
        OSError: it could not be started.
    """
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=limit_s,
            start_new_session=True,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        return Trial(_lines(late.stdout), f"no answer within {limit_s:g} s", crashed=True)
    return Trial(_lines(done.stdout), *_end(done.returncode))


def _lines(output: bytes | None) -> list[str]:
    return (output or b"").decode(errors="replace").splitlines()


def _end(status: int) -> tuple[str, bool]:
    """``failed`` and ``crashed`` of a Trial."""
    if status < 0:
        name = _SIGNALS.get(-status, f"signal {-status}")
        return name, name in _CRASHES
    if status >= _FIRST_EXCEPTION:
        return f"exception {status:#x}", True
    return f"exit status {status}" if status else "", False
