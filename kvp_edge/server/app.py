"""The routes, and how a request gets from them to a context and back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import secrets
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from sse_starlette.sse import EventSourceResponse
from starlette.exceptions import HTTPException

from kvp_edge.errors import BudgetError, ContextLengthError, KVPError
from kvp_edge.server import cache_view
from kvp_edge.server.access import LOCAL_ORIGINS, Access, Rules
from kvp_edge.server.answers import Answers
from kvp_edge.server.chats import Chat, Chats
from kvp_edge.server.context import Ask, Context
from kvp_edge.server.errors import APIError, bad_request
from kvp_edge.server.events import Began, Done, Event, Piece
from kvp_edge.server.metrics import Metrics
from kvp_edge.server.replies import ChatForm, TextForm
from kvp_edge.server.requests import ChatRequest, TextRequest, TokenizeRequest
from kvp_edge.server.served import Cancelled, ServedLlama
from kvp_edge.server.tools import BadRequest, check
from kvp_edge.server.workers import Line

_PAGE = Path(__file__).parent / "page"

#: No script, style or request but the page's own.
_POLICY = "; ".join(
    (
        *("default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'"),
        *("img-src 'self' data:", "base-uri 'none'", "form-action 'none'"),
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(frozen=True)
class Settings:
    """
    Attributes:
        model: name of the model, for clients.
        rules: who may ask.
        most_waiting: requests in the queue.
        longest_reply: tokens; a request that asks for more gets so many.
        patience: seconds in which what is wrong with a request is told with its status; after
            them a stream begins, which gets signs of life, and an error is a part of it.
        ping: seconds between these.
        log: called with what was measured of every reply, and the seconds it took, waiting
            included. No text is logged.
    """

    model: str
    rules: Rules = field(default_factory=Rules)
    most_waiting: int = 64
    longest_reply: int = 4096
    patience: float = 1.0
    ping: float = 10.0
    log: Callable[[Done, float], None] = lambda *_: None


class _Asked:
    """A request in line: a job of ``Line``, and the events that come of it."""

    def __init__(
        self,
        ask: Ask,
        metrics: Metrics,
        idle: Callable[[], bool],
        log: Callable[[Done, float], None],
    ) -> None:
        self.ask, self._metrics, self._idle, self._log = ask, metrics, idle, log
        self.cancelled = False
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._since = time.monotonic()

    def run(self, context: Context) -> None:
        def send(event: Event) -> None:
            if isinstance(event, Began):
                self._metrics.began(time.monotonic() - self._since)
            elif isinstance(event, Done):
                self._metrics.done(event)
                self._log(event, time.monotonic() - self._since)
            self._tell(event)

        try:
            context.serve(self.ask, lambda: self.cancelled, send)
            context.explain(self._idle)
        except Cancelled as cancelled:
            self._tell(cancelled)
        except Exception as error:  # of one request; the server goes on
            self._tell(error)

    def fail(self, error: Exception) -> None:
        self._tell(error)

    def _tell(self, event: Event | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next(self) -> Event:
        """
        Raises:
            Exception: what went wrong.
        """
        event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        return event


def make_app(llms: list[ServedLlama], store: Chats, settings: Settings) -> FastAPI:
    """The server, which owns the models, from its start to its end."""
    at_once = store.folder is not None or len(llms) > 1
    contexts = [Context(llm, store, keeps_at_once=at_once) for llm in llms]
    line: Line | None = None

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        nonlocal line
        line = Line(contexts, settings.most_waiting, Context.close)
        try:
            yield
        finally:
            await asyncio.to_thread(line.end)
            store.close()

    def stat(name: str) -> Callable[[], float]:
        return lambda: sum(float(c.llm.kv_stats[name] or 0) for c in contexts)

    metrics = Metrics(
        {
            "queue": lambda: line.waiting if line else 0,
            "at_work": lambda: line.at_work if line else 0,
            "chats": lambda: len(store),
            "chat_bytes": lambda: store.nbytes,
            "tokens_seen": stat("seen"),
            "tokens_resident": stat("kept"),
            "tokens_logged": stat("logged"),
            "log_bytes": stat("log_bytes"),
            "kv_bytes": stat("kv_bytes"),
        }
    )
    app = FastAPI(title="kvp-edge serve", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(
        CORSMiddleware,
        allow_origin_regex=LOCAL_ORIGINS,
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=[
            "*"
        ],  # clients in pages of this machine name themselves in some of their own
    )
    app.add_middleware(Access, rules=settings.rules)
    app.add_middleware(Answers, headers=_HEADERS, seen=metrics.answered)
    first = llms[0]

    async def answer(
        request: Request, ask: Ask, form: ChatForm | TextForm, streams: bool, include_usage: bool
    ) -> Any:
        assert line is not None
        waiting = line
        job = _Asked(ask, metrics, lambda: waiting.waiting == 0, settings.log)
        waiting.put(job)
        if streams:
            first = asyncio.ensure_future(job.next())
            await asyncio.wait([first], timeout=settings.patience)
            if first.done() and isinstance(error := first.exception(), Exception):
                raise _as_answer(error) from error
            return EventSourceResponse(_stream(job, first, form, include_usage), ping=settings.ping)
        try:
            while True:
                event = await _or_gone(job.next(), request, job)
                if isinstance(event, Began):
                    form.began(event)
                elif isinstance(event, Piece):
                    form.collect(event)
                else:
                    return JSONResponse(form.reply(event))
        except Exception as error:
            raise _as_answer(error) from error

    # -- OpenAI's ----------------------------------------------------------------------------

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Any:
        try:
            tools = check(
                body.tools, body.tool_choice, body.response_format, body.parallel_tool_calls
            )
        except BadRequest as error:
            raise bad_request(str(error), error.param) from error
        top = (body.top_logprobs or 0) if body.logprobs else None
        messages = [message.plain() for message in body.messages]
        ask = Ask(messages, how=_how(body, settings), tools=tools, n=body.n, top_logprobs=top)
        form = ChatForm(settings.model, lambda token: first.piece([token]))
        return await answer(request, ask, form, body.stream, body.include_usage)

    @app.post("/v1/completions")
    async def completions(body: TextRequest, request: Request) -> Any:
        prompt = body.prompt
        assert isinstance(prompt, str) or not isinstance(prompt[0], str)
        if isinstance(prompt, list) and max(prompt) >= first.n_vocab():
            raise bad_request(
                f"token {max(prompt)} does not exist: there are {first.n_vocab()}", "prompt"
            )
        ask = Ask(prompt=prompt, how=_how(body, settings), n=body.n, top_logprobs=body.logprobs)
        echo = ""
        if body.echo:
            echo = (
                prompt
                if isinstance(prompt, str)
                else first.piece(prompt).decode("utf-8", "replace")
            )
        form = TextForm(settings.model, lambda token: first.piece([token]), echo)
        return await answer(request, ask, form, body.stream, body.include_usage)

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [model_card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        if name != settings.model:
            raise APIError(404, f"there is no model '{name}' here", code="model_not_found")
        return model_card()

    def model_card() -> dict[str, Any]:
        return {
            "id": settings.model,
            "object": "model",
            "created": started,
            "owned_by": "kvp_edge",
            "context_length": first.n_ctx(),
        }

    started = int(time.time())

    @app.post("/v1/embeddings")
    async def embeddings() -> Any:
        raise APIError(501, "kvp-edge serve writes replies; for embeddings use another server")

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Any:
        tokens = first.tokenize(body.content.encode(), add_bos=body.add_special, special=False)
        return {"tokens": tokens}

    @app.get("/health")
    async def health() -> Any:
        return {"status": "ok"}

    @app.get("/metrics")
    async def show_metrics() -> Any:
        text, kind = metrics.text()
        return Response(text, media_type=kind)

    # -- of the page -------------------------------------------------------------------------

    def facts(chat: Chat) -> dict[str, Any]:
        return {
            "id": chat.id,
            "title": chat.title,
            "parent": chat.parent,
            "n_messages": len(chat.messages),
            "n_tokens": len(chat.tokens),
            "bytes": chat.nbytes,
            "created": chat.created,
            "updated": chat.updated,
            "resident": any(context.chat is chat for context in contexts),
        }

    def known(id: str) -> Chat:
        chat = store.get(id)
        if chat is None:
            raise APIError(404, f"there is no chat '{id[:40]}'", code="chat_not_found")
        return chat

    @app.get("/kvp/chats")
    async def all_chats() -> Any:
        return {"chats": [facts(chat) for chat in store.all() if chat.messages]}

    @app.get("/kvp/chats/{id}")
    async def one_chat(id: str) -> Any:
        chat = known(id)
        return {**facts(chat), "messages": chat.messages}

    @app.delete("/kvp/chats/{id}", status_code=204)
    async def delete_chat(id: str) -> Response:
        known(id)
        store.delete(id)
        return Response(status_code=204)

    @app.get("/kvp/cache")
    def cache(chat: str | None = None, texts_from: int = 0) -> Any:
        context = next((c for c in contexts if c.chat and c.chat.id == chat), contexts[0])
        context.watch()
        at_work = line is not None and line.at_work > 0
        return cache_view.view(context, at_work, chat, max(texts_from, 0))

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response((_PAGE / "index.html").read_bytes(), media_type="text/html")

    app.mount("/page", StaticFiles(directory=_PAGE), name="page")

    # -- errors ------------------------------------------------------------------------------

    @app.exception_handler(APIError)
    async def of_ours(_: Request, error: APIError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return _of_validation(error).response()

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        cause = error.__cause__
        if isinstance(cause, APIError):
            return cause.response()
        where = f"{request.method} {request.url.path[:80]}"
        sentences = {
            404: f"there is nothing at {where}; OpenAI's paths begin with /v1/",
            405: f"there is nothing at {where}; other methods there are",
        }
        sentence = sentences.get(error.status_code, str(error.detail))
        headers = dict(error.headers or {})
        return APIError(error.status_code, sentence, headers=headers).response()

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, __: Exception) -> Response:
        return _unforeseen().response()  # uvicorn prints it

    return app


async def _stream(
    job: _Asked, first: asyncio.Future[Event], form: ChatForm | TextForm, include_usage: bool
) -> AsyncIterator[dict[str, str]]:
    try:
        event = await first
        while True:
            if isinstance(event, Began):
                chunks = form.began(event)
            elif isinstance(event, Piece):
                chunks = form.piece(event)
            else:
                chunks = form.last(event, include_usage)
            for chunk in chunks:
                yield {"data": json.dumps(chunk, ensure_ascii=False)}
            if isinstance(event, Done):
                break
            event = await job.next()
        yield {"data": "[DONE]"}
    except asyncio.CancelledError:  # the client is gone
        raise
    except Exception as error:
        yield {"data": json.dumps(_as_answer(error).body)}
    finally:
        job.cancelled = True


async def _or_gone(event: Any, request: Request, job: _Asked) -> Event:
    """The next event, while the client is there.

    Raises:
        Cancelled: it is not.
    """
    waiting = asyncio.ensure_future(event)
    try:
        while not waiting.done():
            await asyncio.wait([waiting], timeout=0.25)
            if not waiting.done() and await request.is_disconnected():
                job.cancelled = True
                raise Cancelled
        found: Event = waiting.result()
        return found
    except asyncio.CancelledError:
        job.cancelled = True
        raise
    finally:
        waiting.cancel()


def _how(body: ChatRequest | TextRequest, settings: Settings) -> dict[str, Any]:
    longest = body.longest if isinstance(body, ChatRequest) else body.max_tokens
    seed = secrets.randbits(31) if body.seed is None else body.seed % 2**32
    how = {
        **body.sampling(),
        "max_tokens": min(longest or settings.longest_reply, settings.longest_reply),
        "seed": seed,
        "stop": body.stops,
    }
    if body.logit_bias:
        how["logit_bias"] = body.logit_bias
    return how


def _as_answer(error: Exception) -> APIError:
    """What is told of an error, and with which status."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, ContextLengthError):
        return bad_request(str(error), "messages", "context_length_exceeded")
    if isinstance(error, Cancelled):
        return APIError(499, "the client has gone")
    if isinstance(error, BudgetError):
        return bad_request(str(error), "messages")
    if isinstance(error, (KVPError, MemoryError)):
        return APIError(500, str(error) or "out of memory")
    sys.excepthook(type(error), error, error.__traceback__)
    return _unforeseen()


def _unforeseen() -> APIError:
    return APIError(500, "the server could not answer this request; its own output says why")


def _of_validation(error: RequestValidationError) -> APIError:
    """The first thing that is wrong, by the name of its field. Where a field may have several
    types, what is wrong with the one that it has."""
    problem = min(error.errors(), key=lambda one: str(one["type"]).endswith("_type"))
    where = [str(part) for part in problem["loc"][1:] if not _TYPE.search(str(part))]
    name = ".".join(where) or None
    message = problem["msg"]
    return bad_request(f"{name}: {message}" if name else str(message), name)


#: What pydantic puts among the names of fields to tell of a type.
_TYPE = re.compile(r"^(str|constrained-str)$|\[")
