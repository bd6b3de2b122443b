"""Replies in OpenAI's form, whole or in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import Any

from kvp_edge.server.events import Began, Done, Piece
from kvp_edge.server.served import Written
from kvp_edge.server.tools.calls import merge

#: The bytes of a token.
TextOf = Callable[[int], bytes]


class _Form:
    """One kind of reply. Every chunk and every reply has ``chat_id``; the last chunk and every
    reply has ``kv_cache``.

    Args:
        model: name of the model.
        text_of: for logprobs.
    """

    prefix: str
    whole: str
    part: str

    def __init__(self, model: str, text_of: TextOf) -> None:
        self._text_of = text_of
        self._same = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._chat: dict[str, Any] = {}
        self._choices: dict[int, list[Piece]] = {}
        self._ended: list[dict[str, Any]] = []  # the last chunk of a choice, held back

    def began(self, event: Began) -> list[dict[str, Any]]:
        self._chat = {"chat_id": event.chat_id}
        return []

    def piece(self, event: Piece) -> list[dict[str, Any]]:
        """Chunks. The one that ends a choice comes with what follows it."""
        before, self._ended = self._ended, []
        chunks = self._chunks(event)
        if event.ending is not None:
            self._ended = [chunks.pop()]
        return before + chunks

    def _chunks(self, event: Piece) -> list[dict[str, Any]]:
        """If a choice ends here, the last of them says so."""
        raise NotImplementedError

    def last(self, event: Done, include_usage: bool) -> list[dict[str, Any]]:
        """Chunks that end a stream. Only who asks for usage gets one without choices: others may
        look at the first choice of each."""
        chunks, self._ended = self._ended, []
        if include_usage:
            chunks.append(self._chunk([], usage=_usage(event)))
        if chunks:
            chunks[-1]["kv_cache"] = event.kv_cache
        return chunks

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {**self._same, "object": self.part, "choices": choices, **self._chat, **more}

    def collect(self, event: Piece) -> None:
        """For ``reply``."""
        self._choices.setdefault(event.index, []).append(event)

    def reply(self, event: Done) -> dict[str, Any]:
        """All at once."""
        choices = [
            {
                "index": index,
                **self._said(pieces),
                "logprobs": self._logprobs([w for piece in pieces for w in piece.written]),
                "finish_reason": pieces[-1].ending,
            }
            for index, pieces in sorted(self._choices.items())
        ]
        said = {"choices": choices, "usage": _usage(event), "kv_cache": event.kv_cache}
        return {**self._same, "object": self.whole, **said, **self._chat}

    def _said(self, pieces: list[Piece]) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, written: list[Written]) -> dict[str, Any] | None:
        raise NotImplementedError

    def _text(self, token: int) -> str:
        return self._text_of(token).decode(errors="replace")


class ChatForm(_Form):
    """Of /v1/chat/completions."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, text_of: TextOf) -> None:
        super().__init__(model, text_of)
        self._begun: set[int] = set()

    def _chunks(self, event: Piece) -> list[dict[str, Any]]:
        deltas = list(event.deltas)
        if event.index not in self._begun:
            self._begun.add(event.index)
            deltas.insert(0, {"role": "assistant", "content": ""})
        logprobs = self._logprobs(event.written)
        if logprobs is not None and not deltas:
            deltas = [{}]
        chunks = []
        for i, delta in enumerate(deltas):
            last = i == len(deltas) - 1
            chunks.append(self._choice(event.index, delta, logprobs if last else None, None))
        if event.ending is not None:
            chunks.append(self._choice(event.index, {}, None, event.ending))
        return chunks

    def _choice(
        self, index: int, delta: dict[str, Any], logprobs: Any, ending: str | None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": ending}
        return self._chunk([choice])

    def _said(self, pieces: list[Piece]) -> dict[str, Any]:
        message = merge([delta for piece in pieces for delta in piece.deltas])
        return {"message": message}

    def _logprobs(self, written: list[Written]) -> dict[str, Any] | None:
        told = [w for w in written if w.logprob is not None]
        if not told:
            return None
        return {
            "content": [
                {
                    **self._of_token(w.token, w.logprob),
                    "top_logprobs": [self._of_token(*one) for one in w.top],
                }
                for w in told
            ],
            "refusal": None,
        }

    def _of_token(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._text_of(token)
        return {
            "token": text.decode(errors="replace"),
            "logprob": _finite(logprob),
            "bytes": list(text),
        }


class TextForm(_Form):
    """Of /v1/completions.

    Args:
        echo: a text that comes before the reply.
    """

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, text_of: TextOf, echo: str = "") -> None:
        super().__init__(model, text_of)
        self._echo = echo
        self._lengths: dict[int, int] = {}  # characters of each reply

    def _chunks(self, event: Piece) -> list[dict[str, Any]]:
        text = "".join(delta.get("content") or "" for delta in event.deltas)
        if event.index not in self._lengths:
            text = self._echo + text
        logprobs = self._logprobs(event.written, self._lengths.get(event.index, len(self._echo)))
        self._lengths[event.index] = self._lengths.get(event.index, 0) + len(text)
        if not text and logprobs is None and event.ending is None:
            return []
        choice = {"index": event.index, "text": text, "logprobs": logprobs}
        return [self._chunk([{**choice, "finish_reason": event.ending}])]

    def _said(self, pieces: list[Piece]) -> dict[str, Any]:
        said = (delta.get("content") or "" for piece in pieces for delta in piece.deltas)
        return {"text": self._echo + "".join(said)}

    def _logprobs(self, written: list[Written], at: int | None = None) -> dict[str, Any] | None:
        told = [w for w in written if w.logprob is not None]
        if not told:
            return None
        offsets, at = [], len(self._echo) if at is None else at
        for w in told:
            offsets.append(at)
            at += len(self._text(w.token))
        return {
            "tokens": [self._text(w.token) for w in told],
            "token_logprobs": [_finite(w.logprob) for w in told],
            "top_logprobs": [{self._text(t): _finite(x) for t, x in w.top} for w in told],
            "text_offset": offsets,
        }


def _usage(event: Done) -> dict[str, Any]:
    return {
        "prompt_tokens": event.n_prompt,
        "completion_tokens": event.n_written,
        "total_tokens": event.n_prompt + event.n_written,
        "prompt_tokens_details": {"cached_tokens": event.n_cached},
    }


def _finite(logprob: float | None) -> float | None:
    """JSON has no infinity; OpenAI's lowest is this."""
    return None if logprob is None else max(logprob, -9999.0)
