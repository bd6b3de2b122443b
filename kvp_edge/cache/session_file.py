"""Session files: everything that a bounded chat needs to continue where it stopped.

Layout: kvp_edge.files.records. A conversation is one record: what the session was made with, the
table, and llama.cpp's state. If there is a KV log, its blocks are records before it
(kvp_edge.cache.block_records), and it says where those lie that belong to it.

The last conversation counts. Who saves again to the same file appends: the blocks that are new, and
the conversation as it is now. So what is saved of a long conversation is not written again, and an
append that was interrupted leaves the conversation before it.

The checksums detect damage but do not prove origin: load only sessions that you saved.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from kvp_edge import files
from kvp_edge.binding.structs import LogLayout
from kvp_edge.cache.block_records import StoredBlock, add_block
from kvp_edge.cache.kv_log import Block
from kvp_edge.cache.table import Table
from kvp_edge.cache.types import KVTypes, type_name
from kvp_edge.errors import SessionError
from kvp_edge.files import records
from kvp_edge.files.json_values import is_a, require, shortened
from kvp_edge.files.records import Array, Record, Writer

MAGIC = b"kvpsess\n"
VERSION = 5

_KIND = b"conv"

#: Fields of a header, and their types; numbers in ``_COUNTS`` are from 0 to ``_MOST``.
_CONVERSATION = {
    "made_with": dict[str, Any],
    "table": dict[str, int],
    "protected_prefix": int,
    "log": dict[str, Any] | None,
    "evictions": int,
    "evictions_as_state": int,
    "eviction_ms": float,
    "recalls": int,
    "recalled": int,
    "recall_ms": float,
    "extra": Any,
}

#: Those that older files lack.
_LATER = {"recalls": 0, "recalled": 0, "recall_ms": 0.0}
_RESCUED = {"rescue": str, "model": str, "protected_prefix": int, "extra": Any}
_COUNTS = {"protected_prefix", "evictions", "evictions_as_state", "eviction_ms", *_LATER}
_MOST = 2**31 - 1

#: Arrays of a conversation: type and number of dimensions; None: as many as the policy gives them.
_ARRAYS = {
    "tokens": ("int32", 1),
    "packed_indices": ("int32", 3),
    "packed_rope_positions": ("int32", 3),
    "packed_llama_positions": ("int32", 1),
    "wanted": ("float32", 3),
    "scores": ("float32", None),
    "spans": ("int32", 2),
    "state": ("uint8", 1),
}

#: What ``file_identity`` reads of a file: its ends, and samples spread over the rest.
_END_BYTES, _SAMPLE_BYTES, _N_SAMPLES = 2**20, 2**16, 64


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


# -- writing --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A file as it was when a session was written to it, or read from it.

    Attributes:
        path: of the file, not of a link.
        identity: changes with the file.
        blocks: those that it holds. They are known by their scores, as these stay the same when
            rows are moved; and not kept alive.
    """

    path: str
    identity: tuple[int, ...]
    blocks: tuple[tuple[weakref.ref[Array], Record], ...]

    def records_of(self, blocks: Sequence[Block]) -> list[Record | None]:
        """Where each of these lies; None: not here."""
        there = {id(scores): record for ref, record in self.blocks if (scores := ref()) is not None}
        return [there.get(id(block.scores)) for block in blocks]


