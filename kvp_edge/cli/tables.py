"""Tables and lists of names with what is to be said of them, as lines of text.

They are as wide as a terminal, and in a pipe or a file as they need be. What they show is text and
no markup.
"""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterable, Sequence

from rich.box import Box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kvp_edge.cli.shown import on_one_line

_ANY_WIDTH = 100_000
_RULE_BELOW_THE_HEAD = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)


def table(head: Sequence[tuple[str, int]], rows: Iterable[Sequence[str]]) -> list[str]:
    """Names in the first column, and numbers.

    Args:
        head: of each column its title and its smallest width, with a blank between columns.
    """
    made = Table(box=_RULE_BELOW_THE_HEAD, show_edge=False, pad_edge=False, padding=0)
    for at, (title, width) in enumerate(head):
        made.add_column(
            Text(title),
            justify="right" if at else "left",
            min_width=width - bool(at),  # a blank of the rule stands before it
            no_wrap=True,
        )
    for row in rows:
        made.add_row(*map(_text, row))
    return _lines(made, _ANY_WIDTH)


def named(name: str, text: str, width: int, indent: int = 0) -> str:
    """A name and what is to be said of it, which stays to the right of the name's column.

    Args:
        width: of the name's column.
    """
    made = Table.grid(padding=0)
    made.add_column(min_width=width, no_wrap=True)
    made.add_column()
    made.add_row(_text(name), _text(text))
    terminal = shutil.get_terminal_size().columns if sys.stdout.isatty() else _ANY_WIDTH
    return "\n".join(line.rstrip() for line in _lines(Padding(made, (0, 0, 0, indent)), terminal))


def _text(shown: str) -> Text:
    return Text(on_one_line(shown))


def _lines(made: RenderableType, width: int) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None, force_terminal=False).print(made)
    return out.getvalue().splitlines()
