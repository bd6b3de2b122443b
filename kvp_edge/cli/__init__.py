"""The ``kvp-edge`` command: one module per subcommand."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import kvp_edge
from kvp_edge.cli import subcommands
from kvp_edge.cli.ending import Ended
from kvp_edge.cli.shown import let_go_of_output, note, open_streams
from kvp_edge.cli.subcommands import Parsed, UsageError

#: The commands, in the order of --help: "chat" is the COMMAND of kvp_edge.cli.chat.
COMMANDS = {
    "chat": "chat with a model; the cache stays small",
    "run": "read long texts and answer a question",
    "serve": "serve a model to OpenAI's clients, with a page to chat on",
    "plan": "show what fits into so much memory, and the command for it",
    "demo": "compare policies on hidden facts, in one table",
    "policies": "list the policies, one line each",
    "learn": "train a policy for a model while it reads, and export it",
    "trace": "record what a model attends to, to train a policy",
    "train": "train a policy on traces",
    "export": "write a policy file from a training run",
    "inspect": "explain a policy file",
    "sensitivity": "measure how much each attention head's memory is worth",
    "eval": "measure what a small cache costs a model, with every policy",
    "doctor": "check what works on this machine, and how to fix what does not",
}

_DESCRIPTION = """\
Long conversations in a small KV cache, with stock llama.cpp.

The cache has a fixed number of cells. When it is full, a policy decides which tokens to drop,
and the conversation continues. Dropped tokens come back when a prompt asks for them (--recall). The
first tokens (--sinks), the newest tokens (--recent) and your system prompt are never dropped."""

_EPILOG = """\
examples:
  kvp-edge demo              compare policies, in a table (a minute or two)
  kvp-edge chat              chat with the bundled model
  kvp-edge chat model.gguf --kv-budget 1024    chat with your model
  kvp-edge learn model.gguf  train a policy for your model
  kvp-edge run model.gguf -f book.txt -p "Who found the map?"
  kvp-edge doctor            check this machine

Run kvp-edge COMMAND --help for more. Exit status: 0 done; 1 failed; 2 bad input; 130 interrupted;
128 + N ended by signal N."""


def parse(argv: Sequence[str]) -> Parsed:
    """The command of a command line, ready to run.

    Raises:
        UsageError: there is no such command or option.
        SystemExit: --help or --version is done.
    """
    return subcommands.parse(subcommands.group(COMMANDS, _DESCRIPTION, _EPILOG, _version), argv)


def _version() -> str:
    library = import_module("kvp_edge.binding.library")  # llama.cpp must be loaded for it
    return (
        f"kvp-edge {kvp_edge.__version__} "
        f"(llama-cpp-python {library.BUILT_FOR}, llama.cpp {library.LLAMA_VERSION})"
    )


def _warnings_of(command: Parsed) -> Callable[..., None]:
    def warn(message: Warning | str, *_: object, **__: object) -> None:
        note(f"kvp-edge: warning: {command.worded(message)}")

    return warn


def _run(command: Parsed) -> int:
    """Run a command; what is expected to go wrong becomes a sentence and an exit status."""
    try:
        return command()
    except KeyboardInterrupt:
        note("\nkvp-edge: interrupted")
        return 130
    except Ended as ended:
        note(f"kvp-edge: {ended}")
        return ended.status
    except BrokenPipeError:  # the reader of our output left (`| head`)
        return 1
    except _bad_input() as error:
        if getattr(command.options, "verbose", False):
            raise
        status = 2
        message = command.worded(error)
    except (RuntimeError, MemoryError, ImportError) as error:
        if getattr(command.options, "verbose", False):
            raise
        status = 1
        message = f"{command.worded(error) or 'out of memory'} (run with --verbose for details)"
    finally:
        let_go_of_output()
    note(f"kvp-edge: {message}")
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
        command = parse(argv)
    except UsageError as error:
        raise SystemExit(_told_usage(error)) from error
    except (ImportError, OSError, RuntimeError) as error:  # of llama.cpp or the native part
        note(f"kvp-edge: {error}\nRun kvp-edge doctor to find the cause.")
        return 1
    if not had_output:
        note("kvp-edge: standard output is closed")
        return 2
    with warnings.catch_warnings(), _guard():
        warnings.showwarning = _warnings_of(command)
        return _run(command)


def _told_usage(error: Any) -> int:
    """Tell what is wrong with a command line; returns the exit status."""
    usage = error.ctx.get_usage()
    note(f"u{usage[1:]}\n{error.ctx.command_path}: error: {error.format_message()}")
    return 2
