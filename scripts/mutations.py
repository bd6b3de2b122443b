"""Damage done to valid files on purpose: to bytes, to JSON, to GGUF and to safetensors.

Each takes a ``random.Random`` and gives bytes that may be anything but are near what a reader
expects, so that it looks at them for long.
"""

from __future__ import annotations

import json
import pickle
import struct
from functools import cached_property
from random import Random
from typing import Any

import numpy as np

from makers import record_files

INTS = (0, 1, -1, 2, 3, 7, 255, 256, 2**15, 2**31 - 1, 2**31, -(2**31), 2**32 - 1, 2**32, 2**40)
INTS += (2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 10**400)
VALUES = (
    *(None, True, False, 0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf")),
    *("", "x", "../x", "/dev/zero", "a/b", "\0", "\ud800", "\x1b[2J", "1", "nan", "x" * 5000),
    *([], {}, [[]], [{}], {"": None}, [0], ["x"], [0] * 50),
)
TEXTS = (
    *(b"", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 100_000, b"\xff\xfe", b"nul", b"{}", b"[]"),
    *(b"\xef\xbb\xbf{}", b'{"a": 1, "a": 2}', b"-", b'"', b"0", b"null"),
)


def _copied(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))  # much faster than copy.deepcopy


def of_bytes(rng: Random, data: bytes, reach: int | None = None) -> bytes:
    """A few changes of single bytes, numbers and pieces, half of them in the first ``reach``."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not out:
            break
        end = min(len(out), reach or len(out)) if rng.random() < 0.5 else len(out)
        at = rng.randrange(end)
        match rng.randrange(7):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at] = rng.randrange(256)
            case 2:
                out[at] = rng.choice((0, 0xFF, 0x7F, 0x80))
            case 3:
                del out[at:]
            case 4:
                size = rng.choice((4, 8))
                number = rng.choice(INTS) % 2 ** (8 * size)
                out[at : at + size] = number.to_bytes(size, "little")
            case 5:
                other = rng.randrange(len(out))
                out[at:at] = out[other : other + rng.randrange(32)]
            case _:
                del out[at : at + rng.randrange(1, 32)]
    return bytes(out)


def hostile(rng: Random) -> Any:
    """A value that is seldom the right one."""
    return rng.choice(INTS) if rng.random() < 0.5 else _copied(rng.choice(VALUES))


def of_value(rng: Random, value: Any) -> Any:
    """A JSON value with a few places in it replaced, renamed, taken out or doubled."""
    out = _copied(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        out = _changed(rng, out)
    return out


def _changed(rng: Random, value: Any) -> Any:
    if not isinstance(value, dict | list) or not value or rng.random() < 0.05:
        return _other(rng, value)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = rng.choice(keys)
    inside = isinstance(value[key], dict | list) and rng.random() < 0.7
    if inside or rng.random() < 0.7:
        value[key] = _changed(rng, value[key]) if inside else _other(rng, value[key])
    elif rng.random() < 0.5:
        del value[key]
    elif isinstance(value, dict):
        name = rng.choice(("", "x", f"{key} ", rng.choice(list(value))))
        value[name] = value.pop(key)
    else:
        value.insert(key, _copied(value[key]))
    return value


def _other(rng: Random, value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.5:
        return value + rng.choice((-1, 1, -2, 16))
    return hostile(rng)


def of_json(rng: Random, value: Any) -> bytes:
    """The JSON of a damaged value, or what is no JSON at all."""
    if rng.random() < 0.02:
        return rng.choice(TEXTS)
    text = json.dumps(of_value(rng, value)).encode()
    return of_bytes(rng, text) if rng.random() < 0.05 else text


# -- safetensors ---------------------------------------------------------------------------------


def of_safetensors(rng: Random, data: bytes, inner: str | None) -> bytes:
    """A safetensors file with damage in its bytes, its header, or in its metadata, which are JSON
    in strings; ``inner`` names those to prefer, None: any."""
    if rng.random() < 0.25:
        return of_bytes(rng, data, 2048)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    metadata = header["__metadata__"]
    if rng.random() < 0.7:
        name = inner or rng.choice(list(metadata))
        try:
            metadata[name] = of_json(rng, json.loads(metadata[name])).decode(errors="replace")
        except ValueError:  # a plain string
            metadata[name] = str(hostile(rng))
        # what is too long to be metadata is cut off by the reader, or refused
        text = json.dumps(header).encode()
    else:
        text = of_json(rng, header)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


# -- files of records (kvp_edge.files.records) ---------------------------------------------------


class RecordParts:
    """A valid file of records in the parts that are damaged: headers and arrays. A header's
    ``blocks`` are where the records before it begin, and stay right unless they are damaged."""

    def __init__(self, data: bytes) -> None:
        self._data, self.start = data, data[:64]
        self.records: list[tuple[bytes, dict[str, Any], dict[str, Any]]] = []
        at = 64
        while at < len(data):
            kind, header_bytes, length = struct.unpack_from("<4sIQ", data, at)
            end = at + 16 + header_bytes
            header = json.loads(data[at + 16 : end])
            arrays = {}
            for array in header.pop("arrays"):
                end += -end % 64
                n = int(np.prod(array["shape"]))
                found = np.frombuffer(data, array["dtype"], n, end).reshape(array["shape"])
                arrays[array["name"]] = found
                end += found.nbytes
            self.records.append((kind, header, arrays))
            at += length
            at += -at % 64

    def whole(self) -> bytes:
        return self._assembled(self.records)

    def _assembled(self, records: list[Any], **last: Any) -> bytes:
        """The file's bytes.

        Args:
            last: for the last one, of record_files.record.
        """
        data, places = self.start, list[int]()
        for i, (kind, header, arrays) in enumerate(records):
            places.append(len(data) + -len(data) % 64)
            more = last if i == len(records) - 1 else {}
            text = self._moved(header, places)
            data = record_files.followed(data, record_files.record(kind, text, arrays, **more))
        return data

    def _moved(self, header: Any, places: list[int]) -> Any:
        """A header, whose blocks lie elsewhere now if one before them has become longer."""
        blocks = header.get("blocks") if isinstance(header, dict) else None
        if not blocks or not set(blocks) <= set(self._places):
            return header
        now = [places[min(self._places.index(at), len(places) - 1)] for at in blocks]
        return {**header, "blocks": now}

    @cached_property
    def _places(self) -> list[int]:
        found, at = [], 64
        while at < len(self._data):
            found.append(at)
            at += int(struct.unpack_from("<Q", self._data, at + 8)[0])
            at += -at % 64
        return found

    def damaged(self, rng: Random) -> bytes:
        records = list(self.records)
        # the last one is that of a session's conversation
        at = len(records) - 1 if rng.random() < 0.5 else rng.randrange(len(records))
        kind, header, arrays = records[at]
        last: dict[str, Any] = {}
        match rng.randrange(10):
            case 0:
                return of_bytes(rng, self._data, 1024)
            case 1:
                end = rng.randrange(len(self._data))
                return self._data[:end] + bytes(rng.choice((0, 0, 1, 64, 5000)))
            case 2 | 3 | 4:
                text = of_json(rng, {**header, "arrays": record_files.described(arrays)})
                records[at] = kind, text, arrays
            case 5 | 6 | 7 if arrays:
                name = rng.choice(list(arrays))
                changed = {**arrays, name: of_array(rng, arrays[name])}
                records[at] = kind, header, changed
            case 8:
                last = {rng.choice(("length", "header_bytes")): rng.choice(INTS) % 2**64}
            case _:
                other = rng.randrange(len(records))
                match rng.randrange(3):
                    case 0:
                        del records[at]
                    case 1:
                        records[at], records[other] = records[other], records[at]
                    case _:
                        records.insert(at, (rng.choice((kind, b"xxxx")), *records[other][1:]))
        return self._assembled(records, **last)


def of_array(rng: Random, array: Any) -> Any:
    """An array with a few other numbers, or of another size or shape."""
    if rng.random() < 0.05:
        one = array.reshape(-1)[: rng.choice((1, None))]
        return rng.choice((one, array[None], one.reshape(()) if one.size == 1 else one[:, None]))
    if rng.random() < 0.2:
        return array[tuple(slice(rng.randrange(n + 1)) for n in array.shape)]
    array = array.copy()
    flat = array.reshape(-1)
    for _ in range(rng.choice((1, 2, 8)) if len(flat) else 0):
        at = rng.randrange(min(len(flat), 64) if rng.random() < 0.5 else len(flat))
        raw = (rng.choice(INTS) % 2**64).to_bytes(8, "little")[: flat.itemsize]
        flat[at] = np.frombuffer(raw, flat.dtype)[0]
    return array


# -- GGUF ----------------------------------------------------------------------------------------

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


class GGUFParts:
    """A valid GGUF file in the parts that are damaged: keys with the bytes of their values, the
    descriptions of tensors, the tensors themselves."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 24
        _, self.version, self.n_tensors, n_keys = struct.unpack_from("<4sIQQ", data)
        self.keys: list[tuple[bytes, int, bytes]] = []
        for _ in range(n_keys):
            key, kind = self._string()[8:], self._number("I")
            begin = self._at
            self._skip(kind)
            self.keys.append((key, kind, data[begin : self._at]))
        begin = self._at
        for _ in range(self.n_tensors):
            self._string()
            n_dims = self._number("I")
            self._at += 8 * n_dims + 12
        self.described = data[begin : self._at]
        self.tensors = data[-(-self._at // 32) * 32 :]

    def _number(self, code: str) -> int:
        size = struct.calcsize(code)
        self._at += size
        return int(struct.unpack_from("<" + code, self._data, self._at - size)[0])

    def _string(self) -> bytes:
        begin = self._at
        length = self._number("Q")
        self._at += length
        return self._data[begin : self._at]

    def _skip(self, kind: int) -> None:
        if kind == _STRING:
            self._string()
        elif kind == _ARRAY:
            inner, n = self._number("I"), self._number("Q")
            for _ in range(n):
                self._skip(inner)
        else:
            self._at += _SIZES[kind]

    def damaged(self, rng: Random) -> bytes:
        keys, described = list(self.keys), self.described
        n_keys, n_tensors, version = len(keys), self.n_tensors, self.version
        at = rng.randrange(len(keys))
        name, kind, value = keys[at]
        match rng.randrange(8):
            case 0:
                return of_bytes(rng, self.whole(), len(self.whole()) - len(self.tensors))
            case 1 | 2:
                keys[at] = (name, *_gguf_value(rng))
            case 3:
                keys[at] = (name, kind, of_bytes(rng, value))
            case 4:
                del keys[at]
                n_keys -= rng.random() < 0.9
            case 5:
                keys[at] = (of_bytes(rng, name), kind, value)
            case 6:
                described = of_bytes(rng, described)
            case _:
                which, number = rng.randrange(3), rng.choice(INTS) % 2**64
                n_keys = number if which == 0 else n_keys
                n_tensors = number if which == 1 else n_tensors
                version = number % 2**32 if which == 2 else version
        return _gguf(version, n_tensors, n_keys, keys, described, self.tensors)

    def whole(self) -> bytes:
        counts = self.version, self.n_tensors, len(self.keys)
        return _gguf(*counts, self.keys, self.described, self.tensors)


def _gguf(
    version: int,
    n_tensors: int,
    n_keys: int,
    keys: list[tuple[bytes, int, bytes]],
    described: bytes,
    tensors: bytes,
) -> bytes:
    out = struct.pack("<4sIQQ", b"GGUF", version, n_tensors, n_keys)
    for key, kind, value in keys:
        out += struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value
    out += described
    return out + b"\0" * (-len(out) % 32) + tensors


def _gguf_value(rng: Random) -> tuple[int, bytes]:
    """Type and bytes of a value that is seldom the right one."""
    kind = rng.choice((*_SIZES, _STRING, _ARRAY, 13, 2**31))
    number = rng.choice(INTS)
    if kind == _STRING:
        text = str(rng.choice(VALUES)).encode(errors="replace")
        return kind, struct.pack("<Q", len(text) if rng.random() < 0.7 else number % 2**64) + text
    if kind == _ARRAY:
        inner = rng.choice((*_SIZES, _STRING, _ARRAY, 99))
        n = rng.choice((0, 1, 2, 3, number % 2**64))
        payload = b"".join(_element(rng, inner) for _ in range(min(n, 3)))
        return kind, struct.pack("<IQ", inner, n) + payload
    return kind, (number % 2**64).to_bytes(8, "little")[: _SIZES.get(kind, 4)]


def _element(rng: Random, kind: int) -> bytes:
    if kind == _STRING:
        return struct.pack("<Q", 1) + b"x"
    return rng.randbytes(_SIZES.get(kind, 12))
