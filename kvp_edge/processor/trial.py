"""Something is tried in a child process, because it may end the process or never return."""

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
    """What a child said, and how it ended.

    Attributes:
        lines: of its standard output, up to where it ended.
        failed: "" when it ended by itself with status 0; else how it ended, "SIGILL" say.
        crashed: what it did ended it, or never returned. False also where something else ended it,
            as Linux does when memory runs out.
    """

    lines: list[str]
    failed: str = ""
    crashed: bool = False


def interpreter() -> str | None:
    """The Python that can run a script in a child process.

    None where ``sys.executable`` is no Python: a frozen app would start itself once more, and a
    program that has Python inside would do whatever it does.
    """
    name = os.path.basename(sys.executable or "").lower()
    ours = name.startswith(("python", "pypy")) and not name.startswith("pythonservice")
    return None if getattr(sys, "frozen", False) or not ours else sys.executable


def attempt(command: Sequence[str], limit_s: float) -> Trial:
    """Run a command, without a shell, with nothing to read and in a session of its own, so that
    Ctrl-C and a terminal that goes away are this process's affair; one that is still running after
    ``limit_s`` seconds is killed.

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
