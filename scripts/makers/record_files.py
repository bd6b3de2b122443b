"""Files of records made from their parts, right or wrong: what kvp_edge.files.records describes,
written down once more."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np


def start(magic: bytes, version: int) -> bytes:
    return magic + struct.pack("<I", version) + bytes(52)


def described(arrays: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a header says of them."""
    return [
        {"name": name, "dtype": array.dtype.name, "shape": list(array.shape)}
        for name, array in arrays.items()
    ]


def record(
    kind: bytes,
    header: bytes | dict[str, Any],
    arrays: Mapping[str, Any] | None = None,
    *,
    length: int | None = None,
    header_bytes: int | None = None,
) -> bytes:
    """A record as it stands at a multiple of 64 bytes, behind a right checksum.

    Args:
        header: its text; or what it says, besides the arrays.
        length, header_bytes: what it says instead of its own.
    """
    arrays = arrays or {}
    if isinstance(header, dict):
        header = json.dumps({**header, "arrays": described(arrays)}).encode()
    body = b""
    for array in arrays.values():
        body += bytes(-(16 + len(header) + len(body)) % 64) + np.ascontiguousarray(array).tobytes()
    if length is None:
        length = 16 + len(header) + len(body) + 16
    if header_bytes is None:
        header_bytes = len(header)
    out = kind + struct.pack("<IQ", header_bytes % 2**32, length % 2**64) + header + body
    out += struct.pack("<Q", length % 2**64) + kind
    return out + struct.pack("<I", zlib.crc32(out))


def followed(data: bytes, *more: bytes) -> bytes:
    """Records after what a file has."""
    for one in more:
        data += bytes(-len(data) % 64) + one
    return data
