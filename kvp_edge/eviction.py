"""The eviction manager: WHEN to evict, HOW MUCH, and what is protected. The policy only scores.

It owns the table of which tokens of the conversation are still in the cache. A token is named by
its index in the conversation, for life; ``Table`` says which row of the cache holds it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kvp_edge.errors import BudgetError, KVCacheError
from kvp_edge.limits import CacheLimits
from kvp_edge.native import (
    BoolArray,
    FloatArray,
    IntArray,
    KeyTurn,
    NativeCache,
    NotInPlace,
)
from kvp_edge.policies import Policy
from kvp_edge.rope import KeyFrequencies
from kvp_edge.stats import Eviction
from kvp_edge.turns import choose_rows, choose_tokens
from kvp_edge.whole_spans import MARKER, TEXT, TURN, Span

Granularity = Literal["token", "head"]

#: Names the spans that hold any of the conversation's tokens [start, end): ascending, disjoint.
#: ``start`` is where a span begins, but for spans (words) that can be told from what comes before.
#: What may be the first half of a marker at the very end counts as one, so that it is held, with
#: the newest token, until the other half comes.
SpanFinder = Callable[[int, int], list[Span]]


#: What a session keeps of a table.
_NUMBERS = ("seen", "tail", "shift", "marked", "settled")
_ARRAYS = ("packed", "rotated", "cells", "scores", "spans")


@dataclass(frozen=True)
class Table:
    """Which tokens the cache holds. Row r is the cell with the r-th smallest llama.cpp position.

    The first ``n_packed`` rows are what evictions have left of tokens 0 .. tail - 1; every token
    from ``tail`` on is held, in the rows that follow, by all heads. ``groups`` is [1, 1] at token
    granularity (all heads hold the same tokens) and [n_layer, n_head_kv] at head granularity.
    Arrays are never changed in place, so a table may be kept as a snapshot.

    Attributes:
        seen: tokens of the conversation read so far: 0 .. seen - 1.
        tail: see above; 0 while the cache is complete.
        shift: token t of the tail is at llama.cpp position t - shift.
        packed: int32 [*groups, n_packed], the tokens in the packed rows, ascending in each head.
        rotated: int32 [*groups, n_packed], the RoPE position that the key of each of them carries.
            The same as ``packed`` unless positions were compacted.
        cells: int32 [n_packed], llama.cpp's position of each packed row, ascending. At head
            granularity merely a row's name: attention never looks at it.
        scores: f32 [n_layer, n_head_kv, n] of the first n rows, n <= kept.
        spans: int32 [k, 3], (start, end, kind) of tokens that stay or go together (whole_spans);
            ascending, disjoint. Before the tail, only of what is held, and the newest that begins a
            turn.
        marked: how far into the conversation spans have been looked for.
        settled: held tokens before this one are settled (turns); 0 unless turns are isolated.
    """

    seen: int
    tail: int
    shift: int
    packed: IntArray
    rotated: IntArray
    cells: IntArray
    scores: FloatArray
    spans: IntArray
    marked: int
    settled: int

    @classmethod
    def empty(cls, n_layer: int, n_head_kv: int, granularity: Granularity) -> Table:
        groups = (n_layer, n_head_kv) if granularity == "head" else (1, 1)
        none = np.empty((*groups, 0), np.int32)
        scores = np.empty((n_layer, n_head_kv, 0), np.float32)
        no_spans = np.empty((0, 3), np.int32)
        return cls(0, 0, 0, none, none, np.empty(0, np.int32), scores, no_spans, 0, 0)

    @classmethod
    def of(cls, numbers: dict[str, int], arrays: dict[str, npt.NDArray[Any]]) -> Table:
        """What ``numbers`` and ``arrays`` gave; the arrays are copied.

        Raises:
            ValueError: other names than those.
        """
        if numbers.keys() != set(_NUMBERS) or arrays.keys() != set(_ARRAYS):
            raise ValueError("a table of other numbers or arrays")
        fields: dict[str, Any] = {**numbers}
        fields |= {name: array.copy() for name, array in arrays.items()}
        return cls(**fields)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """For a session file; with ``numbers`` all there is."""
        return {name: getattr(self, name) for name in _ARRAYS}

    def numbers(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in _NUMBERS}

    def adds_up(self, empty: Table) -> bool:
        """Whether types, sizes and orders are those of a table of the same cache as ``empty``.

        Nothing larger than ``seen`` tokens is made on the way, so compare that with what there is
        before.
        """
        return self._numbers_add_up() and self._arrays_fit(empty) and self._rows_add_up()

    def _numbers_add_up(self) -> bool:
        return (
            0 <= self.tail < self.seen < 2**31
            and 0 <= self.shift <= self.tail
            and 0 <= self.marked <= self.seen
            and 0 <= self.settled <= self.tail
        )

    def _arrays_fit(self, empty: Table) -> bool:
        n_packed = self.packed.shape[-1] if self.packed.ndim else -1
        return (
            all(getattr(self, name).dtype == getattr(empty, name).dtype for name in _ARRAYS)
            and self.packed.shape == self.rotated.shape == (*empty.packed.shape[:2], n_packed)
            and self.cells.shape == (n_packed,)
            and self.scores.ndim == 3
            and self.scores.shape[:2] == empty.scores.shape[:2]
            and self.scores.shape[2] <= self.kept
            and self.spans.ndim == 2
            and self.spans.shape[1] == 3
        )

    def _rows_add_up(self) -> bool:
        starts, ends, kinds = self.spans.T
        return (
            bool((self.packed >= 0).all() and (self.cells >= 0).all())
            and _ascend(self.tokens())
            and _ascend(self.present())
            # a key carries the position of its token, or one further to the front
            and bool(((self.rotated >= 0) & (self.rotated <= self.packed)).all())
            and bool((starts >= 0).all() and (starts < ends).all() and (ends <= self.marked).all())
            and bool((ends[:-1] <= starts[1:]).all())
            and bool(np.isin(kinds, (TEXT, MARKER, TURN)).all())
        )

    @property
    def n_packed(self) -> int:
        return len(self.cells)

    @property
    def kept(self) -> int:
        """Rows held, by every head."""
        return self.n_packed + self.seen - self.tail

    @property
    def rewind_from(self) -> int:
        """The cache can be taken back to any length >= this. At least one token of the tail stays:
        llama.cpp continues from the newest position."""
        return self.tail + 1 if self.tail else 0

    def tokens(self) -> IntArray:
        """int32 [*groups, kept]: the token in every row."""
        return self._with_tail(self.packed, 0)

    def rope_positions(self) -> IntArray:
        """int32 [*groups, kept]: the RoPE position that the key in every row carries."""
        return self._with_tail(self.rotated, self.shift)

    def present(self) -> IntArray:
        """int32 [kept]: llama.cpp's position of every row."""
        return self._with_tail(self.cells, self.shift)

    def _with_tail(self, packed: IntArray, shift: int) -> IntArray:
        tail = np.arange(self.tail - shift, self.seen - shift, dtype=np.int32)
        tail = np.broadcast_to(tail, (*packed.shape[:-1], len(tail)))
        return np.concatenate((packed, tail), axis=-1)

    def cut(self, length: int) -> Table:
        """The table after forgetting the tokens from ``length`` on, length >= rewind_from."""
        spans = self.spans[self.spans[:, 0] < length]
        divided = spans[:, 1] > length
        spans = np.where(divided[:, None], np.minimum(spans, (length, length, MARKER)), spans)
        cut = replace(
            self,
            seen=length,
            scores=self.scores[:, :, : self.n_packed + length - self.tail],
            spans=spans.astype(np.int32),
            marked=min(self.marked, length),
        )
        # a turn that goes on is not finished any more
        return replace(cut, settled=min(cut.settled, cut.newest_turn))

    @property
    def newest_turn(self) -> int:
        """The token with which the newest turn begins."""
        turns = self.spans[self.spans[:, 2] == TURN, 0]
        return int(turns[-1]) if len(turns) else 0

    @property
    def unsure_from(self) -> int:
        """Where spans must be looked for again when more is known: the begin of the newest, and
        where that may be no marker after all, of the text that then goes on in it."""
        at = max(0, self.marked - 1)
        i = int(np.searchsorted(self.spans[:, 0], at, side="right")) - 1
        if i < 0 or self.spans[i, 1] <= at:
            return at
        if i > 0 and self.spans[i, 2] == MARKER and self.spans[i - 1, 1] == self.spans[i, 0]:
            i -= int(self.spans[i - 1, 2] == TEXT)
        return int(self.spans[i, 0])

    def with_spans(self, found: list[Span]) -> Table:
        """With all spans from ``unsure_from`` to ``seen``, and without those that mean nothing any
        more because at most one of their tokens is held. Where turns begin is needed as far back as
        the conversation may be cut: from the newest of those before the tail on."""
        new = np.array(found, np.int32).reshape(-1, 3)
        start = min([self.unsure_from, *new[:1, 0].tolist()])
        spans = np.concatenate((self.spans[self.spans[:, 1] <= start], new))
        held = np.zeros(self.seen + 1, np.int32)
        held[self.tokens() + 1] = 1
        before = np.cumsum(held)
        n_held = before[spans[:, 1]] - before[spans[:, 0]]
        stays = (n_held > 1) | (spans[:, 1] > self.tail)
        stays[np.flatnonzero((spans[:, 2] == TURN) & (spans[:, 1] <= self.tail))[-1:]] = True
        return replace(self, spans=spans[stays], marked=self.seen)


