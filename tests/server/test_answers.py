"""What the server answers, beside what ``Llama`` says in process."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvp_edge import Llama
from kvp_edge.bundled import bundled_model
from support.packages import needs

needs("fastapi", "server")
needs("httpx2", "dev")

from starlette.testclient import TestClient  # noqa: E402

from kvp_edge.server.app import Settings, make_app  # noqa: E402
from kvp_edge.server.chats import Chats  # noqa: E402
from kvp_edge.server.context import Context  # noqa: E402
from kvp_edge.server.served import ServedLlama  # noqa: E402

OPTIONS: dict[str, Any] = {
    **{"kv_budget": 128, "n_ctx": 1024, "verbose": False},
    **{"n_threads": 1, "n_threads_batch": 1},
}
DOG = [{"role": "user", "content": "My dog is called Ralph."}]
LONG = [{"role": "user", "content": "snow fell on all roofs where we sang " * 20}]


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    llm = ServedLlama(bundled_model(), **OPTIONS)
    app = make_app([llm], Chats(None, 2**30), Settings("bookworm", longest_reply=40))
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def llm() -> Iterator[Llama]:
    llm = Llama(bundled_model(), **OPTIONS)
    yield llm
    llm.close()


def chat(client: TestClient, messages: Any = DOG, **how: Any) -> dict[str, Any]:
    asked = {"messages": messages, "max_tokens": 12, "temperature": 0, **how}
    answer = client.post("/v1/chat/completions", json=asked)
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def chunks(client: TestClient, path: str = "/v1/chat/completions", **asked: Any) -> list[Any]:
    with client.stream("POST", path, json={"stream": True, "temperature": 0, **asked}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def error(client: TestClient, path: str, status: int, **asked: Any) -> dict[str, Any]:
    answer = client.post(path, json=asked)
    assert answer.status_code == status, answer.text
    said = answer.json()["error"]
    assert said.keys() == {"message", "type", "param", "code"}
    return said  # type: ignore[no-any-return]


def test_a_reply_is_that_of_llama(client: TestClient, llm: Llama) -> None:
    for messages in (DOG, LONG):
        want = llm.create_chat_completion(messages, max_tokens=12, temperature=0)
        got = chat(client, messages)
        assert got["choices"][0]["message"] == want["choices"][0]["message"]
        assert got["choices"][0]["finish_reason"] == want["choices"][0]["finish_reason"]
        for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert got["usage"][name] == want["usage"][name]


def test_a_sampled_reply_is_that_of_llama_with_the_same_seed(
    client: TestClient, llm: Llama
) -> None:
    how = {"max_tokens": 12, "temperature": 1.5, "seed": 7, "top_p": 0.9, "repeat_penalty": 1.2}
    want = llm.create_chat_completion(DOG, **how)
    assert chat(client, **how)["choices"][0]["message"] == want["choices"][0]["message"]


def test_without_a_seed_replies_differ(client: TestClient) -> None:
    said = {
        chat(client, temperature=1.5, max_tokens=20)["choices"][0]["message"]["content"]
        for _ in range(5)
    }
    assert len(said) > 1


def test_a_stream_says_what_a_whole_reply_says(client: TestClient) -> None:
    whole = chat(client)
    found = chunks(client, messages=DOG, max_tokens=12)
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    said = "".join(c["choices"][0]["delta"].get("content", "") for c in found)
    assert said == whole["choices"][0]["message"]["content"]
    endings = [c["choices"][0]["finish_reason"] for c in found]
    assert endings == [None] * (len(found) - 1) + ["stop"]
    assert all(c["object"] == "chat.completion.chunk" and c["chat_id"] for c in found)
    assert ["kv_cache" in c for c in found] == [False] * (len(found) - 1) + [True]
    assert found[-1]["kv_cache"].keys() == whole["kv_cache"].keys()


def test_only_who_asks_for_usage_gets_a_chunk_without_choices(client: TestClient) -> None:
    found = chunks(client, messages=DOG, max_tokens=12, stream_options={"include_usage": True})
    assert found[-1]["choices"] == []
    whole = chat(client)["usage"]
    assert {**found[-1]["usage"], "prompt_tokens_details": None} == {
        **whole,
        "prompt_tokens_details": None,
    }
    assert "kv_cache" in found[-1]


def test_n_replies_are_those_of_n_seeds(client: TestClient) -> None:
    alone = [
        chat(client, temperature=1.2, seed=seed)["choices"][0]["message"] for seed in (5, 6, 7)
    ]
    together = chat(client, temperature=1.2, seed=5, n=3)["choices"]
    assert [choice["index"] for choice in together] == [0, 1, 2]
    assert [choice["message"] for choice in together] == alone


def test_logprobs_are_those_of_the_models_logits(client: TestClient, llm: Llama) -> None:
    told = chat(client, logprobs=True, top_logprobs=3)["choices"][0]
    content = told["logprobs"]["content"]
    assert "".join(one["token"] for one in content) == told["message"]["content"]
    llm.reset()
    llm.create_chat_completion(DOG, max_tokens=1, temperature=0)
    x = llm.newest_logits().astype(np.float64)
    x -= x.max() + math.log(np.exp(x - x.max()).sum())
    assert content[0]["logprob"] == pytest.approx(x.max(), abs=1e-5)
    top = [one["logprob"] for one in content[0]["top_logprobs"]]
    assert top == pytest.approx(sorted(x)[::-1][:3], abs=1e-5)
    assert bytes(content[0]["bytes"]).decode() == content[0]["token"]


def test_a_stream_tells_the_logprobs_of_every_token_once(client: TestClient) -> None:
    whole = chat(client, logprobs=True)["choices"][0]["logprobs"]["content"]
    found = chunks(client, messages=DOG, max_tokens=12, logprobs=True)
    told = [c["choices"][0]["logprobs"] for c in found]
    assert [one for some in told if some for one in some["content"]] == whole


def test_a_stop_ends_the_reply_before_it(client: TestClient) -> None:
    said = chat(client)["choices"][0]["message"]["content"]
    word = said.split()[1]
    choice = chat(client, stop=word)["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == said[: said.index(word)]
    assert chat(client, stop=["no such thing", word])["choices"][0] == choice


def test_a_reply_that_is_cut_says_so(client: TestClient) -> None:
    choice = chat(client, LONG, max_completion_tokens=2)["choices"][0]
    assert choice["finish_reason"] == "length"


def test_no_reply_is_longer_than_the_server_allows(client: TestClient) -> None:
    usage = chat(client, LONG, max_tokens=10**6, logit_bias={}, stop=[])["usage"]
    assert usage["completion_tokens"] <= 40


def test_a_follow_up_reads_only_what_is_new(client: TestClient) -> None:
    messages = list(LONG)
    first = chat(client, messages)
    messages += [first["choices"][0]["message"], {"role": "user", "content": "Who sang?"}]
    second = chat(client, messages)
    assert second["chat_id"] == first["chat_id"]
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= first["usage"]["prompt_tokens"]
    assert second["kv_cache"]["seen"] > first["kv_cache"]["seen"]


def test_another_reply_and_an_edited_message_are_chats_of_their_own(client: TestClient) -> None:
    start = [{"role": "user", "content": "Once more: " + LONG[0]["content"]}]
    said = chat(client, start)
    messages = [*start, said["choices"][0]["message"], {"role": "user", "content": "Who sang?"}]
    old = chat(client, messages)
    again = chat(client, messages)
    edited = chat(client, [*messages[:-1], {"role": "user", "content": "Where?"}])
    assert len({old["chat_id"], again["chat_id"], edited["chat_id"]}) == 3
    for one in (again, edited):
        about = client.get(f"/kvp/chats/{one['chat_id']}").json()
        assert about["parent"] == old["chat_id"]
        assert one["usage"]["prompt_tokens_details"]["cached_tokens"] > 100
    kept = client.get(f"/kvp/chats/{old['chat_id']}").json()
    assert kept["messages"] == [*messages, old["choices"][0]["message"]]


def test_texts_are_continued_as_llama_does(client: TestClient, llm: Llama) -> None:
    prompt = "The old man went to"
    want = llm.create_completion(prompt, max_tokens=8, temperature=0)
    asked = {"prompt": prompt, "max_tokens": 8, "temperature": 0}
    for one in (asked, {**asked, "prompt": [prompt]}):
        got = client.post("/v1/completions", json=one).json()
        assert got["choices"][0]["text"] == want["choices"][0]["text"]
        assert got["usage"]["prompt_tokens"] == want["usage"]["prompt_tokens"]
        assert got["object"] == "text_completion"
    found = chunks(client, "/v1/completions", prompt=prompt, max_tokens=8)
    assert "".join(c["choices"][0]["text"] for c in found) == want["choices"][0]["text"]
    echoed = client.post("/v1/completions", json={**asked, "echo": True}).json()
    assert echoed["choices"][0]["text"] == prompt + want["choices"][0]["text"]


def test_token_ids_are_a_prompt(client: TestClient, llm: Llama) -> None:
    tokens = client.post("/tokenize", json={"content": "The old man went to"}).json()["tokens"]
    assert tokens == llm.tokenize(b"The old man went to", add_bos=False)
    want = llm.create_completion(tokens, max_tokens=8, temperature=0)["choices"][0]["text"]
    asked = {"prompt": tokens, "max_tokens": 8, "temperature": 0, "logprobs": 2}
    got = client.post("/v1/completions", json=asked).json()["choices"][0]
    assert got["text"] == want
    assert "".join(got["logprobs"]["tokens"]) == want
    starts = [want[at:] for at in got["logprobs"]["text_offset"]]
    assert all(map(str.startswith, starts, got["logprobs"]["tokens"]))


@pytest.mark.parametrize(
    ("asked", "param", "said"),
    [
        ({}, "messages", "Field required"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role", "'user'"),
        (
            {"messages": DOG, "temperature": -1},
            "temperature",
            "greater than or equal to 0 (it is -1)",
        ),
        ({"messages": DOG, "n": 99}, "n", "less than or equal to 8 (it is 99)"),
        ({"messages": "x" * 99}, "messages", f"valid list (it is '{'x' * 59}..."),
        ({"messages": [{"role": {}}]}, "messages.0.role", "(it is an object)"),
        ({"messages": DOG, "stop": [""]}, "stop", "at least 1"),
        ({"messages": DOG, "logit_bias": {"x": 1}}, "logit_bias.x", "pattern"),
    ],
)
def test_what_is_wrong_with_a_request_is_told(
    client: TestClient, asked: dict[str, Any], param: str, said: str
) -> None:
    found = error(client, "/v1/chat/completions", 400, **asked)
    assert found["param"].startswith(param)
    assert said in found["message"]
    assert found["type"] == "invalid_request_error"


def test_a_prompt_that_is_too_long_has_the_code_that_clients_know(client: TestClient) -> None:
    for n, stream in ((800, False), (800, True), (100_000, False)):  # the last is not tokenized
        messages = [{"role": "user", "content": "snow fell " * n}]
        found = error(client, "/v1/chat/completions", 400, messages=messages, stream=stream)
        assert found["code"] == "context_length_exceeded"
        assert "n_ctx" in found["message"] or "--n-ctx" in found["message"]
    assert chat(client)["choices"][0]["message"]["content"]


def test_a_token_that_does_not_exist_is_refused(client: TestClient) -> None:
    found = error(client, "/v1/completions", 400, prompt=[10**8])
    assert "token 100000000 does not exist" in found["message"]


def test_pages_of_this_machine_may_send_headers_of_their_clients(client: TestClient) -> None:
    """OpenAI's client for JavaScript sends x-stainless-..."""
    asked = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
    }
    path, page = "/v1/chat/completions", "http://localhost:3000"
    granted = client.options(path, headers={"Origin": page, **asked})
    assert granted.status_code == 200
    assert granted.headers["Access-Control-Allow-Origin"] == page
    assert "x-stainless-os" in granted.headers["Access-Control-Allow-Headers"]
    refused = client.options(path, headers={"Origin": "http://example.org", **asked})
    assert refused.status_code == 403
    assert "Access-Control-Allow-Origin" not in refused.headers


