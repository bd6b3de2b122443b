"""What the command line shows: replies on standard output, everything else on standard error.

A terminal obeys control characters (ESC ] 0 ; ... BEL sets its title, others move the cursor or
answer in the user's name), and texts of a model, a file or a file's name may hold any. So whatever
goes to a terminal has them replaced; what goes into a pipe or a file are the bytes as they are.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any

# C0 but tab and line end, and DEL, have pictures in Unicode; C1 has none
_PICTURES = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}
_ON_ONE_LINE = {**_PICTURES, 0x09: 0x2409, 0x0A: 0x240A}


def visible(text: str) -> str:
    """The text with a picture in place of every control character but tab and line end."""
    return text.translate(_PICTURES)


def on_one_line(text: str) -> str:
    """``visible``, for what must not look like several lines."""
    return text.translate(_ON_ONE_LINE)


def note(text: str, end: str = "\n") -> None:
    """Tell the user something that is no reply. Where nobody can read it, nothing happens."""
    with contextlib.suppress(OSError):
        print(visible(text), end=end, file=sys.stderr, flush=True)


def say(text: str, end: str = "\n") -> None:
    """Write a reply or a result to standard output.

    Raises:
        BrokenPipeError: the reader left.
        OSError: it cannot be written; the message says why.
    """
    try:
        print(visible(text) if sys.stdout.isatty() else text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(f"cannot write to standard output: {error.strerror}") from error


def open_streams() -> bool:
    """Make the three standard streams safe to use: none is missing, and none fails on a character
    that its encoding lacks or on bytes that are no text.

    A missing one is replaced by the null device, which also takes the number: files opened later
    would get it, and llama.cpp's messages would be written into them.

    Returns:
        False if standard output was closed: there is nowhere to write to.
    """
    had_output = sys.stdout is not None
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(null, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdin, sys.stdout):
        _replace_what_it_lacks(stream)
    return had_output


def _replace_what_it_lacks(stream: Any) -> None:
    # a caller of main() may have set another kind of stream, or have read of it
    with contextlib.suppress(AttributeError, io.UnsupportedOperation):
        stream.reconfigure(errors="replace")


def let_go_of_output() -> None:
    """Drop what standard output cannot take any more; Python would try again when it exits, and
    complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
