"""Who may ask, from where, and how much at once."""

from __future__ import annotations

import asyncio
import hmac
import json
from typing import Any

import pytest

from support.packages import needs

needs("fastapi", "server")

from kvp_edge.server.access import MOST_BYTES, Access, Rules, is_loopback, read_keys  # noqa: E402
from kvp_edge.server.errors import APIError  # noqa: E402

LOCAL = {"host": "127.0.0.1:8080"}


def asked(
    rules: Rules,
    headers: dict[str, str],
    path: str = "/v1/models",
    method: str = "POST",
    body: tuple[bytes, ...] = (b"",),
) -> tuple[int, Any]:
    """The status and the body of the answer of an app that reads what is sent, or of the rules."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        read = 0
        try:
            while True:
                message = await receive()
                read += len(message["body"])
                if not message["more_body"]:
                    break
        except APIError as error:
            await error.response()(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(read).encode()})

    parts = list(body)
    sent: list[Any] = []

    async def receive() -> Any:
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(k.encode("latin-1"), v.encode("latin-1")) for k, v in headers.items()],
    }
    asyncio.run(Access(app, rules)(scope, receive, send))
    return sent[0]["status"], json.loads(b"".join(m.get("body", b"") for m in sent[1:]))


# -- keys -----------------------------------------------------------------------------------------

KEYS = Rules(keys=("one key", "another", "schlüssel"), loopback=False)


@pytest.mark.parametrize(
    "given",
    [
        *("Bearer one key", "bearer another", "BEARER  another  "),
        "Bearer schlüssel".encode().decode("latin-1"),  # UTF-8 on the wire
    ],
)
def test_any_of_the_keys_is_accepted(given: str) -> None:
    assert asked(KEYS, {"host": "anything", "authorization": given})[0] == 200


@pytest.mark.parametrize(
    "given",
    [
        *("Bearer", "Bearer ", "Bearer one", "Bearer one key2", "Bearer ONE KEY", "Basic another"),
        *("another", "Bearer another,one key", "Bearer \xff\xfe", "Bearer \0"),
    ],
)
def test_anything_else_is_not(given: str) -> None:
    status, body = asked(KEYS, {"host": "anything", "authorization": given})
    assert status == 401
    assert body["error"]["code"] == "invalid_api_key"


def test_no_key_and_a_wrong_one_are_told_apart() -> None:
    for given, said in (("", "send it as 'Authorization: Bearer KEY'"), ("x", "was sent another")):
        _, body = asked(KEYS, {"host": "anything", "authorization": f"Bearer {given}"})
        assert said in body["error"]["message"]


def test_without_a_key_only_health_and_the_page_answer() -> None:
    for path in ("/", "/health", "/page/style.css"):
        assert asked(KEYS, {"host": "x"}, path)[0] == 200
    for path in (
        *("/v1/models", "/metrics", "/kvp/chats", "/openapi.json", "/page/../v1/models"),
        *("//", "", "/page/", "/page/a/b", "/health/", "/health\n"),
    ):
        assert asked(KEYS, {"host": "x"}, path)[0] == 401, path


def test_keys_are_compared_in_constant_time_and_all_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared, really = [], hmac.compare_digest

    def compare(given: bytes, known: bytes) -> bool:
        compared.append(known)
        return really(given, known)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert KEYS.knows("one key")
    assert not KEYS.knows("one kez")
    assert compared == [key.encode() for key in KEYS.keys] * 2


def test_a_file_of_keys() -> None:
    lines = ["# of the kitchen", "", "  one  ", "two words", "   ", "#three"]
    assert read_keys(lines) == ("one", "two words")
    assert read_keys([]) == ()


# -- names and origins ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:80", "127.0.0.1", "127.0.0.1:8080", "[::1]", "[::1]:8080"]
)
def test_names_of_this_machine(host: str) -> None:
    assert asked(Rules(), {"host": host})[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.com", "localhost.evil.com", "127.0.0.1.evil.com", "evil.com:8080", "", "::1"),
        *("localhost:80:80", "localhost@evil.com", "[evil]", "127.0.0.1:x", "localhost:80 evil"),
    ],
)
def test_other_names_are_refused_where_only_this_machine_may_ask(host: str) -> None:
    status, body = asked(Rules(), {"host": host})
    assert status == 403
    assert "names of this machine" in body["error"]["message"]
    assert f"not to {host!r}" in body["error"]["message"]


def test_the_name_that_it_is_bound_to_is_one() -> None:
    assert asked(Rules(host="127.0.0.2"), {"host": "127.0.0.2:80"})[0] == 200
    assert asked(Rules(), {"host": "127.0.0.2:80"})[0] == 403


@pytest.mark.parametrize(
    "origin",
    [
        *("http://localhost", "http://localhost:3000", "https://127.0.0.1:1", "http://[::1]:5"),
        "http://127.0.0.1:8080",
    ],
)
def test_pages_of_this_machine_may_ask(origin: str) -> None:
    assert asked(Rules(), {**LOCAL, "origin": origin})[0] == 200


@pytest.mark.parametrize(
    "origin",
    [
        *("http://evil.com", "null", "", "http://localhost.evil.com", "http://localhost:80@evil"),
        *("file://", "http://127.0.0.1:8080.evil.com", "ftp://localhost", "http://localhost:8 x"),
        "http://evil.com http://localhost",
    ],
)
def test_other_pages_may_not(origin: str) -> None:
    for method in ("GET", "POST", "OPTIONS"):
        status, body = asked(Rules(), {**LOCAL, "origin": origin}, method=method)
        assert status == 403
        assert "web pages of other sites" in body["error"]["message"]


def test_a_page_of_the_server_itself_may_ask_by_the_name_it_has_in_the_network() -> None:
    rules = Rules(keys=("k",), loopback=False, host="0.0.0.0")
    headers = {"host": "box.lan:80", "origin": "http://box.lan:80", "authorization": "Bearer k"}
    assert asked(rules, headers)[0] == 200
    assert asked(rules, {**headers, "origin": "http://other.lan:80"})[0] == 403


@pytest.mark.parametrize(
    ("host", "local"),
    [
        *(("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True)),
        *(("0.0.0.0", False), ("::", False), ("192.168.0.1", False), ("box.lan", False)),
        ("", False),
    ],
)
def test_is_loopback(host: str, local: bool) -> None:
    assert is_loopback(host) is local


# -- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "status"), [(0, 200), (MOST_BYTES, 200), (MOST_BYTES + 1, 413)])
def test_a_body_that_says_how_long_it_is(n: int, status: int) -> None:
    assert asked(Rules(), {**LOCAL, "content-length": str(n)})[0] == status


@pytest.mark.parametrize("said", ["-1", "1e3", "", "0x10", "\xb2", "1, 1"])
def test_a_length_that_is_none_is_refused(said: str) -> None:
    assert asked(Rules(), {**LOCAL, "content-length": said})[0] == 413


def test_a_body_that_does_not_say_is_counted() -> None:
    half = b"x" * (MOST_BYTES // 2)
    assert asked(Rules(), LOCAL, body=(half, half, b"")) == (200, MOST_BYTES)
    status, body = asked(Rules(), LOCAL, body=(half, half, b"x"))
    assert (status, body["error"]["code"]) == (413, "too_large")
