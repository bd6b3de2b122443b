"""Command lines in --help, README and docs are ones that there are."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from kvp_edge import cli
from kvp_edge.cli import COMMANDS, parse
from kvp_edge.cli.subcommands import UsageError

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

CONTINUED = re.compile(r"\\\n *")

#: Up to a pipe, a redirection, or what a shell would not pass on.
END = re.compile(r"^([|&;<>]|2>)")


def arguments(line: str) -> list[str]:
    """What ``kvp-edge`` is given in a line of a shell."""
    words = shlex.split(line, comments=True)
    end = next((i for i, word in enumerate(words) if END.match(word)), len(words))
    return [word.partition("|")[0] for word in words[:end]]  # one of "tokens|words"


def in_help(epilog: str) -> Iterator[str]:
    """The examples; what stands two blanks after one is said of it."""
    _, _, examples = epilog.partition("examples:\n")
    yield from re.findall(r"kvp-edge (.*?)(?:  |$)", CONTINUED.sub(" ", examples), re.MULTILINE)


def in_page(page: str) -> Iterator[str]:
    lines = r"^(?: {4,}|[^`\n|]*\| )?kvp-edge (.*)$"
    yield from re.findall(lines, CONTINUED.sub(" ", page), re.MULTILINE)
    for code in re.findall(r"(?<!`)`kvp-edge ([^`]+)`", page):
        yield " ".join(code.split())


def check(line: str) -> bool:
    """Whether it names a command of ours and options that this has."""
    argv = arguments(line)
    if not argv or argv[0] not in COMMANDS:
        return False
    try:
        parse(argv)
    except SystemExit as done:  # --help
        return not done.code
    except UsageError as error:
        if not str(error).startswith("Missing"):  # a page need not name them all
            raise
    return True


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_examples_of_help_can_be_run(name: str) -> None:
    epilog = import_module(f"kvp_edge.cli.{name}").COMMAND.epilog if name else cli._EPILOG
    found = [line for line in in_help(epilog) if check(line)]
    assert bool(found) == ("examples:" in epilog)
    assert len(found) == epilog.partition("examples:\n")[2].count("kvp-edge ") - (not name)


def test_command_lines_of_the_pages_are_ones_that_there_are() -> None:
    found = [line for page in PAGES for line in in_page(page.read_text()) if check(line)]
    assert len(found) > 30


@pytest.mark.parametrize("line", ["chat --polcy x", "eval --tasks a --budget 1/4", "run -q b"])
def test_one_that_there_is_not_is_found(line: str) -> None:
    with pytest.raises(UsageError, match="No such option"):
        check(line)
