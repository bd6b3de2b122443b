"""Values with commas between them, for options of scripts."""

from __future__ import annotations


def numbers(text: str) -> list[int]:
    """Whole numbers from 1 on.

    Raises:
        ValueError: something else.
    """
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise ValueError
    return found


def names(text: str) -> list[str]:
    """Each once, in order."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
