"""The attention that logged queries pay to the tokens held now, for policies that need it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from kvp_edge.arrays import FloatArray, TokenIndices
from kvp_edge.binding.queries import Queries

_CHUNK = 128  # queries whose attention is held at once


def attention(queries: Queries, keys: FloatArray, indices: TokenIndices) -> Iterator[FloatArray]:
    """Layer by layer softmax(scale q.k) over the held tokens that a query can see, as llama.cpp's.

    A query sees the tokens of its own position and before. Where all it saw is still held these are
    the probabilities that llama.cpp computed; where tokens were dropped since, those that it would
    compute now.

    Args:
        queries: m of them.
        keys: f32 [n_layer, n_head_kv, n, head_size_k], RoPE included.
        indices: int32 [n] or [n_layer, n_head_kv, n], indices in the conversation.

    Yields:
        f32 [n_head_kv, group, m, n] for every layer, ``group`` query heads to a KV head.
    """
    n_layer, n_head_kv, n, size = keys.shape
    held = np.broadcast_to(indices, (n_layer, n_head_kv, n))
    m = len(queries.indices)
    for layer in range(n_layer):
        grouped = queries.queries[layer].reshape(n_head_kv, -1, m, size)
        logits = grouped @ keys[layer, :, None].swapaxes(-1, -2)
        logits *= queries.scale[layer]
        seen = held[layer, :, None, None, :] <= queries.indices[:, None]
        yield softmax(logits, seen)


def largest_attention(
    queries: Queries, keys: FloatArray, indices: TokenIndices
) -> Iterator[tuple[int, TokenIndices, FloatArray]]:
    """What ``attention`` gives, the largest of a KV head's query heads, some queries at a time.

    Yields:
        A layer; the indices of some queries, int32 [m], in every layer the oldest first; f32
        [n_head_kv, m, n].
    """
    for start in range(0, len(queries), _CHUNK):
        some = queries[start : start + _CHUNK]
        for layer, paid in enumerate(attention(some, keys, indices)):
            yield layer, some.indices, paid.max(axis=1)


def total_attention(queries: Queries, keys: FloatArray, indices: TokenIndices) -> FloatArray:
    """f32 [n_layer, n_head_kv, n]: attention summed over queries, averaged over a KV head's query
    heads."""
    total = np.zeros(keys.shape[:3], np.float32)
    for start in range(0, len(queries), _CHUNK):
        for layer, paid in enumerate(attention(queries[start : start + _CHUNK], keys, indices)):
            total[layer] += paid.sum(axis=2).mean(axis=1)
    return total


def softmax(logits: FloatArray, seen: npt.NDArray[np.bool_] | None = None) -> FloatArray:
    """Over the last axis, among what is ``seen``; zeros where nothing is."""
    if seen is not None:
        logits = np.where(seen, logits, np.float32(-np.inf))
    largest = logits.max(axis=-1, keepdims=True)
    e = np.exp(logits - np.where(np.isfinite(largest), largest, 0))
    probability: FloatArray = e / np.maximum(e.sum(axis=-1, keepdims=True), np.float32(1e-30))
    return probability
