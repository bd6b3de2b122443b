"""Session files: everything that a bounded chat needs to go on as if it had never stopped.

Layout, all numbers little-endian:

    8 bytes   magic
    u32       version of this layout
    u64       length of the header
    header    JSON in UTF-8: what the session was made with, and each array's name, type and shape
    arrays    one after the other, raw
    32 bytes  SHA-256 of all bytes before it

The checksum finds damage, it proves no origin: load only sessions that you saved.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvp_edge.errors import SessionError
from kvp_edge.whole_file import replacing

MAGIC = b"kvpsess\n"
VERSION = 2

_HEAD = struct.Struct("<8sIQ")
_DIGEST_BYTES = 32
_MAX_HEADER_BYTES = 2**26
_DTYPES = {"uint8", "int32", "float32"}

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


def write(path: str | os.PathLike[str], header: dict[str, Any], arrays: dict[str, Array]) -> None:
    """Write a session file; one of that name is replaced at once or stays as it was.

    Raises:
        SessionError: the header is no JSON, or the file cannot be written.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    described = [
        {"name": name, "dtype": array.dtype.name, "shape": array.shape}
        for name, array in arrays.items()
    ]
    try:
        text = json.dumps({**header, "arrays": described}, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise SessionError(f"the session's header cannot be written as JSON: {error}") from error
    try:
        with replacing(Path(path)) as file:
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


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Array]]:
    """Read a session file and check that all of it is what was written.

    Returns:
        The header and the arrays given to ``write``.

    Raises:
        SessionError: no such file, not a session, of another version, cut short or damaged.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        reason = error.strerror or error
        raise SessionError(f"the session '{path}' cannot be read: {reason}") from error
    if len(data) < _HEAD.size + _DIGEST_BYTES or data[:8] != MAGIC:
        raise SessionError(f"'{path}' is not a session of kvp_edge")
    _, version, header_bytes = _HEAD.unpack_from(data)
    if version != VERSION:
        raise SessionError(
            f"'{path}' is a session of version {version}, and this kvp_edge knows version {VERSION}"
        )
    end = len(data) - _DIGEST_BYTES
    if hashlib.sha256(memoryview(data)[:end]).digest() != data[end:]:
        raise SessionError(f"the session '{path}' is damaged or cut short: its checksum is wrong")
    at = _HEAD.size + header_bytes
    try:
        if header_bytes > _MAX_HEADER_BYTES:
            raise ValueError("the header is too long")
        header = json.loads(data[_HEAD.size : at])
        arrays = {}
        for described in header.pop("arrays"):
            if described["dtype"] not in _DTYPES:
                raise ValueError(f"an array of type {described['dtype']}")
            dtype, shape = np.dtype(described["dtype"]), [int(n) for n in described["shape"]]
            count = int(np.prod(shape, dtype=object))
            if min(shape, default=0) < 0 or count * dtype.itemsize > end - at:
                raise ValueError(f"an array of shape {shape}")
            array = np.frombuffer(data, dtype, count, at).reshape(shape)
            arrays[described["name"]] = array
            at += array.nbytes
        if at != end:
            raise ValueError(f"{end - at} bytes more than its arrays")
    except (KeyError, TypeError, ValueError) as error:
        raise SessionError(f"the session '{path}' does not add up: {error}") from error
    return header, arrays


def require_same(path: str | os.PathLike[str], saved: dict[str, Any], here: dict[str, Any]) -> None:
    """Refuse a session that was made with anything else than what is loaded here.

    Raises:
        SessionError: naming the first difference and both sides.
    """
    for name, value in here.items():
        if saved.get(name) == value:
            continue
        if name == "model":  # two checksums
            raise SessionError(
                f"the session '{path}' was saved with model = {str(saved.get(name))[:8]}..., and "
                f"here it is {str(value)[:8]}...: that is another model file, which must be loaded "
                "to go on"
            )
        raise SessionError(
            f"the session '{path}' was saved with {name} = {saved.get(name)}, and here it is "
            f"{value}: a cache can only be resumed with what it was made with"
        )
