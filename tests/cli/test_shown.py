"""What is shown at a terminal cannot command it."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kvp_edge.cli import main
from kvp_edge.cli.shown import note, on_one_line, open_streams, say, visible
from kvp_edge.policy_file import read_policy, write_policy
from support.command_line import GREEDY, Type

TITLE = "\x1b]0;owned\x07\x9b2J\x7f\r"
SHOWN = "␛]0;owned␇�2J␡␍"


class Stream(io.TextIOWrapper):
    def __init__(self, *, terminal: bool, encoding: str = "utf-8") -> None:
        self.bytes = io.BytesIO()
        super().__init__(self.bytes, encoding=encoding)
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def test_every_control_character_but_tab_and_line_end_becomes_visible() -> None:
    codes = [*range(0x20), *range(0x7F, 0xA0)]
    for code in codes:
        shown = visible(f"a{chr(code)}b")
        assert len(shown) == 3
        assert (shown[1] == chr(code)) == (chr(code) in "\t\n")
        assert on_one_line(f"a{chr(code)}b")[1].isprintable() or code >= 0x80
    kept = "".join(map(chr, [*range(0x20, 0x7F), *range(0xA0, 0xD800), 0x1F600]))
    assert visible(kept) == on_one_line(kept) == kept


def test_replies_are_made_visible_at_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal, shown in ((True, SHOWN), (False, TITLE)):
        stream = Stream(terminal=terminal)
        monkeypatch.setattr(sys, "stdout", stream)
        say(TITLE, end="")
        assert stream.bytes.getvalue().decode() == shown


def test_notes_are_always_visible_and_never_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(terminal=False)
    monkeypatch.setattr(sys, "stderr", stream)
    note(TITLE)
    assert stream.bytes.getvalue().decode() == f"{SHOWN}\n"

    def fail(_: str) -> int:
        raise OSError(5, "Input/output error")  # the terminal is gone

    monkeypatch.setattr(stream, "write", fail)
    note("nobody reads this")


def test_standard_streams_replace_what_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(terminal=False, encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xffb\n"), encoding="utf-8"))
    assert open_streams()
    say("é ☃", end="")
    assert stream.bytes.getvalue() == b"\xe9 ?"
    assert sys.stdin.readline() == "a\N{REPLACEMENT CHARACTER}b\n"


def test_commands_show_names_messages_and_files_without_control_characters(
    kvp: Type, tmp_path: Path
) -> None:
    short = [*GREEDY, "--threads", "1", "--max-tokens", "4"]
    typed = f"{TITLE[:-1]} hi\n/undo\n/load {TITLE[:-1]}\n/{TITLE[:-1]}\n"
    for got in (
        kvp("chat", *short, typed=typed),
        kvp("chat", f"{TITLE}.gguf"),
        kvp("run", "-p", "Why?", "-f", f"{TITLE}.txt"),
        kvp("inspect", f"{TITLE}.gguf"),
        kvp("chat", "--policy", TITLE),
        kvp("chat", "--threads", TITLE),
        kvp("chat", "a", TITLE),
    ):
        assert "\x1b" not in got.err
        assert "\x9b" not in got.err
        assert "owned" in got.err


def test_a_policy_file_cannot_forge_lines_of_inspect(
    kvp: Type, tmp_path: Path, bundled_model: str
) -> None:
    [policy] = Path(bundled_model).parent.glob("kvp-Bookworm-*.gguf")
    info, weights = read_policy(policy)
    forged = replace(info, name=f"x\nfingerprint     {'0' * 64}{TITLE}")
    write_policy(tmp_path / "p.gguf", forged, weights)
    got = kvp("inspect", str(tmp_path / "p.gguf"))
    assert got.status == 0
    assert sum(line.startswith("fingerprint") for line in got.replies) == 1
    assert "x␊fingerprint" in got.out


def test_an_encoding_that_lacks_a_character_does_not_end_a_command(
    tmp_path: Path, bundled_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    [policy] = Path(bundled_model).parent.glob("kvp-Bookworm-*.gguf")
    info, weights = read_policy(policy)
    write_policy(tmp_path / "p.gguf", replace(info, name="Zoë ☃"), weights)
    stream = Stream(terminal=False, encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["inspect", str(tmp_path / "p.gguf")]) == 0
    assert stream.bytes.getvalue().splitlines()[0].endswith("Zoë ?".encode("latin-1"))
