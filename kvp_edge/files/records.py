"""Files of records: JSON and arrays, appended one after the other.

Layout, all numbers little-endian:

    8 bytes   magic
    u32       version
    52 bytes  zeros
    records   each at a multiple of 64 bytes, after as many zeros as that takes:
        4 bytes   kind
        u32       length of the header
        u64       length of the record, all of it
        header    JSON in UTF-8: what the writer gave, and each array's name, type and shape
        arrays    raw, each at a multiple of 64 bytes, after as many zeros as that takes
        u64       length of the record, again
        4 bytes   kind, again
        u32       CRC-32 of all of the record before it

So a record that an append did not finish is told from a complete one, the last one is found from
the file's end, and arrays can be used where a map of the file has them. The checksum detects
damage, and does not prove origin. Nothing longer than the file is allocated while it is read.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from kvp_edge.files.json_values import parse, require, shortened

ALIGNED = 64

_START = struct.Struct("<8sI52x")
_HEAD = struct.Struct("<4sIQ")
_TAIL = struct.Struct("<Q4sI")
_CRC = struct.Struct("<I")
_MAX_HEADER_BYTES = 2**26
_MAX_DIMENSIONS = 4
_DTYPES = {"uint8", "int32", "float32"}
_PIECE = 2**20

Array = npt.NDArray[Any]


def aligned(at: int) -> int:
    return -(-at // ALIGNED) * ALIGNED


def start(magic: bytes, version: int) -> bytes:
    """What a file begins with."""
    return _START.pack(magic, version)


def version_of(begin: bytes, magic: bytes) -> int | None:
    """The version in a file's first 64 bytes; None: it is no file of this magic."""
    if len(begin) < _START.size or begin[:8] != magic:
        return None
    return int(_START.unpack(begin)[1])


