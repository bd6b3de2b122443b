"""A llama.cpp KV cache: what it holds, scores and rows removed or packed, by native/kvp_edge.h."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from kvp_edge.arrays import BoolArray, FloatArray, IntArray, LlamaPositions, RopePositions, Rows
from kvp_edge.binding import structs
from kvp_edge.binding.library import call, create, in_place, lib
from kvp_edge.binding.observer import Observer
from kvp_edge.binding.rules import Rule
from kvp_edge.binding.structs import CacheLocation, CacheShape, LogBlock, LogLayout
from kvp_edge.errors import KVCacheError


@dataclass(frozen=True)
class NotInPlace:
    """The answer where scores cannot be computed where keys and values lie: it is not known where,
    or their device lacks an operation or memory. Whoever asked reads the rows instead."""

    reason: str


@dataclass(frozen=True)
class RopeShift:
    """How RoPE turns kept keys to new positions while they are packed.

    Attributes:
        frequency: f64 [n_layer, n_pairs], radians per position.
        distance: int32 [n_layer, n_head_kv, n_keep], new RoPE position minus old.
        neox: pairs are (p, p + n_pairs) of a key; otherwise (2p, 2p + 1).
    """

    frequency: npt.NDArray[np.float64]
    distance: RopePositions
    neox: bool


def _shift_struct(rope_shift: RopeShift | None, keep: IntArray) -> structs.RopeShift | None:
    if rope_shift is None:
        return None
    frequency = np.ascontiguousarray(rope_shift.frequency, np.float64)
    distance = np.ascontiguousarray(rope_shift.distance, np.int32)
    if distance.shape != keep.shape or frequency.shape[:1] != keep.shape[:1]:
        raise ValueError(
            f"frequency {frequency.shape} and distance {distance.shape} do not fit rows "
            f"{keep.shape}"
        )
    return structs.RopeShift(
        frequency=frequency,
        distance=distance,
        n_pairs=frequency.shape[1],
        neox=int(rope_shift.neox),
    )


def pack_state(
    state: npt.NDArray[np.uint8],
    seq_id: int,
    present: LlamaPositions,
    keep: Rows,
    positions: LlamaPositions,
    *,
    rope_shift: RopeShift | None = None,
    k_hadamard_block: int = 0,
) -> npt.NDArray[np.uint8]:
    """Pack a state blob of llama.cpp that lies in memory, without a context (see kvp_state_pack).

    Args:
        state: uint8 [size] from llama_state_seq_get_data; it is overwritten.
        present: int32 [n], ascending: every position in it.
        keep: int32 [n_layer, n_head_kv, n_keep]: rows, all different within a head.
        positions: int32 [n_keep], ascending: positions of the new rows.
        k_hadamard_block: of the keys' Hadamard rotation, needed only with ``rope_shift``.

    Returns:
        uint8 [new size], the beginning of ``state``.

    Raises:
        KVCacheError: the blob is laid out in an unknown way.
        UnsupportedModelError: heads are not whole blocks of the cache's type.
        ValueError: the plan does not fit the blob.
    """
    if state.dtype != np.uint8 or not state.flags.c_contiguous or not state.flags.writeable:
        raise ValueError("a state must be a writeable, contiguous array of uint8")
    present = np.ascontiguousarray(present, np.int32)
    keep = np.ascontiguousarray(keep, np.int32)
    positions = np.ascontiguousarray(positions, np.int32)
    if keep.ndim != 3 or keep.shape[2] != len(positions):
        raise ValueError(f"rows {keep.shape} and {len(positions)} positions do not fit together")
    shift = _shift_struct(rope_shift, keep)
    size = np.zeros(1, np.uintp)
    call(
        "kvp_state_pack",
        state,
        len(state),
        seq_id,
        keep.shape[0],
        keep.shape[1],
        present,
        len(present),
        keep,
        positions,
        len(positions),
        shift,
        k_hadamard_block,
        size,
    )
    return state[: int(size[0])]


class NativeCache:
    """One llama.cpp context's KV cache: read, score, remove and pack tokens of sequence 0.

    Opening decodes three tokens to prove that the cache can be read back and thinned, then clears
    it (see kvp_cache_open). Not thread-safe; must be closed before the context is freed.

    Args:
        ctx: llama_context pointer.
        observer: the context's, so that the cache is scored and packed where it lies; None: through
            llama.cpp's state.

    Raises:
        UnsupportedModelError: recurrent, hybrid, encoder or diffusion model, M-RoPE, or a cache
            that cannot lose tokens from its middle.
        KVCacheError: the state blob is laid out in an unknown way.
        ValueError: the context is not empty, or was made without n_seq_max >= 2.
    """

    def __init__(self, ctx: Any, observer: Observer | None = None) -> None:
        self._ctx = ctx
        self._observer = observer
        handle = observer.handle if observer is not None else None
        self._handle = create("kvp_cache", "kvp_cache_open", ctx, handle)
        self.shape = CacheShape()
        lib.kvp_cache_get_shape(self._handle, self.shape)

    def close(self) -> None:
        """Twice is harmless."""
        self._handle.close()

    @property
    def location(self) -> CacheLocation:
        """Where it lies, and how many bytes were transferred between there and the host so far."""
        location = CacheLocation()
        lib.kvp_cache_get_location(self._handle, location)
        return location

    def appended(self, first: int, n: int) -> None:
        """The ``n`` tokens decoded last are at llama.cpp's positions first, first + 1, ..."""
        if self._observer is not None:  # else nobody asks for cells; called for every token
            call("kvp_cache_appended", self._handle, first, n)

    def forget_cells(self) -> None:
        """Tokens were put into the cache in another way than by decoding them."""
        lib.kvp_cache_forget(self._handle)

    def check_cells(self, present: LlamaPositions) -> bool:
        """Compare the cells followed, where ``present`` lies, with llama.cpp's state, byte by byte.

        Args:
            present: int32 [n], ascending: every position that sequence 0 holds.

        Returns:
            False if the cells are not known.

        Raises:
            KVCacheError: they are others.
        """
        present = np.ascontiguousarray(present, np.int32)
        known = np.zeros(1, np.uint32)
        call("kvp_cache_check_cells", self._handle, present, len(present), known)
        return bool(known[0])

    def read(
        self, p0: int, p1: int, n: int, *, values: bool = True
    ) -> tuple[LlamaPositions, FloatArray, FloatArray | None]:
        """Keys and values of the ``n`` tokens at positions [p0, p1), de-quantised, not rotated.

        Returns:
            positions int32 [n]; keys f32 [n_layer, n_head_kv, n, head_size_k], RoPE included;
            values f32 [n_layer, n_head_kv, n, head_size_v], or None if not queries for.
        """
        s = self.shape
        keys = np.empty((s.n_layer, s.n_head_kv, n, s.head_size_k), np.float32)
        out_values = (
            np.empty((s.n_layer, s.n_head_kv, n, s.head_size_v), np.float32) if values else None
        )
        positions = np.empty(n, np.int32)
        call("kvp_cache_read", self._handle, p0, p1, n, positions, keys, out_values)
        return positions, keys, out_values

    def score(self, rule: Rule, p0: int, p1: int, n: int) -> FloatArray | NotInPlace:
        """Scores of the ``n`` tokens at positions [p0, p1) by a rule, computed where they lie.

        Returns:
            f32 [n_layer, n_head_kv, n], or what the rule says; larger = keep.

        Raises:
            ValueError: the positions hold another number of tokens, or the rule's parameters do not
                fit them or the cache.
        """
        s = self.shape
        scores = np.empty((s.n_layer, s.n_head_kv, *rule.per_head(n)), np.float32)
        struct = rule.struct((s.n_layer, s.n_head_kv, n, s.head_size_k))
        reason = in_place("kvp_cache_score", self._handle, struct, p0, p1, n, scores)
        return scores if reason is None else NotInPlace(reason)

    def remove(self, present: LlamaPositions, keep: BoolArray) -> int:
        """Remove the tokens at ``present[~keep]`` from every layer and head.

        Args:
            present: int32 [n], ascending: every position that sequence 0 holds.
            keep: bool [n]; the last entry must be True.

        Returns:
            The number of llama_memory_seq_rm calls made: the fewest that do it.
        """
        if len(present) != len(keep):
            raise ValueError(f"{len(present)} positions but {len(keep)} keep flags")
        present = np.ascontiguousarray(present, np.int32)
        flags = np.ascontiguousarray(keep, np.uint8)
        ranges = np.zeros(1, np.uint32)
        call("kvp_cache_remove", self._handle, present, flags, len(present), ranges)
        return int(ranges[0])

    def move(self, present: LlamaPositions, positions: LlamaPositions) -> None:
        """Give the cells at ``present`` new, not larger, positions; both int32 [n], ascending.

        llama.cpp turns the keys accordingly when it decodes the next batch (its "K-shift"); until
        then the cache must not be read.
        """
        present = np.ascontiguousarray(present, np.int32)
        positions = np.ascontiguousarray(positions, np.int32)
        if len(present) != len(positions):
            raise ValueError(f"{len(present)} cells cannot move to {len(positions)} positions")
        call("kvp_cache_move", self._handle, present, positions, len(present))

    def check_packing(self) -> None:
        """Test, on an empty context, that heads can keep different rows (kvp_cache_check_packing).

        Raises:
            UnsupportedModelError: they cannot; the message says why.
        """
        call("kvp_cache_check_packing", self._handle)

    def pack(
        self,
        present: LlamaPositions,
        keep: Rows,
        positions: LlamaPositions,
        rope_shift: RopeShift | None = None,
    ) -> None:
        """Let every head keep its own rows, in the same cells (see kvp_cache_pack).

        Args:
            present: int32 [n], ascending: every position that sequence 0 holds.
            keep: int32 [n_layer, n_head_kv, n_keep]: rows, all different within a head; row r is
                the cell at ``present[r]``.
            positions: int32 [n_keep], ascending: positions of the new rows. The last one must be
                ``present[-1]``, unless keys are turned.
            rope_shift: how keys are turned to new positions on the way.

        Raises:
            ValueError, UnsupportedModelError: the plan does not fit; the cache is what it was.
            KVCacheError: llama.cpp's state is laid out in an unknown way (the cache is what it
                was), or a device or llama.cpp failed in the middle (the cache is empty).
        """
        s = self.shape
        present = np.ascontiguousarray(present, np.int32)
        keep = np.ascontiguousarray(keep, np.int32)
        positions = np.ascontiguousarray(positions, np.int32)
        if keep.shape != (s.n_layer, s.n_head_kv, len(positions)):
            raise ValueError(
                f"rows {keep.shape} for {len(positions)} positions in {s.n_layer} layers of "
                f"{s.n_head_kv} KV heads"
            )
        shift = _shift_struct(rope_shift, keep)
        rows = keep, positions, len(positions)
        call("kvp_cache_pack", self._handle, present, len(present), *rows, shift)

    def log_layout(self, type: int | None = None) -> LogLayout:
        """How a KV log of this cache's rows lies in memory.

        Args:
            type: ggml type of the log's keys and values; None: the cache's own types, so that rows
                are copied bit for bit.

        Raises:
            ValueError: it is no type.
            UnsupportedModelError: heads are not whole blocks of it, or it cannot be converted to.
        """
        layout = LogLayout()
        call("kvp_cache_log_layout", self._handle, -1 if type is None else type, layout)
        return layout

    def log_rows(
        self,
        layout: LogLayout,
        p0: int,
        p1: int,
        n: int,
        out: npt.NDArray[np.uint8] | None = None,
    ) -> npt.NDArray[np.uint8]:
        """Copy the ``n`` tokens at positions [p0, p1) into a block of a KV log, oldest first.

        Args:
            layout: from ``log_layout``, of this cache or one like it.
            out: uint8 [n * bytes_per_token], contiguous and writeable, to be filled: a memory map,
                say. None: a new array.

        Returns:
            ``out``, the ``rows`` of a LogBlock.

        Raises:
            ValueError: the positions hold another number of tokens, or the layout is another
                cache's.
            KVCacheError: llama.cpp's state could not be read.
        """
        size = n * layout.bytes_per_token
        if out is None:
            out = np.empty(size, np.uint8)
        if out.shape != (size,) or not out.flags.writeable:
            raise ValueError(f"{n} tokens need a writeable array of {size} bytes, not {out.shape}")
        call("kvp_cache_log_rows", self._handle, layout, p0, p1, n, out)
        return out

    def fill(
        self,
        present: LlamaPositions,
        layout: LogLayout,
        blocks: Sequence[LogBlock],
        source: IntArray,
        positions: LlamaPositions,
        rope_shift: RopeShift | None = None,
    ) -> None:
        """Give every head new rows, from those that are present and a KV log (see kvp_cache_fill).

        Args:
            present: int32 [n], ascending: every position that sequence 0 holds; may be empty.
            layout: of the log.
            blocks: of the log, ascending; only those that ``source`` needs.
            source: int32 [n_layer, n_head_kv, n_new], all different within a head: a present row r,
                which is at ``present[r]``, or -1 - t (``~t``) for the logged row of the
                conversation's token t.
            positions: int32 [n_new], ascending: positions of the new rows. llama.cpp continues
                from the last.
            rope_shift: how keys are turned on the way; its distances have the shape of ``source``.

        Raises:
            ValueError, UnsupportedModelError: the plan does not fit; the cache is what it was.
            KVCacheError: llama.cpp's state is laid out in an unknown way (the cache is what it
                was), or llama.cpp did not take it back (the cache is empty).
        """
        s = self.shape
        present = np.ascontiguousarray(present, np.int32)
        source = np.ascontiguousarray(source, np.int32)
        positions = np.ascontiguousarray(positions, np.int32)
        if source.shape != (s.n_layer, s.n_head_kv, len(positions)):
            raise ValueError(
                f"sources {source.shape} for {len(positions)} positions in {s.n_layer} layers of "
                f"{s.n_head_kv} KV heads"
            )
        for block in blocks:
            if block.rows.shape != (block.n * layout.bytes_per_token,):
                raise ValueError(
                    f"{block.n} logged tokens from {block.first} on are {block.rows.shape} bytes, "
                    f"not {layout.bytes_per_token} each"
                )
        shift = _shift_struct(rope_shift, source)
        log = layout, blocks, len(blocks)
        rows = source, positions, len(positions)
        call("kvp_cache_fill", self._handle, present, len(present), *log, *rows, shift)

    def state(self) -> npt.NDArray[np.uint8]:
        """llama.cpp's state of sequence 0: uint8 [size].

        Raises:
            KVCacheError: llama.cpp could not write it.
        """
        state = np.empty(llama_cpp.llama_state_seq_get_size(self._ctx, 0), np.uint8)
        buffer = np.ctypeslib.as_ctypes(state)
        if llama_cpp.llama_state_seq_get_data(self._ctx, buffer, len(state), 0) != len(state):
            raise KVCacheError("llama.cpp could not write its state")
        return state

    def restore(self, state: npt.NDArray[np.uint8], present: LlamaPositions) -> None:
        """Put back what ``state`` gave, now or in another process.

        Args:
            state: uint8 [size].
            present: int32 [n], ascending: the positions that it must hold.

        Raises:
            ValueError, UnsupportedModelError, KVCacheError: as for ``pack``; only where llama.cpp
                does not take the state back (KVCacheError) is the cache changed, and empty.
        """
        state = np.ascontiguousarray(state, np.uint8)
        present = np.ascontiguousarray(present, np.int32)
        call("kvp_cache_restore", self._handle, state, len(state), present, len(present))

    def check_state(self, state: npt.NDArray[np.uint8], present: LlamaPositions) -> None:
        """Check that ``restore`` would take ``state`` and ``present``; the arguments are the same.

        Raises:
            KVCacheError: it would not.
        """
        state = np.ascontiguousarray(state, np.uint8)
        present = np.ascontiguousarray(present, np.int32)
        try:
            call("kvp_cache_check_state", self._handle, state, len(state), present, len(present))
        except ValueError as error:
            raise KVCacheError(f"the cache does not match its table: {error}") from error

    def newest_position(self) -> int:
        """llama.cpp's largest position of sequence 0, -1 when it is empty."""
        return int(llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(self._ctx), 0))

    def can_continue_at(self, position: int) -> bool:
        """Whether the window cache still holds all that a token at ``position`` would see there.

        Always true for models without sliding-window layers. llama.cpp reuses the cells of a window
        as it moves on, so it can be moved back only as far as they last.
        """
        if not self.shape.has_window:
            return True
        window = int(llama_cpp.llama_model_n_swa(llama_cpp.llama_get_model(self._ctx)))
        first = int(llama_cpp.llama_memory_seq_pos_min(llama_cpp.llama_get_memory(self._ctx), 0))
        return 0 <= first <= max(0, position - window + 1)
