"""Files that others may have made or may read: opened only if they are files, replaced whole.

**Reading.** ``open_regular`` opens nothing but regular files: a FIFO would make a program wait for
ever, a device such as /dev/zero has no end.

**Writing.** ``replacing`` writes to a part, ``NAME.xxxxxxxx.part`` beside the target, and renames
it when all of it is on the disk. So the target is the old file or the new one, whatever happens: a
full disk, Ctrl-C, a kill, a power cut.

A part is locked (flock) from its making until it is renamed or taken away, and the system lets the
lock go when its writer dies, however it dies. That is how a left-over part is told from one that is
being written: whoever saves under the same name takes away the parts that nobody holds.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows: none of the parts that were left is taken away
    fcntl = None  # type: ignore[assignment]
_msvcrt: Any = importlib.import_module("msvcrt") if os.name == "nt" else None

#: Windows locks bytes, and lets nobody else read or write them: the last that can be locked.
_LOCKED_BYTE = 2**31 - 2
#: No file is called that: it holds a NUL byte, or characters that file names here cannot have.
_NO_NAME = "it is not a file name"
_O_BINARY = getattr(os, "O_BINARY", 0)
_O_NONBLOCK = getattr(os, "O_NONBLOCK", 0)


def _refuse_special(mode: int, path: str | os.PathLike[str]) -> None:
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))


def open_regular(path: str | os.PathLike[str], *, write: bool = False) -> BinaryIO:
    """Open a file without ever waiting for it.

    Args:
        write: for reading and writing, not buffered; else for reading.

    Raises:
        OSError: there is none, it cannot be opened so, or it is no regular file (a folder, a FIFO,
            a device...).
    """
    # to open some devices does something, so the look comes first; what is opened is what counts
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:
        raise OSError(errno.EINVAL, _NO_NAME, os.fspath(path)) from error
    _refuse_special(mode, path)

    def opener(path: str, flags: int) -> int:
        return os.open(path, flags | _O_NONBLOCK)

    file: BinaryIO
    if write:
        file = open(path, "r+b", buffering=0, opener=opener)  # noqa: SIM115
    else:
        file = open(path, "rb", opener=opener)  # noqa: SIM115
    try:
        _refuse_special(os.fstat(file.fileno()).st_mode, path)
    except BaseException:
        file.close()
        raise
    return file


def size_of(file: BinaryIO) -> int:
    """Bytes of an open file, to compare lengths with before anything of such a length is made."""
    return os.fstat(file.fileno()).st_size


def read_regular(path: str | os.PathLike[str], most: int) -> bytes:
    """The bytes of a file.

    Args:
        most: a file that has more bytes is refused before it is read.

    Raises:
        OSError: see ``open_regular``; or it is too large.
    """
    with open_regular(path) as file:
        size = size_of(file)
        if size > most:
            raise OSError(errno.EFBIG, f"it has more than {most} bytes", os.fspath(path))
        return file.read(size)


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike[str],
    *,
    private: bool = False,
    follow_link: bool = True,
    durable: bool = True,
) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of ``path`` when the block ends without an exception.

    Its name is in ``.name``, for libraries that want one: they may open it again, not replace it.
    It is locked (``lock``), and stays so if the block keeps a copy of its descriptor (os.dup).

    Args:
        private: others cannot read it (mode 0600): it holds what somebody said or read. Else
            it has the rights that new files have here.
        follow_link: a link stays, and what it points to is replaced. False: a link is refused, for
            names that somebody else may have chosen.
        durable: it is on the disk before it takes the place. False: not for a file that is of no
            use after a power cut.

    Raises:
        OSError: it cannot be written, or what has this name is no regular file. What was there
            before is as it was.
    """
    target = target_of(path, follow_link=follow_link)
    take_away_left_overs(target)
    part, made = "", False
    try:
        while not made:
            part = f"{target}.{secrets.token_hex(4)}.part"
            made = True  # before it is true: an interrupt must find it so
            try:
                file = open(part, "x+b", opener=_maker(0o600 if private else 0o666))  # noqa: SIM115
            except FileExistsError:
                made = False
                continue
            if not _hold(file):
                file.close()
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(part)
                made = False
        with file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows renames no open file
            os.replace(part, target)
        if durable:
            _sync_folder(os.path.dirname(target))
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                os.unlink(part)
        raise


