"""What nobody should send, clients that go away, crashes and full disks.

Whatever comes, there is an answer in OpenAI's form or a closed connection, never a traceback, and
the next request is served.
"""

from __future__ import annotations

import json
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.packages import needs
from support.server import INTERRUPTED, Server

needs("fastapi", "server")

CELLS = ("--kv-budget", "96", "--recent", "16", "--reserve", "64", "--n-ctx", "4096")
CHAT, SECONDS = "/v1/chat/completions", 60.0  # after which a test has failed
HI = [{"role": "user", "content": "My dog is called Ralph."}]
ENDLESS = {"messages": HI, "max_tokens": 3000, "logit_bias": {"3": -100}}  # never <|end|>
TEXT = "snow fell on all roofs where we sang " * 12


@pytest.fixture(scope="module")
def strong() -> Iterator[Server]:
    """One server for all that is sent in vain."""
    with Server(*CELLS, "--queue", "4") as server:
        yield server
        assert server.stop() == INTERRUPTED, server.said


@pytest.fixture
def server(strong: Server) -> Iterator[Server]:
    before = len(strong.said)
    yield strong
    assert strong.ask("/health").status == 200
    assert len(strong.ask(CHAT, {"messages": HI, "max_tokens": 1}).body["choices"]) == 1
    said = strong.said[before:]
    assert "Traceback" not in said, said
    assert "Exception" not in said, said


class Line:
    """A connection, byte by byte."""

    def __init__(self, server: Server) -> None:
        self.socket = socket.create_connection(("127.0.0.1", server.port), SECONDS)

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *parts: bytes) -> Line:
        """As much as the other side takes."""
        try:
            for part in parts:
                self.socket.sendall(part)
        except (BrokenPipeError, ConnectionResetError):
            pass
        return self

    def receive(self, enough: Callable[[bytes], object] = lambda _: False) -> bytes:
        """All until the connection is closed, or until it is enough."""
        found = b""
        try:
            while not enough(found) and (part := self.socket.recv(65536)):
                found += part
        except ConnectionResetError:
            pass
        return found


def head(
    path: str = CHAT, method: str = "POST", host: str = "127.0.0.1", **headers: object
) -> bytes:
    """Of a request; after the answer the connection is closed."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def answered(server: Server, *parts: bytes) -> tuple[int, Any]:
    """The status and the body of what came back, which must be one whole answer."""
    with Line(server) as line:
        found = line.send(*parts).receive()
    first, _, body = found.partition(b"\r\n\r\n")
    status = re.match(rb"HTTP/1.1 (\d+) ", first)
    assert status is not None, found
    kind = b"application/json" in first
    return int(status[1]), json.loads(body) if kind else body


def refused(server: Server, status: int, *parts: bytes) -> dict[str, Any]:
    """The error, which must be in OpenAI's form."""
    got, body = answered(server, *parts)
    assert got == status, body
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert len(str(body)) < 1500
    return body["error"]  # type: ignore[no-any-return]


def posted(
    server: Server, status: int, body: bytes, path: str = CHAT, **headers: object
) -> dict[str, Any]:
    kind = {"Content_Type": "application/json", **headers}
    return refused(server, status, head(path, Content_Length=len(body), **kind), body)


def message(content: str) -> bytes:
    """A request with this JSON as the content of its message."""
    return f'{{"max_tokens": 1, "messages": [{{"role": "user", "content": {content}}}]}}'.encode()


def field(json_: str) -> bytes:
    return f'{{"max_tokens": 1, {json_}, "messages": {json.dumps(HI)}}}'.encode()


# -- bodies ---------------------------------------------------------------------------------------

DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "must be a JSON object"),
        (b"{", "the body is not JSON: .* at character 1"),
        (b'{"messages": nonsense}', "the body is not JSON: .* at character 13"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (DEEP.encode(), "nested too deeply"),
        (b'{"messages":' * 100_000, "nested too deeply"),
        (message(DEEP + "]" * 100_000), "nested too deeply"),
        (field(f'"tools": {DEEP + "]" * 100_000}'), "nested too deeply"),
        (field(f'"nobody_reads_this": {DEEP + "]" * 100_000}'), "nested too deeply"),
        (message('"\xff"').decode().encode("latin-1"), "the body is not JSON: 'utf-8' codec"),
        (field(f'"seed": {"9" * 5000}'), "the body is not JSON: Exceeds the limit"),
        (field('"temperature": NaN'), "temperature: .*finite"),
        (field('"temperature": 1e999'), "temperature: .*finite"),
        (field('"temperature": -0.5'), "temperature: "),
        (field('"seed": 9223372036854775808'), "seed: "),
        (field('"n": 9'), "n: "),
        (field('"max_completion_tokens": 0'), "max_completion_tokens: "),
        (field(f'"model": "{"x" * 257}"'), "model: "),
        (field(f'"stop": {json.dumps(["x"] * 17)}'), "stop: "),
        (field('"logit_bias": {"4096": 1}'), "token 4096 does not exist"),
        (field('"logit_bias": {"999999999": 1}'), "token 999999999 does not exist"),
        (field(f'"logit_bias": {{"{"x" * 100_000}": 1}}'), "logit_bias.xxx"),
        (field('"logit_bias": {"\\ud800": 1}'), "logit_bias"),
        (field('"stop": "\\ud800"'), "stop: "),
        (field('"tools": [{"type": "function", "function": {"name": "\\ud800"}}]'), "tools: "),
        (message('"\\ud800"'), "content: .*'.ud800' is no character"),
        (message('[{"type": "text", "text": "\\udfff"}]'), "text: .*no character"),
        (message('[{"type": "image_url", "image_url": {"url": "x"}}]'), "messages.0.content"),
        (b'{"messages": []}', "messages: "),
        (b'{"messages": [{"role": "user"}], "messages": 3}', "messages: "),
    ],
    ids=range(32),
)
def test_a_body_that_is_no_request(server: Server, body: bytes, says: str) -> None:
    assert re.search(says, posted(server, 400, body)["message"])


def test_other_routes_refuse_the_same(server: Server) -> None:
    says = posted(server, 400, b'{"content": "\\ud800"}', "/tokenize")["message"]
    assert "no character" in says
    says = posted(server, 400, b'{"prompt": "\\ud800"}', "/v1/completions")["message"]
    assert "no character" in says
    says = posted(server, 400, b'{"prompt": [4096]}', "/v1/completions")["message"]
    assert "token 4096 does not exist" in says
    assert "prompt is empty" in posted(server, 400, b'{"prompt": []}', "/v1/completions")["message"]
    assert posted(server, 501, b"{}", "/v1/embeddings")["type"] == "server_error"


def test_nul_and_other_control_characters_are_characters(server: Server) -> None:
    controls = json.dumps("".join(map(chr, range(32))) + "\x7f\x80\u2028\ufeff\U0010ffff")
    body = message(controls)
    status, reply = answered(
        server, head(Content_Type="application/json", Content_Length=len(body)), body
    )
    assert status == 200
    assert reply["usage"]["prompt_tokens"] > 30
    assert server.ask("/tokenize", {"content": "\0"}).body["tokens"]


def test_ten_thousand_messages(server: Server) -> None:
    body = json.dumps({"messages": HI * 10_000}).encode()
    assert posted(server, 400, body)["param"] == "messages"
    body = json.dumps({"messages": HI * 4096}).encode()
    assert posted(server, 400, body)["code"] == "context_length_exceeded"


KINDS = ["text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_body_of_another_kind(server: Server, kind: str) -> None:
    found = posted(server, 400, message('"a"'), Content_Type=kind)
    assert "the header 'Content-Type: application/json'" in found["message"]


@pytest.mark.parametrize("path", [CHAT, "/tokenize", "/v1/completions"])
def test_a_hundred_megabytes(server: Server, path: str) -> None:
    megabyte = b"a" * 10**6
    whole = head(path, Content_Length=10**8, Content_Type="application/json")
    assert refused(server, 413, whole, *[megabyte] * 100)["code"] == "too_large"
    chunk = b"f4240\r\n" + megabyte + b"\r\n"
    parts = head(path, Transfer_Encoding="chunked", Content_Type="application/json")
    assert refused(server, 413, parts, *[chunk] * 100)["code"] == "too_large"


# -- HTTP -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00\xff\x16\x03\x01 hello\r\n\r\n",
        bytes.fromhex("1603010200010001fc0303") + bytes(100) + b"\r\n\r\n",  # TLS
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        head(Content_Length=-1),
        head(Content_Length="9" * 5000),
        head(Content_Length="\xb2"),
        head(Transfer_Encoding="gzip"),
        head(Transfer_Encoding="chunked") + b"zz\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
    ids=range(12),
)
def test_what_is_no_request_is_refused_and_the_connection_closed(
    server: Server, sent: bytes
) -> None:
    with Line(server) as line:
        assert re.match(rb"HTTP/1.1 4\d\d ", line.send(sent).receive())


