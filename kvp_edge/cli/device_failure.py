"""What the command line says when ggml ends the process because a device failed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress

from kvp_edge.last_words import before_abort


def end_with_a_sentence(advice: Callable[[], str] = str) -> Callable[[], None]:
    """Until taken back, a failure in ggml ends the process with a paragraph on stderr and status 1,
    instead of a core dump.

    Args:
        advice: returns what to do now, called after everything registered later than this was.

    Returns:
        A function that takes it back.
    """

    def end(message: str) -> None:
        try:
            with suppress(OSError, ValueError):  # the reader left, or it is closed
                sys.stdout.flush()
            told = f"\nkvp-edge: {message}\nllama.cpp cannot go on after this. {advice()}"
            print(told.rstrip(), file=sys.stderr, flush=True)
        finally:
            os._exit(1)

    return before_abort(end)
