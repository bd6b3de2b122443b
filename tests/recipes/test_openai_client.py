"""OpenAI's own client, as it is installed, against a running server."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.one_chat import (
    QUESTION,
    Turn,
    assert_nothing_was_read_twice,
    assert_one_chat,
    opening,
    turn,
)
from support.packages import needs
from support.server import Server

openai = needs("openai", "dev")
pydantic = needs("pydantic", "server")

Messages = list[dict[str, Any]]
MODEL = "bookworm-4m-f16"
GREEDY = {"model": MODEL, "temperature": 0.0, "max_tokens": 24}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=server.v1, api_key=server.key, max_retries=0) as made:
        yield made


# -- chats ----------------------------------------------------------------------------------------


def test_a_chat_goes_on_where_its_last_reply_ended(client: Any, server: Server) -> None:
    first, number = opening()
    messages, turns, ids = [], [], set()
    for text in (first, QUESTION, "Thank you.", QUESTION):
        messages.append(user(text))
        reply = client.chat.completions.create(messages=messages, **GREEDY)
        messages.append(reply.choices[0].message)  # as it came: the client writes it as JSON again
        turns.append(turn(reply.usage))
        ids.add(reply.chat_id)
    assert number in messages[3].content
    assert_nothing_was_read_twice(turns)
    assert ids == {assert_one_chat(server, first, 8)}
    assert reply.kv_cache["seen"] == turns[-1].prompt + turns[-1].written


def test_a_streamed_chat_goes_on_where_its_last_reply_ended(client: Any, server: Server) -> None:
    first, number = opening()
    messages, turns = [], []
    for text in (first, QUESTION):
        messages.append(user(text))
        stream = client.chat.completions.create(
            messages=messages, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
        chunks = list(stream)
        *others, last = chunks
        assert last.choices == []
        assert last.kv_cache["seen"] > 0
        assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in others)
        assert [c.choices[0].finish_reason for c in others if c.choices[0].finish_reason] == [
            "stop"
        ]
        (chat,) = {chunk.chat_id for chunk in chunks}
        said = "".join(chunk.choices[0].delta.content or "" for chunk in others)
        messages.append({"role": "assistant", "content": said})
        turns.append(turn(last.usage))
    assert number in said
    assert_nothing_was_read_twice(turns)
    assert chat == assert_one_chat(server, first, 4)


def test_a_stream_without_usage_ends_with_a_choice(client: Any) -> None:
    stream = client.chat.completions.create(messages=[user(opening()[0])], stream=True, **GREEDY)
    chunks = list(stream)
    assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in chunks)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].kv_cache["budget"] == 512


def test_the_stream_helper_adds_up_to_the_reply(client: Any) -> None:
    messages = [user(opening()[0])]
    whole = client.chat.completions.create(messages=messages, **GREEDY)
    with client.chat.completions.stream(messages=messages, **GREEDY) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
    final = stream.get_final_completion()
    said = whole.choices[0].message.content
    assert "".join(pieces) == final.choices[0].message.content == said
    assert len(pieces) > 3
    assert final.choices[0].finish_reason == "stop"


def test_an_edited_message_makes_another_chat_and_the_old_one_goes_on(
    client: Any, server: Server
) -> None:
    first, _ = opening()

    def say(messages: Messages) -> Any:
        return client.chat.completions.create(messages=messages, **GREEDY)

    before = [user(first)]
    one = say(before)
    before.append(one.choices[0].message)
    two = say([*before, user(QUESTION)])
    edited = say([*before, user("And what else did I say?")])
    assert edited.chat_id != one.chat_id == two.chat_id
    parents = {c["id"]: c["parent"] for c in server.ask("/kvp/chats").body["chats"]}
    assert parents[edited.chat_id] == one.chat_id
    going_on = [*before, user(QUESTION), two.choices[0].message, user("Thank you.")]
    again = say(going_on)
    assert again.chat_id == one.chat_id
    assert_nothing_was_read_twice([turn(one.usage), turn(two.usage), turn(again.usage)])


def test_parts_of_text_and_a_developer_are_read_as_a_text_and_a_system(
    client: Any, server: Server
) -> None:
    first, _ = opening()

    def say(rules: Any, text: Any) -> Any:
        messages = [rules, {"role": "user", "content": text}]
        return client.chat.completions.create(messages=messages, **GREEDY)

    plain = say({"role": "system", "content": "Be brief."}, first)
    parts = [{"type": "text", "text": first[:9]}, {"type": "text", "text": first[9:]}]
    other = say({"role": "developer", "content": "Be brief."}, parts)
    assert plain.usage.prompt_tokens == other.usage.prompt_tokens
    assert plain.choices[0].message.content == other.choices[0].message.content


def test_a_dropped_stream_keeps_what_was_said(client: Any, server: Server) -> None:
    first, _ = opening()
    said, ask = "", {**GREEDY, "max_tokens": 2000, "logit_bias": {"0": -100}}
    with client.chat.completions.create(messages=[user(first)], stream=True, **ask) as stream:
        for chunk in stream:
            said += chunk.choices[0].delta.content or ""
            if len(said) > 8:
                break
    chat = chunk.chat_id
    until(lambda: not server.ask(f"/kvp/cache?chat={chat}").body["writing"])
    *_, reply = server.ask(f"/kvp/chats/{chat}").body["messages"]
    assert reply["role"] == "assistant"
    assert reply["content"].startswith(said)
    went_on = client.chat.completions.create(
        messages=[user(first), reply, user(QUESTION)], **GREEDY
    )
    assert went_on.chat_id == chat
    assert went_on.usage.prompt_tokens_details.cached_tokens > 20


def until(done: Any) -> None:
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


# -- how a reply is written -----------------------------------------------------------------------


@pytest.mark.parametrize("streams", [False, True])
def test_two_replies_to_one_message_differ_and_a_seed_brings_them_back(
    client: Any, streams: bool
) -> None:
    ask = {"model": MODEL, "n": 2, "max_tokens": 12, "temperature": 4.0, "top_p": 1.0}
    ask["extra_body"] = {"min_p": 0.0}  # which llama.cpp has, and OpenAI has not
    messages = [user(opening()[0])]

    def replies(seed: int) -> list[str]:
        if not streams:
            found = client.chat.completions.create(messages=messages, seed=seed, **ask)
            assert [choice.index for choice in found.choices] == [0, 1]
            return [choice.message.content for choice in found.choices]
        texts = ["", ""]
        for chunk in client.chat.completions.create(
            messages=messages, seed=seed, stream=True, **ask
        ):
            (choice,) = chunk.choices
            texts[choice.index] += choice.delta.content or ""
        return texts

    one = replies(7)
    assert one[0] != one[1]
    assert one == replies(7)
    assert one != replies(8)


def test_logprobs_are_those_of_the_tokens_that_were_written(client: Any) -> None:
    reply = client.chat.completions.create(
        messages=[user(opening()[0])], logprobs=True, top_logprobs=3, **GREEDY
    )
    (choice,) = reply.choices
    told = choice.logprobs.content
    assert b"".join(bytes(t.bytes) for t in told).decode() == choice.message.content
    assert len(told) == reply.usage.completion_tokens
    for token in told:
        best = token.top_logprobs
        assert (best[0].token, best[0].logprob) == (token.token, token.logprob)  # it is greedy
        assert 0 >= best[0].logprob >= best[1].logprob >= best[2].logprob


@pytest.mark.parametrize("streams", [False, True])
def test_a_reply_ends_before_a_stop_word(client: Any, streams: bool) -> None:
    first, number = opening()
    ask = {**GREEDY, "messages": [user(first)], "stop": [number, "never said"]}
    if streams:
        choices = [c.choices[0] for c in client.chat.completions.create(stream=True, **ask)]
        said = "".join(choice.delta.content or "" for choice in choices)
        ending = choices[-1].finish_reason
    else:
        (choice,) = client.chat.completions.create(**ask).choices
        said, ending = choice.message.content, choice.finish_reason
    assert said == "For the harbour: "
    assert ending == "stop"


def test_a_chat_goes_on_after_a_stop_word_and_after_its_length(client: Any, server: Server) -> None:
    first, number = opening()
    messages: Messages = []
    before = 0
    for ending in ({"stop": number}, {"max_tokens": 5}, {}):
        messages.append(user(first if not messages else QUESTION))
        reply = client.chat.completions.create(messages=messages, **{**GREEDY, **ending})
        messages.append(reply.choices[0].message)
        assert turn(reply.usage).cached >= before
        before = reply.usage.prompt_tokens
    assert reply.chat_id == assert_one_chat(server, first, 6)


def test_of_two_replies_the_last_is_gone_on_with_and_the_first_makes_a_branch(
    client: Any, server: Server
) -> None:
    messages = [user(opening()[0])]
    wild = {"max_tokens": 12, "temperature": 4.0, "extra_body": {"min_p": 0.0}, "seed": 7}
    two = client.chat.completions.create(model=MODEL, messages=messages, n=2, **wild)
    one, other = (choice.message for choice in two.choices)
    assert one.content != other.content

    def say(reply: Any) -> Any:
        asked = [*messages, reply, user("Thank you.")]
        return client.chat.completions.create(messages=asked, **GREEDY)

    branch, same = say(one), say(other)
    assert same.chat_id == two.chat_id != branch.chat_id
    parents = {c["id"]: c["parent"] for c in server.ask("/kvp/chats").body["chats"]}
    assert parents[branch.chat_id] == two.chat_id


@pytest.mark.parametrize("streams", [False, True])
def test_letters_that_are_many_tokens_arrive_whole(client: Any, streams: bool) -> None:
    text = "Grüße 😀 日本"
    schema = {"type": "json_schema", "json_schema": {"name": "text", "schema": {"enum": [text]}}}
    ask = {"messages": [user(opening()[0])], "response_format": schema, **GREEDY}
    ask["max_tokens"] = 100
    if streams:
        pieces = [
            chunk.choices[0].delta.content or ""
            for chunk in client.chat.completions.create(stream=True, **ask)
        ]
        assert "😀" in pieces
    else:
        pieces = [client.chat.completions.create(**ask).choices[0].message.content]
    assert "".join(pieces) == f'"{text}"'


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_reply_of_so_many_tokens_ends_for_its_length(client: Any, name: str) -> None:
    reply = client.chat.completions.create(
        model=MODEL, messages=[user(opening()[0])], temperature=0.0, **{name: 3}
    )
    assert reply.usage.completion_tokens == 3
    assert reply.choices[0].finish_reason == "length"


# -- texts ----------------------------------------------------------------------------------------


def test_a_text_is_continued_and_goes_on_from_its_log(client: Any) -> None:
    prompt = f"Chapter {opening()[1]}. The ship lay in the harbour, and the captain"
    turns, ids = [], set()
    for _ in range(3):
        reply = client.completions.create(model=MODEL, prompt=prompt, max_tokens=9, temperature=0.0)
        assert reply.choices[0].finish_reason == "length"
        prompt += reply.choices[0].text
        turns.append(turn(reply.usage))
        ids.add(reply.chat_id)
    assert len(ids) == 1
    assert_nothing_was_read_twice(turns)


def test_a_streamed_text_is_the_same_one_and_may_begin_with_its_prompt(client: Any) -> None:
    ask = {"model": MODEL, "prompt": "It was a dark night,", "max_tokens": 9, "temperature": 0.0}
    whole = client.completions.create(**ask).choices[0].text
    chunks = list(client.completions.create(stream=True, **ask))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole
    assert client.completions.create(echo=True, **ask).choices[0].text == ask["prompt"] + whole
    told = client.completions.create(logprobs=2, **ask).choices[0].logprobs
    assert "".join(told.tokens) == whole
    assert all(len(top) == 2 for top in told.top_logprobs)


def test_tokens_are_a_prompt_too(client: Any, server: Server) -> None:
    ask = {"model": MODEL, "max_tokens": 9, "temperature": 0.0}
    text = "It was a dark night,"
    tokens = server.ask("/tokenize", {"content": text, "add_special": True}).body["tokens"]
    of_tokens = client.completions.create(prompt=tokens, **ask)
    assert (
        of_tokens.choices[0].text == client.completions.create(prompt=text, **ask).choices[0].text
    )


def test_none_is_as_if_it_was_not_given(client: Any) -> None:
    names = ("n", "stream", "stream_options", "logprobs", "top_logprobs", "temperature", "top_p")
    names += ("stop", "seed", "logit_bias", "max_completion_tokens", "presence_penalty", "tools")
    ask: dict[str, Any] = dict.fromkeys(names)
    named = {"role": "user", "content": "Hello.", "name": None}
    reply = client.chat.completions.create(model=MODEL, messages=[named], max_tokens=3, **ask)
    assert reply.usage.completion_tokens == 3
    names = ("n", "stream", "logprobs", "echo", "max_tokens", "suffix", "best_of", "stop")
    text = client.completions.create(model=MODEL, prompt="It was", **dict.fromkeys(names))
    assert text.usage.completion_tokens == 16


# -- what is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["wrong", "a-key-and-more"])
def test_a_wrong_key_is_an_authentication_error(server: Server, key: str) -> None:
    stranger = openai.OpenAI(base_url=server.v1, api_key=key, max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="needs its API key") as found:
        stranger.models.list()
    assert found.value.code == "invalid_api_key"


def test_a_conversation_that_is_too_long_says_so_in_openais_code(client: Any) -> None:
    for streams in (False, True):
        with pytest.raises(openai.BadRequestError, match="of 4096: shorten it") as found:
            client.chat.completions.create(
                messages=[user("harbour " * 5000)], stream=streams, **GREEDY
            )
        assert found.value.code == "context_length_exceeded"
        assert found.value.param == "messages"


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1), ("n", 0), ("top_p", "high"), ("max_tokens", 0), ("messages", [])],
)
def test_a_wrong_field_is_a_bad_request_that_names_it(client: Any, field: str, value: Any) -> None:
    ask = {**GREEDY, "messages": [user("Hello.")], field: value}
    with pytest.raises(openai.BadRequestError, match=field) as found:
        client.chat.completions.create(**ask)
    assert found.value.param == field
    assert found.value.type == "invalid_request_error"


def test_what_is_not_there_is_not_found_or_not_implemented(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'gpt' here") as found:
        client.models.retrieve("gpt")
    assert found.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.files.list()
    with pytest.raises(openai.InternalServerError, match="another server") as failed:
        client.embeddings.create(model=MODEL, input="a text")
    assert failed.value.status_code == 501


def test_a_full_queue_says_when_to_try_again_and_the_client_does(tmp_path: Path) -> None:
    needs("fastapi", "server")
    endless = {"model": MODEL, "max_tokens": 4000, "logit_bias": {"0": -100}}
    with Server("--queue", "1") as server:
        client = openai.OpenAI(base_url=server.v1, api_key="none", max_retries=0)
        with client.completions.create(prompt="It was", stream=True, **endless) as at_work:
            next(iter(at_work))
            waits = threading.Thread(
                target=client.completions.create, kwargs={"model": MODEL, "prompt": "a"}
            )
            waits.start()
            until(lambda: re.search(r"(?m)^kvp_queue 1\.0$", server.ask("/metrics").body))
            with pytest.raises(openai.InternalServerError, match="1 request is waiting") as found:
                client.chat.completions.create(messages=[user("Hello.")], **GREEDY)
            assert found.value.status_code == 503
            assert found.value.code == "queue_full"
            assert int(found.value.response.headers["Retry-After"]) >= 1
        patient = client.with_options(max_retries=5)
        assert patient.chat.completions.create(messages=[user("Hello.")], **GREEDY).choices
        waits.join()


# -- the rest of the client -----------------------------------------------------------------------


def test_the_model_says_its_name_and_how_long_conversations_may_be(client: Any) -> None:
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert model.context_length == 4096
    assert client.models.retrieve(MODEL) == model


def test_raw_answers_have_headers_and_can_be_parsed(client: Any) -> None:
    messages = [user(opening()[0])]
    raw = client.chat.completions.with_raw_response.create(messages=messages, **GREEDY)
    assert raw.headers["Content-Type"] == "application/json"
    assert raw.headers["X-Content-Type-Options"] == "nosniff"
    assert raw.parse().choices[0].message.content
    with client.chat.completions.with_streaming_response.create(
        messages=messages, **GREEDY
    ) as streamed:
        assert streamed.parse().choices[0].message.content == raw.parse().choices[0].message.content


def test_many_at_once_are_answered_each_in_its_own_chat(server: Server) -> None:
    async def chat(client: Any) -> None:
        first, number = opening()
        messages: Messages = []
        turns: list[Turn] = []
        for text in (first, QUESTION):
            messages.append(user(text))
            reply = await client.chat.completions.create(messages=messages, **GREEDY)
            messages.append(reply.choices[0].message)
            turns.append(turn(reply.usage))
        messages.append(user(QUESTION))
        stream = await client.chat.completions.create(messages=messages, stream=True, **GREEDY)
        said = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert number in said
        assert_nothing_was_read_twice(turns)
        assert_one_chat(server, first, 6)

    async def all_of_them() -> None:
        async with openai.AsyncOpenAI(base_url=server.v1, api_key=server.key) as client:
            await asyncio.gather(*(chat(client) for _ in range(8)))

    asyncio.run(all_of_them())


@pytest.mark.parametrize("end", [pytest.param("stop", marks=pytest.mark.slow), "kill"])
def test_a_chat_goes_on_after_the_server_ended(tmp_path: Path, end: str) -> None:
    needs("fastapi", "server")
    first, number = opening()
    with Server(chats=tmp_path / "chats") as server:
        client = openai.OpenAI(base_url=server.v1, api_key="none")
        one = client.chat.completions.create(messages=[user(first)], **GREEDY)
        getattr(server, end)()
        server.start()
        messages = [user(first), one.choices[0].message, user(QUESTION)]
        two = client.chat.completions.create(messages=messages, **GREEDY)
    assert number in two.choices[0].message.content
    assert one.chat_id == two.chat_id
    assert_nothing_was_read_twice([turn(one.usage), turn(two.usage)])
