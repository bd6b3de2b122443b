"""What the newest tokens' queries find in the whole conversation: in the KV log, and in the cells
of the tokens that are not logged yet."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from kvp_edge.arrays import FloatArray
from kvp_edge.binding.cache import NativeCache
from kvp_edge.binding.log_scores import score_log
from kvp_edge.binding.queries import Queries, QueryLog
from kvp_edge.binding.rope import KeyFrequencies
from kvp_edge.cache import recall
from kvp_edge.cache.kv_log import Block, KVLog
from kvp_edge.cache.recall import RecallSettings
from kvp_edge.cache.table import Table


class Asking:
    """Logs the rows of one cache, and asks them.

    Args:
        cache, log: the rows that the log takes are the cache's.
        query_log: of the same context.
        n_threads: that score the log.
    """

    def __init__(
        self, cache: NativeCache, log: KVLog, query_log: QueryLog | None, n_threads: int
    ) -> None:
        self._cache, self._log, self._query_log = cache, log, query_log
        self._n_threads = n_threads
        self._asked_last: FloatArray | None = None  # [n_layer, n_head, head_size], their mean

    # -- logging -----------------------------------------------------------------------------

    def log_until(self, t: Table, end: int, pinned: int) -> None:
        """Log the tokens before ``end`` that are not logged yet. They are in the tail, so all heads
        hold them.

        Args:
            t: the table, with the scores of all rows.
            pinned: see KVLog.append.
        """
        if self._log.end >= end:
            return
        block = self._unlogged(t, end)
        self._log.append(block, lambda rows: self._read_rows(block, rows), pinned=pinned)

    def _unlogged(self, t: Table, end: int) -> Block:
        """The tokens from the log's end to ``end``, without rows."""
        first = self._log.end
        row, n = t.n_packed + first - t.tail, end - first
        starts = t.spans[:, 0]
        spans = t.spans[(first <= starts) & (starts < end)]
        none = np.empty(0, np.uint8)
        return Block(first, n, first - t.shift, none, t.scores[:, :, row : row + n], spans)

    def _read_rows(self, block: Block, rows: npt.NDArray[np.uint8]) -> None:
        first = block.rope_first  # in the tail it is llama.cpp's position, too
        self._cache.log_rows(self._log.layout, first, first + block.n, block.n, out=rows)

    # -- asking ------------------------------------------------------------------------------

    def queries(self, seen: int, n: int) -> Queries | None:
        """The queries of the newest ``n`` tokens; None if they were not logged. The chat template's
        tokens are among them: the last of these write the reply, and without them fewer answers
        come back (docs/recall.md)."""
        return None if self._query_log is None else self._query_log.of(seen - n, seen)

    def attention(
        self, t: Table, asked: Queries, turned: KeyFrequencies | None
    ) -> tuple[FloatArray, FloatArray]:
        """The largest and the mean attention that the queries pay to each token.

        Args:
            t: the table, with the scores of all rows.
            turned: of RoPE, if keys come back to other positions than they were read at.

        Returns:
            f32 [n_layer, n_head_kv, seen] each; minus infinity, and 0, for tokens that are lost.
        """
        newest = self._unlogged(t, t.seen)
        rows = np.empty(newest.n * int(self._log.layout.bytes_per_token), np.uint8)
        self._read_rows(newest, rows)
        blocks = [*self._log.blocks, replace(newest, rows=rows)]
        found = score_log(
            self._log.layout,
            [block.native() for block in blocks],
            asked,
            self._n_threads,
            turn=None if turned is None else _nearer(t, blocks),
            frequencies=turned,
        )
        if found[0].shape[2] == t.seen:  # nothing is lost
            return found
        at = np.concatenate([np.arange(b.first, b.end) for b in blocks])
        shape = (*found[0].shape[:2], t.seen)
        largest, mean = np.full(shape, -np.inf, np.float32), np.zeros(shape, np.float32)
        largest[:, :, at], mean[:, :, at] = found
        return largest, mean

    def remember(self, asked: Queries) -> None:
        """These asked last, for ``turned_away``."""
        self._asked_last = asked.queries.mean(axis=2)

    def forget(self) -> None:
        """Another conversation begins."""
        self._asked_last = None

    def turned_away(self, least: float) -> bool:
        """Whether the newest token's queries are so unlike those that asked last that they may want
        other rows: if the mean cosine of the two is below ``least`` (LouisKV, arXiv:2510.11292)."""
        if self._query_log is None or self._asked_last is None or not len(self._query_log):
            return False
        newest, last = self._query_log.read(1).queries[:, :, 0], self._asked_last
        product = (newest * last).sum(axis=-1)
        norms = np.linalg.norm(newest, axis=-1) * np.linalg.norm(last, axis=-1)
        return bool((product / np.maximum(norms, 1e-30)).mean() < least)


def _nearer(t: Table, blocks: list[Block]) -> npt.NDArray[np.float64]:
    """By how many positions the keys of each block count as turned, where positions were compacted:
    keys of the log stand where they were read, and those of the cells further ahead. f64
    [n_blocks]"""
    nearer = (t.tail - t.shift) / t.tail
    middle = np.array([(b.first + b.end) / 2 for b in blocks])
    turn: npt.NDArray[np.float64] = (
        middle * nearer - middle + [b.first - b.rope_first for b in blocks]
    )
    turn[-1] = 0.0  # the newest tokens stand where they are
    return turn


def wanted(t: Table, attention: FloatArray, s: RecallSettings, together: bool) -> FloatArray:
    """How much every head, or all together, want the first tokens, now or before.

    Args:
        attention: f32 [n_layer, n_head_kv, n].
        together: all heads hold the same tokens.

    Returns:
        f32 [*groups, n]
    """
    found = recall.share(attention, 1.0 if together else s.shared)
    found = recall.widen(found[:1, :1] if together else found, s.after, s.before)
    held = np.take_along_axis(found, t.packed_indices, axis=-1)
    faded = np.maximum(held, t.wanted * np.float32(s.decay), where=np.isfinite(held), out=held)
    np.put_along_axis(found, t.packed_indices, faded, axis=-1)
    return found
