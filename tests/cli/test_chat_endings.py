"""Whatever ends a chat, or goes wrong in it, the conversation is not lost."""

from __future__ import annotations

import os
import shlex
import signal
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvp_edge
from kvp_edge.cli.progress import WatchedLlama
from makers.command import COMMAND
from makers.gguf_models import ModelShape
from support.command_line import GREEDY, Terminal, Type

SHORT = [*GREEDY, "--threads", "1", "--max-tokens", "12"]
TELL = "My dog is called Ralph."


@pytest.fixture
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    folder = tmp_path / "temp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    return folder


def shell(command: str, typed: str | bytes = "", **env: str) -> subprocess.CompletedProcess[bytes]:
    """``chat`` in ``command`` stands for the whole command line of one."""
    chat = shlex.join([*COMMAND, "chat", *SHORT])
    return subprocess.run(
        command.replace("chat", chat, 1),
        shell=True,
        executable="/bin/bash",
        input=typed.encode() if isinstance(typed, str) else typed,
        capture_output=True,
        timeout=300,
        check=False,
        env={**os.environ, **env},
    )


def saved_in(folder: Path) -> Path:
    [file] = folder.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    return file


# -- a file is left ------------------------------------------------------------------------------


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_standard_output_leaves_the_conversation(kvp: Type, temp: Path) -> None:
    done = shell("chat > /dev/full", f"{TELL}\n")
    assert done.returncode == 2
    file = saved_in(temp)
    told = done.stderr.decode()
    assert f"The conversation was written to {file}\n" in told
    assert f"type: /load {file}\n" in told
    assert told.endswith("kvp-edge: cannot write to standard output: No space left on device\n")
    assert "Removed: " + TELL in kvp("chat", *SHORT, typed=f"/load {file}\n/undo\n").err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_in_the_middle_of_a_reply_leaves_what_was_said(
    kvp: Type,
    temp: Path,
    terminal: Callable[..., Terminal],
    random_model: Callable[..., Any],
    name: str,
) -> None:
    # a model with random weights never stops by itself
    model = str(random_model(ModelShape("llama", n_ctx_train=100_000)).path)
    t = terminal("chat", model, "--max-tokens", "50000", "--seed", "3")
    t.read_until("> ")
    t.type("Hello.\n")
    t.read_until("th")
    os.kill(t.pid, getattr(signal, name))
    t.read_until(f"kvp-edge: ended by {name}")
    assert t.exit_status() == 128 + getattr(signal, name)
    file = saved_in(temp)
    got = kvp("chat", model, "--max-tokens", "1", typed=f"/load {file}\n/undo\n/undo\n")
    assert "was not answered" not in got.err  # the part of a reply that was written is one
    assert "Removed: Hello." in got.err
    assert "Nothing has been said yet." in got.err


def test_a_signal_at_the_prompt_leaves_the_conversation_if_there_is_one(
    temp: Path, terminal: Callable[..., Terminal]
) -> None:
    t = terminal("chat", *SHORT)
    t.read_until("> ")
    os.kill(t.pid, signal.SIGTERM)
    assert t.exit_status() == 128 + signal.SIGTERM
    assert list(temp.iterdir()) == []  # nothing was said

    t = terminal("chat", *SHORT)
    t.read_until("> ")
    t.type(f"{TELL}\n")
    t.read_until("t/s]")
    t.read_until("> ")
    time.sleep(0.2)
    os.kill(t.pid, signal.SIGTERM)
    assert t.exit_status() == 128 + signal.SIGTERM
    saved_in(temp)


