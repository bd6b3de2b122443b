"""Where the user types: a line with editing, history and completion, the prompt on stderr."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kvp_edge.cli.ending import signals_call
from kvp_edge.cli.options import text as as_text
from kvp_edge.cli.shown import note

#: Shows a prompt and returns what was typed, without its line end.
#:
#: Raises:
#:     EOFError: nothing comes any more (Ctrl-D).
#:     KeyboardInterrupt: Ctrl-C.
Read = Callable[[str], str]


def line_reader(commands: Sequence[str]) -> Read:
    """
    Args:
        commands: completed by Tab, and the names of files after "/save" and "/load".
    """
    return _Editor(commands).read if _can_edit() else _read_plain


def next_line(_: str = "") -> str:
    """A ``Read`` without a prompt."""
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")


def _read_plain(prompt: str) -> str:
    note(prompt, end="")
    try:
        return next_line()
    except (EOFError, KeyboardInterrupt):
        note("")
        raise


def _can_edit() -> bool:
    """Whether both ends are terminals that can move a cursor."""
    known = os.environ.get("TERM") or ("dumb" if os.name == "posix" else "")
    moves = known.lower() not in ("dumb", "unknown")
    return moves and sys.stdin.isatty() and sys.stderr.isatty()


class _Editor:
    """The line editor. A paste of several lines is one line of its own, with line ends in it."""

    def __init__(self, commands: Sequence[str]) -> None:
        # half a second, which other commands and pipes need not wait for
        from prompt_toolkit import PromptSession  # noqa: PLC0415
        from prompt_toolkit.history import InMemoryHistory  # noqa: PLC0415
        from prompt_toolkit.input import create_input  # noqa: PLC0415
        from prompt_toolkit.output import create_output  # noqa: PLC0415
        from prompt_toolkit.shortcuts import CompleteStyle  # noqa: PLC0415

        output: Any = create_output(stdout=sys.stderr)
        # Nothing drawn here needs to know where on the screen it is, and the answer of a slow
        # terminal would come among what is typed.
        output.enable_cpr = False
        self._session: PromptSession[str] = PromptSession(
            input=create_input(sys.stdin),
            output=output,
            history=InMemoryHistory(),  # nothing of a conversation is left on the disk unasked
            completer=_completer(commands),
            complete_style=CompleteStyle.READLINE_LIKE,
            complete_while_typing=False,
            enable_suspend=True,
        )

    def read(self, prompt: str) -> str:
        """See ``Read``.

        Raises:
            Ended: a signal came that ends the process.
        """
        ended: list[BaseException] = []
        app = self._session.app

        def leave(error: BaseException) -> None:
            """Also before the editor runs, and after it has finished."""
            ended.append(error)
            if app.future is not None and not app.future.done():
                app.exit(exception=error)

        def fail(_: Any, context: dict[str, Any]) -> None:
            leave(context.get("exception") or RuntimeError(context["message"]))

        def started() -> None:
            if ended:
                app.exit(exception=ended[0])

        async def typed() -> str:
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(fail)
            with signals_call(lambda signal: loop.call_soon_threadsafe(leave, signal)):
                return await self._session.prompt_async(
                    prompt, pre_run=started, set_exception_handler=False
                )

        try:
            text = asyncio.run(typed())
        finally:
            if ended:  # what came of it, such as the end of the input, says less
                raise ended[0]
        return as_text(text).rstrip("\n")  # of a paste


def _completer(commands: Sequence[str]) -> Any:
    from prompt_toolkit.completion import (  # noqa: PLC0415
        CompleteEvent,
        Completer,
        Completion,
        PathCompleter,
    )
    from prompt_toolkit.document import Document  # noqa: PLC0415

    class Completions(Completer):
        _paths = PathCompleter(expanduser=True)

        def get_completions(
            self, document: Document, complete_event: CompleteEvent
        ) -> Iterable[Completion]:
            before = document.text_before_cursor
            command, blank, name = before.partition(" ")
            if command in ("/save", "/load") and blank:
                yield from self._paths.get_completions(Document(name), complete_event)
            elif before.startswith("/"):
                fitting = (one for one in commands if one.startswith(before))
                yield from (Completion(one, -len(before)) for one in fitting)

    return Completions()
