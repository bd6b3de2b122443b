"""The options that the command line has."""

from __future__ import annotations

from importlib import import_module

from kvp_edge.cli import COMMANDS
from kvp_edge.cli.parameters import names_of

#: Of every command, and of kvp-edge itself.
EVERYWHERE = {"--help", "--version"}


def options_of(command: str) -> set[str]:
    """The options of ``kvp-edge COMMAND``."""
    module = import_module(f"kvp_edge.cli.{command}")
    return set(names_of(module.Options).values())


def all_options() -> set[str]:
    return EVERYWHERE.union(*map(options_of, COMMANDS))