def write_whole(path: str | os.PathLike[str], data: bytes | str, *, private: bool = False) -> None:
    """Write a file, text as UTF-8; see ``replacing``."""
    with replacing(path, private=private) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def target_of(path: str | os.PathLike[str], *, follow_link: bool = True) -> str:
    """The file that ``replacing`` replaces: no link, and if there is anything, a regular file.

    Raises:
        OSError: it is none.
    """
    try:
        if os.path.islink(path) and not follow_link:
            raise OSError(errno.ELOOP, "it is a link", os.fspath(path))
        if os.path.islink(path) and _is_trap(path):
            raise OSError(errno.EACCES, "it is a link made by another user", os.fspath(path))
        target = os.path.realpath(path) if follow_link else os.path.abspath(path)
    except ValueError as error:
        raise OSError(errno.EINVAL, _NO_NAME, os.fspath(path)) from error
    with contextlib.suppress(FileNotFoundError):
        _refuse_special(os.stat(target).st_mode, path)
    return target


def _is_trap(link: str | os.PathLike[str]) -> bool:
    """Whether Linux, too, would not follow a link (fs.protected_symlinks): it lies in a folder such
    as /tmp, where anybody can make one, and is neither ours nor the folder's owner's."""
    folder = os.stat(os.path.dirname(os.path.abspath(link)))
    shared = folder.st_mode & stat.S_ISVTX and folder.st_mode & stat.S_IWOTH
    return bool(shared) and os.lstat(link).st_uid not in (os.geteuid(), folder.st_uid)


def _maker(mode: int) -> Any:
    def make(path: str, flags: int) -> int:
        return os.open(path, flags | _O_BINARY, mode)

    return make


def lock(file: BinaryIO) -> bool:
    """Lock an open file until it and every copy of its descriptor is closed, or ``unlock``. The end
    of the process closes all. A map (mmap) has a copy.

    Returns:
        False: somebody else has locked it. Where there are no locks (some file systems) it is True.
    """
    if _msvcrt is not None:
        return _lock_byte(file, _msvcrt.LK_NBLCK)
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def unlock(file: BinaryIO) -> None:
    """Let others lock a file, although it or a map of it may stay open."""
    if _msvcrt is not None:
        _lock_byte(file, _msvcrt.LK_UNLCK)
    elif fcntl is not None:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_UN)


def _lock_byte(file: BinaryIO, mode: int) -> bool:
    """``lock`` and ``unlock`` on Windows. The place where the file is read stays."""
    handle = file.fileno()
    place = os.lseek(handle, 0, os.SEEK_CUR)
    try:
        os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
        _msvcrt.locking(handle, mode, 1)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EDEADLK)
    finally:
        os.lseek(handle, place, os.SEEK_SET)
    return True


def is_at(file: BinaryIO, path: str | os.PathLike[str]) -> bool:
    """Whether an open file has this name still."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    return False


def _hold(file: BinaryIO) -> bool:
    """Lock a part. False: somebody took it for a left-over in the moment before, and takes it
    away. Without locks nobody can do so."""
    return lock(file) and (fcntl is None or is_at(file, file.name))


def take_away_left_overs(target: str) -> None:
    """Delete the parts of this name that nobody holds. One that cannot be locked stays."""
    if fcntl is None:
        return
    folder, name = os.path.split(target)
    left = re.compile(re.escape(name) + r"\.[0-9a-f]{8}\.part")
    try:
        found = [entry for entry in os.listdir(folder) if left.fullmatch(entry)]
    except OSError:
        return  # whether it can be written to will be seen
    for entry in found:
        part = Path(folder, entry)
        with contextlib.suppress(OSError):
            if part.is_symlink():
                continue
            with open_regular(part) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if is_at(file, part):
                    part.unlink()


def _sync_folder(folder: str) -> None:
    """Have the new name on the disk, too, where folders can be synced."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
