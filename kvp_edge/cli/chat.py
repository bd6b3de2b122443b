"""``kvp-edge chat``: a conversation that goes on when the cache is full."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

from kvp_edge.cli import chat_format, options
from kvp_edge.cli.chat_format import ChatFormatOptions
from kvp_edge.cli.chat_line import Read, line_reader, next_line
from kvp_edge.cli.option_names import as_options
from kvp_edge.cli.progress import STATUS_LINE_HELP, WatchedLlama
from kvp_edge.cli.rescue import rescuing, start_again
from kvp_edge.cli.shown import note, say
from kvp_edge.cli.subcommands import Command
from kvp_edge.errors import BudgetError, ContextLengthError, SessionError
from kvp_edge.text import transcript
from kvp_edge.text.chat_prompt import Message, prompt_tokens

# To add a command: a line here, and a branch in ``Chat.hear``.
_COMMAND_LIST = """\
  /stats   show the state of the cache
  /regen   write another reply to your last message
  /undo    remove your last message and its reply
  /clear   start a new conversation
  /save F  save the conversation and its cache to the file F
  /load F  load a saved conversation and continue it
  /help    show this list
  /exit    leave (also Ctrl-D)"""

_COMMAND_NAMES = tuple(re.findall(r"^  (/\w+)", _COMMAND_LIST, re.MULTILINE))

_EPILOG = f"""\
in the chat:
{_COMMAND_LIST}
  Ctrl-C stops a reply and keeps what was written of it. End a line with \\ to
  continue the message on the next line, or put several lines between two lines
  of \"\"\". To send a message that begins with /, start the line with a space
  or a second /. Several lines that you paste are one message. Tab completes
  commands and file names; the arrow keys and Ctrl-R find what you typed earlier
  in this chat.

  If the chat ends unexpectedly (a device fails, SIGTERM, SIGHUP, a full disk, a
  bug), it leaves the conversation in a file in the temporary folder. /load
  reads that file.

