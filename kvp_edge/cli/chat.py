"""``kvp-edge chat``: a conversation that goes on when the cache is full."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from itertools import count
from typing import Any

from kvp_edge.cli import options
from kvp_edge.cli.device_failure import ends_with_a_sentence
from kvp_edge.cli.watch import STATUS_LINE_HELP, WatchedLlama, note
from kvp_edge.errors import BudgetError, ContextLengthError, SessionError

_DEFAULT_MAX_TOKENS = 512

_COMMANDS = """\
  /stats   what the cache holds
  /regen   another reply to your last message
  /undo    take back your last message and its reply
  /clear   begin a new conversation
  /save F  write the conversation and the cache to the file F
  /load F  go on with what was saved there
  /help    this list
  /exit    leave (also Ctrl-D)"""

_EPILOG = f"""\
in the chat:
{_COMMANDS}
  Ctrl-C stops a reply; what was said so far stays. A line that ends in \\ goes on in the next one,
  and so do lines between two lines of \"\"\".

  If a device that holds the model or the cache fails, llama.cpp ends the process; the conversation
  is written to a file in the folder for temporary files, which /load reads again.

When standard input is not a terminal, each line is a message; replies go to standard output and
everything else to standard error.

never dropped: the first --sinks tokens, the newest --recent tokens, and the text of --system.

{STATUS_LINE_HELP}

