"""Tables, numbers and names of a Markdown report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from kvp_edge.evaluation.statistics import Estimate


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table as lines."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def estimate(found: Estimate, scale: float, form: str) -> str:
    """A number with its interval, both times ``scale`` and written as ``form``."""
    value = form.format(found.value * scale)
    if math.isnan(found.value):
        return "undefined"
    if math.isnan(found.low):
        return f"{value} [too few items]"
    return f"{value} [{form.format(found.low * scale)}, {form.format(found.high * scale)}]"


def percent(found: Estimate) -> str:
    """A share."""
    return estimate(found, 100, "{:.1f}")


def points(found: Estimate) -> str:
    """A difference of shares, with its sign."""
    return estimate(found, 100, "{:+.1f}")


def nats(found: Estimate) -> str:
    """A loss."""
    return estimate(found, 1, "{:.3f}")


def signed_nats(found: Estimate) -> str:
    """A difference of losses, with its sign."""
    return estimate(found, 1, "{:+.3f}")


def escape(text: str) -> str:
    """A policy's name, which may be a path, escaped for a table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def plural(word: str, n: int) -> str:
    """``word``, in the plural unless n is 1."""
    return word if n == 1 else f"{word}s"


def capital(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]
