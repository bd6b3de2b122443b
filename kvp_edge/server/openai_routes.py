"""The routes of OpenAI's protocol, and those that monitoring asks."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from kvp_edge.files.json_values import shortened
from kvp_edge.server.context import Ask
from kvp_edge.server.errors import APIError, ErrorBody, bad_request
from kvp_edge.server.replies import ChatForm, TextForm
from kvp_edge.server.requests import ChatRequest, TextRequest, TokenizeRequest
from kvp_edge.server.serving import Serving, Settings
from kvp_edge.server.tools import BadRequest, check

#: What a request for a reply gets, for /openapi.json.
_REPLIES: dict[int | str, dict[str, Any]] = {
    200: {"description": "a reply, or its chunks", "content": {"text/event-stream": {}}},
    503: {"model": ErrorBody, "description": "the queue is full, or the server is stopping"},
}

_TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}}}


def openai_routes(serving: Serving) -> APIRouter:
    routes = APIRouter()
    settings, llm, started = serving.settings, serving.llm, int(time.time())

    @routes.post("/v1/chat/completions", responses=_REPLIES)
    async def chat_completions(body: ChatRequest, request: Request) -> Any:
        try:
            tools = await asyncio.to_thread(  # a grammar may take a tenth of a second
                check, body.tools, body.tool_choice, body.response_format, body.parallel_tool_calls
            )
        except BadRequest as error:
            raise bad_request(str(error), error.param) from error
        top = (body.top_logprobs or 0) if body.logprobs else None
        messages = [message.plain() for message in body.messages]
        ask = Ask(
            messages,
            how=_how(body, settings, llm.n_vocab()),
            tools=tools,
            n=body.n,
            top_logprobs=top,
        )
        form = ChatForm(settings.model, lambda token: llm.piece([token]))
        return await serving.answer(
            request, ask, form, stream=body.stream, include_usage=body.include_usage
        )

    @routes.post("/v1/completions", responses=_REPLIES)
    async def completions(body: TextRequest, request: Request) -> Any:
        prompt = body.prompt
        assert isinstance(prompt, str) or not isinstance(prompt[0], str)
        if isinstance(prompt, list):
            _require_token(max(map(int, prompt)), llm.n_vocab(), "prompt")
        ask = Ask(
            prompt=prompt,
            how=_how(body, settings, llm.n_vocab()),
            n=body.n,
            top_logprobs=body.logprobs,
        )
        echo = ""
        if body.echo:
            echo = (
                prompt if isinstance(prompt, str) else llm.piece(prompt).decode("utf-8", "replace")
            )
        form = TextForm(settings.model, lambda token: llm.piece([token]), echo)
        return await serving.answer(
            request, ask, form, stream=body.stream, include_usage=body.include_usage
        )

    @routes.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [model_card()]}

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        if name != settings.model:
            sentence = f"there is no model {shortened(name)} here, only '{settings.model}'"
            raise APIError(404, sentence, code="model_not_found")
        return model_card()

    def model_card() -> dict[str, Any]:
        return {
            "id": settings.model,
            "object": "model",
            "created": started,
            "owned_by": "kvp_edge",
            "context_length": llm.n_ctx(),
        }

    @routes.post("/v1/embeddings", status_code=501, response_model=ErrorBody)
    async def embeddings() -> Any:
        raise APIError(501, "kvp-edge serve writes replies; for embeddings use another server")

    @routes.post("/tokenize")
    def tokenize(body: TokenizeRequest) -> Any:  # in a thread: a long text takes seconds
        tokens = llm.tokenize(body.content.encode(), add_bos=body.add_special, special=False)
        return JSONResponse({"tokens": tokens})

    @routes.get("/health")
    async def health() -> Any:
        return {"status": "ok"}

    @routes.get("/metrics", response_class=Response, responses=_TEXT)
    async def show_metrics() -> Any:
        text, kind = serving.metrics.text()
        return Response(text, media_type=kind)

    return routes


def _how(body: ChatRequest | TextRequest, settings: Settings, n_vocab: int) -> dict[str, Any]:
    longest = body.longest if isinstance(body, ChatRequest) else body.max_tokens
    seed = secrets.randbits(31) if body.seed is None else body.seed % 2**32
    how = {
        **body.sampling(),
        "max_tokens": min(longest or settings.longest_reply, settings.longest_reply),
        "seed": seed,
        "stop": body.stops,
    }
    if body.logit_bias:
        _require_token(max(map(int, body.logit_bias)), n_vocab, "logit_bias")
        how["logit_bias"] = body.logit_bias
    return how


def _require_token(token: int, n_vocab: int, param: str) -> None:
    if token >= n_vocab:
        raise bad_request(f"token {token} does not exist: there are {n_vocab}", param)