examples:
  kvp-edge chat
  kvp-edge chat model.gguf --kv-budget 1024 --n-ctx 32768 --system "You answer briefly."
  kvp-edge chat --hf-repo Qwen/Qwen2.5-0.5B-Instruct-GGUF --hf-file qwen2.5-0.5b-instruct-q8_0.gguf
  printf 'My dog is called Rex.\\nWhat is my dog called?\\n' | kvp-edge chat --temperature 0"""

_AS_BEFORE = "The conversation is as it was before your message."
_MAKE_ROOM = """\
/undo and /clear make room;
a larger --n-ctx at the start makes longer conversations possible."""

_ABOUT_BUNDLED_MODEL = """\
This is the small model that comes along. It recalls what you tell it ("My dog is called Ralph.",
later "What is my dog called?") and babbles otherwise. For a real conversation name a GGUF file."""


def add_chat(commands: Any) -> None:
    parser = commands.add_parser(
        "chat",
        help="chat with a model; the cache stays small",
        description="Chat with a model whose KV cache stays small however long the chat becomes.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_model_options(parser)
    options.add_cache_options(parser, n_ctx_default="what the model was trained for")
    options.add_system_options(parser)
    options.add_sampling_options(parser, temperature=0.7, max_tokens=_DEFAULT_MAX_TOKENS)
    parser.set_defaults(command=_main)


def _main(args: argparse.Namespace) -> int:
    path = options.model_path(args)
    llm = options.load(path, args.n_ctx, args)
    options.warn_beyond_training(llm.n_ctx(), path, args)
    chat = Chat(llm, args)
    # closed here, and not when Python ends: a device that failed meanwhile may say so only then
    with closing(llm), _rescuing(chat, llm, args):
        if not sys.stdin.isatty():
            return _piped(chat)
        _greet(llm, path, args)
        return _at_terminal(chat)


def _greet(llm: WatchedLlama, path: str, args: argparse.Namespace) -> None:
    stats = llm.kv_stats
    note(
        f"{os.path.basename(path)}: up to {llm.n_ctx()} tokens of conversation, in {stats.cells} "
        f"cells ({stats.kv_bytes / 2**20:.1f} MiB); when they are full, {stats.policy} keeps "
        f"{stats.budget}.\n/help lists the commands; Ctrl-D leaves."
    )
    if not _names_model(args):
        note(_ABOUT_BUNDLED_MODEL)


@contextmanager
def _rescuing(chat: Chat, llm: WatchedLlama, args: argparse.Namespace) -> Iterator[None]:
    """Have the conversation written to a new file if a device fails in the meantime."""
    file = _rescue_file()
    command = shlex.join(["kvp-edge", "chat", *([llm.model_path] if _names_model(args) else [])])

    def advice() -> str:
        if not os.path.exists(file):
            return "The conversation could not be written to a file."
        return (
            f"The conversation was written to {file}\n"
            f"To go on, start `{command}` with the options you want, and type: /load {file}"
        )

    with ends_with_a_sentence(advice):
        llm.rescue_to(file, chat.contents)  # registered last, so done first
        try:
            yield
        finally:
            llm.rescue_to(None)


def _rescue_file() -> str:
    """A name that is free: what another process of this number rescued may still be wanted."""
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError:  # no folder can be written to; a chat needs none until a device fails
        folder = os.getcwd()
    stem = os.path.join(folder, f"kvp-edge-rescue-{os.getpid()}")
    names = (f"{stem}{f'-{n}' if n else ''}.kvp" for n in count())
    return next(name for name in names if not os.path.lexists(name))


def _names_model(args: argparse.Namespace) -> bool:
    return args.model is not None or bool(args.hf_repo)


class Chat:
    """One conversation. Replies go to stdout, everything else to stderr."""

    def __init__(self, llm: WatchedLlama, args: argparse.Namespace) -> None:
        self._llm = llm
        self._sampling = options.sampling(args)
        self._seed = options.first_seed(args)
        self._system: list[dict[str, str]] = (
            [{"role": "system", "content": args.system}] if args.system else []
        )
        self._messages = list(self._system)

    def contents(self) -> dict[str, Any]:
        """What a session file holds of the chat besides its tokens."""
        return {"messages": self._messages, "seed": self._seed}

    def hear(self, line: str) -> bool:
        """Answer a message or obey a /command. Returns False if that failed."""
        if not line.strip():
            return True
        if not line.startswith("/"):
            return self._answer({"role": "user", "content": line})
        command, _, argument = line.strip().partition(" ")
        if command in ("/save", "/load"):
            return self._keep(command, argument.strip())
        command = line.strip()
        if command == "/exit":
            raise EOFError
        if command == "/stats":
            note(str(self._llm.kv_stats))
        elif command == "/help":
            note(_COMMANDS)
        elif command == "/clear":
            self._messages = list(self._system)
            self._llm.reset()
            note("A new conversation begins.")
        elif command in ("/regen", "/undo"):
            before = list(self._messages)
            question = self._take_back()
            if question is None:
                note("Nothing has been said yet.")
            elif command == "/undo":
                note(f"Taken back: {question['content']}")
            elif not self._answer(question):
                self._messages = before
                return False
        else:
            note(f"There is no command '{command}'. There are:\n{_COMMANDS}")
            return False
        return True

    def _keep(self, command: str, path: str) -> bool:
        """Save or load a session. If that fails, the conversation is as it was before."""
        if not path:
            note(f"Name a file: {command} FILE")
            return False
        try:
            if command == "/save":
                self._llm.save_session(path, self.contents())
                note(f"Saved to {path} ({os.path.getsize(path) / 2**20:.1f} MiB).")
            else:
                self._resume(path)
                note(f"Loaded {path}: {self._llm.kv_stats}.")
                self._return_question()
        except SessionError as error:
            note(str(error))
            return False
        return True

    def _resume(self, path: str) -> None:
        with self._llm.timed(bar_after=_bar_after()):  # what was rescued is read again
            extra = self._llm.load_session(path)
        try:
            messages, self._seed = extra["messages"], extra["seed"]
        except (KeyError, TypeError) as error:
            self._llm.reset()
            self._messages = list(self._system)
            raise SessionError(
                f"the session '{path}' was not saved by a chat: it holds no messages. A new "
                "conversation begins"
            ) from error
        self._messages = messages
        self._system = [m for m in messages[:1] if m["role"] == "system"]

    def _return_question(self) -> None:
        """A device may have failed before the last message was answered."""
        if self._messages and self._messages[-1]["role"] == "user":
            question = self._messages.pop()
            note(f"Your last message was not answered. Send it again:\n{question['content']}")

    def _take_back(self) -> dict[str, str] | None:
        """Remove the last message of the user with its reply."""
        if len(self._messages) == len(self._system):
            return None
        del self._messages[-1]
        return self._messages.pop()

    def _answer(self, question: dict[str, str]) -> bool:
        """Write a reply to stdout. If that fails, the conversation is as it was before."""
        self._messages.append(question)
        said: list[str] = []
        try:
            with self._llm.timed(bar_after=_bar_after()):
                for text in self._stream():
                    said.append(text)
                    print(text, end="", flush=True)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            if not said:
                self._messages.pop()
                note(f"\nStopped before the reply began. {_AS_BEFORE}")
                return False
        except BudgetError as error:
            raise BudgetError(f"{error} (--no-protect-system)") from error
        except (ContextLengthError, RuntimeError, MemoryError) as error:
            self._messages.pop()
            print(end="\n" if said else "", flush=True)
            note(f"{str(error) or 'out of memory'}\n{_AS_BEFORE} {_MAKE_ROOM}")
            return False
        self._messages.append({"role": "assistant", "content": "".join(said)})
        print(flush=True)
        note(self._llm.status_line())
        if self._llm.n_tokens + 1 >= self._llm.n_ctx():
            note(f"The conversation has reached its {self._llm.n_ctx()} tokens. {_MAKE_ROOM}")
        return True

    def _stream(self) -> Iterator[str]:
        self._seed += 1  # /regen shall not say the same again
        chunks = self._llm.create_chat_completion(
            self._messages, stream=True, seed=self._seed, **self._sampling
        )
        for chunk in chunks:
            text = chunk["choices"][0]["delta"].get("content")
            if text:
                yield text


def _bar_after() -> float | None:
    return 1.0 if sys.stderr.isatty() else None


def _piped(chat: Chat) -> int:
    """One message per line. Status 1 if a line could not be obeyed or answered."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a stray byte is no reason to stop
    failed = False
    try:
        for line in sys.stdin:
            failed |= not chat.hear(line.rstrip("\r\n"))
    except EOFError:
        pass
    return int(failed)


def _at_terminal(chat: Chat) -> int:
    with suppress(ImportError):  # arrow keys and history, where Python has them
        importlib.import_module("readline")
    interrupted = False
    while True:
        try:
            message = _read_message()
            interrupted = False
            chat.hear(message)
        except EOFError:
            note("")
            return 0
        except KeyboardInterrupt:
            note("")
            if interrupted:
                return 130
            interrupted = True
            note("(Ctrl-C again leaves, and so do Ctrl-D and /exit)")


def _read_message() -> str:
    line = _read_line("> ")
    if line.strip() == '"""':
        lines = []
        while (line := _read_line("... ")).strip() != '"""':
            lines.append(line)
        return "\n".join(lines)
    while line.endswith("\\"):
        line = line[:-1] + "\n" + _read_line("... ")
    return line


def _read_line(prompt: str) -> str:
    if sys.stdout.isatty():
        return input(prompt)
    # input() would write the prompt among the replies
    print(prompt, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")
