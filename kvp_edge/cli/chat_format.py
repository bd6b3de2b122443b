"""How messages become the model's text: the options, and what is done without a template."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_cpp.llama_chat_format import (
    Jinja2ChatFormatter,
    LlamaChatCompletionHandlerNotFoundException,
)

from kvp_edge.cli.options import CHAT_TEMPLATE
from kvp_edge.cli.parameters import option
from kvp_edge.llama import Llama
from kvp_edge.text import transcript
from kvp_edge.text.chat_prompt import Message, prompt_tokens

#: Said where a model has conversations to read that are no chat of the user's.
AS_TRANSCRIPTS = (
    "the model has no chat template, so it reads conversations in lines that begin with "
    '"User:" and "Assistant:", and a reply ends with its line'
)


def chat_format_option(without: str) -> Any:
    """
    Args:
        without: what is done with a model file that has no chat template.
    """
    return option(
        None,
        panel=CHAT_TEMPLATE,
        metavar="NAME",
        shown=f"the model file's own template; {without}",
        help="a format that llama-cpp-python knows (chatml, llama-3, gemma, ...), or "
        f"{transcript.NAME}: lines that begin with User: and Assistant:",
    )


@dataclass(frozen=True, kw_only=True)
class ChatFormatOptions:
    chat_format: str | None = chat_format_option("transcript if it has none")
    chat_template: str | None = option(
        None,
        panel=CHAT_TEMPLATE,
        metavar="FILE",
        help="a file with a Jinja template, as on Hugging Face",
    )


def asked_for(args: ChatFormatOptions) -> bool:
    """Whether the options name a chat template."""
    return args.chat_format is not None or args.chat_template is not None


def choose(llm: Llama, args: ChatFormatOptions) -> None:
    """Have chats written as the options say.

    Raises:
        ValueError: there is no such format, or no template in the file.
    """
    if args.chat_format is not None and args.chat_template is not None:
        raise ValueError("give either --chat-format or --chat-template, not both")
    if args.chat_format is not None:
        llm.chat_format = args.chat_format
        try:
            llm.chat_completion_handler()
        except LlamaChatCompletionHandlerNotFoundException as error:
            raise ValueError(f"--chat-format: {error}") from error
    elif args.chat_template is not None:
        llm.chat_handler = _handler(llm, args.chat_template)


def check(llm: Llama, system: list[Message]) -> None:
    """Write the first message of a chat, to see whether the template can.

    Raises:
        ValueError: it cannot; the message tells why, and what to do.
    """
    try:
        prompt_tokens(llm, [*system, {"role": "user", "content": "Hello."}])
    except Exception as error:  # a template is a program, and may fail in any way
        how = " with --system" if system else ""
        raise ValueError(
            f"the chat template of '{os.path.basename(llm.model_path)}' fails on a first "
            f"message{how}: {str(error) or type(error).__name__}. Choose another with "
            "--chat-format or --chat-template"
        ) from error


def _handler(llm: Llama, name: str) -> Any:
    try:
        template = Path(name).read_text(encoding="utf-8")
        formatter = Jinja2ChatFormatter(
            template,
            eos_token=_text(llm, llm.token_eos()),
            bos_token=_text(llm, llm.token_bos()),
            stop_token_ids=[llm.token_eos()],
        )
    except OSError as error:
        raise ValueError(f"cannot read '{name}': {error.strerror}") from error
    except Exception as error:  # UnicodeDecodeError, TemplateSyntaxError
        raise ValueError(f"'{name}' is not a chat template: {error}") from error
    return formatter.to_chat_handler()


def _text(llm: Llama, token: int) -> str:
    return llm.detokenize([token], special=True).decode(errors="replace") if token >= 0 else ""
