"""What all answers have in common: their headers, and that they are counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Answers:
    """
    Args:
        headers: of all answers.
        seen: called with the route and the status of each.
    """

    def __init__(
        self, app: ASGIApp, headers: Mapping[str, str], seen: Callable[[str, int], None]
    ) -> None:
        self._app, self._headers, self._seen = app, headers, seen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._headers)
                self._seen(_route(scope), message["status"])
            await send(message)

        await self._app(scope, receive, with_headers)


def _route(scope: Scope) -> str:
    """Its pattern, of which there are few."""
    return str(getattr(scope.get("route"), "path", "other"))
