"""Who may ask, from where, and how much at once. Everything is refused before it is parsed."""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvp_edge.files.json_values import shortened
from kvp_edge.server.errors import APIError

#: Bytes of a body.
MOST_BYTES = 16 * 2**20

#: What needs no key: whether the server lives, and the page, which asks for one.
_OPEN = re.compile(r"/(health|page/[^/]+)?")

#: Pages of this machine.
LOCAL_ORIGINS = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
_NAMES = {"localhost", "127.0.0.1", "::1"}


@dataclass(frozen=True)
class Rules:
    """
    Attributes:
        keys: any of these is accepted; none: no key is needed.
        loopback: the server is bound to this machine only. Then it answers only to names of this
            machine, so that no web page can reach it by a name of its own (DNS rebinding).
        host: what it is bound to.
    """

    keys: tuple[str, ...] = ()
    loopback: bool = True
    host: str = "127.0.0.1"

    def knows(self, key: str) -> bool:
        """In a time that does not tell how much of a key is right.

        Args:
            key: as a header has it, a character for each byte.
        """
        given = key.encode("latin-1")
        return any([hmac.compare_digest(given, known.encode()) for known in self.keys])


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Access:
    """Refuses what the rules do not allow."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self._app, self._rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check(scope, headers)
        except APIError as error:
            await error.response()(scope, receive, send)
            return
        await self._app(scope, _bounded(receive), send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        rules = self._rules
        if rules.loopback and _name(headers.get("host", "")) not in {*_NAMES, rules.host}:
            raise APIError(
                403,
                "this server answers only to the names of this machine, such as 127.0.0.1, not to "
                f"{shortened(headers.get('host', ''))}",
            )
        origin = headers.get("origin")
        if origin is not None and not self._is_ours(origin, headers):
            raise APIError(
                403,
                f"web pages of other sites may not use this server, as one of {shortened(origin)} "
                "did: only its own page and those of this machine may",
            )
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            raise _too_large()
        if rules.keys and scope["method"] != "OPTIONS" and not _OPEN.fullmatch(scope["path"]):
            kind, _, key = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not key.strip():
                raise _no_key(
                    "this server needs its API key: send it as 'Authorization: Bearer KEY'"
                )
            if not rules.knows(key.strip()):
                raise _no_key(
                    "this server needs its API key, and was sent another: its keys are in the file "
                    "that --api-key-file names"
                )

    def _is_ours(self, origin: str, headers: Headers) -> bool:
        own = re.fullmatch(r"https?://(.+)", origin)
        same = own is not None and own.group(1) == headers.get("host")
        return same or re.fullmatch(LOCAL_ORIGINS, origin) is not None


def _name(host: str) -> str:
    """Without a port."""
    bare = re.fullmatch(r"(\[[^\]]*\]|[^:]*)(:\d+)?", host)
    return bare.group(1).strip("[]").lower() if bare else ""


def _no_key(sentence: str) -> APIError:
    headers = {"WWW-Authenticate": "Bearer"}
    return APIError(401, sentence, code="invalid_api_key", headers=headers)


def _too_large() -> APIError:
    return APIError(
        413, f"the request is too large: at most {MOST_BYTES // 2**20} MiB", code="too_large"
    )


def _bounded(receive: Receive) -> Receive:
    """The same, for a body that does not say how long it is."""
    read = 0

    async def bounded() -> Message:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        if read > MOST_BYTES:
            raise _too_large()
        return message

    return bounded


def read_keys(lines: Iterable[str]) -> tuple[str, ...]:
    """The keys of a file, one on each line; empty lines and those that begin with # are none."""
    stripped = (line.strip() for line in lines)
    return tuple(line for line in stripped if line and not line.startswith("#"))
