"""Chats with models that have no chat template: the conversation as a transcript.

    You answer briefly.

    User: My dog is called Rex.
    Assistant: Noted.
    User: What is my dog called?
    Assistant:

A base model has seen such texts. It writes the assistant's next line, and is stopped where the
user's would begin. Registered with llama_cpp as the chat format "transcript".
"""

from __future__ import annotations

from typing import Any

from llama_cpp.llama_chat_format import ChatFormatterResponse, register_chat_format

NAME = "transcript"

_STOP = ["\nUser:", "\nAssistant:"]


@register_chat_format(NAME)  # type: ignore[untyped-decorator]  # llama_cpp is untyped
def transcript(messages: list[dict[str, Any]], **_: Any) -> ChatFormatterResponse:
    """A llama_cpp chat formatter."""
    about = [_text(m) for m in messages if m["role"] == "system"]
    said = [f"{m['role'].capitalize()}: {_text(m)}" for m in messages if m["role"] != "system"]
    head = "".join(f"{text}\n\n" for text in about)
    return ChatFormatterResponse(prompt=head + "\n".join([*said, "Assistant:"]), stop=_STOP)


def _text(message: dict[str, Any]) -> str:
    """Without the leading space of a reply, since the format writes one itself."""
    content = message.get("content") or ""
    if not isinstance(content, str):  # a list of parts
        content = "\n".join(part["text"] for part in content if part.get("type") == "text")
    return content.strip()
