"""Small answers kept in the user's cache folder. Losing one costs the time to find it again."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from kvp_edge.files import write_whole


def cache_folder() -> Path | None:
    """The folder ``kvp_edge`` among the user's caches, which need not exist; None where there is no
    home folder."""
    given = os.environ.get("XDG_CACHE_HOME")
    if not given and sys.platform == "win32":
        given = os.environ.get("LOCALAPPDATA")
    usual = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    folder = given or os.path.expanduser(usual)
    # without a home "~" stays, and would become a folder of that name wherever we are
    return Path(folder) / "kvp_edge" if os.path.isabs(folder) else None


def recall(name: str) -> Any:
    """What ``remember`` kept under this name; None where there is nothing, or a damaged file."""
    folder = cache_folder()
    if folder is None:
        return None
    try:
        return json.loads((folder / f"{name}.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def remember(name: str, value: Any) -> None:
    """Keep a value that JSON can hold, at once or not at all. A folder that cannot be written is no
    error: it will be found out again."""
    folder = cache_folder()
    if folder is None:
        return
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / f"{name}.json", json.dumps(value, indent=1))
