"""What a cache holds after rows of the KV log came into it: from which rows, at which positions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from kvp_edge.arrays import FloatArray, IntArray, LlamaPositions, TokenIndices
from kvp_edge.binding.cache import RopeShift
from kvp_edge.binding.rope import KeyFrequencies
from kvp_edge.cache.kv_log import KVLog
from kvp_edge.cache.table import Table, scores_of


@dataclass(frozen=True)
class Filling:
    """The arguments of NativeCache.fill, and the table afterwards.

    Attributes:
        source: int32 [n_layer, n_head_kv, n]: a row of now, or ~token of a logged one.
        llama_positions: int32 [n], ascending.
        rope_shift: how keys are turned; None: not at all.
        table: see Table.
    """

    source: IntArray
    llama_positions: LlamaPositions
    rope_shift: RopeShift | None
    table: Table


def rows_of(t: Table) -> IntArray:
    """int32 [*groups, seen]: the row that holds each token; -1 where none does."""
    indices = t.indices()
    rows = np.full((*indices.shape[:-1], t.seen), -1, np.int32)
    at = np.broadcast_to(np.arange(t.kept, dtype=np.int32), indices.shape)
    np.put_along_axis(rows, indices, at, axis=-1)
    return rows


def fill(
    t: Table,
    rows: IntArray,
    chosen: TokenIndices,
    wanted: FloatArray,
    tail: int,
    log: KVLog,
    frequencies: KeyFrequencies | None,
    scored: bool,
) -> Filling:
    """Let every head hold the tokens chosen for it, and all tokens from ``tail`` on.

    Rows that are resident are taken from there; the others must be in the log.

    Args:
        t: the table of now; the cache may hold rows of later tokens, which go.
        rows: ``rows_of(t)``.
        chosen: int32 [*groups, n_packed], tokens before ``tail``, ascending.
        wanted: f32 [*groups, n_packed], see Table.
        tail: at most t.seen.
        frequencies: of RoPE, to compact positions and turn keys to them; None: keys stay as they
            are.
        scored: whether the policy's scores of the rows are kept.
    """
    newest = np.arange(tail, t.seen, dtype=np.int32)
    newest = np.broadcast_to(newest, (*chosen.shape[:-1], len(newest)))
    tokens = np.concatenate((chosen, newest), axis=-1)
    n_packed, n = chosen.shape[-1], tokens.shape[-1]
    rows = np.take_along_axis(rows, tokens, axis=-1)
    resident = rows >= 0
    at = np.maximum(rows, 0)
    ropes = np.take_along_axis(t.rope_positions(), at, axis=-1) if t.kept else at
    ropes = np.where(resident, ropes, log.rope_positions(t.seen)[tokens])

    shift, turn = t.shift, None
    if frequencies is not None:
        llama_positions = np.arange(n, dtype=np.int32)
        shift = tail - n_packed
        heads = (log.layout.n_layer, log.layout.n_head_kv, n)
        distance = np.ascontiguousarray(np.broadcast_to(llama_positions - ropes, heads))
        turn = RopeShift(frequencies.radians, distance, frequencies.neox)
        ropes = np.broadcast_to(llama_positions, ropes.shape)
    elif chosen.shape[:-1] == (1, 1):
        llama_positions = ropes[0, 0]
    else:
        # merely names; the same ones, if possible, let the rows be written where they lie
        held = t.llama_positions()[:n_packed]
        if n_packed == t.n_packed + tail - t.tail and tail >= t.tail:
            first = held
        else:
            first = np.arange(tail - n_packed, tail, dtype=np.int32)
        llama_positions = np.concatenate((first, newest[0, 0] - t.shift))

    source = np.where(resident, rows, ~tokens)
    source = np.broadcast_to(source, (log.layout.n_layer, log.layout.n_head_kv, n))
    return Filling(
        np.ascontiguousarray(source),
        np.ascontiguousarray(llama_positions, np.int32),
        turn,
        replace(
            t,
            tail=tail,
            shift=shift,
            packed_indices=tokens[..., :n_packed],
            packed_rope_positions=np.ascontiguousarray(ropes[..., :n_packed], np.int32),
            packed_llama_positions=llama_positions[:n_packed].astype(np.int32),
            wanted=wanted,
            scores=_scores(t, rows, tokens, n_packed, log) if scored else t.scores[:, :, :0],
            spans=spans_of(t, log),
        ),
    )


def _scores(
    t: Table, rows: IntArray, tokens: TokenIndices, n_packed: int, log: KVLog
) -> FloatArray:
    """Those that the resident rows have, else the logged ones; of rows of the tail as far as they
    go."""
    n_scored = t.scores.shape[2]
    shape = (*t.scores.shape[:2], tokens.shape[-1])
    rows, tokens = np.broadcast_to(rows, shape), np.broadcast_to(tokens, shape)
    scores = scores_of(log.scores(t.seen, t.scores.shape[3:]), tokens)
    if n_scored:
        resident = (rows >= 0) & (rows < n_scored)
        scores[resident] = scores_of(t.scores, np.clip(rows, 0, n_scored - 1))[resident]
    tail = scores[:, :, n_packed:]
    unknown = np.flatnonzero((tail == -np.inf).all(axis=(0, 1, *range(3, tail.ndim))))
    n = n_packed + (int(unknown[0]) if len(unknown) else shape[2] - n_packed)
    return np.ascontiguousarray(scores[:, :, :n], np.float32)


def spans_of(t: Table, log: KVLog) -> IntArray:
    """The spans of all tokens: the log's, then those of newer ones. int32 [k, 3]"""
    logged = log.spans()
    logged = logged[logged[:, 1] <= t.seen]
    end = int(logged[-1, 1]) if len(logged) else 0
    return np.concatenate((logged, t.spans[t.spans[:, 0] >= end])).astype(np.int32)