def test_what_is_not_there_is_told(client: TestClient) -> None:
    assert "embeddings" in error(client, "/v1/embeddings", 501, input="x")["message"]
    without = client.post("/chat/completions", json={"messages": DOG})
    assert without.status_code == 404
    assert without.json()["error"]["message"] == (
        "there is nothing at POST /chat/completions; OpenAI's paths begin with /v1/"
    )
    wrong = client.get("/v1/chat/completions")
    assert wrong.status_code == 405
    assert wrong.headers["Allow"] == "POST"
    assert wrong.json()["error"]["message"] == (
        "there is nothing at GET /v1/chat/completions; use POST"
    )
    assert client.get("/v1/models/gpt").json()["error"]["code"] == "model_not_found"
    assert client.get("/kvp/chats/0123456789abcdef").json()["error"]["code"] == "chat_not_found"


def test_the_model_is_listed(client: TestClient) -> None:
    [model] = client.get("/v1/models").json()["data"]
    assert model["id"] == "bookworm"
    assert client.get("/v1/models/bookworm").json() == model


def test_metrics_count_what_was_done(client: TestClient) -> None:
    def read() -> dict[str, float]:
        lines = client.get("/metrics").text.splitlines()
        return {n: float(x) for n, x in (li.rsplit(" ", 1) for li in lines if li[0] != "#")}

    before, usage, after = read(), chat(client)["usage"], read()
    while after["kvp_at_work"]:  # the chat is being kept
        after = read()
    for name, kind in (("prompt_tokens", "prompt"), ("completion_tokens", "written")):
        key = f'kvp_tokens_total{{kind="{kind}"}}'
        assert after[key] - before.get(key, 0) == usage[name]
    assert after["kvp_queue"] == 0
    assert after["kvp_chats"] >= 1
    assert after["kvp_first_token_seconds_count"] == before["kvp_first_token_seconds_count"] + 1


