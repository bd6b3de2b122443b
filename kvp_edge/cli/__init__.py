"""The ``kvp-edge`` command: one module per subcommand."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any, NoReturn

import kvp_edge
from kvp_edge.cli.ending import Ended
from kvp_edge.cli.option_names import with_options
from kvp_edge.cli.shown import let_go_of_output, note, open_streams, visible

#: The commands, in the order of --help: "chat" is kvp_edge.cli.chat, with add_chat. A module is
#: imported when it is needed, so that doctor can be run where llama.cpp cannot be loaded.
_COMMANDS = (
    *("chat", "run", "demo", "policies", "learn", "trace", "train", "export", "inspect", "eval"),
    "doctor",
)

_DESCRIPTION = """\
Long conversations in a small KV cache, with stock llama.cpp.

The cache has a fixed number of cells. When it is full, a policy decides which tokens the model can
do without, and the conversation goes on. Never dropped: the first tokens (--sinks), the newest
(--recent), and a system prompt that you give."""

_EPILOG = """\
examples:
  kvp-edge demo                              what it is good for, in a table (a minute or two)
  kvp-edge chat                              chat with the small model that comes along
  kvp-edge chat model.gguf --kv-budget 1024  chat with yours
  kvp-edge learn model.gguf                  train a policy for your model
  kvp-edge run model.gguf -f book.txt -p "Who found the map?"
  kvp-edge doctor                            does all of it work on this machine?

kvp-edge COMMAND --help tells more. Exit status: 0 done; 1 failed; 2 bad input; 130 interrupted;
128 + N ended by signal N."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(visible(message))  # it quotes what was typed


class _Version(argparse.Action):
    """--version, which llama.cpp must be loaded for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        native = import_module("kvp_edge.binding.library")
        print(
            f"kvp-edge {kvp_edge.__version__} "
            f"(llama-cpp-python {native.BUILT_FOR}, llama.cpp {native.LLAMA_VERSION})"
        )
        parser.exit()


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Knows the command that ``argv`` begins with; all of them if it begins with none."""
    parser = _Parser(
        prog="kvp-edge",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="show program's version number and exit"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in argv[:1] if argv and argv[0] in _COMMANDS else _COMMANDS:
        getattr(import_module(f"kvp_edge.cli.{name}"), f"add_{name}")(commands)
    return parser


def _run(command: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a command; what is expected to go wrong becomes a sentence and an exit status."""
    try:
        return command(args)
    except KeyboardInterrupt:
        note("\nkvp-edge: interrupted")
        return 130
    except Ended as ended:
        note(f"kvp-edge: {ended}")
        return ended.status
    except BrokenPipeError:  # the reader of our output left (`| head`)
        return 1
    except _bad_input() as error:
        if args.verbose:
            raise
        status = 2
        message = str(error)
    except (RuntimeError, MemoryError, ImportError) as error:
        if args.verbose:
            raise
        status = 1
        message = f"{str(error) or 'out of memory'} (--verbose tells more)"
    finally:
        let_go_of_output()
    note(f"kvp-edge: {with_options(message, args)}")
    return status


def _bad_input() -> tuple[type[Exception], ...]:
    """What the user gave is wrong: an argument, a file, or a model's chat template, which may
    divide by zero, or of which jinja2 complains (llama_cpp brings it, if it could be imported)."""
    jinja2 = sys.modules.get("jinja2")
    template = (jinja2.TemplateError,) if jinja2 else ()
    return (ValueError, OSError, ArithmeticError, *template)


def _guard() -> AbstractContextManager[None]:
    """Against failures in ggml, where it is in this process."""
    if "llama_cpp" not in sys.modules:
        return nullcontext()
    guard: AbstractContextManager[None] = import_module(
        "kvp_edge.cli.device_failure"
    ).ends_with_a_sentence()
    return guard


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. Bad usage and --help raise SystemExit."""
    had_output = open_streams()
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = _parser(argv).parse_args(argv)
    except (ImportError, OSError, RuntimeError) as error:  # of llama.cpp or the native part
        note(f"kvp-edge: {error}\nkvp-edge doctor finds out more")
        return 1
    if not had_output:
        note("kvp-edge: standard output is closed: there is nowhere to write to")
        return 2
    with warnings.catch_warnings(), _guard():
        warnings.showwarning = lambda message, *_, **__: note(
            f"kvp-edge: warning: {with_options(str(message), args)}"
        )
        return _run(args.command, args)
