"""Session files: everything that a bounded chat needs to continue where it stopped.

Layout, all numbers little-endian:

    8 bytes   magic
    u32       version of this layout
    u64       length of the header
    header    JSON in UTF-8: what the session was made with, and each array's name, type and shape
    arrays    one after the other, raw
    32 bytes  SHA-256 of all bytes before it

The checksum detects damage but does not prove origin: load only sessions that you saved.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from kvp_edge import files
from kvp_edge.errors import SessionError
from kvp_edge.files.json_values import parse, require, shortened

MAGIC = b"kvpsess\n"
VERSION = 4

_HEAD = struct.Struct("<8sIQ")
_DIGEST_BYTES = 32
_MAX_HEADER_BYTES = 2**26
_MAX_DIMENSIONS = 4
_DTYPES = {"uint8", "int32", "float32"}

#: Fields of a header, and their types; numbers in ``_COUNTS`` are from 0 to ``_MOST``.
_CONVERSATION = {
    "made_with": dict[str, Any],
    "table": dict[str, int],
    "protected_prefix": int,
    "evictions": int,
    "evictions_as_state": int,
    "eviction_ms": float,
    "extra": Any,
}
_RESCUED = {"rescue": str, "model": str, "protected_prefix": int, "extra": Any}
_COUNTS = {"protected_prefix", "evictions", "evictions_as_state", "eviction_ms"}
_MOST = 2**31 - 1

#: Arrays of a conversation: type and number of dimensions.
_ARRAYS = {
    "tokens": ("int32", 1),
    "packed_indices": ("int32", 3),
    "packed_rope_positions": ("int32", 3),
    "packed_llama_positions": ("int32", 1),
    "wanted": ("float32", 3),
    "scores": ("float32", 3),
    "spans": ("int32", 2),
    "state": ("uint8", 1),
}

#: What ``file_identity`` reads of a file: its ends, and samples spread over the rest.
_END_BYTES, _SAMPLE_BYTES, _N_SAMPLES = 2**20, 2**16, 64

Array = npt.NDArray[Any]


def file_identity(path: str | os.PathLike[str]) -> str:
    """Tells one model file from another without reading all of it: SHA-256 over its size, its first
    and last MiB and 64 samples of 64 KiB between them. Metadata lies in the first part; other
    weights differ nearly everywhere."""
    size = os.path.getsize(path)
    digest = hashlib.sha256(struct.pack("<Q", size))
    with open(path, "rb") as file:
        digest.update(file.read(_END_BYTES))
        step = max(1, size // (_N_SAMPLES + 1))
        for i in range(1, _N_SAMPLES + 1):
            file.seek(i * step)
            digest.update(file.read(_SAMPLE_BYTES))
        file.seek(max(0, size - _END_BYTES))
        digest.update(file.read(_END_BYTES))
    return digest.hexdigest()


@dataclass(frozen=True)
class _Described:
    """An array as the header describes it."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write(
    path: str | os.PathLike[str],
    header: dict[str, Any],
    arrays: dict[str, Array],
    *,
    follow_link: bool = True,
) -> None:
    """Write a session file. An existing file is replaced atomically or stays unchanged.

    Args:
        follow_link: see files.replacing.

    Raises:
        SessionError: the header is no JSON, or the file cannot be written.
    """
    arrays = {
        name: np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        for name, array in arrays.items()
    }
    described = [
        {"name": name, "dtype": array.dtype.name, "shape": array.shape}
        for name, array in arrays.items()
    ]
    try:
        text = json.dumps({**header, "arrays": described}, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise SessionError(f"the session's header cannot be written as JSON: {error}") from error
    try:
        with files.replacing(path, private=True, follow_link=follow_link) as file:
            digest = hashlib.sha256()
            parts: list[Any] = [_HEAD.pack(MAGIC, VERSION, len(text)), text]
            parts += [array.reshape(-1).view(np.uint8) for array in arrays.values()]
            for part in parts:
                digest.update(part)
                file.write(part)
            file.write(digest.digest())
    except OSError as error:
        # str(error) would name the file that is written to the side
        reason = error.strerror or error
        raise SessionError(f"the session cannot be written to '{path}': {reason}") from error


def read(
    path: str | os.PathLike[str], most_bytes: int | None = None
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Read a session file and check that all of it is what was written.

    Nothing longer than the file is allocated. The meaning of the header's other fields and of the
    arrays is not checked: see ``require_conversation``.

    Args:
        most_bytes: a file whose arrays have more is refused before they are read.

    Returns:
        The header and the arrays given to ``write``.

    Raises:
        SessionError: no such file, no regular one, not a session, of another version, cut short,
            damaged or too large.
    """
    try:
        with files.open_regular(path) as file:
            return _read(file, path, most_bytes)
    except OSError as error:
        reason = error.strerror or error
        raise SessionError(f"the session '{path}' cannot be read: {reason}") from error


def _read(
    file: BinaryIO, path: str | os.PathLike[str], most_bytes: int | None
) -> tuple[dict[str, Any], dict[str, Array]]:
    size = files.size_of(file)
    head = file.read(_HEAD.size)
    if size < _HEAD.size + _DIGEST_BYTES or head[:8] != MAGIC:
        raise SessionError(f"'{path}' is not a session of kvp_edge")
    _, version, header_bytes = _HEAD.unpack(head)
    if version != VERSION:
        raise SessionError(
            f"'{path}' is a session of version {version}, but this kvp_edge reads version {VERSION}"
        )
    body = size - _HEAD.size - _DIGEST_BYTES
    try:
        if header_bytes > min(body, _MAX_HEADER_BYTES):
            raise ValueError(f"its header would have {header_bytes} bytes")
        text = file.read(header_bytes)
        header, described = _parse(text, body)
        array_bytes = sum(one.nbytes for one in described)
        if array_bytes != body - header_bytes:
            raise ValueError(
                f"its arrays have {array_bytes} bytes, and the file has {body - header_bytes} for "
                "them"
            )
    except ValueError as error:
        raise SessionError(f"the session '{path}' is damaged or cut short: {error}") from error
    if most_bytes is not None and array_bytes > most_bytes:
        raise SessionError(
            f"the session '{path}' does not fit: it has {array_bytes} bytes of cache, but the "
            f"loaded one has no more than {most_bytes}"
        )
    digest = hashlib.sha256(head + text)
    arrays = {}
    for one in described:
        array = np.empty(one.shape, one.dtype)
        raw = array.reshape(-1).view(np.uint8).data
        if file.readinto(raw) != len(raw):  # type: ignore[attr-defined]
            break  # it has become shorter meanwhile
        digest.update(raw)
        arrays[one.name] = array.astype(one.dtype.newbyteorder("="), copy=False)
    if digest.digest() != file.read(_DIGEST_BYTES):
        raise SessionError(f"the session '{path}' is damaged or cut short: its checksum is wrong")
    return header, arrays


def _parse(text: bytes, most: int) -> tuple[dict[str, Any], list[_Described]]:
    """The header and what it says of the arrays, of which none has more than ``most`` bytes.

    Raises:
        ValueError: it is no header.
    """
    header = require(parse(text), {"arrays": list[dict[str, Any]]})
    found: dict[str, _Described] = {}
    for entry in header.pop("arrays"):
        require(entry, {"name": str, "dtype": str, "shape": list[int]})
        dtype = np.dtype(_known(entry["dtype"])).newbyteorder("<")
        one = _Described(entry["name"], dtype, tuple(entry["shape"]))
        # numpy does not make an empty array of [0, 2^63], either
        sizes = [max(n, 1) for n in one.shape]
        too_large = len(sizes) > _MAX_DIMENSIONS or math.prod(sizes) * one.dtype.itemsize > most
        if too_large or min(one.shape, default=0) < 0:
            raise ValueError(f"it has an array of shape {shortened(entry['shape'])}")
        if one.name in found:
            raise ValueError(f"it has two arrays '{one.name}'")
        found[one.name] = one
    return header, list(found.values())


def _known(dtype: str) -> str:
    if dtype not in _DTYPES:
        raise ValueError(f"it has an array of type {shortened(dtype)}")
    return dtype


def require_conversation(name: str, header: dict[str, Any], arrays: dict[str, Array]) -> None:
    """Refuse a session whose header or arrays are not those of ``Llama.save_session``.

    Args:
        name: what it is called in a sentence, here and below.

    Raises:
        SessionError: naming what is missing or of another type.
    """
    _require(name, header, _CONVERSATION, arrays, _ARRAYS)


def require_rescued(name: str, header: dict[str, Any], arrays: dict[str, Array]) -> None:
    """Refuse a file whose header or arrays are not those of ``Llama.rescue_to``.

    Raises:
        SessionError: naming what is missing or of another type.
    """
    _require(name, header, _RESCUED, arrays, {"tokens": _ARRAYS["tokens"]})


def _require(
    name: str,
    header: dict[str, Any],
    fields: dict[str, Any],
    arrays: dict[str, Array],
    kinds: dict[str, tuple[str, int]],
) -> None:
    try:
        require(header, fields)
        for count in _COUNTS & fields.keys():
            if not 0 <= header[count] <= _MOST:
                raise ValueError(f"'{count}' cannot be {shortened(header[count])}")
        if arrays.keys() != kinds.keys():
            raise ValueError(f"it has the arrays {shortened(sorted(arrays))}")
        for array, kind in kinds.items():
            if (arrays[array].dtype.name, arrays[array].ndim) != kind:
                raise ValueError(f"its {array} must be {kind[0]} of {kind[1]} dimensions")
    except ValueError as error:
        raise SessionError(f"{name} is inconsistent: {error}") from error


def require_tokens(name: str, tokens: Array, n_vocab: int) -> None:
    """Refuse tokens that the model does not have: llama.cpp would end the process.

    Raises:
        SessionError: naming the first.
    """
    foreign = tokens[(tokens < 0) | (tokens >= n_vocab)]
    if len(foreign):
        raise SessionError(f"{name} is inconsistent: the model has no token {foreign[0]}")


def require_same(name: str, saved: dict[str, Any], here: dict[str, Any]) -> None:
    """Refuse a session that does not match the loaded model and options.

    Raises:
        SessionError: naming the first difference and both sides.
    """
    for key, value in here.items():
        if saved.get(key) == value:
            continue
        if key == "model":  # two checksums
            raise SessionError(
                f"{name} was saved with another model file (model = "
                f"{str(saved.get(key))[:8]}..., here {str(value)[:8]}...): load that one to "
                "continue"
            )
        theirs = shortened(saved.get(key)).strip("'")
        raise SessionError(
            f"{name} was saved with {key} = {theirs}, but here it is {value}: load the model "
            "with the saved value to resume it"
        )
