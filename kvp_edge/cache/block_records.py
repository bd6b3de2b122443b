"""Blocks of a KV log as records of a file (kvp_edge.files.records)."""

from __future__ import annotations

from typing import Any, BinaryIO

import numpy as np

from kvp_edge.binding.structs import LogLayout
from kvp_edge.cache.kv_log import Block, Bytes
from kvp_edge.files.json_values import require, shortened
from kvp_edge.files.records import Array, Reader, Record, Writer
from kvp_edge.text.spans import MARKER, TEXT, TURN

KIND = b"blck"

_NUMBERS = {"first": int, "n": int, "rope_first": int}
_MOST = 2**31 - 1


def layout_numbers(layout: LogLayout) -> dict[str, int]:
    """A layout as JSON has it."""
    return {name: int(getattr(layout, name)) for name, *_ in layout._fields_}


def add_block(writer: Writer, block: Block) -> tuple[Record, int]:
    """Append a block.

    Returns:
        Its record, and where in the file its rows begin.

    Raises:
        OSError: see Writer.add.
    """
    numbers = {name: getattr(block, name) for name in _NUMBERS}
    arrays: dict[str, Array] = {"scores": block.scores, "spans": block.spans, "rows": block.rows}
    record, places = writer.add(KIND, numbers, arrays)
    return record, places["rows"]


class StoredBlock:
    """A block in a file. Its rows are read when they are asked for, once.

    Args:
        record: of ``KIND``.
        layout: that its rows must have.

    Attributes:
        record: likewise.
        block: without rows.

    Raises:
        ValueError: it is none of this layout.
    """

    def __init__(self, file: BinaryIO, record: Record, layout: LogLayout) -> None:
        if record.kind != KIND:
            raise ValueError(f"it has a record of kind {record.kind!r} in place of a block")
        self.record = record
        self._reader = Reader(file, record)
        first, n, rope_first = _numbers(self._reader.header)
        found = [(a.name, a.dtype.name, a.shape) for a in self._reader.arrays]
        k = sum(found[1][2][:1]) if len(found) == 3 else 0
        score_shape = found[0][2][3:] if found else ()  # the policy's (kvp_edge.sessions)
        wanted: list[tuple[str, str, tuple[int, ...]]] = [
            ("scores", "float32", (layout.n_layer, layout.n_head_kv, n, *score_shape)),
            ("spans", "int32", (k, 3)),
            ("rows", "uint8", (n * layout.bytes_per_token,)),
        ]
        if found != wanted or k > n:
            raise ValueError(f"its block of {n} tokens has the arrays {shortened(found)}")
        scores, spans = self._reader.read(), self._reader.read()
        self.block = Block(first, n, rope_first, np.empty(0, np.uint8), scores, spans)
        if not _spans_add_up(self.block):
            raise ValueError(f"its block at token {first} has invalid spans")

    def fill(self, into: Bytes) -> None:
        """Read its rows.

        Raises:
            ValueError: the block is damaged, or cannot be read: no OSError, which would say that
                there is no room for it.
        """
        try:
            self._reader.read_into(into)
            self._reader.finish()
        except OSError as error:
            raise ValueError(f"its block at token {self.block.first}: {error}") from error


def _numbers(header: dict[str, Any]) -> tuple[int, int, int]:
    first, n, rope_first = (require(header, _NUMBERS)[name] for name in _NUMBERS)
    # a key carries the position of its token, or one further to the front
    if n < 1 or not 0 <= rope_first <= first or first + n > _MOST:
        raise ValueError(f"it has a block of {n} tokens from {first} on, rotated to {rope_first}")
    return first, n, rope_first


def _spans_add_up(block: Block) -> bool:
    starts, ends, kinds = block.spans.T
    return bool(
        (starts >= block.first).all()
        and (starts < block.end).all()
        and (starts < ends).all()
        and (ends[:-1] <= starts[1:]).all()
        and np.isin(kinds, (TEXT, MARKER, TURN)).all()
    )
