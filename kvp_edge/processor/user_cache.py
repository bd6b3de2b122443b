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
    """The folder ``kvp_edge`` in the user's cache folder, which may not exist; None without a home
    folder."""
    given = os.environ.get("XDG_CACHE_HOME")
    if not given and sys.platform == "win32":
        given = os.environ.get("LOCALAPPDATA")
    usual = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    folder = given or os.path.expanduser(usual)
    # without a home folder "~" stays, and would become a folder of that name
    return Path(folder) / "kvp_edge" if os.path.isabs(folder) else None


def recall(name: str) -> Any:
    """The value that ``remember`` stored under this name; None if there is none, or it is
    damaged."""
    folder = cache_folder()
    if folder is None:
        return None
    try:
        return json.loads((folder / f"{name}.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def remember(name: str, value: Any) -> None:
    """Store a JSON value atomically. A folder that cannot be written is not an error: the value is
    computed again next time."""
    folder = cache_folder()
    if folder is None:
        return
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / f"{name}.json", json.dumps(value, indent=1))