def write(
    path: str | os.PathLike[str],
    header: dict[str, Any],
    arrays: dict[str, Array],
    blocks: Sequence[Block] = (),
    *,
    since: Place | None = None,
    follow_link: bool = True,
) -> Place:
    """Write a session file. An existing file is replaced atomically, or appended to, or stays
    unchanged.

    Args:
        blocks: of the KV log.
        since: where this conversation was written or read last. If that is the file at ``path``
            still, and most of what it would be then is needed, what is new is appended.
        follow_link: see files.replacing.

    Raises:
        SessionError: the header is no JSON, or the file cannot be written.
    """
    try:
        json.dumps(header, allow_nan=False)  # before blocks are written in vain
    except (TypeError, ValueError, RecursionError) as error:
        raise SessionError(f"the session's header cannot be written as JSON: {error}") from error
    try:
        target = files.target_of(path, follow_link=follow_link)
        if since is not None and since.path == target:
            place = _append(since, header, arrays, blocks)
            if place is not None:
                return place
        with files.replacing(path, private=True, follow_link=follow_link) as file:
            file.write(records.start(MAGIC, VERSION))
            writer = Writer(file, records.ALIGNED)
            found = [add_block(writer, block)[0] for block in blocks]
            _add_conversation(writer, header, arrays, found)
            file.flush()
            return _place(file, target, blocks, found)
    except OSError as error:
        # str(error) would name the file that is written to the side
        reason = error.strerror or error
        raise SessionError(f"the session cannot be written to '{path}': {reason}") from error


def _append(
    since: Place, header: dict[str, Any], arrays: dict[str, Array], blocks: Sequence[Block]
) -> Place | None:
    """Returns:
        None: it is another file by now, or more than half of it would not be needed.

    Raises:
        OSError: it cannot be written; the file is what it was.
    """
    there = since.records_of(blocks)
    new = [block for block, record in zip(blocks, there, strict=True) if record is None]
    used = records.ALIGNED + sum(records.aligned(r.length) for r in there if r is not None)
    size = since.identity[_SIZE]
    added = sum(_bytes_of(block) for block in new) + sum(a.nbytes for a in arrays.values())
    if len(new) == len(blocks) or 2 * (size - used) > size + added:
        return None
    try:
        file = files.open_regular(since.path, write=True)
    except OSError:
        return None
    with file:
        if not files.lock(file) or not _is_still(file, since):
            return None
        files.take_away_left_overs(since.path)
        writer = Writer(file, size)
        try:
            added_records = iter([add_block(writer, block)[0] for block in new])
            if new:
                os.fsync(file.fileno())  # the conversation must not be there without its blocks
            found = [record or next(added_records) for record in there]
            _add_conversation(writer, header, arrays, found)
            os.fsync(file.fileno())
        except BaseException:
            with contextlib.suppress(OSError):  # else a reader passes over what is there
                file.truncate(size)
            raise
        return _place(file, since.path, blocks, found)


def _bytes_of(block: Block) -> int:
    return block.rows.nbytes + block.scores.nbytes + block.spans.nbytes


def _add_conversation(
    writer: Writer, header: dict[str, Any], arrays: dict[str, Array], blocks: Sequence[Record]
) -> None:
    writer.add(_KIND, {**header, "blocks": [record.start for record in blocks]}, arrays)


#: Of a file's identity: where its size is.
_SIZE = 2


def _identity(file: BinaryIO) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _is_still(file: BinaryIO, place: Place) -> bool:
    """Whether it is what it was, for nobody else to read, and has no other name: who made that
    wants to have what was there."""
    status = os.fstat(file.fileno())
    private = not status.st_mode & 0o077 or os.name == "nt"
    return _identity(file) == place.identity and private and status.st_nlink == 1


def _place(file: BinaryIO, path: str, blocks: Sequence[Block], found: Sequence[Record]) -> Place:
    refs = (weakref.ref(block.scores) for block in blocks)
    return Place(path, _identity(file), tuple(zip(refs, found, strict=True)))


# -- reading --------------------------------------------------------------------------------------


