"""kvp-edge serve with models that others made: their tokenizers, their templates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.one_chat import Turn, assert_nothing_was_read_twice, assert_one_chat
from support.packages import needs
from support.real_models import PLAIN
from support.server import Server

pytestmark = pytest.mark.real

needs("fastapi", "server")

FIRST = "The code for the harbour is 4711. Please remember it."


@pytest.mark.parametrize("model", PLAIN)
def test_a_chat_goes_on_where_its_last_reply_ended_also_after_a_crash(
    model: str, real_model: Callable[[str], str], tmp_path: Path, book: str
) -> None:
    sea = "Write two sentences about the sea, with an emoji \U0001f30a, as this book does: "
    messages: list[dict[str, Any]] = []
    turns = []
    small = ["--kv-budget", "64", "--recent", "16", "--reserve", "32"]
    with Server(real_model(model), *small, chats=tmp_path / "chats") as server:
        for text in (FIRST, sea + book[20_000:21_000], "What is the code for the harbour?"):
            messages.append({"role": "user", "content": text})
            asked = {"messages": messages, "temperature": 0, "max_tokens": 40}
            reply = server.ask("/v1/chat/completions", asked).body
            messages.append(reply["choices"][0]["message"])
            usage = reply["usage"]
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            turns.append(Turn(usage["prompt_tokens"], cached, usage["completion_tokens"]))
            if len(turns) == 2:
                server.kill()
                server.start()
        assert_one_chat(server, FIRST, 6)
    assert_nothing_was_read_twice(turns)
    assert reply["kv_cache"]["logged"] > 0
