"""JSON that somebody else wrote: parsed without surprises, and of the types that were asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin


def parse(text: str | bytes) -> Any:
    """A value from JSON; bytes are UTF-8.

    Raises:
        ValueError: it is no JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def is_a(value: object, hint: Any) -> bool:
    """Whether a JSON value is of the type ``hint``: one of bool, int, float, str, dict, list, Any,
    list[...], dict[str, ...], or a union of these.

    An int is a float, too, if it is not too large for one; a bool is no number, and no float is NaN
    or infinite.
    """
    kind, inner = _parts(hint)
    if kind in (Union, UnionType):
        return any(is_a(value, one) for one in inner)
    if hint is Any or isinstance(value, bool):
        return hint in (Any, bool)
    if hint is float:  # NaN is not smaller than anything
        return isinstance(value, int | float) and abs(value) <= sys.float_info.max
    if not isinstance(value, kind or hint):
        return False
    if kind is list:
        return all(is_a(one, inner[0]) for one in value)
    return kind is not dict or all(is_a(one, inner[1]) for one in value.values())


@cache  # asked for every element of a long list
def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    return get_origin(hint), get_args(hint)


def require(value: object, hints: Mapping[str, Any]) -> dict[str, Any]:
    """An object of which these names have values of these types; it may have others.

    Raises:
        ValueError: naming the first that it lacks, or that is of another type.
    """
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    for name, hint in hints.items():
        if name not in value:
            raise ValueError(f"'{name}' is missing")
        if not is_a(value[name], hint):
            raise ValueError(f"'{name}' cannot be {shortened(value[name])}")
    return value


def shortened(value: object, most: int = 60) -> str:
    """A value as it is written in a message."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # an int of too many digits to print
        text = f"<{type(value).__name__}>"
    return text if len(text) <= most else text[:most] + "..."
