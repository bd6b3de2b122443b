"""What ``kvp-edge serve`` refuses before it serves anybody."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.packages import needs
from support.server import ONE_THREAD, Server

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


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot read '{}': No such file or directory"), (b"\xbb", "'{}' is no text in UTF-8")],
)
def test_a_file_of_keys_that_cannot_be_read_is_told(
    kvp: Callable[..., Any], tmp_path: Path, content: bytes | None, said: str
) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    run = kvp("serve", "--api-key-file", str(file))
    assert run.status == 2
    assert f"--api-key-file: {said.format(file)}" in run.err


def test_a_folder_of_chats_that_is_a_file_is_told(kvp: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "chats"
    file.touch()
    run = kvp("serve", "--port", "0", *ONE_THREAD, "--chats", str(file))
    assert run.status == 2
    assert f"--chats: '{file}' cannot be used: File exists. Name a folder" in run.err


def test_chats_are_not_kept_in_files_with_a_policy_whose_queries_are_not(
    kvp: Callable[..., Any], tmp_path: Path
) -> None:
    run = kvp("serve", "--port", "0", *ONE_THREAD, "--policy", "tova", "--chats", str(tmp_path))
    assert run.status == 2
    assert "leave out --chats, or choose another --policy" in run.err


def test_what_makes_chats_worse_is_said_at_the_start(bare: str) -> None:
    """A model without a template, more tokens than it was trained for, chats that are not kept."""
    with Server(bare, "--policy", "tova", "--n-ctx", "8192") as server:
        said = server.said
    assert "the model has no chat template" in said
    assert "up to 8192 tokens will be read, but the model was trained for 4096" in said
    assert "--policy tova needs queries, which are not kept with a chat" in said


def test_errors_name_options_of_the_command_line() -> None:
    system = {"role": "system", "content": "Be kind. " * 100}
    asked = {"messages": [system, {"role": "user", "content": "Hello."}], "max_tokens": 1}
    with Server("--kv-budget", "128", "--protect-system") as server:
        answer = server.ask("/v1/chat/completions", asked)
    assert answer.status == 400
    assert "--kv-budget 128 is too small" in answer.body["error"]["message"]


def test_a_chat_that_the_limit_deletes_is_told() -> None:
    with Server("--chats-limit", "1KiB") as server:
        asked = [{"messages": [{"role": "user", "content": text}]} for text in ("Hello.", "Bye.")]
        first, _ = (server.ask("/v1/chat/completions", {**a, "max_tokens": 2}) for a in asked)
        server.stop()
    assert f"deleted chat {first.body['chat_id']} (" in server.said
    assert "more than --chats-limit 1KiB" in server.said


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
