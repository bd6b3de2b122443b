"""What ``kvp-edge serve`` refuses before it serves anybody."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.packages import needs

needs("fastapi", "server")

from kvp_edge.cli import serve  # noqa: E402


def test_other_machines_need_a_key(kvp: Callable[..., Any]) -> None:
    run = kvp("serve", "--host", "0.0.0.0")
    assert run.status == 2
    assert "--host 0.0.0.0 can be reached from other machines: give --api-key-file" in run.err


def test_a_file_without_keys_is_refused(kvp: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# none yet\n\n")
    run = kvp("serve", "--api-key-file", str(file))
    assert run.status == 2
    assert f"'{file}' has no key in it" in run.err


def test_a_port_that_is_taken_is_told(kvp: Callable[..., Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = kvp("serve", "--port", str(port))
    assert run.status == 2
    assert f"cannot answer at 127.0.0.1, port {port}: Address already in use" in run.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--chats-limit", "much"], "--chats-limit is memory, a text like '256MiB', not 'much'"),
        (["--parallel", "2", "--kv-log", "x"], "leave out --kv-log"),
        (["--port", "70000"], "cannot answer at 127.0.0.1, port 70000"),
        (["no.gguf"], "model file 'no.gguf' not found"),
    ],
)
def test_options_that_cannot_be_are_refused(
    kvp: Callable[..., Any], options: list[str], said: str
) -> None:
    run = kvp("serve", *options)
    assert run.status == 2
    assert said in run.err
    assert "Traceback" not in run.err


def test_tokens_are_sent_at_once() -> None:
    """asyncio sets TCP_NODELAY for sockets that name their protocol."""
    for host in ("127.0.0.1", "localhost"):
        with serve._listen(host, 0) as listening:
            assert listening.proto == socket.IPPROTO_TCP
