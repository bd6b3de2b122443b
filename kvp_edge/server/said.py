"""A reply while it is written: its text, its tool calls, its tokens."""

from __future__ import annotations

from typing import Any

from kvp_edge.server.served import Turn, Written
from kvp_edge.server.tools import Reply
from kvp_edge.server.tools.calls import merge


class Said:
    """
    Args:
        tools: finds tool calls in the text; None: it is text.

    Attributes:
        ending: why it ended; None: it has not.
    """

    def __init__(self, tools: Reply | None) -> None:
        self._parser = tools.parser() if tools is not None else None
        self._deltas: list[dict[str, Any]] = []
        self._told = 0  # tokens
        self.ending: str | None = None

    def add(self, text: str, ending: str | None) -> list[dict[str, Any]]:
        """The next piece of text, as deltas of OpenAI's.

        Args:
            ending: why it is the last one, if it is.
        """
        if self._parser is None:
            deltas = [{"content": text}] if text else []
            self.ending = ending
        else:
            deltas = self._parser.feed(text) if text else []
            if ending is not None:
                rest, self.ending = self._parser.finish(ending)
                deltas += rest
        self._deltas += deltas
        return deltas

    def new_tokens(self, turn: Turn) -> list[Written]:
        """Those written since the last time."""
        new, self._told = turn.written[self._told :], len(turn.written)
        return new

    def message(self) -> dict[str, Any] | None:
        """As it comes back with the next request; None: nothing was said."""
        message = merge(self._deltas)
        if not message["content"] and "tool_calls" not in message:
            return None
        return {**message, "content": message["content"] or ""}
