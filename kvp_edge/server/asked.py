"""A request in line, and what is told of it on the way back."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any

from starlette.requests import Request

from kvp_edge.server.context import Ask, Context
from kvp_edge.server.errors import Cancelled
from kvp_edge.server.events import Began, Done, Event
from kvp_edge.server.metrics import Metrics


class Asked:
    """A job of ``Line``, and the events that come of it.

    Args:
        idle: whether no other request waits.
        log: see Settings.
    """

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

    async def next_or_gone(self, gone: asyncio.Future[None]) -> Event:
        """The next event, while the client is there.

        Args:
            gone: done when it is not.

        Raises:
            Cancelled: it is not.
            Exception: what went wrong.
        """
        waiting = asyncio.ensure_future(self.next())
        try:
            either: list[asyncio.Future[Any]] = [waiting, gone]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                raise Cancelled
            return waiting.result()
        except (asyncio.CancelledError, Cancelled):
            self.cancelled = True
            raise
        finally:
            waiting.cancel()


async def until_gone(request: Request) -> None:
    """Returns when the client, who has sent all of its request, has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
