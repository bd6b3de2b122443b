"""The tokens of a chat, as the model's chat template writes it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

import llama_cpp

from kvp_edge.text import transcript
from kvp_edge.text.pieces import token_text

Message = dict[str, str]


class ChatModel(Protocol):
    """What is asked of a model here: kvp_edge.Llama."""

    chat_format: Any

    @property
    def vocab(self) -> Any:
        """llama_vocab pointer."""

    @property
    def lacks_chat_template(self) -> bool: ...

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]: ...

    def chat_completion_handler(self) -> Any: ...


class _Prompt(Exception):
    """Carries the tokens out of a chat handler, which would otherwise complete them."""

    def __init__(self, tokens: list[int]) -> None:
        super().__init__()
        self.tokens = tokens


class _PromptTaker:
    """Stands in for a Llama where a chat handler tokenizes its prompt, or has it completed."""

    verbose = False

    def __init__(self, llm: ChatModel) -> None:
        self._llm = llm

    def tokenize(self, text: bytes, **how: bool) -> list[int]:
        raise _Prompt(self._llm.tokenize(text, **how))

    def create_completion(self, prompt: str, **_: Any) -> None:
        add_bos = bool(llama_cpp.llama_vocab_get_add_bos(self._llm.vocab))
        self.tokenize(prompt.encode(), add_bos=add_bos, special=True)


def transcribe_without_template(llm: ChatModel) -> bool:
    """Make a model without a chat template (usually a base model) read conversations as transcripts
    (kvp_edge.text.transcript). Returns whether it is one."""
    if llm.lacks_chat_template:
        llm.chat_format = transcript.NAME
    return bool(llm.chat_format == transcript.NAME)


def ends_reply(llm: ChatModel, token: int) -> bool:
    """Whether this token ends the model's reply without being part of it: a token that ends
    generation or, in a transcript, the end of the line."""
    if llama_cpp.llama_vocab_is_eog(llm.vocab, token):
        return True
    return llm.chat_format == transcript.NAME and b"\n" in token_text(llm.vocab, token)


def prompt_tokens(llm: ChatModel, messages: list[Any], **how: Any) -> list[int]:
    """The tokens that create_chat_completion would read for these messages.

    Args:
        how: what else the template is given: ``tools``.
    """
    try:
        llm.chat_completion_handler()(llama=_PromptTaker(llm), messages=messages, **how)
    except _Prompt as prompt:
        return prompt.tokens
    raise ValueError(f"chat format '{llm.chat_format}' writes no text prompt")


def next_turn(llm: ChatModel, text: str) -> list[int]:
    """The tokens between two replies of the model: the end of its turn, the user's message
    ``text``, and the chat template's opening of a reply."""
    reply = "KVPREPLY"
    conversation = ["KVPONE", reply, text]
    tokens = prompt_tokens(
        llm,
        [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(conversation)],
    )
    ends = list(accumulate(len(token_text(llm.vocab, t)) for t in tokens))
    pieces = b"".join(token_text(llm.vocab, t) for t in tokens)
    return tokens[bisect_left(ends, pieces.find(reply.encode()) + len(reply)) + 1 :]


def last_begin(llm: ChatModel, tokens: Sequence[int], text: str) -> int:
    """The token in which the last occurrence of ``text`` begins; 0 if there is none."""
    pieces = [token_text(llm.vocab, t) for t in tokens]
    at = b"".join(pieces).rfind(text.encode())
    return bisect_right(list(accumulate(map(len, pieces))), at) if at >= 0 else 0
