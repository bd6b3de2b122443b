"""A chat that ends otherwise than it was meant to leaves its conversation in a file."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from kvp_edge.cli.device_failure import ends_with_a_sentence
from kvp_edge.cli.ending import signals_raise, undisturbed
from kvp_edge.cli.shown import note
from kvp_edge.llama import Llama


class _RescueFile:
    """A file in the folder for temporary files, created when it is needed and not before."""

    def __init__(self) -> None:
        try:
            self._folder = tempfile.gettempdir()
        except FileNotFoundError:  # no folder can be written to; a chat needs none until it fails
            self._folder = os.getcwd()
        self._path: str | None = None

    def create(self) -> str:
        """Create it, empty, under the first name that is free. The folder may be everybody's, so a
        name that was free a moment ago may not be; and what another process of this number rescued
        may still be wanted."""
        stem = os.path.join(self._folder, f"kvp-edge-rescue-{os.getpid()}")
        n = 0
        while True:
            path = f"{stem}{f'-{n}' if n else ''}.kvp"
            n += 1
            try:
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            except FileExistsError:
                continue
            except OSError:  # whoever writes to it now meets the same, and tells it
                return path
            self._path = path
            return path

    def written(self) -> str | None:
        """Its path if it holds something; if not, it is removed."""
        if self._path is None:
            return None
        with suppress(OSError):
            if os.path.getsize(self._path) > 0:
                return self._path
            os.unlink(self._path)
        return None


@contextmanager
def rescuing(llm: Llama, contents: Callable[[], dict[str, Any]], command: str) -> Iterator[None]:
    """Inside, whatever ends the process or comes out as an exception leaves a file that /load
    reads, and tells its name: a device that fails, SIGTERM, SIGHUP, a full disk behind standard
    output, a fault of the program. Not so what is meant to end it: Ctrl-C, and the reader of a
    pipeline that leaves. Nothing is written where nothing was said.

    Args:
        contents: what belongs to the chat besides its tokens; its "messages" are empty if nothing
            was said.
        command: starts such a chat again.
    """
    file = _RescueFile()

    def advice() -> str:
        path = file.written()
        if path is None:
            return "The conversation could not be written to a file."
        return (
            f"The conversation was written to {path}\n"
            f"To continue, start `{command}` with the options you want, and type: /load {path}"
        )

    with ends_with_a_sentence(advice):
        llm.rescue_to(file.create, contents)  # registered last, so done first
        try:
            with signals_raise():
                try:
                    yield
                except BaseException as error:
                    if not _meant(error) and _said_something(contents()):
                        with undisturbed():
                            _rescue(llm, error)
                            note(advice())
                    raise
        finally:
            llm.rescue_to(None)


def _rescue(llm: Llama, error: BaseException) -> None:
    try:
        llm.rescue(str(error))
    except Exception as failure:
        note(f"kvp-edge: {failure}")


def _said_something(contents: dict[str, Any]) -> bool:
    return any(message["role"] != "system" for message in contents["messages"])


def _meant(error: BaseException) -> bool:
    in_a_pipeline = isinstance(error, BrokenPipeError) and not sys.stdin.isatty()
    return isinstance(error, KeyboardInterrupt) or in_a_pipeline


def start_again(model: str | None) -> str:
    """The command for ``rescuing``."""
    return shlex.join(["kvp-edge", "chat", *([model] if model else [])])