def test_a_template_that_cannot_show_a_chat_is_told_of(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> list[int]:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("kvp_edge.server.context.prompt_tokens", fails)
    found = error(client, "/v1/chat/completions", 400, messages=DOG)
    assert found["message"].endswith("cannot show these messages: division by zero")


def test_a_stream_gives_signs_of_life_while_a_prompt_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = threading.Event()
    serve = Context.serve

    def waits(*args: Any) -> None:
        read.wait()
        serve(*args)

    monkeypatch.setattr(Context, "serve", waits)
    settings = Settings("bookworm", patience=0.0, ping=0.01)
    app = make_app([ServedLlama(bundled_model(), **OPTIONS)], Chats(None, 2**30), settings)
    lines: list[str] = []

    async def send(message: Any) -> None:
        lines.extend(message.get("body", b"").decode().splitlines())
        if any(line.startswith(": ping") for line in lines):
            read.set()

    async def talk() -> None:
        body = json.dumps({"messages": DOG, "max_tokens": 4, "stream": True}).encode()
        asked = asyncio.Queue[Any]()
        asked.put_nowait({"type": "http.request", "body": body})
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/chat/completions",
            "query_string": b"",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        }
        async with app.router.lifespan_context(app):
            await app(scope, asked.get, send)

    asyncio.run(talk())
    said = [line for line in lines if line]
    assert said[0].startswith(": ping")
    assert [line for line in said if line.startswith("data: ")][-1] == "data: [DONE]"