def test_lengths_that_contradict_each_other_smuggle_nothing(server: Server) -> None:
    both = head(Transfer_Encoding="chunked", Content_Length=4, Content_Type="application/json")
    hidden = head("/health", "GET")
    with Line(server) as line:
        found = line.send(both, b"0\r\n\r\n", hidden).receive()
    assert found.count(b"HTTP/1.1 400 ") == found.count(b"HTTP/1.1") == 1


def test_requests_sent_at_once_are_answered_one_after_the_other(server: Server) -> None:
    one = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with Line(server) as line:
        found = line.send(one * 50, head("/v1/models", "GET")).receive()
    assert found.count(b"HTTP/1.1 200 OK") == 51
    assert found.rfind(b'{"status":"ok"}') < found.find(b'"object":"list"')


def test_who_sends_slowly_keeps_nobody_waiting(server: Server) -> None:
    slow = [Line(server) for _ in range(40)]
    for i, line in enumerate(slow):
        line.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
        if i % 2:
            line.send(b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{")
    for _ in range(3):
        for i, line in enumerate(slow):
            line.send(b" " if i % 2 else b"X: 1\r\n")
        assert server.ask("/health").status == 200
        assert server.ask(CHAT, {"messages": HI, "max_tokens": 1}).status == 200
    for line in slow:
        line.socket.close()


@pytest.mark.parametrize("host", ["evil.com", "127.0.0.1.evil.com", "localhost@evil.com", ""])
def test_a_name_that_another_server_gave_this_machine(server: Server, host: str) -> None:
    for path in ("/", "/health", "/v1/models", "/page/main.js", "/openapi.json"):
        assert "names of this machine" in refused(server, 403, head(path, "GET", host))["message"]
    body = message('"a"')
    refused(server, 403, head(host=host, Content_Length=len(body)), body)


def test_pages_of_other_sites(server: Server) -> None:
    for origin in ("http://evil.com", "null", "http://localhost.evil.com", "file://"):
        for method in ("GET", "POST", "DELETE", "OPTIONS"):
            asked = head("/v1/models", method, Origin=origin, Access_Control_Request_Method="POST")
            assert "web pages of other sites" in refused(server, 403, asked)["message"]
    # neither a form nor a picture can be sent without an Origin where it matters
    status, _ = answered(server, head("/v1/models", "GET", Origin="http://localhost:3000"))
    assert status == 200


def test_websockets_are_not_spoken_here(server: Server) -> None:
    keys = {"Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ==", "Sec_WebSocket_Version": 13}
    asked = head("/", "GET", Upgrade="websocket", **keys)
    status, _ = answered(server, asked.replace(b"Connection: close", b"Connection: upgrade, close"))
    assert status == 200


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/page/../../../etc/passwd", "GET", 404),
        ("/page/%2e%2e/%2e%2e/cli/serve.py", "GET", 404),
        ("/page/..%2fapp.py", "GET", 404),
        ("/page/..%5capp.py", "GET", 404),
        ("/page/%00", "GET", 404),
        ("/page/" + "a" * 5000, "GET", 404),
        ("/page/", "GET", 404),
        ("/page//etc/passwd", "GET", 404),
        ("/page/index.html%00.js", "GET", 404),
        ("/kvp/chats/..%2f..%2fetc%2fpasswd", "GET", 404),
        ("/kvp/chats/%2e%2e", "GET", 404),
        ("/kvp/chats/%00", "GET", 404),
        ("/kvp/chats/%ff%fe", "GET", 404),
        ("/kvp/chats/%ED%A0%80", "DELETE", 404),
        ("/kvp/chats/..%2flock", "DELETE", 404),
        ("/kvp/chats/lock", "DELETE", 404),
        ("/kvp/cache?texts_from=x", "GET", 400),
        ("/v1/models/%ff", "GET", 404),
        ("/v1//models", "GET", 404),
        ("/%ff", "GET", 404),
        ("/docs", "GET", 404),
        ("/v1/models", "PUT", 405),
        ("/v1/chat/completions", "GET", 405),
        ("http://evil.com/v1/models", "GET", 404),
        ("*", "OPTIONS", 404),
        ("evil.com:443", "CONNECT", 404),
    ],
)
def test_paths(server: Server, path: str, method: str, status: int) -> None:
    refused(server, status, head(path, method))