class Session:
    """An open session file.

    Attributes:
        header, arrays: what was given to ``write``.
    """

    def __init__(
        self, file: BinaryIO, path: str | os.PathLike[str], most_bytes: int | None
    ) -> None:
        self._file, self._path = file, path
        size = files.size_of(file)
        begin = file.read(records.ALIGNED)
        version = records.version_of(begin, MAGIC)
        if version is None:
            raise SessionError(f"'{path}' is not a session of kvp_edge")
        if version != VERSION:
            raise SessionError(
                f"'{path}' is a session of version {version}, but this kvp_edge reads version "
                f"{VERSION}"
            )
        try:
            if begin != records.start(MAGIC, VERSION):
                raise ValueError("its first bytes are wrong")
            self._find(size, most_bytes)
        except SessionError:
            raise
        except ValueError as error:
            raise self.damaged(error) from error

    def _find(self, size: int, most_bytes: int | None) -> None:
        """The last conversation that is complete."""
        last, failure = records.last_record(self._file, size), None
        if last is not None:
            try:
                self._read(last, most_bytes)
                self._torn = False
                return
            except _Damaged as error:
                failure = error
        for record in reversed([*records.all_records(self._file, size)]):
            if record.kind != _KIND or record == last:
                continue
            with contextlib.suppress(_Damaged):
                self._read(record, most_bytes)
                self._torn = True
                warnings.warn(
                    f"the last save of the session '{self._path}' was not completed, or is "
                    "damaged: it continues from the save before",
                    stacklevel=2,
                )
                return
        raise failure or ValueError("it has no complete conversation")

    def _read(self, record: Record, most_bytes: int | None) -> None:
        try:
            if record.kind != _KIND:
                raise ValueError(f"it ends with a record of kind {record.kind!r}")
            reader = records.Reader(self._file, record)
            header = require(reader.header, {"blocks": list[int]})
            if most_bytes is not None and reader.array_bytes > most_bytes:
                raise SessionError(
                    f"the session '{self._path}' does not fit: it has {reader.array_bytes} bytes "
                    f"of cache, but the loaded one has no more than {most_bytes}"
                )
            arrays = {array.name: reader.read() for array in reader.arrays}
            reader.finish()
        except SessionError:
            raise
        except ValueError as error:
            raise _Damaged(str(error)) from error
        self._blocks, self._end = header.pop("blocks"), record.start
        self.header, self.arrays = header, arrays

    def blocks(self, layout: LogLayout, end: int, seen: int) -> list[StoredBlock]:
        """Those of the KV log, ascending, without their rows.

        Args:
            layout: that they must have.
            end: the log's; no block reaches further.
            seen: no span reaches further.

        Raises:
            SessionError: they are damaged or do not add up.
        """
        found: list[StoredBlock] = []
        token, span = 0, 0
        try:
            if len(self._blocks) > end:
                raise ValueError(f"it has {len(self._blocks)} blocks of {end} tokens")
            for at in self._blocks:
                record = records.record_at(self._file, at, self._end)
                if record is None:
                    raise ValueError(f"it has no block at byte {at}")
                found.append(StoredBlock(self._file, record, layout))
                block = found[-1].block
                if not token <= block.first < block.end <= end:
                    raise ValueError(
                        f"its block of tokens {block.first} to {block.end} is out of place"
                    )
                if len(block.spans) and not span <= block.spans[0, 0] < block.spans[-1, 1] <= seen:
                    raise ValueError(f"its block at token {block.first} has invalid spans")
                token, span = block.end, int(block.spans[-1, 1]) if len(block.spans) else span
        except (OSError, ValueError) as error:
            raise self.damaged(error) from error
        return found

    def place(self, blocks: Sequence[StoredBlock]) -> Place | None:
        """For ``write``; None: nothing may be appended, as the file's end is damaged.

        Args:
            blocks: what ``blocks`` has returned.
        """
        if self._torn:
            return None
        target = os.path.realpath(self._path)
        held, found = [b.block for b in blocks], [b.record for b in blocks]
        return _place(self._file, target, held, found)

    def damaged(self, error: Exception) -> SessionError:
        """For what is found only when rows are read."""
        return SessionError(f"the session '{self._path}' is damaged or cut short: {error}")


class _Damaged(ValueError):
    """A conversation that cannot be read."""


