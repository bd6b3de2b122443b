"""The KV log: the keys and values of a conversation, kept outside the cells.

A token is logged once, before the first head drops it, and stays where it is: later evictions copy
nothing. So what is evicted is not resident any more, but not lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvp_edge.arrays import BoolArray, FloatArray, IntArray, RopePositions
from kvp_edge.binding.structs import LogBlock, LogLayout

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Block:
    """Rows of consecutive tokens, and what is known of them. Its arrays are never changed.

    Attributes:
        first: index of its first token in the conversation.
        n: tokens.
        rope_first: RoPE position that the first token's keys carry; the others' follow one by one.
        rows: uint8 [n * bytes_per_token], as kvp_log_block says; it may be a memory map.
        scores: f32 [n_layer, n_head_kv, n, *Policy.score_shape], the policy's when they were
            logged.
        spans: int32 [k, 3], those that stay or go together and begin in it (Table.spans); the last
            one may end after it.
    """

    first: int
    n: int
    rope_first: int
    rows: Bytes
    scores: FloatArray
    spans: IntArray

    @property
    def end(self) -> int:
        """Index of the token after its last."""
        return self.first + self.n

    def native(self) -> LogBlock:
        """The block as the library takes it."""
        return LogBlock(rows=self.rows, first=self.first, n=self.n, rope_first=self.rope_first)

    def cut(self, n: int, rows: Bytes) -> Block:
        """Its first ``n`` tokens, with these rows."""
        spans = self.spans[self.spans[:, 1] <= self.first + n]
        return replace(self, n=n, rows=rows, scores=self.scores[:, :, :n].copy(), spans=spans)

    def within(self, length: int) -> Block:
        """Without a span that begins in it and ends after the first ``length`` tokens. Other tokens
        may follow those."""
        if not len(self.spans) or self.spans[-1, 1] <= length:
            return self
        # it is another block: whoever has stored it knows it by its scores
        return replace(self, spans=self.spans[:-1], scores=self.scores.copy())

    def copy_rows(self, n: int, layout: LogLayout, into: Bytes) -> None:
        """Write the rows of its first ``n`` tokens into a block's memory."""
        old, new = self.rows.reshape(layout.n_layer, -1), into.reshape(layout.n_layer, -1)
        k_old, k_new = self.n * layout.k_row, n * layout.k_row
        new[:, :k_new] = old[:, :k_new]
        new[:, k_new:] = old[:, k_old : k_old + n * layout.v_row]


class LogStore(Protocol):
    """Where a log's rows are kept: memory, or a file."""

    def add(self, block: Block, fill: Callable[[Bytes], None]) -> Block:
        """Keep a block, whose rows ``fill`` writes into the memory that it is given.

        Args:
            block: without rows.

        Returns:
            The block with its rows.

        Raises:
            OSError, MemoryError: there is no room; nothing has changed.
        """
        ...

    def keep(self, blocks: Sequence[Block]) -> Sequence[Block]:
        """Of all blocks only these are needed from now on.

        Returns:
            The same; their rows may lie elsewhere.
        """
        ...


class InMemory:
    """A LogStore in the process's memory."""

    def __init__(self, layout: LogLayout) -> None:
        self._bytes_per_token = int(layout.bytes_per_token)

    def add(self, block: Block, fill: Callable[[Bytes], None]) -> Block:
        rows = np.empty(block.n * self._bytes_per_token, np.uint8)
        fill(rows)
        return replace(block, rows=rows)

    def keep(self, blocks: Sequence[Block]) -> Sequence[Block]:
        return blocks  # memory is freed with its last block


@dataclass(frozen=True)
class Logged:
    """What a log holds at one moment.

    Attributes:
        blocks: ascending. Tokens may be missing between them: the oldest ones, past the limit, and
            those that found no room.
        end: tokens before this one were logged, though some may be lost.
        lost: how many are.
    """

    blocks: tuple[Block, ...] = ()
    end: int = 0
    lost: int = 0