def _ascend(rows: IntArray) -> bool:
    """Whether every number of the last axis is larger than the one before; a difference of two
    could overflow."""
    return bool((rows[..., 1:] > rows[..., :-1]).all())


def units(tokens: IntArray, spans: IntArray) -> IntArray:
    """A number for each token, the same for the tokens of one span, ascending like the tokens.

    Args:
        tokens: int32 [..., n].
        spans: int32 [k, 2], [start, end), start < end, ascending, disjoint.
    """
    if len(spans) == 0:
        return tokens
    n = max(int(tokens.max()) + 1, int(spans[-1, 1]))
    step = np.zeros(n + 1, np.int32)
    step[spans[:, 0] + 1] += 1
    step[spans[:, 1]] -= 1
    behind_a_first = np.cumsum(step[:n]) > 0
    first = np.where(behind_a_first, 0, np.arange(n, dtype=np.int32))
    return np.maximum.accumulate(first)[tokens]


def clipped(spans: IntArray, first: int, end: int) -> IntArray:
    """The parts of [start, end) spans between ``first`` and ``end``: int32 [k, 2]."""
    inside = np.clip(spans[:, :2], first, max(first, end))
    return inside[inside[:, 0] < inside[:, 1]]


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

    - the cache holds exactly the rows of the table, and at most ``limits.cells`` of them;
    - the newest token read is held, so that the next batch can follow it;
    - an eviction protects the first ``protected_prefix`` tokens and the newest ``limits.recent``,
      and beyond these at most the rest of a marker at either border, never of a word or sentence;
    - ``trusted`` is False if any of this may have been broken by an error or an interrupt in the
      middle of a change, or by somebody else; then only ``clear`` mends it.

    Args:
        find_spans: tokens that stay or go together.
        granularity: "token": a token goes from every layer and head at once. "head": every (layer,
            KV head) keeps its own tokens, all the same number.
        isolate_turns: do not thin out finished turns again for new ones (kvp_edge.turns).
        compact_at: positions are compacted before they would reach this many, None: never.
        frequencies: of RoPE, needed to compact at head granularity.
    """

    def __init__(
        self,
        limits: CacheLimits,
        policy: Policy,
        cache: NativeCache,
        find_spans: SpanFinder,
        on_evict: Callable[[Eviction], None] | None = None,
        *,
        granularity: Granularity = "token",
        isolate_turns: bool = False,
        compact_at: int | None = None,
        frequencies: KeyFrequencies | None = None,
    ) -> None:
        self.limits = limits
        self.policy = policy
        self.granularity = granularity
        self.on_evict = on_evict
        self.trusted = True
        self.cache = cache
        self._find_spans = find_spans
        self._isolate_turns = isolate_turns
        self._compact_at = compact_at
        self._frequencies = frequencies
        self._shift_pending = False
        self._protected_prefix = limits.sinks
        self.clear()

    def empty_table(self) -> Table:
        shape = self.cache.shape
        return Table.empty(shape.n_layer, shape.n_head_kv, self.granularity)

    # -- what is held ------------------------------------------------------------------------

    @property
    def seen(self) -> int:
        return self._table.seen

    @property
    def kept(self) -> int:
        return self._table.kept

    @property
    def positions(self) -> IntArray:
        """Tokens held, as their indices in the conversation, ascending: int32 [kept], at head
        granularity [n_layer, n_head_kv, kept]."""
        tokens = self._table.tokens()
        return tokens if self.granularity == "head" else tokens[0, 0]

    @property
    def packs_in_place(self) -> bool:
        """Whether the cache is scored and packed where it lies, as long as cells are known and no
        sliding window would lose tokens that it still sees."""
        return self.cache.place.packs(self.granularity)

    @property
    def shift(self) -> int:
        """The next token, number ``seen``, goes to llama.cpp's position ``seen - shift``."""
        return self._table.shift

    def can_rewind(self, length: int) -> bool:
        """Whether the cache can be taken back to the first ``length`` tokens as if it had never
        read further than the last eviction: every token it would have protected is still there."""
        if length == 0:
            return True
        t = self._table
        if not (self.trusted and t.rewind_from <= length <= t.seen):
            return False
        return length == t.seen or self.cache.can_continue_at(length - t.shift)

    def can_return(self, length: int) -> bool:
        """Whether the cache can be taken back to what it was when the conversation had ``length``
        tokens: no eviction came after that, so nothing is lost that was there then."""
        t = self._table
        last_eviction = t.tail + self.limits.recent if t.tail else 0  # see _next_tail
        return self.can_rewind(length) and (length >= last_eviction or length in (0, t.seen))

    def snapshot(self) -> Table:
        """The table, to be stored beside a copy of llama.cpp's state."""
        return self._table

    @property
    def protected_prefix(self) -> int:
        """The first so many tokens are never evicted."""
        return self._protected_prefix

    def restore(self, table: Table) -> None:
        """Take over a table stored by ``snapshot``; llama.cpp's state must be that of its time."""
        self._table = table
        self._shift_pending = False
        self.trusted = True

    def restore_with(self, table: Table, state: npt.NDArray[np.uint8]) -> None:
        """Take over a table and the state of llama.cpp that belongs to it.

        Raises:
            ValueError, KVCacheError: see NativeCache.restore. If ``trusted`` is still True the
                cache is what it was, else it is empty.
        """
        before = self.cache.state() if self.seen else None
        try:
            with self._changing():
                self.cache.restore(state, table.present())
        except (ValueError, KVCacheError) as error:
            if self._put_back(before):
                raise ValueError("llama.cpp does not take its state") from error
            raise
        self.restore(table)

    def _put_back(self, before: npt.NDArray[np.uint8] | None) -> bool:
        """After a state was refused: put the old one back, if llama.cpp has emptied the cache.

        Returns:
            Whether that was necessary, and done.
        """
        present = self._table.present()
        newest = int(present[-1]) if self.seen else -1
        emptied = self.cache.newest_position() != newest
        if emptied and before is not None:
            with contextlib.suppress(ValueError, KVCacheError):
                self.cache.restore(before, present)
        self.trusted = self.cache.newest_position() == newest
        return emptied and self.trusted

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
        self.evictions_as_state = 0  # of these, through llama.cpp's state
        self.eviction_ms = 0.0
        self.restore(self.empty_table())

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
                "a change of the cache was interrupted, or something else has used the model's "
                "context, so it is not known what it holds. Call reset() and read the conversation "
                "again"
            )
        if not self.can_rewind(length):
            raise KVCacheError(
                f"the cache cannot be taken back to {length} tokens: it has seen {self.seen}, and "
                f"can go back to {self._table.rewind_from} at most. Call reset() and read the "
                "conversation again"
            )
        if length < self._table.seen:
            t = self._table.cut(length)
            # what follows will be other tokens, and scores may look at those
            self._table = replace(t, scores=self._final(t.scores, t.n_packed, t.kept))

    def append(self, n: int) -> None:
        """``n`` more tokens were decoded."""
        self.cache.appended(self.seen - self.shift, n)
        self._table = replace(self._table, seen=self._table.seen + n)
        if self._shift_pending:
            self._shift_pending = False
            self.trusted = True

    def protect_prefix(self, n: int) -> None:
        """Never evict the first ``n`` tokens (a system prompt); the sinks stay protected anyway.

        Raises:
            BudgetError: nothing would be left to choose.
        """
        self._protected_prefix = self.protectable(n)

    def protectable(self, n: int) -> int:
        """How many first tokens would be protected if ``n`` were asked for.

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
        return n

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

    def score(self) -> None:
        """Do now what the next eviction does first, and is spared if nothing is read until then:
        a snapshot of this moment can be evicted to several budgets."""
        t = self._table
        self._table = t.with_spans(self._find_spans(t.unsure_from, t.seen))
        self._score()

    def evict(self) -> None:
        """Evict now, down to the budget, if more is held."""
        if self.kept > self.limits.budget:
            self._evict()

    def _evict(self) -> None:
        started, place = time.perf_counter(), self.cache.place
        self.score()
        before = self._table
        tokens = before.tokens()
        first, newest = self._protected_borders()
        protected = (tokens < first) | (tokens >= newest)
        unit = units(tokens, clipped(before.spans, first, newest))
        if self.granularity == "head":
            self._pack(tokens, protected, unit)
        else:
            self._remove(tokens[0, 0], protected[0, 0], unit[0, 0])
        if self._isolate_turns:
            settled = max(before.settled, min(before.newest_turn, newest))
            self._table = replace(self._table, settled=settled)
        ms = 1e3 * (time.perf_counter() - started)
        self.evictions += 1
        self.eviction_ms += ms
        after = self.cache.place
        in_place = self.packs_in_place and after.packed_as_state == place.packed_as_state
        self.evictions_as_state += not in_place
        if self.on_evict is not None:
            dropped = _no_longer_held(tokens, self._table.tokens(), before.seen)
            self.on_evict(
                Eviction(
                    spans(dropped),
                    len(dropped),
                    self.kept,
                    self.seen,
                    self.policy.name,
                    ms,
                    "device" if in_place else "state",
                    after.crossed - place.crossed,
                )
            )

    def _protected_borders(self) -> tuple[int, int]:
        """Tokens before the first of these and from the second on are protected, with the markers
        of which they hold a part. A word or sentence is divided there: as long as those may be,
        they could take the whole budget."""
        t = self._table
        first, newest = self._protected_prefix, t.seen - self.limits.recent
        for start, end, _ in t.spans[t.spans[:, 2] != TEXT].tolist():
            if start < first < end:
                first = end
            if start < newest < end:
                newest = start
        return first, newest

    def _next_tail(self) -> int:
        """The newest ``recent`` tokens are all held, so the conversation can be cut anywhere among
        them; fewer only after a rewind, which may leave less than that of the old tail. So an
        eviction with n tokens read leaves a tail that begins at n - recent or after."""
        return max(self._table.tail, self._table.seen - self.limits.recent)

    def _must_compact(self, n_keep: int) -> bool:
        """Whether positions would get past the limit before the next eviction."""
        t = self._table
        ahead = t.seen - t.shift + self.limits.cells - n_keep
        return self._compact_at is not None and ahead > self._compact_at

    def _remove(self, tokens: IntArray, protected: BoolArray, unit: IntArray) -> None:
        """Token granularity: choose by one score per token, and remove the others' cells."""
        t = self._table
        worth = self.policy.worth(t.scores, t.seen - tokens)
        whole = self.policy.whole_tokens(worth)
        if whole is not None:
            worth = whole[None, None]
        settled = tokens < t.settled
        keep = choose_tokens(worth, unit, protected, self.limits.budget, settled)
        present = t.present()
        kept, cells = tokens[keep], present[keep]
        tail = self._next_tail()
        n_packed, shift = len(kept) - (t.seen - tail), t.shift
        with self._changing():
            self.cache.remove(present, keep)
            if self._must_compact(len(kept)):
                new = np.arange(len(kept), dtype=np.int32)
                self.cache.move(cells, new)
                cells, shift = new, tail - n_packed
                self._shift_pending = True
            self._table = replace(
                t,
                tail=tail,
                shift=shift,
                packed=kept[None, None, :n_packed],
                rotated=cells[None, None, :n_packed],
                cells=cells[:n_packed],
                scores=self._final(t.scores[:, :, keep], n_packed, len(kept)),
            )
        # llama.cpp turns the keys of moved cells when it decodes the next batch, not before
        self.trusted = not self._shift_pending

    def _pack(self, tokens: IntArray, protected: BoolArray, unit: IntArray) -> None:
        """Head granularity: every head ranks its own rows, and all keep the same number."""
        t = self._table
        n_keep = max(self.limits.budget, int(protected.sum(axis=-1).max()))
        if n_keep >= t.kept:
            return  # all protected: make_room finds no free cell and says so
        worth = self.policy.worth(t.scores, t.seen - tokens)
        keep = choose_rows(worth, unit, protected, n_keep, tokens < t.settled)
        tail = self._next_tail()
        n_recent = t.seen - tail
        n_packed, shift = n_keep - n_recent, t.shift
        present = t.present()
        # Whose cells survive: the oldest rows', so that the cells in use are the lowest ones; of a
        # model with a window cache, which loses the same positions, the newest rows'.
        window = self.cache.shape.has_window
        oldest = present[t.kept - n_keep :][:n_packed] if window else present[:n_packed]
        positions = np.concatenate((oldest, present[t.kept - n_recent :]))
        rotated = np.take_along_axis(t.rope_positions(), keep, axis=-1)
        turn = None
        if self._must_compact(n_keep):
            assert self._frequencies is not None
            positions, shift = np.arange(n_keep, dtype=np.int32), tail - n_packed
            f = self._frequencies
            turn = KeyTurn(f.radians, positions - rotated, f.neox)
            rotated = np.broadcast_to(positions, rotated.shape)
        with self._changing():
            self.cache.pack(present, keep, positions, turn)
            self._table = replace(
                t,
                tail=tail,
                shift=shift,
                packed=np.take_along_axis(tokens, keep[..., :n_packed], axis=-1),
                rotated=rotated[..., :n_packed],
                cells=positions[:n_packed],
                scores=self._final(np.take_along_axis(t.scores, keep, axis=-1), n_packed, n_keep),
            )

    def _final(self, scores: FloatArray, n_packed: int, kept: int) -> FloatArray:
        """Of the scores of the first rows of ``kept``, those that will not change: they move with
        their rows. The newest tokens are scored again when their later neighbours are known, and
        with scope "cache" all tokens are."""
        if self.policy.scope == "cache":
            return scores[:, :, :0]
        return scores[:, :, : max(n_packed, kept - self.policy.context)]

    def _score(self) -> None:
        """Bring ``table.scores`` up to date: each token is read once, unless the policy looks at
        the whole cache. Then all scores are of one moment, and end with it."""
        t = self._table
        shape = self.cache.shape
        first = t.scores.shape[2]
        if first == t.kept:
            return
        if self.policy.scope == "cache":
            first = 0
        # Rows that are scored for the first time lie in the tail, where all heads hold the same
        # tokens. Their left neighbours are read with them, as far as the tail goes.
        start = max(min(first, t.n_packed), first - self.policy.context)
        present, tokens = t.present()[start:], t.tokens()[..., start:]
        n = len(present)
        positions = tokens if start < t.n_packed and self.granularity == "head" else tokens[0, 0]
        p0, p1 = int(present[0]), int(present[-1]) + 1
        if self.policy.inputs == "positions":
            nothing = np.empty((shape.n_layer, shape.n_head_kv, n, 0), np.float32)
            new = self.policy.score(nothing, nothing, positions)
        else:
            try:
                new = self.policy.score_in_place(self.cache, p0, p1, positions)
            except NotInPlace:
                want_values = self.policy.inputs == "keys+values"
                _, keys, values = self.cache.read(p0, p1, n, values=want_values)
                no_values = keys[..., :0]
                new = self.policy.score(keys, no_values if values is None else values, positions)
        expected = (shape.n_layer, shape.n_head_kv, n)
        if new.shape != expected:
            raise ValueError(
                f"policy '{self.policy.name}' returned scores of shape {new.shape}, not "
                f"[n_layer, n_head_kv, n_tokens] = {expected}"
            )
        new = new[:, :, first - start :].astype(np.float32)
        scores = np.concatenate((t.scores[:, :, :first], new), axis=2)
        self._table = replace(t, scores=scores)


def _no_longer_held(before: IntArray, after: IntArray, seen: int) -> IntArray:
    """Tokens that some head held before and none does now, ascending."""
    held = np.zeros(seen, np.bool_)
    held[before] = True
    held[after] = False
    return np.flatnonzero(held).astype(np.int32)
