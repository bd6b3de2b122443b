"""The head of a chat, before the first message: the system prompt and the definitions of tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from markupsafe import escape  # jinja2's, which llama_cpp brings

#: A text of at least this many bytes counts as a message wherever it is found.
_TELLING_BYTES = 16


class Head(NamedTuple):
    """What identifies the head of a chat in its rendered text."""

    system: list[bytes]
    """Texts of the system message, in their order."""
    first: bytes | None
    """The text of the first message after it, if the head is to go up to there."""

    @classmethod
    def of(cls, messages: Any, tools: bool) -> Head | None:
        """
        Args:
            messages: as in create_chat_completion.
            tools: whether tools are defined; templates show them before the first message.

        Returns:
            None if there is no head.
        """
        messages = list(messages)
        has_system = bool(messages) and messages[0].get("role") == "system"
        system = _texts(messages[0]) if has_system else []
        rest = messages[1:] if has_system else messages
        first = next(iter(_texts(rest[0])), None) if tools and rest else None
        return cls(system, first) if system or first else None

    def end(self, text: bytes, markers: Sequence[bytes]) -> int | None:
        """How many bytes of the chat's text are its head; None if not all of it is found.

        Args:
            text: of the chat, or its beginning.
            markers: the texts that the chat template puts between messages.
        """
        at = 0
        for part in self.system:
            found = _find(part, text, at)
            if found is None:
                return None
            _, at = found
        if self.first is None:
            return at
        # some words occur in definitions of tools as well, but not after a marker
        ways = [(marker, _find(marker + self.first, text, at)) for marker in markers]
        starts = [found[0] + len(marker) for marker, found in ways if found is not None]
        if not starts and len(self.first) >= _TELLING_BYTES:
            found = _find(self.first, text, at)
            starts = [found[0]] if found is not None else []
        return min(starts, default=None)


def _find(part: bytes, text: bytes, at: int) -> tuple[int, int] | None:
    """Where ``part`` begins and ends in ``text``, from ``at`` on. llama_cpp's own template
    "chatml-function-calling" writes quotation marks as HTML does."""
    found = text.find(part, at)
    if found < 0:
        part = str(escape(part.decode())).encode()
        found = text.find(part, at)
    return (found, found + len(part)) if found >= 0 else None


def _texts(message: Any) -> list[bytes]:
    """The texts of a message, as a template would show them."""
    content = message.get("content")
    if isinstance(content, str):
        texts = [content]
    else:
        texts = [part["text"] for part in content or [] if part.get("type") == "text"]
    return [text.strip().encode() for text in texts if text.strip()]
