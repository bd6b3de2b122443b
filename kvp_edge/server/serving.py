"""All that serves: contexts, chats, the line for them, and how a reply comes back."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi.responses import JSONResponse
from sse_starlette.sse import EventSourceResponse
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from kvp_edge.server.access import Rules
from kvp_edge.server.asked import Asked, until_gone
from kvp_edge.server.chats import Chats
from kvp_edge.server.context import Ask, Context
from kvp_edge.server.errors import APIError, as_answer
from kvp_edge.server.events import Began, Done, Event, Piece
from kvp_edge.server.metrics import Metrics
from kvp_edge.server.replies import ChatForm, TextForm
from kvp_edge.server.served import ServedLlama
from kvp_edge.server.workers import Line


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
        worded: what an error says to Llama's caller, in words of who started the server.
        log: called with what was measured of every reply, and the seconds it took, waiting
            included. No text is logged.
    """

    model: str
    rules: Rules = field(default_factory=Rules)
    most_waiting: int = 64
    longest_reply: int = 4096
    patience: float = 1.0
    ping: float = 10.0
    worded: Callable[[str], str] = str
    log: Callable[[Done, float], None] = lambda *_: None


class Serving:
    """What the routes have in common.

    Args:
        llms: one for each context; they are closed in the end, as is the store.

    Attributes:
        llm: any of them, to look at: its vocabulary, its limits.
    """

    def __init__(self, llms: list[ServedLlama], store: Chats, settings: Settings) -> None:
        at_once = store.folder is not None or len(llms) > 1
        self.contexts = [Context(llm, store, keeps_at_once=at_once) for llm in llms]
        self.store, self.settings, self.llm = store, settings, llms[0]
        self._line: Line | None = None
        self.metrics = Metrics(
            {
                "queue": lambda: self._line.waiting if self._line else 0,
                "at_work": lambda: self.at_work,
                "chats": lambda: len(store),
                "chat_bytes": lambda: store.nbytes,
                "tokens_seen": self._stat("seen"),
                "tokens_resident": self._stat("kept"),
                "tokens_logged": self._stat("logged"),
                "log_bytes": self._stat("log_bytes"),
                "kv_bytes": self._stat("kv_bytes"),
            }
        )

    def _stat(self, name: str) -> Callable[[], float]:
        return lambda: sum(float(c.llm.kv_stats[name] or 0) for c in self.contexts)

    @property
    def at_work(self) -> int:
        """Requests that are served just now."""
        return self._line.at_work if self._line else 0

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Any) -> AsyncIterator[None]:
        """From the first request to the last."""
        self._line = Line(self.contexts, self.settings.most_waiting, Context.close)
        try:
            yield
        finally:
            await asyncio.to_thread(self._line.end)
            self.store.close()

    async def answer(
        self,
        request: Request,
        ask: Ask,
        form: ChatForm | TextForm,
        *,
        stream: bool,
        include_usage: bool,
    ) -> Any:
        """A reply, or a stream of it.

        Raises:
            APIError: there is none.
        """
        line = self._line
        assert line is not None
        job = Asked(ask, self.metrics, lambda: line.waiting == 0, self.settings.log)
        line.put(job)
        if stream:
            first = asyncio.ensure_future(job.next())
            await asyncio.wait([first], timeout=self.settings.patience)
            if first.done() and isinstance(error := first.exception(), Exception):
                raise self._told(error) from error
            chunks = _stream(job, first, form, include_usage, self._told)
            return _Stream(job, chunks, self.settings.ping)
        gone = asyncio.ensure_future(until_gone(request))
        try:
            while True:
                event = await job.next_or_gone(gone)
                if isinstance(event, Began):
                    form.began(event)
                elif isinstance(event, Piece):
                    form.collect(event)
                else:
                    return JSONResponse(form.reply(event))
        except APIError:
            raise
        except Exception as error:
            raise self._told(error) from error
        finally:
            gone.cancel()

    def _told(self, error: Exception) -> APIError:
        return as_answer(error, self.settings.worded)


class _Stream(EventSourceResponse):
    """A stream whose job ends with it, even if not a chunk of it could be sent."""

    def __init__(self, job: Asked, chunks: AsyncIterator[dict[str, str]], ping: float) -> None:
        super().__init__(chunks, ping=ping)
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancelled = True


async def _stream(
    job: Asked,
    first: asyncio.Future[Event],
    form: ChatForm | TextForm,
    include_usage: bool,
    told: Callable[[Exception], APIError],
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
        yield {"data": json.dumps(told(error).body)}
