"""What comes before the first message of a chat: the system prompt, and what tools there are."""

from __future__ import annotations

from typing import Any, NamedTuple

from markupsafe import escape  # jinja2's, which llama_cpp brings


class Head(NamedTuple):
    """Where the head of a chat lies in the text that a chat template makes of it."""

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

    def end(self, text: bytes) -> int | None:
        """How many bytes of the chat's text are its head; None if the template does not show it."""
        at = 0
        for part in self.system:
            found = _find(part, text, at)
            if found is None:
                return None
            _, at = found
        first = _find(self.first, text, at) if self.first is not None else None
        return at if first is None else first[0]


def _find(part: bytes, text: bytes, at: int) -> tuple[int, int] | None:
    """Where ``part`` begins and ends in ``text``, from ``at`` on. llama_cpp's own template
    "chatml-function-calling" writes quotation marks as HTML does."""
    for form in (part, str(escape(part.decode())).encode()):
        found = text.find(form, at)
        if found >= 0:
            return found, found + len(form)
    return None


def _texts(message: Any) -> list[bytes]:
    """The texts of a message, as a template would show them."""
    content = message.get("content")
    if isinstance(content, str):
        texts = [content]
    else:
        texts = [part["text"] for part in content or [] if part.get("type") == "text"]
    return [text.strip().encode() for text in texts if text.strip()]