If standard input is not a terminal, each line (or each block between two lines of \"\"\") is a
message. Replies go to standard output and everything else to standard error.

A model file without a chat template is usually a base model, which continues texts. It reads the
conversation as a transcript, in lines that begin with "User:" and "Assistant:", and is stopped when
it begins a line of the user's.

The first --sinks tokens, the newest --recent tokens and the text of --system are never dropped.
What is dropped stays in a log, and what your message asks for comes back before the reply
(--recall).

{STATUS_LINE_HELP}

examples:
  kvp-edge chat
  kvp-edge chat model.gguf --kv-budget 1024 --n-ctx 32768 \\
      --system "You answer briefly."
  kvp-edge chat --hf-repo Qwen/Qwen2.5-0.5B-Instruct-GGUF \\
      --hf-file qwen2.5-0.5b-instruct-q8_0.gguf
  printf 'My dog is called Rex.\\nWhat is my dog called?\\n' | kvp-edge chat \\
      --temperature 0"""

_AS_BEFORE = "The conversation is unchanged."
_MAKE_ROOM = """\
Use /undo or /clear to make room,
or start with a larger --n-ctx."""
_TOO_LONG_ALONE = """\
The message alone is too long:
start with a larger --n-ctx, or read it with kvp-edge run."""

_ABOUT_BUNDLED_MODEL = """\
This is the bundled model, which is small. It recalls what you tell it ("My dog is called Ralph.",
later "What is my dog called?") and writes nonsense otherwise. For a real conversation, name a GGUF
file."""


@dataclass(frozen=True, kw_only=True)
class Options(options.SamplingOptions, ChatFormatOptions, options.BoundedOptions):
    n_ctx: int | None = options.n_ctx_option("the length that the model was trained for")
    chat_format: str | None = chat_format.chat_format_option("transcript if it has none")


def _main(args: Options) -> int:
    path = options.model_path(args)
    llm = options.load(path, args.n_ctx, args)
    options.warn_beyond_training(llm.n_ctx(), path, args)
    llm.on_came_back = note
    chat = Chat(llm, args)
    command = start_again(llm.model_path if _names_model(args) else None)
    # closed here, and not when Python ends: a device that failed meanwhile may say so only then
    with closing(llm), rescuing(llm, chat.contents, command):
        chat.choose_format()
        if not sys.stdin.isatty():
            return _piped(chat)
        _greet(llm, path, args)
        return _at_terminal(chat)


def _greet(llm: WatchedLlama, path: str, args: Options) -> None:
    stats = llm.kv_stats
    info = llm.kv.policy.info if llm.kv is not None else None
    trained = f" (trained with '{info.base_model}')" if info and info.base_model else ""
    note(
        f"{os.path.basename(path)}: conversations of up to {llm.n_ctx()} tokens, in {stats.cells} "
        f"cells ({stats.memory}). When these are full, {stats.policy}{trained} "
        f"keeps {stats.budget} tokens.\nType /help for the commands, Ctrl-D to leave."
    )
    if not _names_model(args):
        note(_ABOUT_BUNDLED_MODEL)


def _names_model(args: Options) -> bool:
    return args.model is not None or bool(args.hf_repo)


class Chat:
    """One conversation. Replies go to stdout, everything else to stderr."""

    def __init__(self, llm: WatchedLlama, args: Options) -> None:
        self._llm = llm
        self._args = args
        self._sampling = options.sampling(args)
        self._seed = options.first_seed(args)
        self._system: list[Message] = (
            [{"role": "system", "content": args.system}] if args.system else []
        )
        self._messages = list(self._system)
        self._taken_back = False  # something that the cache still holds
        self._reply: list[str] = []  # what was said so far of the reply that is being written

    def choose_format(self) -> None:
        """Have messages written as the options say, and see that the first one can be.

        Raises:
            ValueError: it cannot.
        """
        chat_format.choose(self._llm, self._args)
        if self._llm.lacks_chat_template:
            self._llm.chat_format = transcript.NAME
            name = os.path.basename(self._llm.model_path)
            note(
                f"{name} has no chat template, so it reads the conversation as a transcript "
                "(--chat-format NAME chooses another format)."
            )
        chat_format.check(self._llm, self._system)

    def contents(self) -> dict[str, Any]:
        """What a session file holds of the chat besides its tokens."""
        said = "".join(self._reply)
        unfinished = [{"role": "assistant", "content": said}] if said else []
        return {"messages": [*self._messages, *unfinished], "seed": self._seed}

    def hear(self, line: str) -> bool:
        """Answer a message or obey a /command. Returns False if that failed."""
        if not line.strip():
            return True
        if not line.startswith("/") or line.startswith("//") or "\n" in line:
            return self._answer({"role": "user", "content": line})
        command, _, argument = line.strip().partition(" ")
        if command in ("/save", "/load"):
            return self._keep(command, argument.strip())
        command = line.strip()
        if command == "/exit":
            raise EOFError
        if command == "/stats":
            note(str(self._llm.kv_stats))
            if self._taken_back:
                note("They include what was removed, until your next message.")
        elif command == "/help":
            note(_COMMAND_LIST)
        elif command == "/clear":
            self._messages = list(self._system)
            self._taken_back = False
            self._llm.reset()
            note("A new conversation begins.")
        elif command in ("/regen", "/undo"):
            before = list(self._messages)
            question = self._take_back()
            if question is None:
                note("Nothing has been said yet.")
            elif command == "/undo":
                self._taken_back = True
                note(f"Removed: {question['content']}")
            else:
                if self._sampling["temperature"] <= 0:
                    note("(The likeliest reply is the same again; --temperature 0.7 gives others.)")
                if not self._answer(question):
                    self._messages = before
                    return False
        else:
            note(
                f"There is no command '{command}'. The commands are:\n{_COMMAND_LIST}\n"
                "To send it as a message, start the line with a space."
            )
            return False
        return True

    def _keep(self, command: str, argument: str) -> bool:
        """Save or load a session. If that fails, the conversation is as it was before."""
        if not argument:
            note(f"Name a file: {command} FILE")
            return False
        path = os.path.expanduser(argument)
        try:
            if command == "/save":
                self._llm.save_session(path, self.contents())
                note(f"Saved to {path} ({os.path.getsize(path) / 2**20:.1f} MiB).")
            else:
                self._resume(path)
                note(f"Loaded {path}: {self._llm.kv_stats}.")
                self._return_question()
        except Exception as error:  # whatever it is, the conversation is worth more
            self._tell(error)
            return False
        return True

    def _resume(self, path: str) -> None:
        saved: list[_Saved] = []
        with self._llm.timed(bar_after=_bar_after()):  # what was rescued is read again
            self._llm.load_session(path, accept=lambda extra: saved.append(_Saved.of(path, extra)))
        self._messages, self._seed = saved[0]
        self._taken_back = False
        self._system = [m for m in self._messages[:1] if m["role"] == "system"]

    def _return_question(self) -> None:
        """The chat may have ended before the last message was answered."""
        if self._messages and self._messages[-1]["role"] == "user":
            question = self._messages.pop()
            note(
                "Your last message was not answered. To get a reply, send it again:\n"
                f"{question['content']}"
            )

    def _take_back(self) -> Message | None:
        """Remove the last message of the user with its reply."""
        if len(self._messages) == len(self._system):
            return None
        del self._messages[-1]
        return self._messages.pop()

    def _answer(self, question: Message) -> bool:
        """Write a reply to stdout. If that fails, the conversation is as it was before."""
        self._messages.append(question)
        try:
            with self._llm.timed(bar_after=_bar_after()):
                for text in self._stream():
                    self._reply.append(text)
                    say(text, end="")
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            if not self._reply:
                self._messages.pop()
                note(f"\nStopped before the reply began. {_AS_BEFORE}")
                return False
        except OSError:  # nobody can be answered any more
            raise
        except BudgetError as error:
            self._messages.pop()
            raise BudgetError(f"{error} (--no-protect-system)") from error
        except Exception as error:
            self._messages.pop()
            if self._reply:
                self._reply.clear()
                say("")
            self._tell(error)
            note(_AS_BEFORE)
            if isinstance(error, ContextLengthError):
                note(_MAKE_ROOM if self._would_fit_alone(question) else _TOO_LONG_ALONE)
            return False
        self._taken_back = False
        self._messages.append({"role": "assistant", "content": "".join(self._reply)})
        self._reply.clear()
        say("")
        note(self._llm.status_line())
        if self._llm.n_tokens + 1 >= self._llm.n_ctx():
            note(f"The conversation is full ({self._llm.n_ctx()} tokens). {_MAKE_ROOM}")
        return True

    def _would_fit_alone(self, question: Message) -> bool:
        """Whether the message could be answered in a new conversation."""
        try:
            n = len(prompt_tokens(self._llm, [*self._system, question]))
        except ValueError:  # a chat format that writes no text: nobody can tell
            return len(self._messages) > len(self._system)
        return n < self._llm.n_ctx()

    def _tell(self, error: Exception) -> None:
        """Say what went wrong; of what was not foreseen also what kind of thing it is."""
        foreseen = isinstance(error, (ValueError, RuntimeError, MemoryError, OSError))
        kind = "" if foreseen and str(error) else f"{type(error).__name__}: "
        message = as_options(str(error), type(self._args))
        note(f"{kind}{message}" if not isinstance(error, MemoryError) else "out of memory")
        if self._args.verbose:
            note("".join(traceback.format_exception(error)))

    def _stream(self) -> Iterator[str]:
        self._seed += 1  # /regen shall not say the same again
        chunks = self._llm.create_chat_completion(
            self._messages, stream=True, seed=self._seed, **self._sampling
        )
        for chunk in chunks:
            text = chunk["choices"][0]["delta"].get("content") or ""
            if not self._reply and self._llm.chat_format == transcript.NAME:
                text = text.lstrip()  # it goes on after "Assistant:"
            if text:
                yield text


class _Saved(NamedTuple):
    """What a session of a chat holds besides its tokens."""

    messages: list[Message]
    seed: int

    @classmethod
    def of(cls, path: str, extra: Any) -> _Saved:
        """
        Raises:
            SessionError: these are no messages of a chat.
        """
        match extra:
            case {"messages": [*messages], "seed": int(seed)} if _alternate(messages):
                return cls([{"role": m["role"], "content": m["content"]} for m in messages], seed)
        raise SessionError(
            f"the session '{path}' was not saved by a chat: it contains no messages. Your "
            "conversation is unchanged"
        )


def _alternate(messages: list[Any]) -> bool:
    """Whether these are a system message or none, and then the user's and the assistant's by
    turns."""
    roles = []
    for message in messages:
        match message:
            case {"role": str(role), "content": str(content)} if _is_text(content):
                roles.append(role)
            case _:
                return False
    turns = roles[1:] if roles[:1] == ["system"] else roles
    return turns == [("user", "assistant")[i % 2] for i in range(len(turns))]


def _is_text(content: str) -> bool:
    try:
        content.encode()  # JSON can hold half a character
    except UnicodeEncodeError:
        return False
    return True


def _bar_after() -> float | None:
    return 1.0 if sys.stderr.isatty() else None


def _piped(chat: Chat) -> int:
    """One message per line, or per block. Status 1 if one could not be obeyed or answered."""
    failed = False
    try:
        while True:
            failed |= not chat.hear(_read_message(next_line))
    except EOFError:
        return int(failed)


def _at_terminal(chat: Chat) -> int:
    read = line_reader(_COMMAND_NAMES)
    interrupted = False
    while True:
        try:
            message = _read_message(read)
            while message.endswith("\\"):
                message = message[:-1] + "\n" + read("... ")
            interrupted = False
            chat.hear(message)
        except EOFError:
            return 0
        except KeyboardInterrupt:
            if interrupted:
                return 130
            interrupted = True
            note("(To leave, press Ctrl-C again or Ctrl-D, or type /exit)")


def _read_message(read: Read) -> str:
    """A line, or those between two lines of \"\"\" or up to the end of the input."""
    line = read("> ")
    if line.strip() != '"""':
        return line
    lines: list[str] = []
    try:
        while (line := read("... ")).strip() != '"""':
            lines.append(line)
    except EOFError:
        if not lines:
            raise
    return "\n".join(lines)


COMMAND = Command(
    _main,
    Options,
    "Chat with a model in a KV cache of fixed size, however long the chat becomes.",
    _EPILOG,
)
