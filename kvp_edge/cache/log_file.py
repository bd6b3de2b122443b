"""The file of a KV log: rows that are written once and mapped, so that they need no memory.

Layout: kvp_edge.files.records. The first record says which model and rows these are, each that
follows is a block (kvp_edge.cache.block_records). A crash in the middle of an append leaves a file
that holds every complete block.
"""

from __future__ import annotations

import contextlib
import errno
import io
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, BinaryIO

import numpy as np

from kvp_edge import files
from kvp_edge.binding.structs import LogLayout
from kvp_edge.cache.block_records import StoredBlock, add_block, layout_numbers
from kvp_edge.cache.kv_log import Block, Bytes
from kvp_edge.errors import OptionError
from kvp_edge.files import records

MAGIC = b"kvpklog\n"
VERSION = 1

_ABOUT = b"logf"
#: A map covers so much of what will be written next; each map takes a descriptor.
_LEAST_MAPPED, _MOST_MAPPED = 2**20, 2**27
_TRIES = 10


class LogFile:
    """A LogStore in a file.

    The file is the log's alone and private (mode 0600): it holds what was read, as keys and values.
    It has no text, so nothing can be continued from it (a session can): what a log of an ended
    process has left at ``path`` is replaced.

    Rows are written (``write``, so that a full disk is an error of ``add``) and then mapped
    read-only: the system decides which of them are in memory. The file is never shortened under a
    map: when most of it is not needed any more, another file takes its place, and blocks that
    somebody still has keep the old one.

    Args:
        path: of the file. A link is followed.
        layout: of the rows.
        about: what else the file says of itself, anything JSON can hold.

    Raises:
        OptionError: it cannot be made or written, is another Llama's, or no KV log.
    """

    def __init__(
        self, path: str | os.PathLike[str], layout: LogLayout, about: dict[str, Any] | None = None
    ) -> None:
        self._bytes_per_token = int(layout.bytes_per_token)
        self._about = {"layout": layout_numbers(layout), "about": about}
        self._failed: tuple[int, int] | None = None  # bytes live and all when rewriting failed
        try:
            self._path = files.target_of(path)
            self._file = self._begin(path)
        except OSError as error:
            raise OptionError(
                f"kv_log='{path}' cannot be used: {error.strerror or error}. Name a file in a "
                "folder that exists and that you may write to"
            ) from error

    def _begin(self, shown: str | os.PathLike[str]) -> _Growing:
        for _ in range(_TRIES):  # it may come, go or be replaced in between
            try:
                return self._anew(shown)
            except FileNotFoundError:
                with contextlib.suppress(FileExistsError):
                    return self._first()
            except _Gone:
                pass
        raise OSError(errno.EBUSY, "other programs keep changing it")

    def _first(self) -> _Growing:
        """Where there is no file."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        file = io.FileIO(os.open(self._path, flags, 0o600), "r+b")
        if not files.lock(file):
            file.close()
            raise OSError(errno.EBUSY, "another Llama has just created it")
        try:
            return _Growing(file, self._about)
        except BaseException:
            file.close()
            with contextlib.suppress(OSError):
                os.unlink(self._path)
            raise

    def _anew(self, shown: str | os.PathLike[str]) -> _Growing:
        """In place of a log that nobody uses."""
        with files.open_regular(self._path, write=True) as old:
            if not files.lock(old):
                raise OptionError(
                    f"kv_log='{shown}' is in use by another Llama, here or in another process: "
                    "each needs a file of its own"
                )
            if not files.is_at(old, self._path):
                raise _Gone
            # its maker may have been killed before it wrote the first byte
            if files.size_of(old) and old.read(len(MAGIC)) != MAGIC:
                raise OptionError(
                    f"kv_log='{shown}' exists and is not a KV log of kvp_edge, so it is not "
                    "overwritten: choose another name, or delete the file"
                )
            return self._replaced(())[0]

    def _replaced(self, blocks: Sequence[Block]) -> tuple[_Growing, list[Block]]:
        """Another file with these blocks, which has taken the place of the one at ``path``.

        Raises:
            OSError: it cannot be written; nothing has changed.
        """
        grown = None
        try:
            with files.replacing(self._path, private=True, durable=False) as part:
                # a second descriptor, as this one ends with the block; the lock is common to both
                grown = _Growing(io.FileIO(os.dup(part.fileno()), "r+b"), self._about)
                moved = [grown.add(block) for block in blocks]
        except BaseException:
            if grown is not None:
                grown.close()
            raise
        return grown, moved

    # -- LogStore ----------------------------------------------------------------------------

    def add(self, block: Block, fill: Callable[[Bytes], None]) -> Block:
        rows = np.empty(block.n * self._bytes_per_token, np.uint8)
        fill(rows)
        return self._file.add(replace(block, rows=rows))

    def keep(self, blocks: Sequence[Block]) -> Sequence[Block]:
        file = self._file
        live, size = sum(map(file.bytes_of, blocks)), file.bytes_of_blocks
        file.keep_only(blocks)
        if 2 * live < size and self._worth_a_try(live, size):
            try:
                if not files.is_at(file.file, self._path):
                    raise FileNotFoundError(errno.ENOENT, "it was moved", self._path)
                self._file, moved = self._replaced(blocks)
            except OSError:
                self._failed = live, size
            else:
                self._failed = None
                file.close()
                return moved
        return [block if file.bytes_of(block) else self._copied(block) for block in blocks]

    def _worth_a_try(self, live: int, size: int) -> bool:
        """Not for every block again, where there is no room for another file."""
        return (
            self._failed is None
            or live == 0
            or live < self._failed[0] // 2
            or size > 2 * self._failed[1]
        )

    def _copied(self, block: Block) -> Block:
        """One that was given up, and came back: it lies in a file that has no name any more."""
        try:
            return self._file.add(block)
        except (OSError, MemoryError):
            return block

    def close(self) -> None:
        """Let another have the file, and add nothing more. Rows stay where they are as long as
        somebody has them. Closing again has no effect."""
        self._file.close()


class _Gone(Exception):
    """The file lost its name while it was opened."""


class _Growing:
    """An open file of blocks, and the maps of what is in it.

    Args:
        file: an empty one, which is the object's from now on. It is not buffered: what cannot be
            written must fail at once, and leave nothing for later.
        about: what its first record says.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, file: io.FileIO, about: dict[str, Any]) -> None:
        self.file = file
        begin = records.start(MAGIC, VERSION)
        if file.write(begin) != len(begin):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._writer = records.Writer(file, len(begin))
        self._writer.add(_ABOUT, about, {})
        self._begin = records.aligned(self._writer.end)
        self._live: dict[int, int] = {}  # where a block's rows lie in memory -> bytes of its record
        self._map: mmap.mmap | None = None
        self._mapped_from = 0

    @property
    def bytes_of_blocks(self) -> int:
        return records.aligned(self._writer.end) - self._begin

    def bytes_of(self, block: Block) -> int:
        """0: it does not lie here, or is not needed any more."""
        return self._live.get(block.rows.ctypes.data, 0)

    def keep_only(self, blocks: Sequence[Block]) -> None:
        here = {block.rows.ctypes.data for block in blocks}
        self._live = {at: size for at, size in self._live.items() if at in here}

    def add(self, block: Block) -> Block:
        """Append a block with its rows, and have them mapped.

        Raises:
            OSError, MemoryError: nothing has changed.
        """
        before = self._writer.end
        try:
            record, at = add_block(self._writer, block)
            rows = self._view(at, block.rows.nbytes)
        except BaseException:
            self._writer.end = before
            # no block lies behind, and what does not lie in the file must not be in a map
            self._map = None
            with contextlib.suppress(OSError):
                self.file.truncate(before)
            raise
        self._live[rows.ctypes.data] = records.aligned(record.length)
        return replace(block, rows=rows)

    def _view(self, at: int, n: int) -> Bytes:
        """Bytes of the file in memory, read-only."""
        if self._map is None or not self._mapped_from <= at <= self._mapped_to - n:
            self._map_from(at, n)
        assert self._map is not None
        return np.frombuffer(self._map, np.uint8, n, at - self._mapped_from)

    @property
    def _mapped_to(self) -> int:
        return self._mapped_from + (0 if self._map is None else len(self._map))

    def _map_from(self, at: int, least: int) -> None:
        """Map the file from there on, with what will be written next if it can be made so long:
        what is added is a hole, and takes no room."""
        begin = at // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        ahead = min(max(_LEAST_MAPPED, self._writer.end), _MOST_MAPPED)
        end = max(begin + ahead, at + least)
        try:
            self.file.truncate(max(end, self._writer.end))
        except OSError:
            end = at + least
        self._map = mmap.mmap(
            self.file.fileno(), end - begin, access=mmap.ACCESS_READ, offset=begin
        )
        self._mapped_from = begin

    def close(self) -> None:
        if self.file.closed:
            return
        self._map = None
        with contextlib.suppress(OSError):
            self.file.truncate(self._writer.end)
        files.unlock(self.file)
        self.file.close()


