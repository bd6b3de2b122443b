"""The chat at a terminal that can move a cursor: the line editor, and what ends it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from makers.command import COMMAND
from makers.gguf_models import ModelShape
from support.command_line import GREEDY, Terminal

SHORT = [*GREEDY, "--threads", "1", "--max-tokens", "12"]
TELL = "My dog is called Ralph."
PASTE, PASTED = "\x1b[200~", "\x1b[201~"
UP = "\x1b[A"

Open = Callable[..., Terminal]


@pytest.fixture
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    folder = tmp_path / "temp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def plain(shown: str) -> str:
    """Without what moves the cursor."""
    return re.sub(r"\x1b\[[?\d;]*[A-Za-z]|[\b\r]", "", shown)


def chat(terminal: Open, *argv: str) -> Terminal:
    t = terminal("chat", *SHORT, *argv, term="xterm")
    t.prompt()
    return t


def test_a_paste_of_several_lines_is_one_message(terminal: Open) -> None:
    t = chat(terminal)
    t.type(f"{PASTE}My dog\nis called Ralph.\n{PASTED}\r")
    t.read_until("t/s]")
    t.prompt()
    t.type("/undo\r")
    assert "Removed: My dog\nis called Ralph.\n" in plain(t.prompt())
    t.type("/undo\r")
    assert "Nothing has been said yet" in plain(t.prompt())  # it was one


def test_a_pasted_command_is_obeyed_and_pasted_lines_that_begin_like_one_are_a_message(
    terminal: Open,
) -> None:
    t = chat(terminal)
    t.type(f"{PASTE}/stats\n{PASTED}\r")
    assert "0 tokens seen" in plain(t.prompt())
    t.type(f"{PASTE}/etc\n/usr{PASTED}\r")
    t.read_until("t/s]")


def test_tab_completes_commands_and_the_names_of_files(terminal: Open, tmp_path: Path) -> None:
    (tmp_path / "there.txt").write_text("no session")
    t = chat(terminal)
    t.type("/st\t\r")
    assert "0 tokens seen" in plain(t.prompt())
    t.type(f"/lo\t {tmp_path}/the\t\r")
    assert f"'{tmp_path}/there.txt' is not a session" in plain(t.prompt())


def test_what_was_typed_before_comes_back_and_nothing_of_it_is_left_on_the_disk(
    terminal: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    t = chat(terminal)
    t.type("/undo\r")
    t.read_until("Nothing has been said")
    t.prompt()
    t.type(f"{UP}\r")
    t.read_until("Nothing has been said")
    t.prompt()
    t.type("/exit\r")
    assert t.exit_status() == 0
    found = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not any(b"/undo" in file.read_bytes() for file in found)


def test_what_is_typed_while_a_reply_is_written_is_the_next_message(
    terminal: Open, random_model: Callable[..., Any]
) -> None:
    # a model with random weights never stops by itself
    model = str(random_model(ModelShape("llama", n_ctx_train=100_000)).path)
    t = terminal("chat", model, "--max-tokens", "300", "--seed", "3", term="xterm")
    t.prompt()
    t.type("Hello.\r")
    t.read_until("th")
    t.type("/stats\n")
    t.read_until("t/s]")
    assert "cells" in t.read_until("tokens seen") + t.read_until("cells")


def test_ctrl_c_stops_a_reply_and_twice_at_the_prompt_leaves(
    terminal: Open, random_model: Callable[..., Any]
) -> None:
    model = str(random_model(ModelShape("llama", n_ctx_train=100_000)).path)
    t = terminal("chat", model, "--max-tokens", "50000", "--seed", "3", term="xterm")
    t.prompt()
    t.type("Hello.\r")
    t.read_until("th")
    t.type("\x03")
    t.read_until("t/s]")
    t.prompt()
    t.type("half a mess\x03")
    t.read_until("press Ctrl-C again")
    t.prompt()
    t.type("/stats\r")
    t.read_until("tokens seen")
    t.prompt()
    os.kill(t.pid, signal.SIGINT)  # not typed
    t.read_until("press Ctrl-C again")
    t.prompt()
    t.type("\x03")
    assert t.exit_status() == 130


def test_ctrl_d_leaves_and_the_terminal_is_as_it_was(terminal: Open) -> None:
    import termios

    t = terminal("chat", *SHORT, term="xterm")
    before = termios.tcgetattr(t._fd)
    t.prompt()
    assert termios.tcgetattr(t._fd) != before
    t.type("\x04")
    t.read_until("\x1b[?2004l")  # no more bracketed paste
    assert t.exit_status() == 0
    assert termios.tcgetattr(t._fd) == before


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_at_the_prompt_leaves_the_conversation(
    terminal: Open, temp: Path, name: str
) -> None:
    number = getattr(signal, name)
    t = chat(terminal)
    os.kill(t.pid, number)
    assert t.exit_status() == 128 + number
    assert list(temp.iterdir()) == []  # nothing was said

    t = chat(terminal)
    t.type(f"{TELL}\r")
    t.read_until("t/s]")
    t.prompt()
    os.kill(t.pid, number)
    t.read_until(f"kvp-edge: ended by {name}")
    assert t.exit_status() == 128 + number
    assert len(list(temp.iterdir())) == 1


def test_a_signal_is_heeded_after_any_number_of_prompts_and_at_any_moment_of_one(
    terminal: Open,
) -> None:
    for wait_s in (0.0, 0.001, 0.01, 0.05):
        t = chat(terminal)
        for _ in range(3):
            t.type("/undo\r")
            t.read_until("Nothing")
            t.prompt()
        t.type("/undo\r")
        t.read_until("Nothing")
        time.sleep(wait_s)
        os.kill(t.pid, signal.SIGTERM)
        assert t.exit_status(20) == 128 + signal.SIGTERM


def test_a_terminal_that_is_closed_leaves_the_conversation(terminal: Open, temp: Path) -> None:
    t = chat(terminal)
    t.type(f"{TELL}\r")
    t.read_until("t/s]")
    t.prompt()
    t.hang_up()
    assert t.exit_status() != 0
    assert len(list(temp.iterdir())) == 1


def test_a_terminal_that_is_closed_ends_a_chat_that_heeds_no_hang_up(
    terminal: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        t = chat(terminal)
    finally:
        signal.signal(signal.SIGHUP, before)
    t.hang_up()
    t.exit_status(30)


def test_bytes_that_are_no_utf8_become_replacement_marks(terminal: Open) -> None:
    t = chat(terminal)
    os.write(t._fd, b"/Caf\xe9\r")
    assert "no command '/Caf\N{REPLACEMENT CHARACTER}'" in plain(t.prompt())


def test_replies_alone_are_on_standard_output(terminal: Open, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = f'exec "$@" > {out}'
    t = Terminal.of("/bin/sh", "-c", script, "sh", *COMMAND, "chat", *SHORT, term="xterm")
    t.prompt()
    t.type(f"{TELL}\r")
    t.read_until("t/s]")
    t.prompt()
    t.type("/exit\r")
    assert t.exit_status() == 0
    t.close()
    assert len(out.read_text().splitlines()) == 1
    assert "\x1b" not in out.read_text()


@pytest.mark.parametrize("where", ["2> FILE", "< FILE"])
def test_there_is_no_editor_where_one_of_both_ends_is_no_terminal(
    where: str, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("/exit\n")
    script = f'exec "$@" {where.replace("FILE", str(file))}'
    t = Terminal.of("/bin/sh", "-c", script, "sh", *COMMAND, "chat", *SHORT, term="xterm")
    t.type("/exit\n")
    assert t.exit_status() == 0
    t.close()
    assert "\x1b" not in file.read_text()


def test_the_editor_is_imported_where_it_is_used() -> None:
    code = (
        "import sys; sys.path.remove('')\n"
        "import kvp_edge.cli.chat; print('prompt_toolkit' in sys.modules)"
    )
    done = subprocess.run([*COMMAND[:2], code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