def test_a_fault_of_the_program_leaves_the_conversation_under_the_next_free_name(
    kvp: Type, temp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: WatchedLlama) -> str:
        raise AssertionError("what nobody thought of")

    other = temp / "other"
    taken = temp / f"kvp-edge-rescue-{os.getpid()}.kvp"
    taken.symlink_to(other)  # by somebody who wants to read it, or to have it overwrite something
    with monkeypatch.context() as patch:
        patch.setattr(WatchedLlama, "status_line", fail)
        with pytest.raises(AssertionError, match="nobody thought of"):
            kvp("chat", *SHORT, typed=f"{TELL}\n")
    assert not other.exists()
    file = temp / f"kvp-edge-rescue-{os.getpid()}-1.kvp"
    got = kvp("chat", *SHORT, typed=f"/load {file}\nWhat is my dog called?\n")
    assert "Ralph" in got.replies[-1]


def test_a_file_that_cannot_be_written_is_not_said_to_be(
    kvp: Type, temp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(WatchedLlama, "status_line", lambda _: 1 / 0)
    monkeypatch.setattr("os.replace", fail)
    got = kvp("chat", *SHORT, typed=f"{TELL}\n")
    assert got.status == 2
    assert "No space left on device" in got.err
    assert "The conversation could not be written to a file." in got.err
    assert "was written to" not in got.err
    assert list(temp.iterdir()) == []


@pytest.mark.parametrize("typed", ["", "/exit\n"])
def test_a_chat_that_ends_as_meant_leaves_nothing(kvp: Type, temp: Path, typed: str) -> None:
    kvp("chat", *SHORT, typed=f"{TELL}\n{typed}")
    assert list(temp.iterdir()) == []


def test_a_reader_that_leaves_a_pipeline_wants_no_file(temp: Path) -> None:
    done = shell("chat --max-tokens 400 --temperature 1.2 | head -c 20", f"{TELL}\n" * 3)
    assert b"Traceback" not in done.stderr
    assert b"Exception" not in done.stderr
    assert list(temp.iterdir()) == []


# -- the chat goes on ----------------------------------------------------------------------------


def test_loading_anything_bad_leaves_the_conversation_as_it_was(
    kvp: Type, tmp_path: Path, bundled_model: str
) -> None:
    hello: list[Any] = [{"role": "user", "content": "Hello."}]
    reply = {"role": "assistant", "content": "Hello."}
    bad: list[Any] = [
        None,
        [],
        {"messages": hello},
        {"messages": hello, "seed": "7"},
        {"messages": hello, "seed": 1.5},
        {"messages": "Hello.", "seed": 7},
        {"messages": {"role": "user"}, "seed": 7},
        {"messages": ["Hello."], "seed": 7},
        {"messages": [{"role": "user"}], "seed": 7},
        {"messages": [{"role": "user", "content": None}], "seed": 7},
        {"messages": [{"role": "user", "content": "\ud83d"}], "seed": 7},
        {"messages": [{"role": 5, "content": "Hello."}], "seed": 7},
        {"messages": hello * 2, "seed": 7},
        {"messages": [reply], "seed": 7},
        {"messages": [*hello, {"role": "system", "content": "Be kind."}], "seed": 7},
    ]
    llm = kvp_edge.Llama(bundled_model, kv_budget=512, verbose=False)
    llm.eval([1, 2, 3])
    for i, extra in enumerate(bad):
        llm.save_session(tmp_path / str(i), extra)
    llm.close()
    (tmp_path / "garbage").write_bytes(b"kvpsess\n" + b"\xff" * 100)
    (tmp_path / "folder").mkdir()
    files = [*map(str, range(len(bad))), "garbage", "folder", "absent"]
    loads = "".join(f"/load {tmp_path / name}\n" for name in files)
    got = kvp("chat", *SHORT, typed=f"{TELL}\n{loads}What is my dog called?\n")
    assert got.status == 1
    assert got.err.count("contains no messages. Your conversation is unchanged") == len(bad)
    assert "Loaded" not in got.err
    assert "Ralph" in got.replies[-1]
    first, second = got.stats
    assert second["read"] < second["seen"] - first["seen"]  # nothing was read again


def test_what_can_be_saved_can_be_loaded(kvp: Type, tmp_path: Path) -> None:
    file = tmp_path / "s"
    options = [*SHORT, "--system", "You are kind."]
    kvp("chat", *options, typed=f"Hello.\n{TELL}\n/save {file}\n")
    got = kvp("chat", *options, typed=f"/load {file}\n/undo\n/undo\n/undo\n")
    assert got.status == 0
    assert got.err.count("Removed:") == 2
    assert "Nothing has been said yet." in got.err


def test_a_template_that_refuses_a_later_message_does_not_end_the_chat(
    kvp: Type, tmp_path: Path
) -> None:
    file = tmp_path / "template"
    for refusal in ("raise_exception('one question is enough')", "1 / 0", "messages[0].x.y"):
        file.write_text(
            f"{{% if messages|length > 1 %}}{{{{ {refusal} }}}}{{% endif %}}"
            "{{ messages[0].content }}"
        )
        got = kvp("chat", *SHORT, "--chat-template", str(file), typed="Hi.\nMore.\n/undo\n")
        assert got.status == 1
        assert len(got.stats) == 1
        assert "The conversation is unchanged." in got.err
        assert "Removed: Hi." in got.err


def test_a_message_that_is_too_long_by_itself_gets_no_advice_that_does_not_help(kvp: Type) -> None:
    got = kvp("chat", *SHORT, "--n-ctx", "300", typed="many words " * 200 + "\n")
    assert "message alone is too long" in got.err
    assert "/undo" not in got.err


def test_also_after_others_and_one_that_fits_alone_is_told_what_makes_room(kvp: Type) -> None:
    long = "many words " * 200
    got = kvp("chat", *SHORT, "--n-ctx", "300", typed=f"Hello.\n{long}\n")
    assert "message alone is too long" in got.err
    assert "/undo" not in got.err
    half = "many words " * 60
    got = kvp("chat", *SHORT, "--n-ctx", "300", typed=f"{half}\n{half}\n{half}\n")
    assert "Use /undo or /clear to make room" in got.err
    assert "message alone is too long" not in got.err


def test_a_line_that_begins_with_two_slashes_is_a_message_as_it_is(kvp: Type) -> None:
    got = kvp("chat", *SHORT, typed="// a comment\n/undo\n")
    assert len(got.stats) == 1
    assert "Removed: // a comment" in got.err


def test_a_line_that_begins_with_a_slash_can_be_sent(kvp: Type) -> None:
    got = kvp("chat", *SHORT, typed='/etc/passwd\n /etc/passwd\n"""\n/etc\n/usr\n"""\n/undo\n')
    assert "There is no command '/etc/passwd'" in got.err
    assert "start the line with a space" in got.err
    assert len(got.stats) == 2
    assert "Removed: /etc\n/usr" in got.err


def test_a_block_in_a_pipe_is_one_message_even_if_it_is_not_closed(kvp: Type) -> None:
    got = kvp("chat", *SHORT, typed='"""\nMy dog\nis called Ralph.\n')
    assert (got.status, len(got.stats)) == (0, 1)
    assert (kvp("chat", *SHORT, typed='"""\n').status, len(got.stats)) == (0, 1)


# -- streams that are closed, or know fewer characters -------------------------------------------


def test_closed_streams_do_no_harm() -> None:
    assert shell("chat <&-").returncode == 0
    done = shell("chat 2>&-", f"{TELL}\n")
    assert done.returncode == 0
    assert done.stdout.strip()
    done = shell("chat >&-", f"{TELL}\n")
    assert (done.returncode, done.stderr) == (
        2,
        b"kvp-edge: standard output is closed\n",
    )


def test_bytes_that_are_no_utf8_at_a_terminal_do_not_end_a_chat(
    terminal: Callable[..., Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LC_ALL", "C")
    t = terminal("chat", *SHORT)
    t.read_until("> ")
    os.write(t._fd, b"Caf\xe9 a\x80b.\n")
    t.read_until("t/s]")
    t.read_until("> ")
    t.type("/exit\n")
    assert t.exit_status() == 0