def read_log(path: str | os.PathLike[str], layout: LogLayout) -> tuple[dict[str, Any], list[Block]]:
    """What a log file holds: all blocks that are complete, also those that were not needed any
    more.

    Returns:
        What the file says of itself, and the blocks, with their rows in memory.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no KV log, of another layout, or damaged before its last record.
    """
    with files.open_regular(path) as file:
        size = files.size_of(file)
        if records.version_of(file.read(records.ALIGNED), MAGIC) != VERSION:
            raise ValueError("it is not a KV log, or one of another version")
        found = [*records.all_records(file, size)]
        if not found or found[0].kind != _ABOUT:
            raise ValueError("it does not say what it holds")
        about, rest = records.Reader(file, found[0]), found[1:]
        about.finish()
        if about.header.get("layout") != layout_numbers(layout):
            raise ValueError("it has another layout")
        blocks = []
        for record in rest:
            try:
                blocks.append(_read_block(file, record, layout))
            except ValueError:
                if record is not rest[-1]:
                    raise
        return about.header, blocks


def _read_block(file: BinaryIO, record: records.Record, layout: LogLayout) -> Block:
    stored = StoredBlock(file, record, layout)
    rows = np.empty(stored.block.n * int(layout.bytes_per_token), np.uint8)
    stored.fill(rows)
    return replace(stored.block, rows=rows)
