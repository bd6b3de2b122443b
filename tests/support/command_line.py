"""The command line as users meet it: in this process, and at a terminal."""

from __future__ import annotations

import io
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from kvp_edge.cli import main
from makers.command import COMMAND

FEW_CELLS = ["--kv-budget", "64", "--recent", "16", "--threads", "1"]
GREEDY = ["--temperature", "0"]

STATUS = re.compile(
    r"\[kvp: (?P<seen>\d+) tokens seen, (?P<kept>\d+) kept, (?P<dropped>\d+) dropped by "
    r"(?P<policy>[\w-]+) \((?P<evictions>\d+) evictions\), (?P<mib>[\d.]+) MiB(?: \w+(?:/\w+)?)?"
    r"(, log (?P<log>[\d.]+) MiB)? \| "
    r"read (?P<read>\d+) at [\d.-]+ t/s, wrote (?P<wrote>\d+) at [\d.-]+ t/s\]"
)


class Output:
    """What a command printed, and its exit status."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err
        self.replies = out.splitlines()
        self.stats = [
            {k: v if k == "policy" else float(v) for k, v in m.groupdict("0").items()}
            for m in STATUS.finditer(err)
        ]


Type = Callable[..., Output]


@pytest.fixture
def kvp(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Type:
    """kvp("chat", "--policy", "knorm", typed="Hello.\\n") runs the command in this process."""

    def run(*argv: str, typed: str | bytes = "") -> Output:
        data = typed.encode() if isinstance(typed, str) else typed
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        try:
            status = main(argv)
        except SystemExit as usage:
            status = int(usage.code or 0)
        captured = capsys.readouterr()
        return Output(status, captured.out, captured.err)

    return run


class Terminal:
    """A command at a pseudo-terminal."""

    def __init__(self, *argv: str, term: str = "dumb") -> None:
        self._start([*COMMAND, *argv], term)

    @classmethod
    def of(cls, *command: str, term: str = "dumb") -> Terminal:
        """Any other command."""
        made = cls.__new__(cls)
        made._start(list(command), term)
        return made

    def _start(self, command: list[str], term: str) -> None:
        import pty  # not on every system

        self._ahead = b""
        self._prompt = "> " if term == "dumb" else "\x1b[2C"  # the editor moves past ">" and blank
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.execve(command[0], command, {**os.environ, "TERM": term})

    def read_until(self, text: str, seconds: float = 120) -> str:
        """What was printed since the last call, up to and with ``text``."""
        end = time.monotonic() + seconds
        while text.encode() not in self._ahead:
            ready, _, _ = select.select([self._fd], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"waited in vain for {text!r} after {self._ahead!r}"
            self._ahead += os.read(self._fd, 4096)
        seen, found, self._ahead = self._ahead.partition(text.encode())
        return (seen + found).decode(errors="replace")

    def prompt(self) -> str:
        """What was printed since the last call, up to and with the chat's prompt."""
        return self.read_until(self._prompt)

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def hang_up(self) -> None:
        """Close the terminal."""
        os.close(self._fd)
        self._fd = -1

    def interrupt(self) -> None:
        """Ctrl-C at the prompt. Python's line editor misses one that comes while it handles a key
        or has just printed the prompt."""
        time.sleep(0.2)
        self.type("\x03")

    def exit_status(self, seconds: float = 120) -> int:
        end = time.monotonic() + seconds
        while (found := os.waitpid(self.pid, os.WNOHANG)) == (0, 0):
            assert time.monotonic() < end, "waited in vain for the command to end"
            time.sleep(0.02)
        self.pid = 0
        return os.waitstatus_to_exitcode(found[1])

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        if self.pid:  # a test failed: a hang-up would do, unless the tests run under nohup
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    pytest.importorskip("pty")  # noqa: TID251 (not of Windows)
    opened: list[Terminal] = []

    def open_terminal(*argv: str, term: str = "dumb") -> Terminal:
        opened.append(Terminal(*argv, term=term))
        return opened[-1]

    yield open_terminal
    for one in opened:
        one.close()
