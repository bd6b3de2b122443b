"""Which tokens every head keeps, and in which rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kvp_edge.arrays import FloatArray, IntArray, LlamaPositions, RopePositions, TokenIndices
from kvp_edge.cache.selection import several_held
from kvp_edge.text.spans import MARKER, TEXT, TURN, Span

Granularity = Literal["token", "head"]


#: What a session keeps of a table.
_NUMBERS = ("seen", "tail", "shift", "marked")
_ARRAYS = (
    *("packed_indices", "packed_rope_positions", "packed_llama_positions", "wanted"),
    *("scores", "spans"),
)


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
        packed_indices: int32 [*groups, n_packed], the tokens in the packed rows, ascending in each
            head.
        packed_rope_positions: int32 [*groups, n_packed], the RoPE position that the key of each of
            them carries. The same as ``packed_indices`` unless positions were compacted.
        packed_llama_positions: int32 [n_packed], llama.cpp's position of each packed row,
            ascending. At head granularity merely a row's name: attention never looks at it.
        wanted: f32 [*groups, n_packed], how much questions have wanted the rows that they recalled
            (kvp_edge.cache.recall), fading; 0 for all others.
        scores: f32 [n_layer, n_head_kv, n, *Policy.score_shape] of the first n rows, n <= kept.
        spans: int32 [k, 3], (start, end, kind) of tokens that stay or go together (whole_spans);
            ascending, disjoint. Before the tail, only of what is held, and the newest that begins a
            turn.
        marked: how far into the conversation spans have been looked for.
    """

    seen: int
    tail: int
    shift: int
    packed_indices: TokenIndices
    packed_rope_positions: RopePositions
    packed_llama_positions: LlamaPositions
    wanted: FloatArray
    scores: FloatArray
    spans: IntArray
    marked: int

    @classmethod
    def empty(
        cls,
        n_layer: int,
        n_head_kv: int,
        granularity: Granularity,
        score_shape: tuple[int, ...] = (),
    ) -> Table:
        groups = (n_layer, n_head_kv) if granularity == "head" else (1, 1)
        none, unwanted = np.empty((*groups, 0), np.int32), np.empty((*groups, 0), np.float32)
        scores = np.empty((n_layer, n_head_kv, 0, *score_shape), np.float32)
        no_spans = np.empty((0, 3), np.int32)
        return cls(0, 0, 0, none, none, np.empty(0, np.int32), unwanted, scores, no_spans, 0)

    @classmethod
    def of(cls, numbers: dict[str, int], arrays: dict[str, npt.NDArray[Any]]) -> Table:
        """What ``numbers`` and ``arrays`` gave; the arrays are copied.

        Raises:
            ValueError: other names than those.
        """
        if numbers.keys() != set(_NUMBERS) or arrays.keys() != set(_ARRAYS):
            raise ValueError("its table has other numbers or arrays")
        fields: dict[str, Any] = {**numbers}
        fields |= {name: array.copy() for name, array in arrays.items()}
        return cls(**fields)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The table's arrays for a session file; ``numbers`` has the rest."""
        return {name: getattr(self, name) for name in _ARRAYS}

    def numbers(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in _NUMBERS}

    def adds_up(self, empty: Table) -> bool:
        """Whether types, sizes and orders fit the cache that ``empty`` belongs to.

        This allocates nothing larger than ``seen`` tokens, so check ``seen`` first.
        """
        return self._numbers_add_up() and self._arrays_fit(empty) and self._rows_add_up()

    def _numbers_add_up(self) -> bool:
        return (
            0 <= self.tail < self.seen < 2**31
            and 0 <= self.shift <= self.tail
            and 0 <= self.marked <= self.seen
        )

    def _arrays_fit(self, empty: Table) -> bool:
        n_packed = self.packed_indices.shape[-1] if self.packed_indices.ndim else -1
        return (
            all(getattr(self, name).dtype == getattr(empty, name).dtype for name in _ARRAYS)
            and self.packed_indices.shape
            == self.packed_rope_positions.shape
            == self.wanted.shape
            == (*empty.packed_indices.shape[:2], n_packed)
            and self.packed_llama_positions.shape == (n_packed,)
            and self.scores.ndim == empty.scores.ndim
            and self.scores.shape[:2] == empty.scores.shape[:2]
            and self.scores.shape[3:] == empty.scores.shape[3:]
            and self.scores.shape[2] <= self.kept
            and self.spans.ndim == 2
            and self.spans.shape[1] == 3
        )

    def _rows_add_up(self) -> bool:
        starts, ends, kinds = self.spans.T
        return (
            bool((self.packed_indices >= 0).all() and (self.packed_llama_positions >= 0).all())
            and _ascend(self.indices())
            and _ascend(self.llama_positions())
            # a key carries the position of its token, or one further to the front
            and bool(
                (
                    (self.packed_rope_positions >= 0)
                    & (self.packed_rope_positions <= self.packed_indices)
                ).all()
            )
            and bool((starts >= 0).all() and (starts < ends).all() and (ends <= self.marked).all())
            and bool((ends[:-1] <= starts[1:]).all())
            and bool(np.isin(kinds, (TEXT, MARKER, TURN)).all())
        )

    @property
    def n_packed(self) -> int:
        return len(self.packed_llama_positions)

    @property
    def kept(self) -> int:
        """Rows held, by every head."""
        return self.n_packed + self.seen - self.tail

    @property
    def rewind_from(self) -> int:
        """The cache can be taken back to any length >= this. At least one token of the tail stays:
        llama.cpp continues from the newest position."""
        return self.tail + 1 if self.tail else 0

    def indices(self) -> TokenIndices:
        """int32 [*groups, kept]: the token in every row, by its index in the conversation."""
        return self._with_tail(self.packed_indices, 0)

    def rope_positions(self) -> RopePositions:
        """int32 [*groups, kept]: the RoPE position that the key in every row carries."""
        return self._with_tail(self.packed_rope_positions, self.shift)

    def wanted_rows(self) -> FloatArray:
        """f32 [*groups, kept]: ``wanted`` of every row, 0 in the tail."""
        none = np.zeros((*self.wanted.shape[:-1], self.seen - self.tail), np.float32)
        return np.concatenate((self.wanted, none), axis=-1)

    def llama_positions(self) -> LlamaPositions:
        """int32 [kept]: llama.cpp's position of every row."""
        return self._with_tail(self.packed_llama_positions, self.shift)

    def _with_tail(self, packed: IntArray, shift: int) -> IntArray:
        tail = np.arange(self.tail - shift, self.seen - shift, dtype=np.int32)
        tail = np.broadcast_to(tail, (*packed.shape[:-1], len(tail)))
        return np.concatenate((packed, tail), axis=-1)

    def cut(self, length: int) -> Table:
        """The table after forgetting the tokens from ``length`` on, length >= rewind_from."""
        spans = self.spans[self.spans[:, 0] < length]
        divided = spans[:, 1] > length
        spans = np.where(divided[:, None], np.minimum(spans, (length, length, MARKER)), spans)
        return replace(
            self,
            seen=length,
            scores=self.scores[:, :, : self.n_packed + length - self.tail],
            spans=spans.astype(np.int32),
            marked=min(self.marked, length),
        )

    @property
    def newest_turn(self) -> int:
        """The token with which the newest turn begins."""
        turns = self.spans[self.spans[:, 2] == TURN, 0]
        return int(turns[-1]) if len(turns) else 0

    @property
    def unsure_from(self) -> int:
        """Where to search for spans again when more text is known: the start of the newest span,
        or, if that may not be a marker after all, the start of the text that would continue in
        it."""
        at = max(0, self.marked - 1)
        i = int(np.searchsorted(self.spans[:, 0], at, side="right")) - 1
        if i < 0 or self.spans[i, 1] <= at:
            return at
        if i > 0 and self.spans[i, 2] == MARKER and self.spans[i - 1, 1] == self.spans[i, 0]:
            i -= int(self.spans[i - 1, 2] == TEXT)
        return int(self.spans[i, 0])

    def with_spans(self, found: list[Span]) -> Table:
        """With all spans from ``unsure_from`` to ``seen``. Spans with at most one kept token are
        removed, but not the newest start of a turn before the tail and those after it: the
        conversation may be cut back to there."""
        new = np.array(found, np.int32).reshape(-1, 3)
        start = min([self.unsure_from, *new[:1, 0].tolist()])
        spans = np.concatenate((self.spans[self.spans[:, 1] <= start], new))
        stays = several_held(self.indices(), spans) | (spans[:, 1] > self.tail)
        stays[np.flatnonzero((spans[:, 2] == TURN) & (spans[:, 1] <= self.tail))[-1:]] = True
        return replace(self, spans=spans[stays], marked=self.seen)


def scores_of(scores: FloatArray, rows: IntArray) -> FloatArray:
    """The scores of some rows.

    Args:
        scores: f32 [n_layer, n_head_kv, n, *score_shape].
        rows: int [n_layer, n_head_kv, m].

    Returns:
        f32 [n_layer, n_head_kv, m, *score_shape].
    """
    of_rows = rows.reshape(*rows.shape, *(1 for _ in scores.shape[3:]))
    found: FloatArray = np.take_along_axis(scores, of_rows, axis=2)
    return found


def _ascend(numbers: IntArray) -> bool:
    """Whether every number of the last axis is larger than the one before; a difference of two
    could overflow."""
    return bool((numbers[..., 1:] > numbers[..., :-1]).all())
