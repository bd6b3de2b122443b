"""The options that the command line has, read from its own help."""

from __future__ import annotations

import contextlib
import io
import re

import pytest

from kvp_edge.cli import main

COMMANDS = (
    *("chat", "run", "demo", "policies", "learn", "trace", "train", "export", "inspect", "eval"),
    "doctor",
)
_AT_LINE_START = re.compile(r"^[\s│*]*((?:--?[\w-]+(?: [\w.{},]+)?(?:, | |/)?)+)")


def options_of(command: str, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The long options of ``kvp-edge COMMAND``; "" is kvp-edge itself."""
    monkeypatch.setenv("COLUMNS", "1000")  # no line of prose is wrapped before an option
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        main([*filter(None, [command]), "--help"])
    found = (_AT_LINE_START.match(line) for line in shown.getvalue().splitlines())
    return {option for one in found if one for option in re.findall(r"--[a-z][\w-]*", one.group(1))}
