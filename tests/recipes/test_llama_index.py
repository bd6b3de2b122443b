"""LlamaIndex as a client of the server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from support.one_chat import (
    QUESTION,
    assert_nothing_was_read_twice,
    assert_one_chat,
    opening,
    turn,
)
from support.packages import needs
from support.recipes import Recipe
from support.server import Server

pytestmark = pytest.mark.recipes

openai_like = needs("llama_index.llms.openai_like", "recipes")
ChatMessage = needs("llama_index.core.llms", "recipes").ChatMessage


def llm_of(server: Server, **more: Any) -> Any:
    how = {"is_chat_model": True, "context_window": 4096, "temperature": 0, "max_tokens": 24}
    return openai_like.OpenAILike(
        api_base=server.v1, api_key=server.key, model="any", max_retries=0, **{**how, **more}
    )


def test_the_recipe_goes_on_with_its_chat(server: Server) -> None:
    recipe = Recipe(server, "LlamaIndex", "python")
    printed, names = recipe.python()
    chat = assert_one_chat(server, recipe.first, 4)
    assert printed.strip().endswith(chat)
    usage = names["reply"].raw.usage
    assert 20 < usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens


def test_replies_streams_and_async_ones_go_on_with_one_chat(server: Server) -> None:
    llm = llm_of(server, additional_kwargs={"stream_options": None})
    first, number = opening()
    history = [ChatMessage(first)]
    turns, ids = [], set()
    for how in ("chat", "achat", "stream_chat", "chat"):
        if how == "stream_chat":
            *_, reply = llm.stream_chat(history)
            assert number in reply.message.content
        else:
            reply = asyncio.run(llm.achat(history)) if how == "achat" else llm.chat(history)
            turns.append(turn(reply.raw.usage))
        ids.add(reply.raw.chat_id)
        history += [reply.message, ChatMessage(QUESTION)]
    assert ids == {assert_one_chat(server, first, 8)}
    assert_nothing_was_read_twice(turns[:2])
    assert turns[2].cached > turns[1].cached


def test_a_text_is_completed_and_streamed(server: Server) -> None:
    llm = llm_of(server, is_chat_model=False)
    whole = llm.complete("It was a dark night,").text
    assert whole
    *_, last = llm.stream_complete("It was a dark night,")
    assert last.text == whole
    assert asyncio.run(llm.acomplete("It was a dark night,")).text == whole


def test_a_chat_engine_with_a_memory_goes_on_with_one_chat(server: Server) -> None:
    from llama_index.core.chat_engine import SimpleChatEngine

    engine = SimpleChatEngine.from_defaults(llm=llm_of(server))
    first, number = opening()
    engine.chat(first)
    assert number in engine.chat(QUESTION).response
    assert number in "".join(engine.stream_chat(QUESTION).response_gen)
    assert_one_chat(server, first, 6)
