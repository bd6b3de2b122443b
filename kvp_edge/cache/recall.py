"""Recall: the newest tokens' own queries decide which older rows are in the cells.

A score that does not know what will be asked cannot keep what will be asked for. The question's
queries do know. They are asked of every token of the conversation, resident or in the KV log, in
one softmax; heads take the rows that they attend to most, mostly together, and what follows these:
an answer stands behind the words that match. After RepairKV (OpenReview LsrmZrp7tW).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvp_edge.arrays import BoolArray, FloatArray, IntArray, Rows, TokenIndices
from kvp_edge.binding import ranking
from kvp_edge.cache.selection import spans
from kvp_edge.cache.table import Table


@dataclass(frozen=True)
class RecallSettings:
    """How rows are chosen. The defaults are measured (docs/recall.md).

    Attributes:
        n_queries: of how many of the newest tokens the queries ask, at most.
        after, before: a token is as good as the best of the ``after`` tokens before it and the
            ``before`` tokens after it.
        floor: share of a head's unprotected rows that the policy's own ranking keeps.
        passes: how often the question is asked at most; with the answer of the first the deeper
            layers ask better.
        threshold: nothing is moved while tokens that are not resident would get less than this
            share of the attention.
        shared: how much all heads together decide; 0: each head for itself, 1: all hold the same.
            A few heads find a fact, and the others need its rows when it is told.
        decay: by this what a row is wanted fades from one recall to the next.
        faded: a recalled row that is wanted less than this is treated like all others.
        stay: share of a head's unprotected rows that recalled ones keep when others are evicted.
        turned_away: while a reply is written, queries ask again when their mean cosine with those
            that asked last is below this.
    """

    n_queries: int = 64
    after: int = 12
    before: int = 2
    floor: float = 0.0
    passes: int = 2
    threshold: float = 0.02
    shared: float = 0.8
    decay: float = 0.7
    faded: float = 0.1
    stay: float = 0.5
    turned_away: float = 0.5


@dataclass(frozen=True)
class Choice:
    """Rows that queries have chosen, to be brought into the cells (EvictionManager.bring).

    Attributes:
        table: of the cache before the tokens that asked, with the scores of all rows.
        rows: int32 [*groups, seen], which of them hold each token: filling.rows_of.
        tail: all heads hold every token from here on.
        tokens: int32 [*groups, n], ascending: of the tokens before, those that every head holds.
        wanted: f32 [*groups, n], how much, see Table.
        n_rows: of these, those that do not lie in cells.
        share, n_asked, ms: see Recall.
    """

    table: Table
    rows: IntArray
    tail: int
    tokens: TokenIndices
    wanted: FloatArray
    n_rows: int
    share: float
    n_asked: int
    ms: float


#: A passage came back if this share of the heads took it, or as many as took any.
_MANY = 0.25


@dataclass(frozen=True)
class Recall:
    """What came back before a reply, as handed to ``on_recall``.

    Each head holds its own tokens, so hardly any token of a large model is dropped by all of them
    at once.

    Attributes:
        heads: f32 [seen], the share of the heads that took each token back.
        n_rows: rows that came back, in all heads.
        share: of the attention of the tokens that asked, how much would have gone to tokens that
            their heads did not hold.
        n_asked: tokens whose queries asked.
        passes: how often they did.
        ms: milliseconds it took, without reading the question again.
    """

    heads: FloatArray
    n_rows: int
    share: float
    n_asked: int
    passes: int
    ms: float

    @classmethod
    def of(cls, before: TokenIndices, now: TokenIndices, seen: int, found: list[Choice]) -> Recall:
        """What came of choices, one after the other.

        Args:
            before, now: what was and what is held: EvictionManager.indices.
            seen: tokens of the conversation.
            found: at least one.
        """
        came = _held(now, seen) & ~_held(before, seen)
        return cls(
            heads=came.mean(axis=0, dtype=np.float32),
            n_rows=int(came.sum()),
            share=found[0].share,
            n_asked=found[0].n_asked,
            passes=len(found),
            ms=sum(one.ms for one in found),
        )

    @property
    def n_tokens(self) -> int:
        """Tokens that came back, on average over the heads."""
        return round(float(self.heads.sum()))

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """[start, end) spans of tokens, by index in the conversation, that many heads took back."""
        if not self.heads.any():
            return ()
        many = np.flatnonzero(self.heads >= min(_MANY, self.heads.max()))
        return spans(many.astype(np.int32))

    def largest_spans(self, n: int) -> list[tuple[int, int]]:
        """Of ``spans`` those that heads took most of back, at most ``n``, in their order."""
        most = sorted(self.spans, key=lambda one: -float(self.heads[slice(*one)].sum()))
        return sorted(most[:n])


def _held(indices: TokenIndices, seen: int) -> BoolArray:
    """bool [heads, seen]; at token granularity all heads are one."""
    rows = indices.reshape(-1, indices.shape[-1])
    held = np.zeros((len(rows), seen), np.bool_)
    np.put_along_axis(held, rows, True, axis=1)
    return held


def share(attention: FloatArray, shared: float) -> FloatArray:
    """How much each head wants every token: 1 is as much as any.

    Args:
        attention: f32 [n_layer, n_head_kv, n]; minus infinity for what is lost.
        shared: see RecallSettings.

    Returns:
        f32 [n_layer, n_head_kv, n]
    """
    own = _of_most(attention)
    if not shared:
        return own
    # heads that look at one place count more than those that look everywhere
    together = _of_most(attention.mean(axis=(0, 1), keepdims=True))
    if shared == 1:
        return np.broadcast_to(together, own.shape)
    own *= np.float32(1 - shared)
    own += np.float32(shared) * together
    return own


def _of_most(attention: FloatArray) -> FloatArray:
    """As a share of the largest number of its row."""
    most = np.maximum(attention.max(axis=-1, keepdims=True), np.float32(1e-9))
    of_most: FloatArray = attention / most
    return of_most


def widen(attention: FloatArray, after: int, before: int) -> FloatArray:
    """Let a token count as much as the best of those that it follows closely, or precedes.

    Every step away costs a thousandth, so that of equal ones the nearest is first.

    Args:
        attention: f32 [..., n], of consecutive tokens.

    Returns:
        f32 [..., n]
    """
    widened = np.array(attention)
    n = attention.shape[-1]
    reaches = [(steps, 0.999**steps) for steps in range(1, min(after, n - 1) + 1)]
    reaches += [(-steps, 0.999 ** (steps + after)) for steps in range(1, min(before, n - 1) + 1)]
    less = np.empty(n, np.float32)
    for head in np.ndindex(attention.shape[:-1]):  # one by one, as that fits into the caches
        one, wide = attention[head], widened[head]
        for steps, factor in reaches:
            np.multiply(one, np.float32(factor), out=less)
            to, of = (wide[steps:], less[:-steps]) if steps > 0 else (wide[:steps], less[-steps:])
            np.maximum(to, of, out=to)
    return widened


def best_of(worth: FloatArray, unprotected: BoolArray, n: int) -> BoolArray:
    """The ``n`` best unprotected rows of every head, fewer if there are not so many: bool [..., n
    rows]."""
    chosen = np.zeros(worth.shape, np.bool_)
    n = min(n, worth.shape[-1])
    if n > 0:
        ranked = np.where(unprotected & np.isfinite(worth), worth, -np.inf)
        best = np.argpartition(ranked, -n, axis=-1)[..., -n:]
        np.put_along_axis(chosen, best, True, axis=-1)
        chosen &= np.isfinite(ranked)
    return chosen


def floor_of(
    worth: FloatArray, held: TokenIndices, competing: BoolArray, share: float, n: int
) -> BoolArray:
    """Of the first ``n`` tokens, those that heads keep by the policy's ranking: bool [*groups, n].

    Args:
        worth: f32 [*groups, rows], the policy's, of the rows held.
        held: int32 [*groups, rows], their tokens.
        competing: bool [*groups, rows], those not protected.
        share: how much of the competing rows, see RecallSettings.floor.
    """
    floor = np.zeros((*held.shape[:-1], n), np.bool_)
    best = best_of(worth, competing, int(share * int(competing.sum(axis=-1).min())))
    np.put_along_axis(floor, held, best, axis=-1)
    return floor


def choose(
    wanted: FloatArray,
    floor: BoolArray,
    available: BoolArray,
    protected: BoolArray,
    unit: IntArray,
    n_keep: int,
) -> TokenIndices:
    """The tokens that every head holds next.

    Args:
        wanted: f32 [*groups, n], widened attention to the first n tokens.
        floor: bool [*groups, n], what stays by the policy's ranking.
        available: bool [*groups, n], resident or logged.
        protected: bool [n] or [*groups, n], of those available; at most n_keep in each group.
        unit: int32 [n], see ranking.choose_rows.

    Returns:
        int32 [*groups, n_keep], ascending.
    """
    scores = np.where(floor, np.float32(2.0), wanted)  # attention is at most 1
    # a row that is resident and lost from the log was not asked: the last of those that may stay
    np.maximum(scores, np.float32(-1.0), out=scores)
    np.copyto(scores, np.float32(-np.inf), where=~available)
    shape = scores.shape
    unit = np.broadcast_to(unit, shape)
    rows: Rows = ranking.choose_rows(scores, unit, np.broadcast_to(protected, shape), n_keep)
    return rows
