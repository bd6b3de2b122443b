"""What a GGUF file holds, read without believing it: lengths are compared with the file's first.

The package gguf reads GGUF, too, but takes lengths as they are: an array said to have 2^40 elements
keeps it busy for ever. So it only names types here, and de-quantises. The format is defined in
ggml's docs/gguf.md.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from kvp_edge.files import size_of

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
#: struct's code for each type of a key's value, by its number; strings and arrays are not among
#: them.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
#: Longer ones are not kept: a vocabulary is of no interest here.
_LONGEST_ARRAY = 1024
#: So much is looked at in seconds, and is more than any model has.
_MOST = {"keys": 2**16, "tensors": 2**16, "strings": 2**20, "bytes of strings": 2**28}
_MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies. ``shape`` has the axis that lies together in memory last; ``kind`` is
    ggml's number of its type."""

    shape: tuple[int, ...]
    kind: int
    start: int
    nbytes: int


class GGUFFile:
    """The keys and tensors of an open file.

    Attributes:
        values: key -> int, float, bool, str, or list of these; long arrays are None.
        tensors: name -> Tensor.

    Raises:
        ValueError: it is no GGUF file, or is damaged, cut short or of another version.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._left = size_of(file)
        self._n_strings = self._string_bytes = 0
        if self._take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version, n_tensors, n_keys = self._numbers("IQQ")
        if version not in _VERSIONS:
            raise ValueError(f"it is GGUF of version {version}, not one of {_VERSIONS}")
        self._require_few("keys", n_keys)
        self._require_few("tensors", n_tensors)
        self.values: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self._string()
            if key in self.values:
                raise ValueError(f"it has the key {key!r} twice")
            (kind,) = self._numbers("I")
            self.values[key] = self._value(kind)
        self.tensors: dict[str, Tensor] = {}
        self._read_tensors(n_tensors)

    def data(self, tensor: Tensor) -> npt.NDArray[np.float32]:
        """A tensor's numbers, de-quantised: float32 of its shape.

        Raises:
            ValueError: of a type that gguf does not de-quantise; or the file is shorter by now.
        """
        import gguf  # noqa: PLC0415 (chatting with a heuristic does without it)

        self._file.seek(tensor.start)
        raw = self._file.read(tensor.nbytes)
        if len(raw) != tensor.nbytes:
            raise ValueError("it is cut short")
        kind = gguf.GGMLQuantizationType(tensor.kind)
        rows = np.frombuffer(raw, np.uint8).reshape(*tensor.shape[:-1], -1)
        try:
            found = gguf.quants.dequantize(rows, kind)
        except NotImplementedError as error:
            raise ValueError(f"gguf cannot de-quantise the type {kind.name}") from error
        return np.asarray(found, np.float32).reshape(tensor.shape)

    # -- parsing -----------------------------------------------------------------------------

    def _require(self, n_bytes: int) -> None:
        if n_bytes > self._left:
            raise ValueError(
                f"it is cut short: {n_bytes} bytes should follow, but there are {self._left}"
            )
        self._left -= n_bytes

    def _take(self, n_bytes: int) -> bytes:
        self._require(n_bytes)
        return self._file.read(n_bytes)

    def _numbers(self, codes: str) -> tuple[Any, ...]:
        return struct.unpack("<" + codes, self._take(struct.calcsize("<" + codes)))

    def _string(self) -> str:
        self._n_strings += 1
        self._require_few("strings", self._n_strings)
        (length,) = self._numbers("Q")
        self._string_bytes += length
        self._require_few("bytes of strings", self._string_bytes)
        return self._take(length).decode()

    def _pass_strings(self, n: int) -> None:
        """What ``_string`` does ``n`` times, but quickly: a vocabulary has a million of them."""
        self._n_strings += n
        self._require_few("strings", self._n_strings)
        room = _MOST["bytes of strings"] - self._string_bytes
        read, number, passed = self._file.read, struct.Struct("<Q").unpack, 0
        for _ in range(n):
            begin = read(8)
            if len(begin) < 8:
                self._require(self._left + 1)
            (length,) = number(begin)
            passed += length
            if passed > room:
                self._require_few("bytes of strings", self._string_bytes + passed)
            read(length)  # quicker than to seek, as short as they are
        self._string_bytes += passed
        self._require(8 * n + passed)

    def _require_few(self, what: str, n: int) -> None:
        if n > _MOST[what]:
            raise ValueError(f"it claims to have {n} {what}, more than {_MOST[what]}")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise ValueError(f"it has a value of the unknown type {kind}")
        return self._numbers(_SCALARS[kind])[0]

    def _array(self) -> list[Any] | None:
        kind, n = self._numbers("IQ")
        if kind == _STRING:
            if n <= _LONGEST_ARRAY:
                return [self._string() for _ in range(n)]
            self._pass_strings(n)
            return None
        if kind not in _SCALARS:
            raise ValueError(f"it has an array of the unknown type {kind}")
        size = n * struct.calcsize(_SCALARS[kind])
        if n <= _LONGEST_ARRAY:
            return list(self._numbers(f"{n}{_SCALARS[kind]}"))
        self._require(size)
        self._file.seek(size, 1)
        return None

    def _read_tensors(self, n: int) -> None:
        import gguf  # noqa: PLC0415

        found: list[tuple[str, tuple[int, ...], int, int]] = []
        for _ in range(n):
            name = self._string()
            (n_dims,) = self._numbers("I")
            if not 1 <= n_dims <= _MAX_DIMENSIONS:
                raise ValueError(f"its tensor {name!r} has {n_dims} dimensions")
            dims = self._numbers(f"{n_dims}Q")
            kind, offset = self._numbers("IQ")
            found.append((name, tuple(reversed(dims)), kind, offset))
        alignment = self.values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"its general.alignment is {alignment!r}")
        begin = -(-self._file.tell() // alignment) * alignment
        end = size_of(self._file)
        for name, shape, kind, offset in found:
            if name in self.tensors:
                raise ValueError(f"it has the tensor {name!r} twice")
            if kind not in gguf.GGML_QUANT_SIZES:
                raise ValueError(f"its tensor {name!r} is of the unknown type {kind}")
            n_block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
            if shape[-1] % n_block:
                raise ValueError(f"its tensor {name!r} has rows that are not whole blocks")
            nbytes = prod(shape) // n_block * block_bytes
            if begin + offset + nbytes > end:
                raise ValueError(f"it is cut short: its tensor {name!r} ends beyond it")
            self.tensors[name] = Tensor(shape, kind, begin + offset, nbytes)
