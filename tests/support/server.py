"""A real server: a process of ``kvp-edge serve``, and what is asked of it without any client."""

from __future__ import annotations

import contextlib
import json
import queue
import re
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import pytest

from makers.command import COMMAND
from support.packages import needs

_READY = re.compile(r"(http://\S+) is ready")

#: Its exit status after Ctrl-C.
INTERRUPTED = 130

#: It needs no more of two cores, on which the clients run, too.
ONE_THREAD = ("--threads", "1")


class Answer(NamedTuple):
    """
    Attributes:
        status: of HTTP.
        body: what was in the JSON, or the text of anything else.
    """

    status: int
    body: Any
    headers: dict[str, str]


class Server:
    """A server that runs from the beginning of a ``with`` block to its end.

    Args:
        options: of the command line, a model file among them; without one it is the bundled model.
        chats: its folder; None: it keeps them in memory.
        key_file: with the keys that clients must have one of; None: they need none.
        seconds: to wait for it, at most.

    Attributes:
        key: the first of these keys.
        port: the same after a restart.
        url: where it answers.
    """

    def __init__(
        self,
        *options: str,
        chats: Path | None = None,
        key_file: Path | None = None,
        seconds: float = 120,
    ) -> None:
        self.key: str | None = None
        self._seconds = seconds
        self._options = [*ONE_THREAD, *options]
        if chats is not None:
            self._options += ["--chats", str(chats)]
        if key_file is not None:
            self.key = key_file.read_text().split()[0]
            self._options += ["--api-key-file", str(key_file)]
        self.port, self.url = 0, ""
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._said: list[str] = []

    # -- the process -------------------------------------------------------------------------

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._process is not None:
            self.kill()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def said(self) -> str:
        """Its standard error so far, of all its runs."""
        return "".join(self._said)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        assert self._process is None
        lines: queue.Queue[str | None] = queue.Queue()
        self._process = process = subprocess.Popen(
            [*COMMAND, "serve", "--port", str(self.port), *self._options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, args=(process, lines), daemon=True)
        self._reader.start()
        end = time.monotonic() + self._seconds
        while True:
            try:
                line = lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                line = None
            if line is None:
                self.kill()
                pytest.fail(f"the server did not start:\n{self.said}")
            if ready := _READY.search(line):
                self.url = ready.group(1)
                self.port = int(self.url.rpartition(":")[2])
                return

    def _read(self, process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            self._said.append(line)
            lines.put(line)
        lines.put(None)

    def stop(self) -> int:
        """As Ctrl-C does.

        Returns:
            Its exit status.
        """
        return self._end(signal.SIGINT)

    def kill(self) -> None:
        """As a crash would: it can save nothing."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> int:
        process, self._process = self._process, None
        assert process is not None
        assert self._reader is not None
        process.send_signal(how)
        try:
            status = process.wait(self._seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            pytest.fail(f"the server did not end:\n{self.said}")
        self._reader.join()
        return status

    def restart(self) -> None:
        """End it and start it again, at the same address."""
        self.stop()
        self.start()

    # -- requests ----------------------------------------------------------------------------

    @property
    def v1(self) -> str:
        """What OpenAI's clients call the base URL."""
        return f"{self.url}/v1"

    @property
    def headers(self) -> dict[str, str]:
        """With its key, if it has one."""
        return {} if self.key is None else {"Authorization": f"Bearer {self.key}"}

    def ask(
        self,
        path: str,
        body: dict[str, Any] | bytes | None = None,
        *,
        method: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """One request and its whole answer, whatever its status.

        Args:
            path: such as "/v1/models".
            body: sent as JSON; bytes: as they are; None: it is a GET.
            headers: besides its key.
        """
        with self._open(path, body, method, headers) as found:
            text = found.read().decode()
            kind = found.headers.get_content_type()
            parsed = json.loads(text) if kind == "application/json" else text
            return Answer(found.status, parsed, dict(found.headers.items()))

    @contextlib.contextmanager
    def stream(self, path: str, body: dict[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
        """The chunks of a stream as they come. Who leaves the block drops the rest of it."""
        with self._open(path, {**body, "stream": True}, None, None) as found:
            assert found.status == 200, found.read()
            yield _chunks(found)

    def _open(
        self,
        path: str,
        body: dict[str, Any] | bytes | None,
        method: str | None,
        headers: dict[str, str] | None,
    ) -> Any:
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        kind = {} if data is None else {"Content-Type": "application/json"}
        request = urllib.request.Request(
            self.url + path,
            data,
            {**kind, **self.headers, **(headers or {})},
            method=method,
        )
        try:
            return _opener.open(request, timeout=self._seconds)
        except urllib.error.HTTPError as answer:
            return answer


#: Without the proxies that the environment may name.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _chunks(stream: Any) -> Iterator[dict[str, Any]]:
    for line in stream:
        data = line.decode().partition("data: ")[2].strip()
        if data == "[DONE]":
            return
        if data:
            yield json.loads(data)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One with the bundled model, a folder for chats, and a key; tests share it."""
    needs("fastapi", "server")
    folder = tmp_path_factory.mktemp("server")
    keys = folder / "keys"
    keys.write_text("a-key\n")
    with Server(chats=folder / "chats", key_file=keys) as running:
        yield running
        assert running.stop() == INTERRUPTED, running.said
        assert "Traceback" not in running.said
