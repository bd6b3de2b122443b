"""Ctrl-C at every moment of a call, one after the other."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def interrupted(do: Callable[[], Any], at: int, *files: str) -> bool:
    """Call ``do``, with Ctrl-C at number ``at`` of the moments at which CPython looks for signals:
    where functions begin, and behind calls.

    Args:
        files: only in the code of these.

    Returns:
        Whether there are so many.
    """
    left = at

    def watch(frame: Any, event: str, _: Any) -> None:
        nonlocal left
        counts = not files or frame.f_code.co_filename in files
        if counts and event in ("call", "c_return"):
            left -= 1
            if left < 0:
                sys.setprofile(None)
                raise KeyboardInterrupt

    sys.setprofile(watch)
    try:
        do()
    except KeyboardInterrupt:
        pass  # contextlib.suppress would be interrupted itself
    finally:
        sys.setprofile(None)
    return left < 0
