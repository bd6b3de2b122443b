"""The commands, as typer and rich parse their options and show their help.

To parse a command line is all that is left to typer: it returns what to run, and on what, and
``kvp_edge.cli`` runs it and tells of what goes wrong.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from kvp_edge.cli.option_names import as_options
from kvp_edge.cli.parameters import NO_VALUE, several, signature
from kvp_edge.cli.shown import say

#: What typer raises when a command line is not as --help says. It has no public name for it.
UsageError: type[Exception]
(UsageError,) = typer.BadParameter.__bases__


@dataclass(frozen=True)
class Parsed:
    """A command, and the options it was given."""

    run: Callable[[Any], int]
    options: Any

    def __call__(self) -> int:
        return self.run(self.options)

    def worded(self, message: object) -> str:
        """A message of what it ran, which names arguments of Python, with its options instead."""
        return as_options(str(message), type(self.options))


@dataclass(frozen=True)
class Command:
    """One module's part: what it runs, with which options, and what its --help says.

    Attributes:
        options: a dataclass, see ``kvp_edge.cli.parameters``.
        epilog: shown as it stands.
    """

    run: Callable[[Any], int]
    options: type
    description: str
    epilog: str = ""


class _Help:
    """For a command: its epilog's examples keep their lines, and are no markup."""

    verbatim = ""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        # typer takes everything for a terminal where CI runs; rich finds out
        rich_utils: Any = import_module("typer.rich_utils")
        rich_utils.FORCE_TERMINAL = None
        super().format_help(ctx, formatter)  # type: ignore[misc]
        # rich has printed that already; what the formatter is given comes after it
        formatter.write(f"\n{_wrapped(self.verbatim, formatter.width)}" if self.verbatim else "")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            rest: list[str] = super().parse_args(ctx, args)  # type: ignore[misc]
            return rest
        except UsageError as error:
            error.ctx = ctx  # type: ignore[attr-defined]  # typer leaves it out of some
            raise

    def get_help_option(self, ctx: Any) -> Any:
        found: Any = super().get_help_option(ctx)  # type: ignore[misc]
        found.metavar = NO_VALUE
        return found


class _Command(_Help, TyperCommand):
    """Some of its options take several values at once."""

    several: frozenset[str] = frozenset()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_one_by_one(args, self.several)))


def _one_by_one(args: Sequence[str], several: frozenset[str]) -> Iterator[str]:
    """``--text a b`` as ``--text a --text b``: a shell makes the first of ``--text *.txt``."""
    name = ""
    waits = False  # for the name's first value
    for at, arg in enumerate(args):
        if arg == "--":
            yield from args[at:]
            return
        if arg.startswith("-") and arg != "-":
            name, waits = (arg, True) if arg in several else ("", False)
        elif name and not waits:
            yield name
        else:
            waits = False
        yield arg


class _Group(_Help, TyperGroup):
    """``kvp-edge`` itself."""


def _wrapped(text: str, width: int) -> str:
    """The text with those paragraphs filled that have no indented line."""

    def filled(part: str) -> str:
        return part if re.search("^ ", part, re.MULTILINE) else textwrap.fill(part, width)

    return "\n\n".join(map(filled, text.split("\n\n")))


def _one_line(text: str) -> str:
    """The text with a line for each paragraph, for rich to wrap."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


class _Lazy(TyperCommand):
    """A command whose module is imported when it is used, so that --help of them all is fast and
    doctor can be run where llama.cpp cannot be loaded."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        assert self.name is not None
        return _loaded(self.name).make_context(info_name, args, parent, **extra)


def _loaded(name: str) -> TyperCommand:
    command: Command = import_module(f"kvp_edge.cli.{name}").COMMAND
    options = command.options

    def parsed(**values: Any) -> Parsed:
        return Parsed(command.run, options(**values))

    parsed.__signature__ = signature(options)  # type: ignore[attr-defined]
    app = typer.Typer(add_completion=False)
    app.command(name, cls=_Command, help=command.description)(parsed)
    made: Any = typer.main.get_command(app)
    made.verbatim, made.several = command.epilog, frozenset(several(options))
    return made  # type: ignore[no-any-return]


def group(
    commands: dict[str, str], description: str, epilog: str, version: Callable[[], str]
) -> TyperGroup:
    """``kvp-edge`` itself.

    Args:
        commands: name -> what it is for. The module of that name here has its ``COMMAND``.
        version: what --version says.
    """

    def show_version(wanted: bool) -> None:
        if wanted:
            say(version())
            raise typer.Exit

    def options(
        version: bool = typer.Option(
            False,
            "--version",
            callback=show_version,
            is_eager=True,
            metavar=NO_VALUE,
            help="show program's version number and exit",
        ),
    ) -> None: ...

    app = typer.Typer(add_completion=False, cls=_Group, help=_one_line(description))
    app.callback(subcommand_metavar="COMMAND ...")(options)
    made: Any = typer.main.get_command(app)
    made.verbatim = epilog
    for name, help in commands.items():
        made.add_command(_Lazy(name, help=help))
    return made  # type: ignore[no-any-return]


def parse(group: TyperGroup, argv: Sequence[str]) -> Parsed:
    """The command of a command line.

    Raises:
        UsageError: there is no such command or option.
        SystemExit: --help or --version is done.
    """
    parsed = group.main(list(argv), prog_name="kvp-edge", standalone_mode=False)
    if isinstance(parsed, Parsed):
        return parsed
    raise SystemExit(parsed or 0)
