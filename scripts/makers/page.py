"""``kvp-edge serve`` in a process of its own, and what a reader does on its page."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any

from makers.command import COMMAND

_READY = re.compile(r"(http://[\d.]+:\d+) is ready")


class Server:
    """The server, which can be ended and started again at the same port.

    Args:
        arguments: of the command: a model (otherwise the bundled one) and options.
    """

    def __init__(self, *arguments: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._arguments = arguments
        self.log: list[str] = []
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        """
        Raises:
            RuntimeError: it does not start; the message is what it said.
        """
        options = ["--port", str(self.port), "--threads", "1", *self._arguments]
        self._process = subprocess.Popen(
            [*COMMAND, "serve", *options], stderr=subprocess.PIPE, text=True
        )
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.log.append(line)
            if _READY.search(line):
                break
        else:
            raise RuntimeError("".join(self.log))
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        assert self._process.stderr is not None
        self.log.extend(self._process.stderr)

    def end(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(20)

    def get(self, path: str) -> Any:
        """What it answers, of JSON."""
        with urllib.request.urlopen(self.url + path) as answer:
            return json.load(answer)


def chromium() -> str | None:
    """The path of a Chromium, if there is one."""
    names = ("chromium", "google-chrome", "chromium-browser")
    return next((path for path in map(shutil.which, names) if path), None)


@contextlib.contextmanager
def launched() -> Iterator[Any]:
    """A browser of Playwright's, with the Chromium of this machine."""
    from playwright.sync_api import sync_playwright  # noqa: PLC0415  # only where there is one

    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox"] if is_root else []
        )
        yield browser
        browser.close()


def box(page: Any) -> Any:
    return page.get_by_label("Your message", exact=True)


def send(page: Any, text: str) -> None:
    box(page).fill(text)
    box(page).press("Enter")


def replies(page: Any) -> Any:
    return page.get_by_role("article", name="Reply", exact=True)


def idle(page: Any, seconds: float = 15) -> None:
    """Wait until no reply is written, and the page knows what the server has stored of it."""
    from playwright.sync_api import expect  # noqa: PLC0415

    ended = re.compile("^(Reply: |Stopped|The reply is complete)")
    expect(page.get_by_role("status")).to_have_text(ended, timeout=1000 * seconds)
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()


def say(page: Any, text: str, seconds: float = 15) -> None:
    """Send a message, and wait for the reply."""
    n = replies(page).count()
    send(page, text)
    replies(page).nth(n).wait_for(timeout=1000 * seconds)
    idle(page, seconds)
