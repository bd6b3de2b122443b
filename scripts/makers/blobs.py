"""State blobs of llama.cpp in numpy, written and read from the layout alone (llama_kv_cache's
state_write_meta and state_write_data in src/llama-kv-cache.cpp), not by the native parser."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

MAGIC = 0xAF143CD8


@dataclass
class Cache:
    """One KV cache of one sequence. Rows are bytes: keys and values [n_layer, n_cells, row_bytes],
    values also when the blob stores them transposed."""

    positions: NDArray[np.int32]
    type_k: int
    type_v: int
    value_size: int
    """bytes of one value of V when transposed, else 0"""
    keys: Bytes
    values: Bytes

    def by_head(self, n_head_kv: int) -> tuple[Bytes, Bytes]:
        """Keys and values [n_layer, n_head_kv, n_cells, bytes of a head]."""
        split = (*self.keys.shape[:2], n_head_kv, -1)
        return self.keys.reshape(split).swapaxes(1, 2), self.values.reshape(split).swapaxes(1, 2)


def read(blob: bytes, seq_id: int = 0) -> list[Cache]:
    """All caches in a blob: the base cache, and the window cache if there is one."""
    magic, seq = struct.unpack_from("<Ii", blob)
    assert (magic, seq) == (MAGIC, seq_id)
    at, caches = 8, []

    def take(fmt: str) -> tuple[Any, ...]:
        nonlocal at
        at += struct.calcsize(fmt)
        return struct.unpack_from(fmt, blob, at - struct.calcsize(fmt))

    def take_bytes(n: int) -> Bytes:
        nonlocal at
        at += n
        return np.frombuffer(blob, np.uint8, n, at - n)

    while at < len(blob):
        n_stream, n_cells = take("<II")
        assert n_stream == 1
        cells = [take("<iIi") for _ in range(n_cells)]
        assert all(c[1:] == (1, seq_id) for c in cells)
        v_trans, n_layer = take("<II")
        keys, values, value_size = [], [], 0
        for _ in range(n_layer):
            type_k, row = take("<iQ")
            keys.append(take_bytes(n_cells * row).reshape(n_cells, row))
        for _ in range(n_layer):
            if v_trans:
                type_v, value_size, width = take("<iII")
                columns = take_bytes(width * n_cells * value_size)
                columns = columns.reshape(width, n_cells, value_size)
                values.append(columns.swapaxes(0, 1).reshape(n_cells, -1))
            else:
                type_v, row = take("<iQ")
                values.append(take_bytes(n_cells * row).reshape(n_cells, row))
        positions = np.array([c[0] for c in cells], np.int32)
        caches.append(
            Cache(positions, type_k, type_v, value_size, np.stack(keys), np.stack(values))
        )
    return caches


def write(caches: list[Cache], seq_id: int = 0) -> bytes:
    parts: list[Any] = [struct.pack("<Ii", MAGIC, seq_id)]
    for c in caches:
        n_layer, n_cells, row = c.keys.shape
        parts.append(struct.pack("<II", 1, n_cells))
        parts += [struct.pack("<iIi", position, 1, seq_id) for position in c.positions.tolist()]
        parts.append(struct.pack("<II", int(c.value_size > 0), n_layer))
        for k in c.keys:
            parts += [struct.pack("<iQ", c.type_k, row), np.ascontiguousarray(k)]
        for v in c.values:
            if c.value_size:
                columns = v.reshape(n_cells, -1, c.value_size).swapaxes(0, 1)
                parts.append(struct.pack("<iII", c.type_v, c.value_size, len(columns)))
                parts.append(np.ascontiguousarray(columns))
            else:
                parts += [struct.pack("<iQ", c.type_v, v.shape[1]), np.ascontiguousarray(v)]
    return b"".join(parts)


def take_rows(x: Bytes, keep: NDArray[np.int32]) -> Bytes:
    """[n_layer, n_head_kv, n, bytes] -> [n_layer, n_keep, row_bytes], every head its own rows."""
    rows = np.take_along_axis(x, keep[..., None].astype(np.intp), axis=2).swapaxes(1, 2)
    return rows.reshape(*rows.shape[:2], -1)


def saved(ctx: Any, seq_id: int = 0) -> bytes:
    size = llama_cpp.llama_state_seq_get_size(ctx, seq_id)
    buffer = (ctypes.c_uint8 * size)()
    assert llama_cpp.llama_state_seq_get_data(ctx, buffer, size, seq_id) == size
    return bytes(buffer)
