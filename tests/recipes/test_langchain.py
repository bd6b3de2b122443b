"""LangChain: as a client of the server, and in process with a bounded Llama."""

from __future__ import annotations

import re
import warnings
from typing import Any

import llama_cpp
import pytest

import kvp_edge
from support.one_chat import (
    QUESTION,
    Turn,
    assert_nothing_was_read_twice,
    assert_one_chat,
    opening,
)
from support.packages import needs
from support.paths import ROOT
from support.recipes import Recipe
from support.server import Server

pytestmark = pytest.mark.recipes

langchain_openai = needs("langchain_openai", "recipes")
pydantic = needs("pydantic", "server")


@pytest.fixture
def chat(server: Server) -> Any:
    return langchain_openai.ChatOpenAI(
        base_url=server.v1,
        api_key=server.key,
        model="any",
        temperature=0,
        max_tokens=24,
        max_retries=0,
        stream_usage=True,
    )


def turn(reply: Any) -> Turn:
    usage = reply.usage_metadata
    cached = usage["input_token_details"]["cache_read"]
    return Turn(usage["input_tokens"], cached, usage["output_tokens"])


def test_the_recipe_goes_on_with_its_chat(server: Server) -> None:
    recipe = Recipe(server, "LangChain", "python")
    printed, names = recipe.python()
    assert_nothing_was_read_twice([turn(names["history"][1]), turn(names["reply"])])
    assert_one_chat(server, recipe.first, 4)
    assert names["reply"].content in printed


def test_replies_and_streams_go_on_with_one_chat(chat: Any, server: Server) -> None:
    first, number = opening()
    history: list[Any] = [("system", "Be brief."), ("user", first)]
    turns = []
    for stream in (False, True, False):
        if stream:
            pieces = list(chat.stream(history))
            assert len(pieces) > 5
            reply = pieces[0]
            for piece in pieces[1:]:
                reply += piece
        else:
            reply = chat.invoke(history)
        turns.append(turn(reply))
        history += [reply, ("user", QUESTION)]
    assert number in reply.content
    assert_nothing_was_read_twice(turns)
    assert_one_chat(server, first, 7)


def test_a_batch_is_a_chat_for_each(chat: Any, server: Server) -> None:
    told = [opening() for _ in range(5)]
    replies = chat.batch([first for first, _ in told])
    for (first, number), reply in zip(told, replies, strict=True):
        assert number in reply.content
        assert_one_chat(server, first, 2)


def test_a_chain_with_a_prompt_and_a_parser_streams(chat: Any) -> None:
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.prompts import ChatPromptTemplate

    prompt = ChatPromptTemplate.from_messages([("user", "The code for the {place} is {code}.")])
    pieces = list((prompt | chat | StrOutputParser()).stream({"place": "harbour", "code": 4711}))
    assert "4711" in "".join(pieces)
    assert len(pieces) > 5


def test_what_is_wrong_comes_as_openais_exceptions(chat: Any, server: Server) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="too many for this server"):
        chat.invoke("harbour " * 5000)
    stranger = langchain_openai.ChatOpenAI(
        base_url=server.v1, api_key="wrong", model="any", max_retries=0
    )
    with pytest.raises(openai.AuthenticationError, match="needs its API key"):
        stranger.invoke("Hello.")


# -- tools ----------------------------------------------------------------------------------------


class Code(pydantic.BaseModel):  # type: ignore[misc, name-defined]
    """The code for a place."""

    place: str = pydantic.Field(max_length=12)
    secret: bool


def look_up(place: str) -> str:
    """The code for a place."""
    return "4711"


def test_a_tool_that_must_be_called_is_called_and_its_answer_goes_on(
    chat: Any, server: Server
) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage

    first, _ = opening()
    bound = chat.bind_tools([Code], tool_choice="any").bind(max_tokens=200)
    history: list[Any] = [HumanMessage(first)]
    called = bound.invoke(history)
    (call,) = called.tool_calls
    assert call["name"] == "Code"
    assert Code(**call["args"])
    history += [called, ToolMessage("4711", tool_call_id=call["id"])]
    reply = chat.bind_tools([Code]).invoke(history)
    assert turn(reply).cached >= turn(called).prompt - 8  # this model's template shows no calls
    assert_one_chat(server, first, 4)


def test_a_streamed_call_adds_up_to_one(chat: Any) -> None:
    bound = chat.bind_tools([Code], tool_choice="Code").bind(max_tokens=200)
    pieces = list(bound.stream(opening()[0]))
    whole = pieces[0]
    for piece in pieces[1:]:
        whole += piece
    (call,) = whole.tool_calls
    assert call["name"] == "Code"
    assert Code(**call["args"])


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_is_an_object_of_its_class(chat: Any, method: str) -> None:
    found = chat.with_structured_output(Code, method=method).invoke(opening()[0], max_tokens=200)
    assert isinstance(found, Code)


# -- in process -----------------------------------------------------------------------------------


def test_chat_llama_cpp_takes_the_bounded_llama_as_readme_says(
    bundled_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("langchain_community", "recipes")
    monkeypatch.setattr(llama_cpp, "Llama", llama_cpp.Llama)  # put back afterwards
    (code,) = re.findall(
        r"(?ms)^```python\n(import llama_cpp, kvp_edge.*?)^```$", (ROOT / "README.md").read_text()
    )
    code = code.replace('"model.gguf"', repr(bundled_model)).replace("n_ctx=32768", "n_ctx=4096")
    code = code.replace('{"kv_budget": 2048}', '{"kv_budget": 128, "n_threads_batch": 1}', 1)
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the package says it will end
        exec(compile(code, "README.md", "exec", dont_inherit=True), names)
    chat = names["chat"]
    llm = chat.client
    assert isinstance(llm, kvp_edge.Llama)
    read: list[tuple[int, int]] = []
    llm.on_batch = lambda first, end: read.append((first, end))
    history: list[Any] = [("user", "The code for the harbour is 4711. Please remember it.")]
    history.append(chat.invoke(history, temperature=0))
    known = llm.n_tokens
    read.clear()
    history.append(("user", "Thank you. " * 120))
    history.append(chat.invoke(history, temperature=0))
    assert min(start for start, _ in read) == known
    assert llm.kv_stats.evictions > 0
    history.append(("user", QUESTION))
    pieces = [piece.content for piece in chat.stream(history, temperature=0)]
    assert "4711" in "".join(pieces)  # it was dropped, and came back
    assert llm.kv_stats.recalls > 0
    llm.close()
