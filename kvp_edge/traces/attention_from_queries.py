"""Attention computed from logged queries and the cache's keys.

With flash attention llama.cpp never stores the attention, so it cannot be captured
(kvp_edge.traces.tracer), but queries and keys can be read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvp_edge.arrays import FloatArray, HalfArray
from kvp_edge.binding.queries import QueryLog
from kvp_edge.errors import KVCacheError

if TYPE_CHECKING:
    from kvp_edge.binding.blocks import Blocks
    from kvp_edge.binding.cache import NativeCache
    from kvp_edge.binding.observer import Observer


#: Queries whose attention is in memory at once, in one layer: few enough for a processor's cache.
_PIECE = 64
#: Causal mask within a piece: hides later tokens from each query.
_CAUSAL = np.triu(np.full((_PIECE, _PIECE), -np.inf, np.float32), 1)


class AttentionFromQueries:
    """The sums over blocks of queries that kvp_capture_end defines (native/kvp_edge.h), from
    softmax(scale q.k) of the base cache's layers.

    Queries and keys are llama.cpp's own, de-quantised, with the Hadamard rotation undone. The sums
    do not include its rounding inside the operation (queries to the keys' precision).

    Args:
        observer: of the context that computes them.
    """

    def __init__(self, observer: Observer) -> None:
        self._log = QueryLog(observer)

    def start(self, context: Any, cache: NativeCache, batch: int) -> None:
        """Find the model's queries; ``batch``: the most tokens that are decoded at once.

        Raises:
            UnsupportedModelError: they are not found, or attention is more than softmax(scale q.k).
        """
        self._cache, self._batch = cache, batch
        self._log.start(
            context,
            cache,
            batch,
            "Trace it without flash attention, with values that are not quantised (--type-v f16)",
        )

    def begin(self, blocks: Blocks, n_tokens: int) -> None:
        """Start a text of up to ``n_tokens``, from an empty cache."""
        shape = self._cache.shape
        self._log.clear()
        self._blocks, self._done = blocks, 0
        self._sums = np.zeros((shape.n_layer, shape.n_head_kv, blocks.n_sums(n_tokens)), np.float32)

    def make_room(self, n_read: int, n_next: int) -> None:
        """Call before decoding ``n_next`` tokens, after ``n_read`` since ``begin``. The log keeps
        the queries of one batch, so that memory does not grow."""
        if n_read > self._done and n_read + n_next > self._done + self._batch:
            self._add(n_read, self._cache.read(0, n_read, n_read, values=False)[1])

    def end(self, keys: FloatArray) -> HalfArray:
        """The sums of all tokens decoded since ``begin``: float16 [n_layer, n_head_kv, P].

        Args:
            keys: f32 [n_layer, n_head_kv, n, head_size_k], of these tokens.

        Raises:
            KVCacheError: the model computes numbers that are not finite.
        """
        n = keys.shape[2]
        self._add(n, keys)
        sums = self._sums[:, :, : self._blocks.n_sums(n)]
        if not np.isfinite(sums).all():
            raise KVCacheError("the model's attention is not finite: the model file may be damaged")
        return (sums * np.float32(self._blocks.scale)).astype(np.float16)

    def _add(self, n: int, keys: FloatArray) -> None:
        """Add the attention of the queries from ``_done`` to ``n`` to ``keys``, those of all n
        tokens."""
        done, self._done = self._done, n
        self._log.append(done, n - done)
        logged = self._log.read(n - done)
        for start in range(done, n, _PIECE):
            stop = min(start + _PIECE, n)
            piece = logged[start - done : stop - done]
            # the blocks that the piece's queries are of
            parts = [span for span in self._blocks.spans(stop) if span[1] > start]
            for layer, sums in enumerate(self._sums):
                queries = piece.queries[layer] * piece.scale[layer]
                paid = _largest_attention(queries, keys[layer, :, :stop])
                for begin, end, at in parts:
                    mine = paid[:, max(begin, start) - start : end - start, :end]
                    sums[:, at : at + end] += mine.sum(axis=1)


def _largest_attention(queries: FloatArray, keys: FloatArray) -> FloatArray:
    """softmax(q.k) of the newest tokens' queries, the largest of the query heads of each group.

    kvp_edge.policies.query_attention does this for a cache with holes. Here each query sees all
    tokens before it, so only the newest need a mask, which takes half the time.

    Args:
        queries: f32 [n_head, m, head_size], scaled, of the last m <= 64 of the n tokens.
        keys: f32 [n_head_kv, n, head_size].

    Returns:
        f32 [n_head_kv, m, n].
    """
    (n_head_kv, n, size), m = keys.shape, queries.shape[1]
    with np.errstate(invalid="ignore", over="ignore"):  # end() reports it
        p = queries.reshape(n_head_kv, -1, size) @ keys.swapaxes(-1, -2)
        p = p.reshape(n_head_kv, -1, m, n)
        p[..., n - m :] += _CAUSAL[:m, :m]
        p -= p.max(axis=-1, keepdims=True)
        np.exp(p, out=p)
        p /= p.sum(axis=-1, keepdims=True)
    largest: FloatArray = p.max(axis=1)
    return largest