def test_a_method_that_is_not_allowed_tells_which_are(server: Server) -> None:
    assert server.ask("/v1/models", method="PUT").headers["allow"] == "GET"


def test_numbers_without_bound_in_a_query(server: Server) -> None:
    for n in ("9" * 30, "-1", "-" + "9" * 30, "0"):
        assert server.ask(f"/kvp/cache?texts_from={n}&chat=%00%ff").status == 200


def test_a_server_with_a_key_is_open_to_nobody_else(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("sesame\n")
    wrong = ("", "Bearer", "Bearer sesam", "Bearer sesame2", "Basic sesame", "Bearer \xff")
    with Server(*CELLS, key_file=tmp_path / "keys") as server:
        for given in wrong:
            error = refused(server, 401, head("/v1/models", "GET", Authorization=given))
            assert error["code"] == "invalid_api_key"
        assert refused(server, 401, head("/kvp/chats", "GET"))["code"] == "invalid_api_key"
        assert server.ask("/v1/models").status == 200
        assert answered(server, head("/health", "GET"))[0] == 200
        assert server.stop() == INTERRUPTED
    assert "Traceback" not in server.said


# -- clients that go away -------------------------------------------------------------------------


def until(done: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < end


def measured(server: Server, name: str) -> float:
    found = re.search(rf"^kvp_{name} (\S+)$", server.ask("/metrics").body, re.MULTILINE)
    assert found is not None
    return float(found[1])


def idle(server: Server) -> bool:
    return measured(server, "queue") == measured(server, "at_work") == 0


def sent(server: Server, **body: Any) -> Line:
    """A request whose answer nobody reads yet."""
    data = json.dumps(body).encode()
    line = Line(server)
    return line.send(head(Content_Type="application/json", Content_Length=len(data)), data)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_reply(server: Server, stream: bool) -> None:
    with sent(server, **ENDLESS, stream=stream) as line:
        if stream:
            line.receive(lambda found: found.count(b"data: ") > 3)
        else:
            until(lambda: server.ask("/kvp/cache").body["writing"])
    until(lambda: idle(server))
    assert server.ask("/kvp/chats").body["chats"][0]["n_tokens"] < ENDLESS["max_tokens"]


def test_who_leaves_while_waiting_costs_nothing(server: Server) -> None:
    with server.stream(CHAT, ENDLESS) as chunks:
        next(chunks)
        before = len(server.ask("/kvp/chats").body["chats"])
        for stream in (True, False):
            with sent(server, messages=HI * 3, stream=stream):
                until(lambda: measured(server, "queue") == 1)
            until(lambda: measured(server, "queue") == 0)
        assert measured(server, "at_work") == 1
    until(lambda: idle(server))
    assert len(server.ask("/kvp/chats").body["chats"]) == before + 1


def test_a_full_queue_says_when_to_come_back(server: Server) -> None:
    waiting = []
    with server.stream(CHAT, ENDLESS) as chunks:
        next(chunks)
        for n in range(1, 5):
            waiting.append(sent(server, messages=HI, max_tokens=1))
            until(lambda n=n: measured(server, "queue") == n)  # type: ignore[misc]
        full = server.ask(CHAT, {"messages": HI})
        assert (full.status, full.body["error"]["code"]) == (503, "queue_full")
        assert int(full.headers["retry-after"]) >= 1
        assert server.ask(CHAT, {"messages": HI, "stream": True}).status == 503
    for line in waiting:  # those that waited are served all the same
        assert b"HTTP/1.1 200 OK" in line.receive()
        line.socket.close()


# -- crashes and disks ----------------------------------------------------------------------------


def say(server: Server, *messages: Any, **how: Any) -> dict[str, Any]:
    body = {"messages": list(messages), "max_tokens": 6, "temperature": 0, **how}
    answer = server.ask(CHAT, body)
    assert answer.status == 200, answer.body
    return answer.body  # type: ignore[no-any-return]


def two_turns(server: Server) -> tuple[str, list[Any], int]:
    """A chat: its id, its messages, its tokens."""
    said: list[Any] = []
    for text in (TEXT, f"And then? {TEXT}"):
        said.append({"role": "user", "content": text})
        reply = say(server, *said)
        said.append(reply["choices"][0]["message"])
    found = server.ask(f"/kvp/chats/{reply['chat_id']}").body
    assert found["messages"] == said
    return reply["chat_id"], said, found["n_tokens"]


def goes_on(server: Server, name: str, said: list[Any], n_tokens: int) -> None:
    """The chat is as of its last finished turn, and is not read again."""
    found = server.ask(f"/kvp/chats/{name}").body
    assert found["messages"] == said
    reply = say(server, *said, {"role": "user", "content": "Where?"})
    assert reply["chat_id"] == name
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] >= n_tokens - 2


def test_a_server_killed_while_it_writes_has_all_chats_after_a_restart(tmp_path: Path) -> None:
    with Server(*CELLS, chats=tmp_path / "chats") as server:
        first = two_turns(server)
        second = two_turns_of_another(server)
        more = [*first[1], {"role": "user", "content": "Tell me more."}]
        with server.stream(CHAT, {**ENDLESS, "messages": more}) as chunks:
            for _ in range(5):
                next(chunks)
            server.kill()
        server.start()
        goes_on(server, *first)
        goes_on(server, *second)
        assert server.stop() == INTERRUPTED
    assert "Traceback" not in server.said


def two_turns_of_another(server: Server) -> tuple[str, list[Any], int]:
    said = [{"role": "user", "content": "Somebody else is here."}]
    reply = say(server, *said)
    said.append(reply["choices"][0]["message"])
    n = server.ask(f"/kvp/chats/{reply['chat_id']}").body["n_tokens"]
    return reply["chat_id"], said, n


@pytest.mark.skipif(sys.platform != "linux", reason="limits another process' files")
def test_on_a_full_disk_replies_go_on_and_chats_are_read_again(tmp_path: Path) -> None:
    import resource

    with Server(*CELLS, chats=tmp_path / "chats") as server:
        name, said, _ = two_turns(server)
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        said.append({"role": "user", "content": f"And then? {TEXT}"})
        reply = say(server, *said)
        assert reply["chat_id"] == name
        said.append(reply["choices"][0]["message"])
        assert "a chat cannot be kept, and will be read again: " in server.said
        other = say(server, {"role": "user", "content": TEXT[::-1]})
        assert other["chat_id"] != name

        said.append({"role": "user", "content": "Where?"})
        reply = say(server, *said)
        assert reply["chat_id"] == name
        assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        said.append(reply["choices"][0]["message"])

        resource.prlimit(
            server.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        )
        said.append({"role": "user", "content": "Why?"})
        reply = say(server, *said)
        said.append(reply["choices"][0]["message"])
        n = server.ask(f"/kvp/chats/{name}").body["n_tokens"]
        server.kill()
        server.start()
        goes_on(server, name, said, n)
        assert server.stop() == INTERRUPTED
    assert "Traceback" not in server.said


def test_a_server_that_is_ended_while_it_writes_keeps_what_was_said(tmp_path: Path) -> None:
    with Server(*CELLS, chats=tmp_path / "chats") as server:
        with server.stream(CHAT, ENDLESS) as chunks:
            name = next(chunks)["chat_id"]
            for _ in range(5):
                next(chunks)
            assert server.stop() == INTERRUPTED
        server.start()
        said = server.ask(f"/kvp/chats/{name}").body["messages"]
        assert [one["role"] for one in said] == ["user", "assistant"]
        assert said[1]["content"]
        assert server.stop() == INTERRUPTED
    assert "Traceback" not in server.said
