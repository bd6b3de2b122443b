"""The tokens of a chat, as the model's chat template writes it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import llama_cpp

from kvp_edge.llama import Llama
from kvp_edge.text import transcript
from kvp_edge.text.pieces import token_text

Message = dict[str, str]


class _Prompt(Exception):
    """Carries the tokens out of a chat handler, which would otherwise go on to complete them."""

    def __init__(self, tokens: list[int]) -> None:
        super().__init__()
        self.tokens = tokens


class _PromptTaker:
    """Stands in for a Llama where a chat handler tokenizes its prompt, or has it completed."""

    verbose = False

    def __init__(self, llm: Llama) -> None:
        self._llm = llm

    def tokenize(self, text: bytes, **how: bool) -> list[int]:
        raise _Prompt(self._llm.tokenize(text, **how))

    def create_completion(self, prompt: str, **_: Any) -> None:
        add_bos = self._llm._model.add_bos_token()
        self.tokenize(prompt.encode(), add_bos=add_bos, special=True)


def transcribe_without_template(llm: Llama) -> bool:
    """Have a model whose file has no chat template, most often a base model, shown conversations as
    transcripts (kvp_edge.text.transcript). Whether it is one of these."""
    if llm.lacks_chat_template:
        llm.chat_format = transcript.NAME
    return bool(llm.chat_format == transcript.NAME)


def ends_reply(llm: Llama, token: int) -> bool:
    """Whether the model's reply is over with this token, which is no part of it: one that ends
    generation, or, in a transcript, one with the end of the line, where the user's would begin."""
    if llama_cpp.llama_vocab_is_eog(llm._model.vocab, token):
        return True
    return llm.chat_format == transcript.NAME and b"\n" in token_text(llm._model.vocab, token)


def prompt_tokens(llm: Llama, messages: list[Message]) -> list[int]:
    """The tokens that create_chat_completion would read for these messages."""
    try:
        llm.chat_completion_handler()(llama=_PromptTaker(llm), messages=messages)
    except _Prompt as prompt:
        return prompt.tokens
    raise ValueError(f"chat format '{llm.chat_format}' writes no text prompt")


def next_turn(llm: Llama, text: str) -> list[int]:
    """The tokens between a reply of the model's own and its next one: the end of its turn, the
    user's message ``text``, and what the chat template begins a reply with."""
    reply = "KVPREPLY"
    conversation = ["KVPONE", reply, text]
    tokens = prompt_tokens(
        llm,
        [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(conversation)],
    )
    ends = list(accumulate(len(token_text(llm._model.vocab, t)) for t in tokens))
    pieces = b"".join(token_text(llm._model.vocab, t) for t in tokens)
    return tokens[bisect_left(ends, pieces.find(reply.encode()) + len(reply)) + 1 :]


def last_begin(llm: Llama, tokens: Sequence[int], text: str) -> int:
    """The number of the token in which ``text`` begins the last time; 0 if it does not occur."""
    pieces = [token_text(llm._model.vocab, t) for t in tokens]
    at = b"".join(pieces).rfind(text.encode())
    return bisect_right(list(accumulate(map(len, pieces))), at) if at >= 0 else 0