@dataclass(frozen=True)
class Record:
    """Where a record lies in a file."""

    kind: bytes
    start: int
    length: int
    header_bytes: int

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class Described:
    """An array as the header describes it, and where it begins in the record."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    at: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


# -- writing --------------------------------------------------------------------------------------


class Writer:
    """Appends records.

    Args:
        file: to write to. It may take fewer bytes than it is given (io.FileIO).
        end: where its last record ends; what lies behind is overwritten.

    Attributes:
        end: likewise; it moves when a record is complete. After an error it may be set back to
            what it was before.
    """

    def __init__(self, file: BinaryIO, end: int) -> None:
        self._file = file
        self.end = end

    def add(
        self, kind: bytes, header: Mapping[str, Any], arrays: Mapping[str, Array]
    ) -> tuple[Record, dict[str, int]]:
        """Append a record.

        Returns:
            It, and where in the file each array begins.

        Raises:
            TypeError, ValueError, RecursionError: the header is no JSON; nothing was written.
            OSError: it cannot be written; the file has a part of it, which no reader takes for a
                record.
        """
        little = {
            name: np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
            for name, array in arrays.items()
        }
        described = [
            {"name": name, "dtype": array.dtype.name, "shape": array.shape}
            for name, array in little.items()
        ]
        text = json.dumps({**header, "arrays": described}, allow_nan=False).encode()
        if len(text) > _MAX_HEADER_BYTES:
            raise ValueError(f"it has {len(text)} bytes, more than {_MAX_HEADER_BYTES}")
        begin = aligned(self.end)
        places, at = {}, begin + _HEAD.size + len(text)
        for name, array in little.items():
            places[name] = at = aligned(at)
            at += array.nbytes
        record = Record(kind, begin, at + _TAIL.size - begin, len(text))
        self._file.seek(self.end)
        self._write(bytes(begin - self.end))
        head = _HEAD.pack(kind, len(text), record.length) + text
        crc, at = self._write(head), begin + len(head)
        for name, array in little.items():
            crc = self._write(bytes(places[name] - at), crc)
            crc = self._write(array.reshape(-1).view(np.uint8).data, crc)
            at = places[name] + array.nbytes
        tail = _TAIL.pack(record.length, kind, 0)[: -_CRC.size]
        self._write(tail + _CRC.pack(zlib.crc32(tail, crc)))
        self.end = record.end
        return record, places

    def _write(self, data: Any, crc: int = 0) -> int:
        left = memoryview(data)
        while left.nbytes:
            left = left[self._file.write(left) :]
        return zlib.crc32(data, crc)


# -- reading --------------------------------------------------------------------------------------


def record_at(file: BinaryIO, at: int, size: int) -> Record | None:
    """The record that begins there, if it is complete as far as its two ends say.

    Args:
        size: of the file, in bytes.
    """
    if at < 0 or at % ALIGNED or at + _HEAD.size + _TAIL.size > size:
        return None
    kind, header_bytes, length = _HEAD.unpack(_read(file, at, _HEAD.size))
    if not _HEAD.size + header_bytes + _TAIL.size <= length <= size - at:
        return None
    tail = _TAIL.unpack(_read(file, at + length - _TAIL.size, _TAIL.size))
    return Record(kind, at, length, header_bytes) if tail[:2] == (length, kind) else None


def last_record(file: BinaryIO, size: int) -> Record | None:
    """The record that the file ends with, if it is complete as far as its two ends say."""
    if size < _START.size + _HEAD.size + _TAIL.size:
        return None
    length = _TAIL.unpack(_read(file, size - _TAIL.size, _TAIL.size))[0]
    return record_at(file, size - length, size)


def all_records(file: BinaryIO, size: int) -> Iterator[Record]:
    """Those from the beginning up to the first that is not complete."""
    at = _START.size
    while (record := record_at(file, at, size)) is not None:
        yield record
        at = aligned(record.end)


class Reader:
    """Reads a record from its beginning to its end, array by array, in their order.

    Several may read one file by turns.

    Attributes:
        header: without the arrays' descriptions.
        arrays: these, in their order.

    Raises:
        ValueError: what the header says does not add up.
    """

    def __init__(self, file: BinaryIO, record: Record) -> None:
        if record.header_bytes > _MAX_HEADER_BYTES:
            raise ValueError(f"its header would have {record.header_bytes} bytes")
        self._file, self._record = file, record
        head = _read(file, record.start, _HEAD.size + record.header_bytes)
        self._crc, self._at = zlib.crc32(head), len(head)
        body = record.length - len(head) - _TAIL.size
        self.header, self.arrays = _parse(head[_HEAD.size :], len(head), body)
        last = self.arrays[-1].at + self.arrays[-1].nbytes if self.arrays else len(head)
        if last != record.length - _TAIL.size:
            raise ValueError(
                f"its arrays have {last - len(head)} bytes, and the record has {body} for them"
            )
        self._next = 0

    @property
    def array_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays)

    def read(self) -> Array:
        """The next array.

        Raises:
            ValueError: the file has become shorter.
        """
        one = self.arrays[self._next]
        array = np.empty(one.shape, one.dtype)
        self.read_into(array.reshape(-1).view(np.uint8))
        return array.astype(one.dtype.newbyteorder("="), copy=False)

    def read_into(self, into: npt.NDArray[np.uint8]) -> None:
        """Read the bytes of the next array.

        Raises:
            ValueError: likewise.
        """
        one = self.arrays[self._next]
        self._take(one.at - self._at)
        self._file.seek(self._record.start + one.at)
        left = into.data
        while left.nbytes:
            piece = left[: _read_into(self._file, left[:_PIECE])]
            self._crc = zlib.crc32(piece, self._crc)
            left = left[piece.nbytes :]
        self._at = one.at + one.nbytes
        self._next += 1

    def finish(self) -> None:
        """After the last array.

        Raises:
            ValueError: what was read is not what was written.
        """
        tail = _read(self._file, self._record.start + self._at, _TAIL.size)
        if _CRC.unpack(tail[-_CRC.size :])[0] != zlib.crc32(tail[: -_CRC.size], self._crc):
            raise ValueError("its checksum is wrong")

    def _take(self, n: int) -> None:
        """The zeros before an array."""
        self._crc = zlib.crc32(_read(self._file, self._record.start + self._at, n), self._crc)


def _read(file: BinaryIO, at: int, n: int) -> bytes:
    """So many bytes, which are no more than the file has.

    Raises:
        ValueError: by now it has fewer.
    """
    data = bytearray(n)
    left = memoryview(data)
    file.seek(at)
    while left.nbytes:
        left = left[_read_into(file, left) :]
    return bytes(data)


def _read_into(file: BinaryIO, into: memoryview) -> int:
    """How many bytes were read, at least one.

    Raises:
        ValueError: there are none.
    """
    n: int = file.readinto(into) or 0  # type: ignore[attr-defined]  # every binary file has it
    if not n:
        raise ValueError("it has become shorter")
    return n


def _parse(text: bytes, at: int, most: int) -> tuple[dict[str, Any], list[Described]]:
    """The header and what it says of the arrays, of which none has more than ``most`` bytes.

    Args:
        at: where in the record the header ends.

    Raises:
        ValueError: it is no header.
    """
    header = require(parse(text), {"arrays": list[dict[str, Any]]})
    found: dict[str, Described] = {}
    for entry in header.pop("arrays"):
        require(entry, {"name": str, "dtype": str, "shape": list[int]})
        dtype = np.dtype(_known(entry["dtype"])).newbyteorder("<")
        one = Described(entry["name"], dtype, tuple(entry["shape"]), aligned(at))
        # numpy does not make an empty array of [0, 2^63], either
        sizes = [max(n, 1) for n in one.shape]
        too_large = len(sizes) > _MAX_DIMENSIONS or math.prod(sizes) * one.dtype.itemsize > most
        if too_large or min(one.shape, default=0) < 0:
            raise ValueError(f"it has an array of shape {shortened(entry['shape'])}")
        if one.name in found:
            raise ValueError(f"it has two arrays '{one.name}'")
        found[one.name] = one
        at = one.at + one.nbytes
    return header, list(found.values())


def _known(dtype: str) -> str:
    if dtype not in _DTYPES:
        raise ValueError(f"it has an array of type {shortened(dtype)}")
    return dtype
