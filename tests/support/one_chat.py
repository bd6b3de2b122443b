"""Whether what a client sends back goes on with the chat that the server has."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

from support.server import Server

#: One is told in the first turn of a chat, so that no two of them begin alike.
_numbers = itertools.count(1101, 37)


def opening() -> tuple[str, str]:
    """What is said first in a chat, and the number that it tells."""
    number = str(next(_numbers))
    return f"The code for the harbour is {number}. Please remember it.", number


QUESTION = "What is the code for the harbour?"


class Turn(NamedTuple):
    """The tokens of one reply, as a client tells them.

    Attributes:
        cached: tokens of the prompt that were not read again.
    """

    prompt: int
    cached: int
    written: int


def turn(usage: Any) -> Turn:
    """Of OpenAI's usage."""
    cached = usage.prompt_tokens_details.cached_tokens
    return Turn(usage.prompt_tokens, cached, usage.completion_tokens)


def assert_nothing_was_read_twice(turns: Iterable[Turn]) -> None:
    """Of a chat that began anew, each prompt goes on where the reply before it ended."""
    first, *others = turns
    assert first.cached == 0
    assert others
    before = first
    for now in others:
        known = before.prompt + before.written
        assert known - 1 <= now.cached < now.prompt  # the last token written was not always read
        before = now


def assert_one_chat(server: Server, opening: str, n_messages: int) -> str:
    """The server has one chat that begins with this, and all of its messages.

    Returns:
        The id of the chat.
    """
    found = [c for c in server.ask("/kvp/chats").body["chats"] if c["title"] == opening]
    assert [c["n_messages"] for c in found] == [n_messages]
    id: str = found[0]["id"]
    return id