def test_a_call_of_a_tool_comes_back_as_one_and_is_remembered(client: TestClient) -> None:
    schema = {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": schema}}]
    asked = {"tools": tools, "tool_choice": "required", "max_tokens": 40}
    said = chat(client, **asked)
    choice = said["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    [call] = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Rome"}
    answer = {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}
    later = chat(client, [*DOG, choice["message"], answer], tools=tools)
    assert later["chat_id"] == said["chat_id"]
    found = chunks(client, messages=DOG, **asked)
    [streamed] = [c for f in found for c in f["choices"][0]["delta"].get("tool_calls", [])]
    assert streamed["function"] == call["function"]


def test_a_reply_has_the_form_that_is_asked_for(client: TestClient) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    said = chat(client, response_format=form, max_tokens=30)["choices"][0]["message"]["content"]
    assert json.loads(said) in ({"n": 1}, {"n": 2})
    found = error(
        client, "/v1/chat/completions", 400, messages=DOG, response_format={"type": "poem"}
    )
    assert found["param"] == "response_format"


def test_the_cache_is_shown_as_it_is(client: TestClient) -> None:
    said = chat(client, LONG)
    view = client.get("/kvp/cache").json()
    stats, heads = view["stats"], view["n_heads"]
    assert view["chat"] == said["chat_id"]
    assert len(view["held"]) == len(view["logged"]) == len(view["texts"]) == stats["seen"]
    assert sum(view["held"]) == stats["kept"] * heads
    assert max(view["held"]) == heads
    assert all(view["logged"])
    later = client.get("/kvp/cache", params={"chat": view["chat"], "texts_from": 5}).json()
    assert later["texts"] == view["texts"][5:]
    assert client.get("/kvp/cache?chat=other&texts_from=5").json()["texts_from"] == 0


def test_the_words_that_asked_for_what_came_back_are_told(client: TestClient) -> None:
    client.get("/kvp/cache")  # somebody watches
    messages: list[Any] = []
    for said in (
        "My dog is called Ralph.",
        *["snow fell on all roofs where we sang " * 8] * 6,
        "What is my dog called?",
    ):
        messages.append({"role": "user", "content": said})
        messages.append(chat(client, messages)["choices"][0]["message"])
    recall = {"asked_by": []}
    while not recall["asked_by"]:  # found out when the reply is done, if nobody waits
        recall = client.get("/kvp/cache").json()["last_recall"]
    words = [word["text"].strip() for word in recall["asked_by"]]
    assert words == ["What", "is", "my", "dog", "called"]
    assert all(0 < word["attention"] < 1 for word in recall["asked_by"])
    assert len(recall["heads"]) >= recall["spans"][-1]["end"]
