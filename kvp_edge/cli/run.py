"""``kvp-edge run``: read long texts and answer one question."""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from kvp_edge.cli import chat_format, options
from kvp_edge.cli.chat_format import ChatFormatOptions
from kvp_edge.cli.parameters import option
from kvp_edge.cli.progress import STATUS_LINE_HELP, WatchedLlama
from kvp_edge.cli.shown import note, say
from kvp_edge.cli.subcommands import Command
from kvp_edge.text.chat_prompt import Message

_TEMPLATE_ROOM = 1024  # tokens that a chat template may add to the text

_EPILOG = f"""\
The texts and the question form one user message. While they are read, the cache holds a few hundred
tokens, and the policy decides which. What it drops stays in a log, and what the question asks for
comes back before the reply (--recall).

A model file without a chat template is usually a base model, which continues texts. It reads the
texts and the question as with --raw, so write the question as the beginning of the answer.

The first --sinks tokens, the newest --recent tokens and the text of --system are never dropped.

{STATUS_LINE_HELP}

examples:
  kvp-edge run model.gguf -f book.txt -p "Who found the map?"
  kvp-edge run model.gguf --kv-budget 2048 -f part1.txt -f part2.txt \\
      -p "What changed?"
  git log | kvp-edge run model.gguf -f - -p "What was done last week?" --json
  kvp-edge run model.gguf --raw -f story.txt          (continue the text)"""


@dataclass(frozen=True, kw_only=True)
class _Read:
    file: list[str] = option(
        (),
        "-f",
        "--file",
        metavar="FILE",
        help="a text file to read; may be given several times; - is standard input",
    )
    prompt: str = option(
        "",
        "-p",
        "--prompt",
        parse=options.text,
        metavar="TEXT",
        help="the question, read after the texts",
    )
    raw: bool = option(False, help="no chat template: the model continues the text")
    json: bool = option(False, help="print one JSON object: answer, usage, kv_cache")
    progress: bool = option(False, help="show the progress bar even without a terminal")


@dataclass(frozen=True, kw_only=True)
class Options(options.SamplingOptions, ChatFormatOptions, options.BoundedOptions, _Read):
    n_ctx: int | None = options.n_ctx_option("enough for the texts")
    chat_format: str | None = chat_format.chat_format_option("as with --raw if it has none")
    max_tokens: int = 256
    temperature: float = 0.0


def _main(args: Options) -> int:
    if args.raw and args.system:
        raise ValueError("--raw uses no chat template: leave out --system")
    if args.raw and chat_format.asked_for(args):
        raise ValueError("--raw uses no chat template: leave out --chat-format and --chat-template")
    if args.raw and args.special_in_messages:
        raise ValueError(
            "--raw reads text in which special tokens are always taken: leave out "
            "--special-in-messages"
        )
    if not args.prompt and not args.raw:
        raise ValueError(
            'give a question: -p "question" (or --raw, to let the model continue the text)'
        )
    text = "\n\n".join([read_text(name).strip() for name in args.file] + [args.prompt]).strip()
    if not text:
        raise ValueError("the text to read is empty")
    path = options.model_path(args)
    llm = options.load(path, args.n_ctx or _enough_context(text, path, args), args)
    chat_format.choose(llm, args)
    raw = args.raw or llm.lacks_chat_template
    if not raw:
        chat_format.check(llm, _system(args))
    elif not args.raw:
        _tell_that_it_continues(llm, args)
    llm.on_came_back = None if args.json else note
    options.warn_beyond_training(len(llm.tokenize(text.encode())) + args.max_tokens, path, args)
    show = args.progress or sys.stderr.isatty()
    with closing(llm):
        with llm.timed(bar_after=0.0 if show else None):
            result = _answer(llm, text, args, raw)
        if args.json:
            say(json.dumps(result, ensure_ascii=False, indent=2))
        else:
            note(llm.status_line())
    return 0


def read_text(name: str) -> str:
    """A text file, or standard input for "-"; bytes that are no UTF-8 become replacement marks.

    Raises:
        ValueError: it is no text.
    """
    if name == "-":
        data, what = sys.stdin.buffer.read(), "standard input"
    else:
        what = f"'{name}'"
        try:
            with open(name, "rb") as file:
                data = file.read()
        except OSError as error:
            raise ValueError(f"cannot read {what}: {error.strerror}") from error
    if b"\0" in data:
        raise ValueError(
            f"{what} is not text: it contains NUL bytes. Convert it to plain text first"
        )
    return data.decode("utf-8-sig", errors="replace")


def _enough_context(text: str, path: str, args: Options) -> int:
    """A logical context for the text, known before there is a tokenizer: no token is shorter than
    a byte."""
    most: int = len(text.encode()) + len((args.system or "").encode()) + args.max_tokens
    return max(options.trained_context(path), most + _TEMPLATE_ROOM)


def _tell_that_it_continues(llm: WatchedLlama, args: Options) -> None:
    name = os.path.basename(llm.model_path)
    if args.system:
        raise ValueError(
            f"'{name}' has no chat template, so --system cannot be used: put it into the "
            "text, or choose a template with --chat-format"
        )
    note(
        f"{name} has no chat template, so it continues the text, as with --raw (use --chat-format "
        "NAME for a chat)."
    )


def _system(args: Options) -> list[Message]:
    return [{"role": "system", "content": args.system}] if args.system else []


def _answer(llm: WatchedLlama, text: str, args: Options, raw: bool) -> dict[str, Any]:
    """Answer on stdout as it is written, unless it goes into the JSON object returned."""
    how = {"seed": options.first_seed(args), "stream": not args.json, **options.sampling(args)}
    if raw:
        result = llm.create_completion(text, **how)
    else:
        messages = [*_system(args), {"role": "user", "content": text}]
        result = llm.create_chat_completion(messages, **how)
    if not args.json:
        for chunk in result:
            choice = chunk["choices"][0]
            said = choice["text"] if raw else choice["delta"].get("content")
            say(said or "", end="")
        say("")
        return {}
    choice = result["choices"][0]
    return {
        "answer": choice["text"] if raw else choice["message"]["content"],
        "usage": result["usage"],
        "kv_cache": result["kv_cache"],
    }


COMMAND = Command(
    _main,
    Options,
    "Read texts of any length through a small KV cache, then answer a question.",
    _EPILOG,
)
