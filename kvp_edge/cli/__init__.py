"""The ``kvp-edge`` command: one module per subcommand."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

from jinja2 import TemplateError  # a chat template's; llama_cpp brings jinja2

import kvp_edge
from kvp_edge.cli.chat import add_chat
from kvp_edge.cli.demo import add_demo
from kvp_edge.cli.device_failure import ends_with_a_sentence
from kvp_edge.cli.ending import Ended
from kvp_edge.cli.eval import add_eval
from kvp_edge.cli.export import add_export
from kvp_edge.cli.inspect import add_inspect
from kvp_edge.cli.learn import add_learn
from kvp_edge.cli.policies import add_policies
from kvp_edge.cli.run import add_run
from kvp_edge.cli.shown import let_go_of_output, note, open_streams, visible
from kvp_edge.cli.trace import add_trace
from kvp_edge.cli.train import add_train
from kvp_edge.native import BUILT_FOR, LLAMA_VERSION

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

kvp-edge COMMAND --help tells more. Exit status: 0 done; 1 failed; 2 bad input; 130 interrupted;
128 + N ended by signal N."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(visible(message))  # it quotes what was typed


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="kvp-edge",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version",
        action="version",
        version=(
            f"kvp-edge {kvp_edge.__version__} "
            f"(llama-cpp-python {BUILT_FOR}, llama.cpp {LLAMA_VERSION})"
        ),
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    adders = (add_chat, add_run, add_demo, add_policies, add_learn)
    for add in (*adders, add_trace, add_train, add_export, add_inspect, add_eval):
        add(commands)
    return parser


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    note(f"kvp-edge: warning: {message}")


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
    except (ValueError, OSError, TemplateError, ArithmeticError) as error:
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
    note(f"kvp-edge: {message}")
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. Bad usage and --help raise SystemExit."""
    had_output = open_streams()
    args = _parser().parse_args(argv)
    if not had_output:
        note("kvp-edge: standard output is closed: there is nowhere to write to")
        return 2
    with warnings.catch_warnings(), ends_with_a_sentence():
        warnings.showwarning = _warn
        return _run(args.command, args)
