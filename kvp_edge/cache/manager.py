"""The eviction manager: WHEN to evict, HOW MUCH, and what is protected. The policy only scores.

It owns the table of which tokens of the conversation are still in the cache. A token is named by
its index in the conversation, for life; ``Table`` says which row of the cache holds it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from kvp_edge.arrays import BoolArray, FloatArray, IntArray, TokenIndices
from kvp_edge.binding.cache import NativeCache, RopeShift
from kvp_edge.binding.queries import Queries, QueryLog
from kvp_edge.binding.rope import KeyFrequencies
from kvp_edge.cache import asking, filling, recall
from kvp_edge.cache.asking import Asking
from kvp_edge.cache.kv_log import KVLog, Logged
from kvp_edge.cache.limits import CacheLimits
from kvp_edge.cache.recall import Choice, Recall, RecallSettings
from kvp_edge.cache.selection import clipped, no_longer_held, spans, units
from kvp_edge.cache.stats import Eviction, KVStats
from kvp_edge.cache.table import Granularity, Table, scores_of
from kvp_edge.cache.turns import choose_rows, choose_tokens, settled_before
from kvp_edge.cache.view import LiveView
from kvp_edge.errors import BudgetError, KVCacheError, PolicyError, UnsupportedModelError
from kvp_edge.policies import Policy
from kvp_edge.text.spans import TEXT, Span

#: Names the spans that hold any of the conversation's tokens [start, end): ascending, disjoint.
#: ``start`` is where a span begins, but for spans (words) that can be told from what comes before.
#: What may be the first half of a marker at the very end counts as one, so that it is held, with
#: the newest token, until the other half comes.
SpanFinder = Callable[[int, int], list[Span]]

#: As many tokens ask at least, if so many can be read again, when fewer were read.
_FEW = 8


class EvictionManager:
    """Keeps one context's cache inside its limits.

    The owner calls ``follow`` with the length it continues from, then, for every batch,
    ``make_room``, decode, ``append``. Invariants between these calls:

    - the cache holds exactly the rows of the table, and at most ``limits.cells`` of them;
    - the newest token read is held, so that the next batch can follow it;
    - every token that a head does not hold is in the log, if there is one, or counted as lost: the
      log ends at the table's tail or after it;
    - an eviction protects the first ``protected_prefix`` tokens and the newest ``limits.recent``,
      and beyond these at most the rest of a marker at either border, never of a word or sentence;
    - ``trusted`` is False if any of this may have been broken by an error or an interrupt in the
      middle of a change, or by somebody else; then only ``clear`` mends it.

    Args:
        find_spans: tokens that stay or go together.
        granularity: "token": a token goes from every layer and head at once. "head": every (layer,
            KV head) keeps its own tokens, all the same number.
        isolate_turns: do not thin out finished turns again for new ones (kvp_edge.cache.turns).
        compact_at: positions are compacted before they would reach this many, None: never.
        frequencies: of RoPE, needed to compact at head granularity.
        query_log: for a policy that needs queries, and for recall.
        log: of the rows of all tokens that some head may have dropped, for recall; or None.
        recall_settings: how rows are recalled.
        n_threads: that score the log.

    Attributes:
        limits, policy: see ``replace_limits`` and ``replace_policy``.
        cache: llama.cpp's.
        trusted: see above.
        evictions, evictions_as_state, eviction_ms, recalls, recalled, recall_ms: see KVStats.
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
        query_log: QueryLog | None = None,
        log: KVLog | None = None,
        recall_settings: RecallSettings | None = None,
        n_threads: int = 1,
    ) -> None:
        self.limits = limits
        self.policy = policy
        self.granularity = granularity
        self.on_evict = on_evict
        self.trusted = True
        self.cache = cache
        self.query_log = query_log
        self.log = log
        self.recall_settings = recall_settings or RecallSettings()
        self._asking = None if log is None else Asking(cache, log, query_log, n_threads)
        self._logs_all_queries = query_log is not None and policy.n_queries > 0
        self._log_shift = 0  # the table's when the logged queries were computed
        self._find_spans = find_spans
        self._isolate_turns = isolate_turns
        self._compact_at = compact_at
        self._frequencies = frequencies
        self._shift_pending = False
        self._protected_prefix = limits.sinks
        self.clear()

    def empty_table(self) -> Table:
        shape = self.cache.shape
        return Table.empty(
            shape.n_layer, shape.n_head_kv, self.granularity, self.policy.score_shape
        )

    # -- what is held ------------------------------------------------------------------------

    @property
    def seen(self) -> int:
        return self._table.seen

    @property
    def kept(self) -> int:
        return self._table.kept

    @property
    def indices(self) -> TokenIndices:
        """Tokens held, as their indices in the conversation, ascending: int32 [kept], at head
        granularity [n_layer, n_head_kv, kept]."""
        tokens = self._table.indices()
        return tokens if self.granularity == "head" else tokens[0, 0]

    @property
    def packs_in_place(self) -> bool:
        """Whether the cache is scored and packed where it lies, as long as cells are known and no
        sliding window would lose tokens that it still sees."""
        return self.cache.location.packs(self.granularity)

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
        if self.log is not None:  # nothing is lost
            return self.can_rewind(length) or self._can_bring_back(length)
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

    def restore(self, table: Table, logged: Logged | None = None) -> None:
        """Take over a table stored by ``snapshot``; llama.cpp's state must be that of its time.
        Queries logged of its tokens stay, so they must be of the same conversation; and so do their
        rows in the KV log, unless ``logged`` says what it held then."""
        self._table = table
        if self.query_log is not None:
            self.query_log.rewind(table.seen)
        if self.log is not None:
            self.log.restore(self.log.held if logged is None else logged)
            self.log.cut(table.seen)
            self.log.reach(table.tail)
        self._shift_pending = False
        self.trusted = True

    @contextmanager
    def restoring(self, table: Table, state: npt.NDArray[np.uint8]) -> Iterator[None]:
        """Take over a table and the state of llama.cpp that belongs to it. What else changes with
        them goes into the block: an interrupt in there leaves ``trusted`` False.

        Raises:
            ValueError: on entering: the state is refused, and the cache is what it was.
            KVCacheError: likewise: llama.cpp took neither this state nor the old one back. The
                cache is empty, and not trusted.
        """
        before, newest = self.cache.state() if self.seen else None, self.cache.newest_position()
        trusted = self.trusted
        with self._changing():
            try:
                self.cache.restore(state, table.llama_positions())
            except (ValueError, KVCacheError) as error:
                if self.cache.newest_position() == newest:
                    self.trusted = trusted
                    raise ValueError(str(error)) from error
                if trusted and not self._put_back(before):
                    raise
                self.trusted = trusted
                raise ValueError("llama.cpp rejects its state") from error
            yield
            self.restore(table)

    def _put_back(self, before: npt.NDArray[np.uint8] | None) -> bool:
        """After llama.cpp has emptied the cache: give it the state of before again.

        Returns:
            Whether it took that.
        """
        if before is None:
            return False
        try:
            self.cache.restore(before, self._table.llama_positions())
        except (ValueError, KVCacheError):
            return False
        return True

    def _count_from_zero(self) -> None:
        self.restore_counts(0, 0, 0.0, 0, 0, 0.0)

    def restore_counts(
        self,
        evictions: int,
        evictions_as_state: int,
        eviction_ms: float,
        recalls: int,
        recalled: int,
        recall_ms: float,
    ) -> None:
        """Take over what was counted when the table was stored."""
        self.evictions = evictions
        self.evictions_as_state = evictions_as_state
        self.eviction_ms = eviction_ms
        self.recalls, self.recalled, self.recall_ms = recalls, recalled, recall_ms

    def stats(self, kv_bytes: int, cells: int) -> KVStats:
        """What the cache holds and what evictions have cost.

        Args:
            kv_bytes: of llama.cpp's cache.
            cells: likewise.
        """
        location = self.cache.location
        return KVStats(
            seen=self.seen,
            kept=self.kept,
            dropped=self.seen - self.kept,
            evictions=self.evictions,
            cells=cells,
            kv_bytes=kv_bytes,
            eviction_ms=self.eviction_ms,
            budget=self.limits.budget,
            policy=self.policy.name,
            granularity=self.granularity,
            pack="device" if self.packs_in_place else "state",
            where=location.where,
            transferred_bytes=location.bytes_transferred,
            evictions_as_state=self.evictions_as_state,
            recalls=self.recalls,
            recalled=self.recalled,
            recall_ms=self.recall_ms,
            logged=self.log.n_tokens if self.log is not None else 0,
            lost=self.log.lost if self.log is not None else 0,
            log_bytes=self.log.nbytes if self.log is not None else 0,
        )

    # -- what decides ------------------------------------------------------------------------

    def replace_policy(self, policy: Policy) -> None:
        """Let another policy decide from now on, which fits this model (opening.check_policy). One
        that needs queries finds those that were logged: enough of them if the cache was opened
        with a policy that needs as many. One of scope "history" knows nothing of what is held.

        Raises:
            PolicyError: it needs queries, and none are logged.
        """
        if policy.n_queries and not self._logs_all_queries:
            raise PolicyError(
                f"policy '{policy.name}' needs queries, and none are logged: load the model "
                "with a policy that needs queries, too"
            )
        t, before, self.policy = self._table, self.policy, policy
        if policy.identity() == before.identity():
            return
        if policy.scope != "token":  # it scores all that is held
            self._table = replace(t, scores=self.empty_table().scores)
        elif before.score_shape:  # it scores what is read from now on
            ages = t.seen - t.indices()[..., : t.scores.shape[2]]
            self._table = replace(t, scores=before.worth(t.scores, ages).astype(np.float32))

    def replace_limits(self, limits: CacheLimits) -> None:
        """Let these limits hold from now on, which llama.cpp's cells and batch allow."""
        self.limits = limits

    # -- changes -----------------------------------------------------------------------------

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """An exception inside (Ctrl-C, an error of llama.cpp) leaves ``trusted`` False. So do moved
        cells: llama.cpp turns their keys when it decodes the next batch, not before."""
        self.trusted = False
        yield
        self.trusted = not self._shift_pending

    def clear(self) -> None:
        """Forget every token and start counting again. The owner removes the cells
        (llama_memory_seq_rm from 0 on)."""
        self._count_from_zero()
        if self._asking is not None:
            self._asking.forget()
        if self.log is not None:
            self.log.clear()
        self.restore(self.empty_table())

    def follow(self, length: int, interrupted: bool) -> None:
        """Be at the first ``length`` tokens, where the owner is. The owner removes the cells of
        those after them.

        Args:
            interrupted: an interrupt or an error may have come between ``make_room`` and the end
                of ``append``, and what came of the batch is not known.

        Raises:
            KVCacheError: see ``rewind``.
        """
        self.notice_others(length, interrupted)
        if length > self.seen and self.trusted:
            # An interrupt came between decoding and the end of append(): a token counts when it is
            # decoded.
            log = self.query_log
            if log is not None and log.watching and log.newest < length - 1:
                log.append(self.seen, length - self.seen)
            self._append(length - self.seen)
        self.rewind(length)

    def notice_others(self, length: int, interrupted: bool) -> None:
        """Trust the cache no longer if its newest token is not that of the conversation: then
        something else has used the context (a library that calls llama.cpp by itself). What it did
        is noticed only if it left another number of tokens. The arguments are those of
        ``follow``."""
        if length == 0 or not self.trusted:
            return
        there = self.cache.newest_position() + 1 + self.shift  # tokens, after llama.cpp
        if interrupted:  # some of a batch may be there as well
            self.trusted = there >= length
        else:  # who goes back may remove the cells, too
            self.trusted = there in (self.seen, length) and there >= length

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
                "a change of the cache was interrupted, or something else has used the "
                "model's context, so its contents are unknown. Call reset() and read the "
                "conversation again"
            )
        if not self.can_rewind(length) and self._can_bring_back(length):
            try:
                self._bring_back(length)
            except (MemoryError, UnsupportedModelError) as error:
                raise KVCacheError(
                    f"the cache cannot be taken back to {length} tokens "
                    f"({str(error) or 'out of memory'}). Call reset() and read the conversation "
                    "again"
                ) from error
        if not self.can_rewind(length):
            raise KVCacheError(
                f"the cache cannot be rewound to {length} tokens: of {self.seen} tokens seen, "
                f"it can go back to {self._table.rewind_from}. Call reset() and read the "
                "conversation again"
            )
        if length < self._table.seen:
            t = self._table.cut(length)
            # what follows will be other tokens, and scores may look at those
            self._table = replace(t, scores=self._final(t.scores, t.n_packed, t.kept))
        if self.query_log is not None:
            self.query_log.rewind(length)
        if self.log is not None:
            self.log.cut(length)

    def append(self, n: int) -> None:
        """``n`` more tokens were decoded.

        Raises:
            KVCacheError: llama.cpp did not show their queries to the log.
        """
        if self.query_log is not None:
            self.query_log.append(self.seen, n)
        self._append(n)

    def _append(self, n: int) -> None:
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
                f"{self.limits.recent}, so kv_budget={self.limits.budget} is too small. Raise "
                f"it to {needed} or more, or do not protect the system prompt"
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
        if self.limits.cells - self.kept < n or self._reaches_limit(n):
            self._evict(before_batch=True)
        free = self.limits.cells - self.kept
        if free < 1:
            raise KVCacheError(
                f"all {self.limits.cells} cells contain protected tokens: raise kv_budget or "
                "protect fewer tokens"
            )
        self._forget_turned_queries()
        return min(n, free)

    def _forget_turned_queries(self) -> None:
        if self.query_log is not None and self.shift != self._log_shift:
            self.query_log.clear()  # the keys held were turned, each by another angle
            self._log_shift = self.shift

    # -- the log, and what comes back from it ------------------------------------------------

    @property
    def complete(self) -> bool:
        """Whether nothing was ever dropped."""
        return self._table.tail == 0

    def logged_queries(self, n: int) -> bool:
        """Whether the queries of the newest ``n`` tokens are logged."""
        return self._asking is not None and self._asking.queries(self.seen, n) is not None

    def newest_queries(self, n: int) -> Queries | None:
        """The queries of the newest ``n`` tokens; None: they were not logged."""
        return None if self._asking is None else self._asking.queries(self.seen, n)

    def attention_to(self, tokens: FloatArray, asked: Queries) -> float:
        """How much of the attention of queries goes to some tokens, on average over the queries
        and the heads. The cache does not change.

        Args:
            tokens: f32 [seen], how much each token counts; those later are not counted.
        """
        assert self._asking is not None
        t = self._scored()
        turned = self._frequencies if self._turns(t) else None
        _, mean = self._asking.attention(t, asked, turned)
        return float((mean[:, :, : len(tokens)] * tokens).sum(axis=-1).mean())

    def watch_queries(self, on: bool) -> None:
        """Log the queries of what is read next, for recall. A cache that was opened with a policy
        that needs queries logs all."""
        if self.query_log is not None and not self._logs_all_queries:
            self.query_log.watch(on)

    def n_asking(self, n_new: int) -> int:
        """How many of the newest tokens can ask for older ones, of a prompt of which the last
        ``n_new`` were read just now. 0: nothing was dropped, or they cannot be read again."""
        t = self._table
        if self.log is None or not self.trusted or self.log.n_tokens == 0 or t.tail == 0:
            return 0
        if self._turns(t) and self.cache.shape.has_window:
            return 0  # the window's keys cannot be turned with the others
        n = min(self.recall_settings.n_queries, max(n_new, _FEW), t.seen - t.rewind_from)
        start = t.seen - n
        return n if n > 0 and self.can_rewind(start) else 0

    def choose_by_queries(self, n: int, asked: Queries | None = None) -> Choice | None:
        """Let the queries of the newest ``n`` tokens choose what every head holds of the tokens
        before them. The cache does not change: the owner goes back by ``n`` tokens, calls ``bring``
        and reads them again.

        Args:
            n: at most ``n_asking``.
            asked: other queries than theirs.

        Returns:
            None: too little of their attention would go to tokens that are not resident, or their
            queries were not logged.
        """
        s = self.recall_settings
        assert self._asking is not None
        started = time.perf_counter()
        t = self._scored()
        asked = self._asking.queries(t.seen, n) if asked is None else asked
        if asked is None or not len(asked):
            return None
        now = t.cut(t.seen - n)
        tail = max(now.tail, now.seen - self.limits.recent)
        # first, as the oldest may be given up for it
        self._asking.log_until(t, tail, self._protected_prefix)
        turned = self._frequencies if self._turns(t) else None
        largest, mean = self._asking.attention(t, asked, turned)
        self._asking.remember(asked)
        rows = filling.rows_of(now)
        resident = rows >= 0
        share = float(np.where(resident, 0, mean[:, :, : now.seen]).sum(axis=-1).mean())
        if share < s.threshold:
            return None
        together = self.granularity == "token"
        wanted = asking.wanted(now, largest[:, :, :tail], s, together)
        chosen = self._choose(now, tail, wanted, resident[..., :tail])
        fresh = ~np.take_along_axis(resident, chosen, axis=-1)
        return Choice(
            table=now,
            rows=rows,
            tail=tail,
            tokens=chosen,
            wanted=np.take_along_axis(np.maximum(wanted, 0), chosen, axis=-1),
            n_rows=int(fresh.sum()),
            share=share,
            n_asked=len(asked),
            ms=1e3 * (time.perf_counter() - started),
        )

    def bring(self, choice: Choice) -> float:
        """Let every head hold what ``choose_by_queries`` chose, after the owner went back.

        Returns:
            The milliseconds it took.
        """
        assert self.log is not None
        started = time.perf_counter()
        t = choice.table
        n_scored = t.n_packed + choice.tail - t.tail
        filled = filling.fill(
            replace(t, scores=self._final(t.scores, n_scored, t.kept)),
            choice.rows,
            choice.tokens,
            choice.wanted,
            choice.tail,
            self.log,
            self._frequencies if self._turns(t) else None,
            scored=self.policy.scope != "cache",
        )
        self._fill(self._table, filled)
        return 1e3 * (time.perf_counter() - started)

    def count_recall(self, event: Recall) -> None:
        """Count what came back before a reply."""
        self.recalls += 1
        self.recalled += event.n_tokens
        self.recall_ms += event.ms

    def queries_turned_away(self) -> bool:
        """Whether the newest token's queries may want other rows than those that asked last."""
        return self._asking is not None and self._asking.turned_away(
            self.recall_settings.turned_away
        )

    def _choose(self, t: Table, tail: int, wanted: FloatArray, resident: BoolArray) -> TokenIndices:
        """The tokens before ``tail`` that every head holds next: as many as now."""
        assert self.log is not None
        n_packed = t.n_packed + tail - t.tail
        first, newest = self._protected_borders(t)
        tokens = np.arange(tail, dtype=np.int32)
        available = resident | self.log.holds(tail)
        protected = available & ((tokens < first) | (tokens >= newest))
        if protected.sum(axis=-1).max() > n_packed:  # after going back, others are the newest
            protected &= resident
        worth = self.policy.worth(t.scores, t.seen - t.indices())[..., :n_packed]
        whole = self.policy.whole_tokens(worth) if self.granularity == "token" else None
        if self.granularity == "token":
            worth = worth.mean(axis=(0, 1), keepdims=True) if whole is None else whole[None, None]
        held = t.indices()[..., :n_packed]
        competing = ~np.take_along_axis(protected, held, axis=-1)
        floor = recall.floor_of(worth, held, competing, self.recall_settings.floor, tail)
        spans = filling.spans_of(t, self.log)
        unit = tokens if self.log.lost else units(tokens, clipped(spans, first, newest))
        return recall.choose(wanted, floor, available, protected, unit, n_packed)

    def _can_bring_back(self, length: int) -> bool:
        """Whether the log has what the cache would hold after ``length`` tokens."""
        log, t = self.log, self._table
        if log is None or not self.trusted or not 0 < length <= min(log.end, t.seen):
            return False
        n = self._held_after(length)
        held = log.holds(length)
        start = 0 if n == length else max(0, length - self.limits.recent)
        kept = held[: self._protected_prefix].all() and held[start:].all() and held.sum() >= n
        if self.cache.shape.has_window and (self._turns(t) or self.granularity == "token"):
            return False  # the log has no rows of the window, which must be as it was, and complete
        as_read = self.cache.newest_position() == t.seen - 1 - t.shift
        return bool(kept) and as_read and self.cache.can_continue_at(length - t.shift)

    def _held_after(self, length: int) -> int:
        """How many tokens a cache holds that has gone back to this length: all, if they fit."""
        return length if length <= self.limits.cells else self.limits.budget

    def _bring_back(self, length: int) -> None:
        """Go back to the first ``length`` tokens, all of them logged: the best by what the policy
        said of them then, and the newest."""
        log, t = self.log, self._table
        assert log is not None
        n = self._held_after(length)
        tail = 0 if n == length else max(0, length - self.limits.recent)
        tokens = np.arange(tail, dtype=np.int32)
        groups = t.packed_indices.shape[:-1]
        ages = np.arange(length, 0, -1, dtype=np.int32)
        scores = log.scores(length, self.policy.score_shape)
        worth = self.policy.worth(scores, ages)[..., :tail]
        if self.granularity == "token":
            worth = np.where(np.isfinite(worth), worth, 0).mean(axis=(0, 1), keepdims=True)
        available = np.broadcast_to(log.holds(tail), (*groups, tail))
        floor = np.zeros((*groups, tail), np.bool_)
        protected = tokens < self._protected_prefix
        n_packed = n - (length - tail)
        ranked = np.argsort(np.argsort(worth, axis=-1), axis=-1) / np.float32(max(1, tail))
        chosen = recall.choose(
            ranked.astype(np.float32), floor, available, protected, tokens, n_packed
        )
        gone = replace(self.empty_table(), seen=length, tail=length)
        none = np.zeros(chosen.shape, np.float32)
        filled = filling.fill(
            replace(gone, shift=t.shift),
            filling.rows_of(gone),
            chosen,
            none,
            tail,
            log,
            self._frequencies if self._turns(t) else None,
            scored=self.policy.scope != "cache",
        )
        back = filled.table
        # what follows will be other tokens: scores may look at those, spans may end there
        back = replace(back, scores=self._final(back.scores, back.n_packed, back.kept))
        self._fill(t, replace(filled, table=replace(back, spans=gone.spans, marked=0)))
        if tail == 0:  # as it was before the first eviction
            self._count_from_zero()

    def _turns(self, t: Table) -> bool:
        """Whether rows that come back take other positions than they were read at: once any were
        compacted, those of the log too."""
        assert self.log is not None
        if self._compact_at is None:
            return False
        return t.shift > 0 or any(block.first != block.rope_first for block in self.log.blocks)

    def _fill(self, t: Table, filled: filling.Filling) -> None:
        """Let the cache, which holds the rows of ``t``, hold others.

        Raises:
            MemoryError, UnsupportedModelError: the cache is what it was.
            KVCacheError: it is empty, and not trusted.
        """
        assert self.log is not None
        blocks = [block.native() for block in self.log.blocks]
        present = t.llama_positions()
        with self._changing():
            try:
                self.cache.fill(
                    present,
                    self.log.layout,
                    blocks,
                    filled.source,
                    filled.llama_positions,
                    filled.rope_shift,
                )
            except (MemoryError, UnsupportedModelError):
                self.trusted = True
                raise
            self._table = filled.table
            self._forget_turned_queries()

    # -- eviction ----------------------------------------------------------------------------

    def score(self) -> None:
        """Do now what the next eviction does first, and is spared if nothing is read until then:
        a snapshot of this moment can be evicted to several budgets."""
        self._table = self._scored()

    def evict(self) -> None:
        """Evict now, down to the budget, if more is held."""
        if self.kept > self.limits.budget:
            self._evict(before_batch=False)

    def _evict(self, before_batch: bool) -> None:
        started, location = time.perf_counter(), self.cache.location
        before = self._scored()
        indices = before.indices()
        first, newest = self._protected_borders(before)
        protected = (indices < first) | (indices >= newest)
        unit = units(indices, clipped(before.spans, first, newest))
        if self._asking is not None:
            self._asking.log_until(before, self._next_tail(), self._protected_prefix)
        if self.granularity == "head":
            self._pack(before, indices, protected, unit)
        else:
            self._remove(before, indices[0, 0], protected[0, 0], unit[0, 0], before_batch)
        ms = 1e3 * (time.perf_counter() - started)
        self.evictions += 1
        self.eviction_ms += ms
        after = self.cache.location
        in_place = self.packs_in_place and after.packed_as_state == location.packed_as_state
        self.evictions_as_state += not in_place
        if self.on_evict is not None:
            dropped = no_longer_held(indices, self._table.indices())
            self.on_evict(
                Eviction(
                    dropped=spans(dropped),
                    n_dropped=len(dropped),
                    kept=self.kept,
                    seen=self.seen,
                    policy=self.policy.name,
                    ms=ms,
                    pack="device" if in_place else "state",
                    transferred_bytes=after.bytes_transferred - location.bytes_transferred,
                )
            )

    def _settled(self, t: Table, indices: TokenIndices) -> BoolArray:
        """Which tokens are ranked apart from newer ones, so that turns stay isolated."""
        return indices < (settled_before(t) if self._isolate_turns else 0)

    def _protected_borders(self, t: Table) -> tuple[int, int]:
        """Tokens before the first of these and from the second on are protected, with the markers
        of which they hold a part. A word or sentence is divided there: as long as those may be,
        they could take the whole budget."""
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
        return self._reaches_limit(self.limits.cells - n_keep)

    def _reaches_limit(self, n: int) -> bool:
        """Whether positions would get past the limit with ``n`` more tokens."""
        return self._compact_at is not None and self.seen - self.shift + n > self._compact_at

    def _remove(
        self,
        t: Table,
        indices: TokenIndices,
        protected: BoolArray,
        unit: IntArray,
        before_batch: bool,
    ) -> None:
        """Token granularity: choose by one score per token, and remove the others' cells.

        Args:
            t: the table, with the scores of all rows.
            before_batch: a batch is decoded next. Only then positions are compacted, as llama.cpp
                turns keys with it; until then nothing could be done with the cache.
        """
        worth = self.policy.worth(t.scores, t.seen - indices)
        whole = self.policy.whole_tokens(worth)
        if whole is not None:
            worth = whole[None, None]
        worth = self._with_recalled(t, worth, protected)
        keep = choose_tokens(worth, unit, protected, self.limits.budget, self._settled(t, indices))
        present = t.llama_positions()
        kept, llama_positions = indices[keep], present[keep]
        tail = self._next_tail()
        n_packed, shift = len(kept) - (t.seen - tail), t.shift
        with self._changing():
            self.cache.remove(present, keep)
            if before_batch and self._must_compact(len(kept)):
                new = np.arange(len(kept), dtype=np.int32)
                self.cache.move(llama_positions, new)
                llama_positions, shift = new, tail - n_packed
                self._shift_pending = True
            self._table = replace(
                t,
                tail=tail,
                shift=shift,
                packed_indices=kept[None, None, :n_packed],
                packed_rope_positions=llama_positions[None, None, :n_packed],
                packed_llama_positions=llama_positions[:n_packed],
                wanted=t.wanted_rows()[:, :, keep][:, :, :n_packed],
                scores=self._final(t.scores[:, :, keep], n_packed, len(kept)),
            )

    def _pack(self, t: Table, indices: TokenIndices, protected: BoolArray, unit: IntArray) -> None:
        """Head granularity: every head ranks its own rows, and all keep the same number.

        Args:
            t: the table, with the scores of all rows.
        """
        n_keep = max(self.limits.budget, int(protected.sum(axis=-1).max()))
        if n_keep >= t.kept:
            return  # all protected: make_room finds no free cell and says so
        worth = self.policy.worth(t.scores, t.seen - indices)
        worth = self._with_recalled(t, worth, protected)
        keep = choose_rows(worth, unit, protected, n_keep, self._settled(t, indices))
        tail = self._next_tail()
        n_recent = t.seen - tail
        n_packed, shift = n_keep - n_recent, t.shift
        present = t.llama_positions()
        # Whose cells survive: the oldest rows', so that the cells in use are the lowest ones; of a
        # model with a window cache, which loses the same positions, the newest rows'.
        window = self.cache.shape.has_window
        oldest = present[t.kept - n_keep :][:n_packed] if window else present[:n_packed]
        llama_positions = np.concatenate((oldest, present[t.kept - n_recent :]))
        rope_positions = np.take_along_axis(t.rope_positions(), keep, axis=-1)
        rope_shift = None
        if self._must_compact(n_keep):
            assert self._frequencies is not None
            llama_positions, shift = np.arange(n_keep, dtype=np.int32), tail - n_packed
            f = self._frequencies
            rope_shift = RopeShift(f.radians, llama_positions - rope_positions, f.neox)
            rope_positions = np.broadcast_to(llama_positions, rope_positions.shape)
        with self._changing():
            self.cache.pack(present, keep, llama_positions, rope_shift)
            self._table = replace(
                t,
                tail=tail,
                shift=shift,
                packed_indices=np.take_along_axis(indices, keep[..., :n_packed], axis=-1),
                packed_rope_positions=rope_positions[..., :n_packed],
                packed_llama_positions=llama_positions[:n_packed],
                wanted=np.take_along_axis(t.wanted_rows(), keep, axis=-1)[..., :n_packed],
                scores=self._final(scores_of(t.scores, keep), n_packed, n_keep),
            )

    def _with_recalled(self, t: Table, worth: FloatArray, protected: BoolArray) -> FloatArray:
        """The worth of all rows, of which those that questions have recalled come first, while the
        attention that these paid to them has not faded, in their share of the room."""
        if not t.wanted.any():
            return worth
        s, wanted = self.recall_settings, t.wanted_rows()
        eligible = ~protected & (wanted >= s.faded)
        room = self.limits.budget - int(protected.sum(axis=-1).max())
        recalled = recall.best_of(wanted, eligible, int(s.stay * max(0, room)))
        top = np.where(np.isfinite(worth), worth, -np.inf).max(axis=-1, keepdims=True)
        top = np.where(np.isfinite(top), top, 0)
        return np.where(recalled, top + (np.abs(top) + 1) * (1 + wanted), worth).astype(np.float32)

    def _final(self, scores: FloatArray, n_packed: int, kept: int) -> FloatArray:
        """Of the scores of the first rows of ``kept``, those that count at the next eviction: they
        move with their rows. The newest tokens are scored again when their later neighbours are
        known, and with scope "cache" all tokens are; with "history" what they scored is needed."""
        if self.policy.scope == "cache":
            return scores[:, :, :0]
        if self.policy.scope == "history":
            return scores
        return scores[:, :, : max(n_packed, kept - self.policy.context)]

    def _scored(self) -> Table:
        """The table with all spans and scores: each token is read once, unless the policy looks at
        the whole cache. Then all scores are of one moment, and end with it, or go into those of the
        next (scope "history").

        An eviction that does not come to pass must leave none of it: the newest tokens' scores
        change with the tokens that come after them.
        """
        t = self._table
        t = t.with_spans(self._find_spans(t.unsure_from, t.seen))
        if t.scores.shape[3:] != self.policy.score_shape:  # of the policy when it was stored
            t = replace(t, scores=self.empty_table().scores)
        first = t.scores.shape[2]
        if first == t.kept:
            return t
        if self.policy.scope != "token":
            first = 0
        # Rows that are scored for the first time lie in the tail, where all heads hold the same
        # tokens. Their left neighbours are read with them, as far as the tail goes.
        start = max(min(first, t.n_packed), first - self.policy.context)
        present, tokens = t.llama_positions()[start:], t.indices()[..., start:]
        indices = tokens if start < t.n_packed and self.granularity == "head" else tokens[0, 0]
        previous = t.scores if self.policy.scope == "history" else t.scores[:, :, :0]
        view = LiveView(self.cache, present, indices, previous, self.query_log)
        new, wanted = self.policy.score(view), (*view.shape, *self.policy.score_shape)
        if new.shape != wanted:
            axes = ["n_layer", "n_head_kv", "n_tokens", *map(str, self.policy.score_shape)]
            raise PolicyError(
                f"policy '{self.policy.name}' returned scores of shape {new.shape}, not "
                f"[{', '.join(axes)}] = {wanted}"
            )
        new = new[:, :, first - start :].astype(np.float32)
        return replace(t, scores=np.concatenate((t.scores[:, :, :first], new), axis=2))
