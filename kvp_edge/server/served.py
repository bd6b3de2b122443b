"""A Llama that serves requests: each can be stopped, and is measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import llama_cpp
import numpy as np

from kvp_edge.arrays import FloatArray
from kvp_edge.binding.queries import Queries
from kvp_edge.cache.recall import Recall
from kvp_edge.cache.stats import Eviction
from kvp_edge.llama import Llama
from kvp_edge.server.errors import Cancelled


@dataclass(frozen=True)
class Written:
    """A token of a reply.

    Attributes:
        token: its id.
        logprob: its natural logarithm of probability, before sampling changes any; None: not asked.
        top: the likeliest tokens and theirs, best first.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Turn:
    """One request, while it is served.

    Attributes:
        cancelled: asked after every batch and every token written.
        top_logprobs: how many of the likeliest tokens are told; None: no logprobs.
        written: tokens of the reply.
        read: tokens that were read for the prompt.
        first: index of the first token that was read; None: none was.
        n_evictions, eviction_ms: what evictions it took.
        n_recalled, recall_ms: tokens that came back, and what that took.
        recalled: what came back last, before the reply.
        asked: the queries that asked for it, of the newest tokens of then; None: not kept.
        started, began: seconds (time.perf_counter) when the turn, and the reply, began.
    """

    cancelled: Callable[[], bool] = lambda: False
    top_logprobs: int | None = None
    written: list[Written] = field(default_factory=list)
    read: int = 0
    first: int | None = None
    n_evictions: int = 0
    eviction_ms: float = 0.0
    n_recalled: int = 0
    recall_ms: float = 0.0
    recalled: Recall | None = None
    asked: Queries | None = None
    started: float = field(default_factory=time.perf_counter)
    began: float | None = None


class ServedLlama(Llama):
    """A bounded Llama that tells the turn that is served what it does.

    Attributes:
        turn: what is served just now, or was served last.
        keeps_queries: turns keep the queries of their recalls.
    """

    keeps_queries = False

    def __init__(self, model_path: str, **options: Any) -> None:
        self.turn = Turn()
        super().__init__(
            model_path, on_recall=self._see_recall, on_evict=self._see_eviction, **options
        )
        self.on_batch = self._see_batch

    def _see_eviction(self, event: Eviction) -> None:
        self.turn.n_evictions += 1
        self.turn.eviction_ms += event.ms

    def _see_recall(self, event: Recall) -> None:
        self.turn.recalled = event
        self.turn.n_recalled += event.n_tokens
        self.turn.recall_ms += event.ms
        if self.keeps_queries and self.kv is not None:
            self.turn.asked = self.kv.newest_queries(event.n_asked)

    def _see_batch(self, first: int, end: int) -> None:
        turn = self.turn
        if turn.began is None:
            turn.read += end - first
            turn.first = first if turn.first is None else min(turn.first, first)
        if turn.cancelled():
            raise Cancelled

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        turn = self.turn
        if turn.began is None:
            turn.began = time.perf_counter()
        if turn.cancelled():
            raise Cancelled
        token = super().sample(*args, **kwargs)
        if llama_cpp.llama_vocab_is_eog(self.vocab, token):
            return token  # it ends the reply, and is no part of it
        if turn.top_logprobs is None:
            turn.written.append(Written(token))
        else:
            turn.written.append(_with_logprobs(token, self.newest_logits(), turn.top_logprobs))
        return token

    def prompt_of(self, text: str) -> list[int]:
        """The tokens that create_completion reads for a text."""
        begins = llama_cpp.llama_vocab_get_add_bos(self.vocab)
        ends = llama_cpp.llama_vocab_get_add_eos(self.vocab)
        tokens = self.tokenize(text.encode(), add_bos=False, special=True)
        return [self.token_bos()] * begins + tokens + [self.token_eos()] * ends

    def piece(self, tokens: Sequence[int]) -> bytes:
        """The text of tokens, those of the template's markers too."""
        text: bytes = self.detokenize(list(tokens), special=True)
        return text


def _with_logprobs(token: int, logits: FloatArray, n: int) -> Written:
    """
    Args:
        logits: f32 [n_vocab].
    """
    x = logits.astype(np.float64)
    highest = float(np.nanmax(x))
    if not math.isfinite(highest):
        return Written(token, -math.inf)
    x -= highest + math.log(float(np.nansum(np.exp(x - highest))))
    best = np.argpartition(-x, min(n, len(x) - 1))[:n]
    best = best[np.argsort(-x[best], kind="stable")]
    return Written(token, float(x[token]), tuple((int(i), float(x[i])) for i in best))
