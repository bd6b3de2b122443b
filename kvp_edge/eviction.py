"""The eviction manager: WHEN to evict, HOW MUCH, and what is protected. The policy only scores.

It owns the table of which tokens of the conversation are still in the cache. At token granularity a
token's position is its index in the conversation, for life.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from kvp_edge.errors import BudgetError, KVCacheError
from kvp_edge.limits import CacheLimits
from kvp_edge.native import FloatArray, IntArray, NativeCache, choose_tokens
from kvp_edge.policies import Policy
from kvp_edge.stats import Eviction

#: Names the chat-template markers of which a part lies in the conversation's tokens [start, end):
#: [start, end) pairs, ascending, not overlapping. What may be the first half of a marker at the
#: very end counts as one, so that it is held, with the newest token, until the other half comes.
MarkerFinder = Callable[[int, int], list[tuple[int, int]]]


@dataclass
class Table:
    """Which tokens the cache holds. All arrays run over the tokens held, by ascending position.

    Attributes:
        seen: tokens of the conversation read so far; positions are 0 .. seen - 1.
        positions: int32 [kept].
        unit: int32 [kept]; tokens with the same number stay or go together (chat-template markers
            are one unit; any other token is its own: its position).
        scores: f32 [n_layer, n_head_kv, n] of the first n tokens held, n <= kept.
        marked: how far into the conversation markers have been looked for.
        rewind_from: the cache can be taken back to any length >= this; 0 while it is complete.
    """

    seen: int
    positions: IntArray
    unit: IntArray
    scores: FloatArray
    marked: int
    rewind_from: int

    @classmethod
    def empty(cls, n_layer: int, n_head_kv: int) -> Table:
        none = np.empty(0, np.int32)
        return cls(0, none, none, np.empty((n_layer, n_head_kv, 0), np.float32), 0, 0)


def spans(positions: IntArray) -> tuple[tuple[int, int], ...]:
    """Ascending positions as [start, end) runs of consecutive numbers."""
    if len(positions) == 0:
        return ()
    cut = np.flatnonzero(np.diff(positions) != 1) + 1
    firsts = positions[np.concatenate(([0], cut))]
    lasts = positions[np.concatenate((cut - 1, [len(positions) - 1]))]
    return tuple((int(a), int(b) + 1) for a, b in zip(firsts, lasts, strict=True))


class EvictionManager:
    """Keeps one context's cache inside its limits.

    The owner calls, for every batch: ``rewind`` to the length it continues from, ``make_room``,
    decode, ``append``. Invariants between these calls:

    - the cache holds exactly the tokens of ``positions``, and at most ``limits.cells`` of them;
    - the newest token read is held, so that the next batch can follow it;
    - ``trusted`` is False if any of this may have been broken by an error or an interrupt in the
      middle of a change; then only ``clear`` mends it.
    """

    def __init__(
        self,
        limits: CacheLimits,
        policy: Policy,
        cache: NativeCache,
        find_markers: MarkerFinder,
        on_evict: Callable[[Eviction], None] | None = None,
    ) -> None:
        self.limits = limits
        self.policy = policy
        self.on_evict = on_evict
        self.trusted = True
        self._cache = cache
        self._find_markers = find_markers
        self._protected_prefix = limits.sinks
        self.clear()

    def _empty_table(self) -> Table:
        return Table.empty(self._cache.shape.n_layer, self._cache.shape.n_head_kv)

    # -- what is held ------------------------------------------------------------------------

    @property
    def seen(self) -> int:
        return self._table.seen

    @property
    def kept(self) -> int:
        return len(self._table.positions)

    @property
    def positions(self) -> IntArray:
        """Positions of the tokens held, ascending, int32 [kept]."""
        return self._table.positions.copy()

    def can_rewind(self, length: int) -> bool:
        """Whether the cache can be taken back to the first ``length`` tokens as if it had never
        read further than the last eviction: every token it would have protected is still there."""
        if length == 0:
            return True
        return self.trusted and self._table.rewind_from <= length <= self._table.seen

    def snapshot(self) -> Table:
        """The table, to be stored beside a copy of llama.cpp's state."""
        t = self._table
        return Table(t.seen, t.positions, t.unit, t.scores, t.marked, t.rewind_from)

    def restore(self, table: Table) -> None:
        """Take over a table stored by ``snapshot``; llama.cpp's state must be that of its time."""
        self._table = table
        self.trusted = True

    # -- changes -----------------------------------------------------------------------------

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """An exception inside (Ctrl-C, an error of llama.cpp) leaves ``trusted`` False."""
        self.trusted = False
        yield
        self.trusted = True

    def clear(self) -> None:
        """Forget every token and begin to count anew. The owner removes the cells
        (llama_memory_seq_rm from 0 on)."""
        self.evictions = 0
        self.eviction_ms = 0.0
        self._table = self._empty_table()
        self.trusted = True

    def rewind(self, length: int) -> None:
        """Forget the tokens from ``length`` on. The owner removes their cells.

        Raises:
            KVCacheError: tokens before ``length`` were evicted since, so the cache cannot continue
                from there; the conversation must be read again.
        """
        if length == 0:
            self.clear()
            return
        if not self.trusted:
            raise KVCacheError(
                "a change of the cache was interrupted, so it is not known what it holds. Call "
                "reset() and read the conversation again"
            )
        if not self.can_rewind(length):
            raise KVCacheError(
                f"the cache cannot be taken back to {length} tokens: it has seen {self.seen}, and "
                f"can go back to {self._table.rewind_from} at most. Call reset() and read the "
                "conversation again"
            )
        t = self._table
        if length == t.seen:
            return
        n = int(np.searchsorted(t.positions, length))
        self._table = Table(
            length,
            t.positions[:n],
            t.unit[:n],
            t.scores[:, :, :n],
            min(t.marked, length),
            t.rewind_from,
        )

    def append(self, n: int) -> None:
        """``n`` more tokens were decoded."""
        t = self._table
        new = np.arange(t.seen, t.seen + n, dtype=np.int32)
        self._table = Table(
            t.seen + n,
            np.concatenate((t.positions, new)),
            np.concatenate((t.unit, new)),
            t.scores,
            t.marked,
            t.rewind_from,
        )

    def protect_prefix(self, n: int) -> None:
        """Never evict the first ``n`` tokens (a system prompt); the sinks stay protected anyway.

        Raises:
            BudgetError: nothing would be left to choose.
        """
        n = max(n, self.limits.sinks)
        needed = n + self.limits.recent + 1
        if self.limits.cells < self.limits.n_ctx and needed > self.limits.budget:
            raise BudgetError(
                f"the protected system prompt takes {n} tokens and the recent window "
                f"{self.limits.recent}: with kv_budget={self.limits.budget} nothing would be left "
                f"to choose. Raise kv_budget to {needed} or more, or do not protect the system "
                "prompt"
            )
        self._protected_prefix = n

    def make_room(self, n: int) -> int:
        """Make sure that a batch of up to ``n`` tokens fits, evicting if it does not.

        Returns:
            How many tokens may be decoded now: at least 1, at most ``n`` and ``limits.n_batch``.

        Raises:
            KVCacheError: the protected tokens alone fill the cache.
        """
        n = min(n, self.limits.n_batch)
        if self.limits.cells - self.kept < n:
            self._evict()
        free = self.limits.cells - self.kept
        if free < 1:
            raise KVCacheError(
                f"all {self.limits.cells} cells hold protected tokens: raise kv_budget, or protect "
                "less"
            )
        return min(n, free)

    # -- eviction ----------------------------------------------------------------------------

    def _evict(self) -> None:
        started = time.perf_counter()
        self._mark_units()
        self._score()
        t = self._table
        protected = t.positions < self._protected_prefix
        protected |= t.positions >= t.seen - self.limits.recent
        keep = choose_tokens(t.scores, t.unit, protected, self.limits.budget)
        dropped = t.positions[~keep]
        with self._changing():
            self._cache.remove(t.positions, keep)
            self._table = Table(
                t.seen,
                t.positions[keep],
                t.unit[keep],
                t.scores[:, :, keep],
                t.marked,
                # The newest `recent` tokens are all held, so the conversation can be cut anywhere
                # among them; but at least one must stay, for the next batch to follow.
                max(1, t.seen - self.limits.recent + 1),
            )
        ms = 1e3 * (time.perf_counter() - started)
        self.evictions += 1
        self.eviction_ms += ms
        if self.on_evict is not None:
            self.on_evict(
                Eviction(spans(dropped), len(dropped), self.kept, self.seen, self.policy.name, ms)
            )

    def _mark_units(self) -> None:
        """Give the tokens of each marker that came in since the last time one unit number."""
        t = self._table
        unit = t.unit.copy()
        for start, end in self._find_markers(t.marked, t.seen):
            a, b = np.searchsorted(t.positions, (start, end))
            unit[a:b] = unit[a] if b > a else 0
        t.unit = unit
        t.marked = t.seen

    def _score(self) -> None:
        """Bring ``table.scores`` up to date: each token is read once, unless the policy looks at
        the whole cache."""
        t = self._table
        shape = self._cache.shape
        first = 0 if self.policy.scope == "cache" else t.scores.shape[2]
        positions = t.positions[first:]
        n = len(positions)
        if n == 0:
            return
        p0, p1 = int(positions[0]), int(positions[-1]) + 1
        if self.policy.inputs == "positions":
            nothing = np.empty((shape.n_layer, shape.n_head_kv, n, 0), np.float32)
            new = self.policy.score(nothing, nothing, positions)
        elif self.policy.native_scorer is not None:
            _, new = self._cache.score(self.policy.native_scorer, p0, p1, n)
        else:
            want_values = self.policy.inputs == "keys+values"
            _, keys, values = self._cache.read(p0, p1, n, values=want_values)
            new = self.policy.score(keys, keys[..., :0] if values is None else values, positions)
        expected = (shape.n_layer, shape.n_head_kv, n)
        if new.shape != expected:
            raise ValueError(
                f"policy '{self.policy.name}' returned scores of shape {new.shape}, not "
                f"[n_layer, n_head_kv, n_tokens] = {expected}"
            )
        t.scores = np.concatenate((t.scores[:, :, :first], new.astype(np.float32)), axis=2)
