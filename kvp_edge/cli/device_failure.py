"""What the command line says when ggml ends the process because a device failed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from kvp_edge.cli.shown import visible
from kvp_edge.llamacpp.abort_hook import before_abort

_STDERR = 2


@contextmanager
def ends_with_a_sentence(advice: Callable[[], str] = str) -> Iterator[None]:
    """Inside, a failure in ggml ends the process with a paragraph on stderr and status 1, instead
    of a core dump.

    Args:
        advice: returns what to do now. Called after all that was registered with ``before_abort``
            later than this.
    """
    # llama_cpp points stderr elsewhere while it loads a model, and a device may fail just then
    stderr = None
    with suppress(OSError):  # it may be closed
        stderr = os.dup(_STDERR)

    def end(message: str) -> None:
        try:
            with suppress(OSError, ValueError):  # the reader left, or it is closed
                sys.stdout.flush()
            told = visible(
                f"\nkvp-edge: {message}\nllama.cpp cannot continue after this. {advice()}"
            )
            if stderr is not None:
                os.write(stderr, f"{told.rstrip()}\n".encode(errors="replace"))
        finally:
            os._exit(1)

    take_back = before_abort(end)
    try:
        yield
    finally:
        take_back()
        if stderr is not None:
            os.close(stderr)
