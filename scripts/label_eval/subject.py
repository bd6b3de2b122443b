"""The model: it reads a text once, says what later uses attend to, and loses what it is told."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np

from kvp_edge.arrays import FloatArray
from kvp_edge.binding.log_scores import score_log
from kvp_edge.binding.observer import Observer
from kvp_edge.binding.structs import LogBlock
from kvp_edge.measuring import Bookmark, MeasuringLlama
from kvp_edge.policies import Policy
from kvp_edge.traces.labels import LATER, NEAR, QUESTIONED, REPEATED, Labeller, tokens_needed
from label_eval.labels import ASKED, CONTINUED, LATER_SUM, Given

#: Most tokens of the model's own questions (QUESTIONED), and those of its continuation (CONTINUED).
WRITTEN, CONTINUATION = 160, 64


@dataclass(frozen=True)
class Forced:
    """What the model thinks of a reply that it is made to read.

    Attributes:
        loss: nats per token.
        same: each of the tokens is the likeliest after those before: it would write this reply.
    """

    loss: float
    same: bool


class Subject(MeasuringLlama):
    """A model that reads texts into a full cache, and drops tokens of each head when it is told to.

    Args:
        model_path: GGUF file.
        n_ctx: most tokens at a time, see ``room``.
        parts: the attention that is asked for, of labels.PARTS.
        policies: those that it will be given.
        threads: of llama.cpp, and to compute attention.

    Raises:
        UnsupportedModelError: its queries cannot be found, or attention is more than
            softmax(scale q.k).
    """

    def __init__(
        self,
        model_path: str,
        n_ctx: int,
        parts: Collection[str],
        policies: Iterable[Policy],
        threads: int,
        **engine: Any,
    ) -> None:
        # the one that needs the most preparation at load; all need queries, as labels do
        first = max(
            (Given(np.empty((0, 0, 0), np.float32)), *policies),
            key=lambda policy: (
                policy.needs_frequencies and policy.n_queries > 0,
                policy.n_queries,
            ),
        )
        super().__init__(
            model_path,
            n_ctx,
            n_ctx,
            n_ctx,
            policy=first,
            granularity="head",
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
            **engine,
        )
        written = [name for name in (QUESTIONED, REPEATED) if name in parts]
        self._labeller = Labeller(self._shown, written, WRITTEN) if written else None
        if self._labeller is not None:
            self._labeller.start(self, self._manager.cache)
        for policy in policies:
            self.check(policy)

    def adjust_context(self, params: Any) -> None:
        super().adjust_context(params)
        self._shown = Observer(params)  # beside the cache's own

    @staticmethod
    def room(length: int, parts: Collection[str]) -> int:
        """The most tokens that a text of ``length`` takes, with what makes these parts, but for
        what is asked."""
        needed = tokens_needed(length, [*parts], WRITTEN)
        return max(needed, length + CONTINUATION) if CONTINUED in parts else needed

    def begin(self, context: Sequence[int]) -> Bookmark:
        """Read a text from an empty cache."""
        self.forget()
        if self._labeller is not None:
            self._labeller.begin()
        self.read(context)
        return self.bookmark()

    # -- labels ------------------------------------------------------------------------------

    def attention(
        self, at: Bookmark, parts: Collection[str], uses: Sequence[Sequence[int]]
    ) -> dict[str, FloatArray]:
        """The attention that later uses pay to the n tokens read until ``at``, which ``begin`` has
        returned: f32 [n_layer, n_head_kv, n] of each part. What comes after it is forgotten.

        Args:
            uses: of ASKED, each read after the text by itself.
        """
        found: dict[str, FloatArray] = {}
        if {LATER, LATER_SUM} & set(parts):
            self.go_back(at)
            found[LATER], found[LATER_SUM] = self._later()
        if CONTINUED in parts:
            self.go_back(at)
            self._continue(CONTINUATION)
            found[CONTINUED] = self._paid_since(at)
        if ASKED in parts:
            found[ASKED] = np.maximum.reduce(list(self._asked(at, uses)))
        if self._labeller is not None and {QUESTIONED, REPEATED} & set(parts):
            self.go_back(at)
            for name, label in self._labeller.labels().items():
                found[name] = label.astype(np.float32)
        self.go_back(at)
        return {part: found[part] for part in parts}

    def value_norms(self, at: Bookmark) -> FloatArray:
        """The norm of each token's value: f32 [n_layer, n_head_kv, n]."""
        self.go_back(at)
        n = int(self.n_tokens)
        _, _, values = self._manager.cache.read(0, n, n)
        assert values is not None
        norms: FloatArray = np.linalg.norm(values, axis=-1)
        return norms

    def _later(self) -> tuple[FloatArray, FloatArray]:
        """The largest attention and the sum (of the means over a KV head's query heads) that the
        text's own tokens pay. They ask in pieces of NEAR tokens, and only of tokens that are NEAR
        tokens or more before the piece: what is nearer is held as recent anyhow."""
        cache, log, n = self._manager.cache, self._manager.query_log, int(self.n_tokens)
        assert log is not None
        asked, layout = log.read(n), cache.log_layout()
        shape = (cache.shape.n_layer, cache.shape.n_head_kv, n)
        largest, total = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        blocks: list[LogBlock] = []
        for begin in range(0, n, NEAR):
            end = min(begin + NEAR, n)
            rows = cache.log_rows(layout, begin, end, end - begin)
            blocks.append(LogBlock(rows, begin, end - begin, begin))
            far = begin - NEAR + 1
            if far > 0:
                paid, mean = score_log(layout, blocks, asked[begin:end], self.n_threads)
                np.maximum(largest[:, :, :far], paid[:, :, :far], out=largest[:, :, :far])
                total[:, :, :far] += mean[:, :, :far] * (end - begin)
        return largest, total

    def _continue(self, count: int) -> None:
        """Write the likeliest tokens; those that end a reply are never written."""
        ends = [llama_cpp.llama_vocab_is_eog(self.vocab, t) for t in range(self.n_vocab())]
        for _ in range(count):
            self.read([int(np.where(ends, -np.inf, self.newest_logits()).argmax())])

    def _asked(self, at: Bookmark, uses: Sequence[Sequence[int]]) -> Iterator[FloatArray]:
        for use in uses:
            self.go_back(at)
            self.read(use)
            yield self._paid_since(at)

    def _paid_since(self, at: Bookmark) -> FloatArray:
        """The largest attention that the tokens read since ``at`` pay to those before."""
        cache, log = self._manager.cache, self._manager.query_log
        assert log is not None
        n, end = len(at.tokens), int(self.n_tokens)
        layout = cache.log_layout()
        block = LogBlock(cache.log_rows(layout, 0, end, end), 0, end, 0)
        asked = log.read(end - n)
        paid: FloatArray = score_log(layout, [block], asked, self.n_threads, mean=False)[0]
        return paid[:, :, :n]

    # -- what is lost ------------------------------------------------------------------------

    def ranked(self, at: Bookmark, policy: Policy) -> Bookmark:
        """The bookmark ``at``, with all tokens scored by the policy."""
        self.go_back(at)
        self.policy = policy
        return self.scored(at)

    def cut(self, ranked: Bookmark, budget: int) -> None:
        """Be at the bookmark, with the ``budget`` best tokens of each head."""
        self.go_back(ranked)
        self.limit(budget)
        self.evict()

    def forced(self, question: Sequence[int], reply: Sequence[int]) -> Forced:
        """Read a question, then a reply of at least one token, whatever the model would write."""
        rows: list[FloatArray] = []
        with self.logits_to(lambda _, found: rows.append(found.copy())):
            self.read([*question, *reply])
        logits = np.concatenate(rows)[-len(reply) - 1 : -1].astype(np.float64)
        chosen = logits[np.arange(len(reply)), np.asarray(reply)]
        loss = np.logaddexp.reduce(logits, axis=1) - chosen
        return Forced(float(loss.mean()), bool((logits.argmax(axis=1) == reply).all()))