@contextlib.contextmanager
def opened(path: str | os.PathLike[str], most_bytes: int | None = None) -> Iterator[Session]:
    """Read a session file and check that its conversation is what was written.

    Nothing longer than the file is allocated. The meaning of the header's other fields and of the
    arrays is not checked: see ``require_conversation``.

    Args:
        most_bytes: a file whose arrays have more is refused before they are read.

    Raises:
        SessionError: no such file, no regular one, not a session, of another version, cut short,
            damaged or too large.
    """
    with contextlib.ExitStack() as stack:
        try:
            session = Session(stack.enter_context(files.open_regular(path)), path, most_bytes)
        except OSError as error:
            reason = error.strerror or error
            raise SessionError(f"the session '{path}' cannot be read: {reason}") from error
        yield session


def read(
    path: str | os.PathLike[str], most_bytes: int | None = None
) -> tuple[dict[str, Any], dict[str, Array]]:
    """The header and the arrays of a session file, as ``opened`` finds them; without blocks."""
    with opened(path, most_bytes) as session:
        return session.header, session.arrays


# -- what it must be ------------------------------------------------------------------------------


def require_conversation(name: str, header: dict[str, Any], arrays: dict[str, Array]) -> None:
    """Refuse a session whose header or arrays are not those of ``Llama.save_session``. What the
    header of an older file lacks is added to it.

    Args:
        name: what it is called in a sentence, here and below.

    Raises:
        SessionError: naming what is missing or of another type.
    """
    header.update(_LATER | header)
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
    kinds: Mapping[str, tuple[str, int | None]],
) -> None:
    try:
        require(header, fields)
        for count in _COUNTS & fields.keys():
            if not 0 <= header[count] <= _MOST:
                raise ValueError(f"'{count}' cannot be {shortened(header[count])}")
        if arrays.keys() != kinds.keys():
            raise ValueError(f"it has the arrays {shortened(sorted(arrays))}")
        for array, (dtype, ndim) in kinds.items():
            found = arrays[array]
            if found.dtype.name != dtype or ndim not in (None, found.ndim):
                dimensions = "" if ndim is None else f" of {ndim} dimensions"
                raise ValueError(f"its {array} must be {dtype}{dimensions}")
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


def require_log(name: str, log: dict[str, Any], layout: dict[str, int], table: Table) -> int:
    """Refuse what a header says of a KV log if that cannot go on here.

    Args:
        log: it.
        layout: of the log here.
        table: of the conversation.

    Returns:
        The log's end.

    Raises:
        SessionError: naming the first difference and both sides, or what does not add up.
    """
    try:
        require(log, {"layout": dict[str, int], "end": int})
        # what is not logged yet must be held
        if not table.tail <= log["end"] <= table.seen:
            raise ValueError(f"its KV log ends at token {shortened(log['end'])}")
    except ValueError as error:
        raise SessionError(f"{name} is inconsistent: {error}") from error
    for key, value in layout.items():
        theirs = log["layout"].get(key)
        if theirs != value:
            raise SessionError(
                f"{name} was saved with a KV log of {key} = {shortened(theirs)}, but here it is "
                f"{value}: load the model with the same kv_log_type, or with recall='off' to leave "
                "the log out"
            )
    return int(log["end"])


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
        types = [saved.get("type_k"), saved.get("type_v")]
        if key in ("type_k", "type_v") and is_a(types, list[int]):
            were = KVTypes(saved["type_k"], saved["type_v"])
            raise SessionError(
                f"{name} was saved with {key} = {type_name(saved[key])}, but here it is "
                f"{type_name(value)}: load the model with kv_type='{were}' to resume it"
            )
        theirs = shortened(saved.get(key)).strip("'")
        raise SessionError(
            f"{name} was saved with {key} = {theirs}, but here it is {value}: load the model "
            "with the saved value to resume it"
        )
