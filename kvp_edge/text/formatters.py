"""llama_cpp's chat completion handlers, most of which are a formatter that writes a prompt, and a
function around it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from llama_cpp.llama_chat_format import Jinja2ChatFormatter

#: Of the functions that llama_cpp makes of its formatters.
_HANDLER = Jinja2ChatFormatter("", "", "").to_chat_handler().__code__


def formatter_of(handler: Callable[..., Any]) -> Any:
    """What writes the prompts of one of llama_cpp's handlers; None if the handler does that by
    itself, or is somebody else's."""
    if getattr(handler, "__code__", None) is not _HANDLER:
        return None
    return inspect.getclosurevars(handler).nonlocals["chat_formatter"]
