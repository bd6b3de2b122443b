"""What traces are made of: texts, chats and questions, cut into pieces that fit."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from kvp_edge.corpora import TRAINING_PROSE, training_prose
from kvp_edge.errors import TraceError
from kvp_edge.llama import Llama
from kvp_edge.text.chat_prompt import Message, last_begin, prompt_tokens
from kvp_edge.traces.questions import TaskMaker, fingerprint

#: A trace has at least this many tokens before its future.
MIN_PROMPT = 8


@dataclass(frozen=True)
class Cut:
    """How pieces are made.

    Attributes:
        length: most tokens of a trace.
        future: "text": what follows in the source; "greedy": what the model writes.
        future_tokens: how many tokens of a text, or of the model's own, are the future.
        seed: draws tasks and chooses pieces.
    """

    length: int
    future: str
    future_tokens: int
    seed: int

    @property
    def greedy(self) -> bool:
        return self.future == "greedy"


@dataclass(frozen=True)
class Piece:
    """One trace to be: ``tokens`` are read, ``n_generate`` more are written by the model; those
    from ``n_prompt`` on are the future. ``source`` says where it is from."""

    tokens: Sequence[int]
    n_prompt: int
    n_generate: int
    source: str


class Source(Protocol):
    """Something that pieces can be cut from."""

    def about(self) -> dict[str, Any]:
        """Its entry in the manifest; equal only if the pieces are equal."""

    def pieces(self, llm: Llama, cut: Cut) -> Iterator[Piece]:
        """All pieces, in a fixed order."""


@dataclass(frozen=True)
class TextFile:
    """A plain text, cut into pieces side by side; the rest is left out."""

    path: str

    def about(self) -> dict[str, Any]:
        return {"kind": "text", **_file(self.path, _read(self.path))}

    def pieces(self, llm: Llama, cut: Cut) -> Iterator[Piece]:
        begin = [t for t in llm.tokenize(b"", add_bos=True) if t == llm.token_bos()]
        tokens = llm.tokenize(_text(self.path).encode(), add_bos=False)
        step = cut.length - len(begin)
        n_prompt = cut.length - cut.future_tokens
        for at in range(0, len(tokens) - step + 1, step):
            piece = [*begin, *tokens[at : at + step]]
            name = f"{os.path.basename(self.path)}, token {at}"
            if cut.greedy:
                yield Piece(piece[:n_prompt], n_prompt, cut.future_tokens, name)
            else:
                yield Piece(piece, n_prompt, 0, name)


@dataclass(frozen=True)
class ChatFile:
    """JSON lines, each a list of {"role", "content"} (or {"messages": list}). A trace ends with the
    last reply that fits, or the first one cut to fit, and the reply is the future. A chat whose
    first message is too long is left out."""

    path: str

    def about(self) -> dict[str, Any]:
        return {"kind": "chats", **_file(self.path, _read(self.path))}

    def pieces(self, llm: Llama, cut: Cut) -> Iterator[Piece]:
        for number, line in enumerate(_text(self.path).splitlines(), 1):
            if not line.strip():
                continue
            name = f"{os.path.basename(self.path)}, line {number}"
            messages = _messages(line, f"'{self.path}', line {number}")
            replies = [i for i, m in enumerate(messages) if i and m["role"] == "assistant"]
            for i in reversed(replies):
                prompt = prompt_tokens(llm, messages[:i])
                if cut.greedy:
                    piece = Piece(prompt, len(prompt), cut.future_tokens, name)
                else:
                    reply = llm.tokenize(messages[i]["content"].encode(), add_bos=False)
                    piece = Piece([*prompt, *reply], len(prompt), 0, name)
                    if i == replies[0] and len(prompt) + cut.future_tokens <= cut.length:
                        piece = replace(piece, tokens=piece.tokens[: cut.length])
                if len(piece.tokens) + piece.n_generate <= cut.length:
                    yield piece
                    break


@dataclass(frozen=True)
class Tasks:
    """Generated questions about facts in long prose. The future is the question with its answer:
    the right one, or the model's own."""

    count: int
    prose: Sequence[str] = ()
    """Text files to hide the facts in; none: the bundled prose."""

    def about(self) -> dict[str, Any]:
        prose = [_file(path, _read(path)) for path in self.prose]
        prose = prose or [_file(TRAINING_PROSE, training_prose().encode())]
        made = fingerprint()
        return {"kind": "tasks", "count": self.count, "prose": prose, "questions": made}

    def pieces(self, llm: Llama, cut: Cut) -> Iterator[Piece]:
        prose = "\n".join(map(_text, self.prose)) if self.prose else training_prose()
        maker = TaskMaker(
            prose, lambda text: len(llm.tokenize(text.encode(), add_bos=False)), cut.seed
        )
        for i in range(self.count):
            # the tokens of template, facts and question are known only afterwards
            for room in range(cut.length - 64, 0, -max(32, cut.length // 32)):
                task = maker.make(room)
                prompt = prompt_tokens(llm, task.messages)
                answer = llm.tokenize(task.answer.encode(), add_bos=False)
                n_generate = cut.future_tokens if cut.greedy else 0
                tokens = prompt if cut.greedy else [*prompt, *answer]
                if len(tokens) + n_generate <= cut.length:
                    yield Piece(
                        tokens, last_begin(llm, prompt, task.question), n_generate, f"task {i}"
                    )
                    break


def plan(sources: Iterable[Source], llm: Llama, cut: Cut, n_traces: int | None) -> list[Piece]:
    """The pieces to trace: all there are, or ``n_traces`` of them drawn by the seed.

    Raises:
        TraceError: there are none, or fewer than asked for.
    """
    found = [
        piece
        for source in sources
        for piece in source.pieces(llm, cut)
        if MIN_PROMPT <= piece.n_prompt < len(piece.tokens) + piece.n_generate
    ]
    if not found:
        raise TraceError(
            f"nothing to trace: no text has {cut.length} tokens, no chat has a reply that "
            "ends within them, and no question fits. Lower --length, or give more sources"
        )
    if n_traces is None:
        return found
    if n_traces > len(found):
        raise TraceError(
            f"the sources make {len(found)} traces of up to {cut.length} tokens, fewer than "
            f"the {n_traces} asked for: lower --traces or --length, or give more sources"
        )
    return random.Random(cut.seed).sample(found, n_traces)


def _messages(line: str, where: str) -> list[Message]:
    try:
        chat = json.loads(line)
    except ValueError as error:
        raise TraceError(f"{where} is not JSON: {error}") from error
    chat = chat.get("messages") if isinstance(chat, dict) else chat
    if not isinstance(chat, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in chat
    ):
        raise TraceError(
            f"{where} is not a chat: it must be a list like "
            '[{"role": "user", "content": "Hello."}]'
        )
    return [{"role": m["role"], "content": m["content"]} for m in chat]


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise TraceError(f"cannot read '{path}': {error.strerror}") from error


def _text(path: str) -> str:
    data = _read(path)
    if b"\0" in data:
        raise TraceError(
            f"'{path}' is not text: it contains NUL bytes. Convert it to plain text first"
        )
    return data.decode("utf-8-sig", errors="replace")


def _file(path: str, data: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(data).hexdigest()
    return {"file": os.path.basename(path), "bytes": len(data), "sha256": digest}
