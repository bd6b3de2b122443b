"""--help, of every command: it fits a terminal, commands none, and is there at once."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module

import pytest
from rich.text import Text

from kvp_edge.cli import COMMANDS
from kvp_edge.training.settings import Settings
from support.command_line import Terminal, Type

ALL = ["", *COMMANDS]


def help_of(kvp: Type, command: str) -> str:
    got = kvp(*command.split(), "--help")
    assert (got.status, got.err) == (0, "")
    return got.out


@pytest.mark.parametrize("command", ALL)
def test_help_fits_80_columns(kvp: Type, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for line in help_of(kvp, command).splitlines():
        assert len(line) <= 80, line


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_all_of_what_every_option_is_for(
    kvp: Type, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    shown = " ".join(help_of(kvp, command).split())
    options = import_module(f"kvp_edge.cli.{command}").Options
    for base in options.__mro__:
        for one in fields(base) if hasattr(base, "__dataclass_fields__") else ():
            if said := one.metadata.get("help"):
                assert said in shown
                assert Text.from_markup(said).plain == said  # none of it is taken for markup


def test_help_has_no_colours_but_at_a_terminal(kvp: Type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")  # in which typer takes everything for a terminal
    monkeypatch.setenv("PY_COLORS", "1")
    code = "from kvp_edge.cli import main; main(['doctor', '--help'])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert "--json" in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize(("environment", "colours"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_help_has_colours_at_a_terminal_that_has_them_and_wants_them(
    terminal: Callable[..., Terminal],
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    colours: bool,
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    t = terminal("doctor", "--help", term="xterm")
    shown = t.read_until("be bounded")
    assert t.exit_status() == 0
    assert bool(re.search(r"\x1b\[[\d;]*3\d", shown)) == colours
    assert "json" in shown


def test_help_of_all_commands_imports_none_of_them() -> None:
    code = (
        "import sys; from kvp_edge.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in sys.modules if name.split('.')[0] in "
        "('numpy', 'llama_cpp', 'gguf', 'torch', 'prompt_toolkit', 'tqdm')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert "a minute or two" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["chat", "--threads", "0"], "'--threads': must be at least 1, not 0"),
        (["chat", "--threads", "513"], "'--threads': must be at most 512, not 513"),
        (["chat", "--n-ctx", "many"], "'--n-ctx': must be a whole number, not 'many'"),
        (["chat", "--temperature", "hot"], "'--temperature': must be a number, not 'hot'"),
        (["chat", "--repack", "maybe"], "'--repack': must be auto, on, off, not 'maybe'"),
        (["chat", "--seed"], "--seed"),
        (["train", "traces"], "--out"),
        (["chat", "--polcy", "knorm"], "--polic"),
        (["tarce"], "trace"),
    ],
)
def test_bad_usage_names_the_option_and_what_is_right(
    kvp: Type, argv: list[str], says: str
) -> None:
    got = kvp(*argv)
    assert (got.status, got.out) == (2, "")
    usage, error = got.err.splitlines()
    assert usage.startswith("usage: kvp-edge")
    assert re.match(r"kvp-edge( \w+)?: error: ", error)
    assert says in error


def test_several_values_may_follow_one_option() -> None:
    from kvp_edge.cli import parse

    options = parse(["trace", "--out", "o", "--text", "a", "b", "--chats", "c", "--text=d"]).options
    assert (options.text, options.chats, options.model) == (["a", "b", "d"], ["c"], None)
    options = parse(["trace", "m", "--text", "a", "b", "--tasks", "3", "--out", "o"]).options
    assert (options.text, options.tasks, options.model) == (["a", "b"], 3, "m")
    options = parse(["trace", "--out", "o", "--text", "a", "-", "--", "m"]).options
    assert (options.text, options.model) == (["a", "-"], "m")


def test_every_setting_of_training_shows_its_default(
    kvp: Type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    told = help_of(kvp, "train")
    settings = told[told.index("─ settings ─") : told.index("examples:")]
    names = re.findall(r"^│ (--[\w-]+)", settings, re.MULTILINE)
    assert len(names) == len(fields(Settings))
    assert settings.count("[default: ") == len(names)