class KVLog:
    """The rows of one conversation's first tokens.

    Args:
        layout: of its rows.
        store: where they are kept.
        limit: bytes that they may take; None: as many as there are. Past it the oldest blocks are
            given up.

    Attributes:
        held: what it holds; a snapshot, to be given to ``restore``.
        failure: why the newest tokens that were lost found no room; None: all found room.
    """

    def __init__(self, layout: LogLayout, store: LogStore, limit: int | None = None) -> None:
        self.layout = layout
        self.limit = limit
        self._store = store
        self.clear()

    @property
    def blocks(self) -> tuple[Block, ...]:
        return self.held.blocks

    @property
    def end(self) -> int:
        return self.held.end

    @property
    def lost(self) -> int:
        return self.held.lost

    @property
    def n_tokens(self) -> int:
        """Tokens that it holds."""
        return self.end - self.lost

    @property
    def nbytes(self) -> int:
        """Bytes of their rows."""
        return self.n_tokens * int(self.layout.bytes_per_token)

    def holds(self, end: int) -> BoolArray:
        """bool [end]: which of the first tokens it holds."""
        held = np.zeros(end, np.bool_)
        for block in self.blocks:
            held[block.first : block.end] = True
        return held

    def scores(self, end: int, score_shape: tuple[int, ...] = ()) -> FloatArray:
        """f32 [n_layer, n_head_kv, end, *score_shape]: the policy's of the first tokens; minus
        infinity where they are not known, and where another policy gave them another shape."""
        shape = self.layout.n_layer, self.layout.n_head_kv, end, *score_shape
        found = np.full(shape, -np.inf, np.float32)
        for block in self.blocks:
            if block.scores.shape[3:] != score_shape:
                continue
            part = block.scores[:, :, : max(0, end - block.first)]
            found[:, :, block.first : block.first + part.shape[2]] = part
        return found

    def spans(self) -> IntArray:
        """int32 [k, 3]: those of all tokens held, ascending."""
        return np.concatenate([np.empty((0, 3), np.int32), *(b.spans for b in self.blocks)])

    def rope_positions(self, end: int) -> RopePositions:
        """int32 [end]: of the first tokens' keys; -1 where they are not held."""
        found = np.full(end, -1, np.int32)
        for block in self.blocks:
            n = min(block.n, end - block.first)
            if n > 0:
                found[block.first : block.first + n] = block.rope_first + np.arange(n)
        return found

    # -- changes: ``held`` is replaced in one step, so an interrupt leaves the old or the new -----

    def clear(self) -> None:
        """Forget everything."""
        self.held = Logged()
        self.failure: str | None = None
        self._store.keep(())

    def append(self, block: Block, fill: Callable[[Bytes], None], pinned: int = 0) -> None:
        """Log the tokens of a block that begins at ``end``. If they find no room they are lost, and
        ``failure`` says why.

        Args:
            block: without rows. Its scores and spans are copied: they are views of all tokens'.
            fill: writes its rows.
            pinned: blocks with any of the first so many tokens are not given up for the limit.

        Raises:
            ValueError: it begins elsewhere.
        """
        now = self.held
        if block.first != now.end:
            raise ValueError(f"a block from token {block.first} on, and the log ends at {now.end}")
        block = replace(block, scores=block.scores.copy(), spans=block.spans.copy())
        try:
            block = self._store.add(block, fill)
        except (OSError, MemoryError) as error:
            self.failure = _reason(error)
            self.held = Logged(now.blocks, block.end, now.lost + block.n)
            return
        self.held = Logged((*now.blocks, block), block.end, now.lost)
        self._keep_limit(pinned)

    def _keep_limit(self, pinned: int) -> None:
        if self.limit is None or self.nbytes <= self.limit:
            return
        least = self.limit * 3 // 4  # so that a file is not written anew for every block
        kept, size = list(self.blocks), self.nbytes
        for block in self.blocks:
            if size <= least:
                break
            if block.first >= pinned:
                kept.remove(block)
                size -= block.n * int(self.layout.bytes_per_token)
        self._hold(kept, self.end)

    def cut(self, length: int) -> None:
        """Forget the tokens from ``length`` on."""
        if self.end <= length:
            return
        kept = [b.within(length) for b in self.blocks if b.end <= length]
        parted = next((b for b in self.blocks if b.first < length < b.end), None)
        if parted is not None:
            n, block = length - parted.first, parted
            try:
                kept.append(
                    self._store.add(
                        block.cut(n, np.empty(0, np.uint8)),
                        lambda rows: block.copy_rows(n, self.layout, rows),
                    )
                )
            except (OSError, MemoryError) as error:
                self.failure = _reason(error)
        self._hold(kept, length)

    def reach(self, end: int) -> None:
        """Count the tokens up to ``end`` that were not logged as lost."""
        if self.end < end:
            self._hold(self.blocks, end)

    def restore(self, held: Logged) -> None:
        """Hold what it held when ``held`` was taken. Its store must not have been told since that
        these blocks are not needed any more, unless they lie in memory."""
        self._hold(held.blocks, held.end)

    def copied(
        self,
        blocks: Sequence[Block],
        fill: Callable[[Block, Bytes], None],
        end: int,
        pinned: int = 0,
    ) -> Logged:
        """Copies of what another log holds, in this log's store: as many as its limit allows, the
        newest of those that are not pinned.

        They are for ``restore``. If nothing comes of them, restore ``held``, which gives them up.

        Args:
            blocks: ascending; those that this log holds itself are not copied.
            fill: writes the rows of one of them.
            end: the other log's.
            pinned: see ``append``.
        """
        mine, room = {id(block) for block in self.blocks}, self.limit
        kept: list[Block] = []
        for block in sorted(blocks, key=lambda b: (b.first >= pinned, -b.first)):
            if room is not None:
                room -= block.n * int(self.layout.bytes_per_token)
                if room < 0 and block.first >= pinned:
                    break
            try:
                same = id(block) in mine
                kept.append(block if same else self._store.add(block, partial(fill, block)))
            except (OSError, MemoryError) as error:
                self.failure = _reason(error)
        kept.sort(key=lambda b: b.first)
        return Logged(tuple(kept), end, end - sum(block.n for block in kept))

    def _hold(self, blocks: Sequence[Block], end: int) -> None:
        kept = tuple(self._store.keep(blocks))
        self.held = Logged(kept, end, end - sum(block.n for block in kept))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or "out of memory"
