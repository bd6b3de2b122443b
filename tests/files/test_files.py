"""Files from others are opened only if they are files; files of ours are replaced whole."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from kvp_edge import files
from kvp_edge.files import open_regular, read_regular, replacing, write_whole


class LikeWindows:
    """msvcrt.locking, by locks that belong to an open file as Windows' do: fcntl(2), F_OFD_SETLK.
    Other processes and handles may read and write the byte here, and not on Windows."""

    LK_UNLCK, LK_NBLCK = 0, 2

    def locking(self, handle: int, mode: int, n: int) -> None:
        kind = fcntl.F_WRLCK if mode == self.LK_NBLCK else fcntl.F_UNLCK
        lock = struct.pack("hhqqi4x", kind, os.SEEK_CUR, 0, n, 0)
        try:
            fcntl.fcntl(handle, fcntl.F_OFD_SETLK, lock)
        except BlockingIOError as error:
            raise PermissionError(errno.EACCES, "Permission denied") from error


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


def test_a_file_opened_to_be_written_is_not_waited_for_either_and_is_not_buffered(
    tmp_path: Path, fifo: Path
) -> None:
    with pytest.raises(OSError, match="it is not a regular file"):
        open_regular(fifo, write=True)
    (tmp_path / "a").write_text("abc")
    with open_regular(tmp_path / "a", write=True) as file:
        file.write(b"x")
        assert (tmp_path / "a").read_text() == "xbc"


@pytest.mark.parametrize("windows", [False, True])
def test_a_locked_file_is_nobody_elses_until_it_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, windows: bool
) -> None:
    if windows:
        monkeypatch.setattr(files, "_msvcrt", LikeWindows())
        monkeypatch.setattr(files, "fcntl", None)
    (tmp_path / "a").touch()
    one, other = (open_regular(tmp_path / "a", write=True) for _ in range(2))
    with one, other:
        assert files.lock(one)
        assert not files.lock(other)
        copy = os.dup(one.fileno())
        one.close()
        assert not files.lock(other)
        os.close(copy)
        assert files.lock(other)
    one, other = (open_regular(tmp_path / "a", write=True) for _ in range(2))
    with one, other:
        assert files.lock(one)
        files.unlock(one)
        assert files.lock(other)
        assert files.is_at(other, tmp_path / "a")
        (tmp_path / "a").rename(tmp_path / "b")
        assert not files.is_at(other, tmp_path / "a")
        assert files.is_at(other, tmp_path / "b")
        other.write(b"abc")
        files.unlock(other)
        assert files.lock(other)
        other.write(b"d")
        assert (tmp_path / "b").read_bytes() == b"abcd", "it is written on where it was"


def test_what_need_not_outlive_a_power_cut_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    for durable, most in ((False, 0), (True, 2)):
        with replacing(tmp_path / "a", durable=durable) as file:
            file.write(b"x")
        assert len(synced) == most
        assert (tmp_path / "a").read_bytes() == b"x"


def parts(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.part"))


# -- reading ---------------------------------------------------------------------------------------


def test_nothing_is_opened_or_waited_for_but_a_regular_file(
    tmp_path: Path, fifo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "to-fifo").symlink_to(fifo)
    with socket.socket(socket.AF_UNIX) as unix:
        monkeypatch.chdir(tmp_path)  # the name of a socket must be short
        unix.bind("socket")
    for path in (
        fifo,
        tmp_path / "to-fifo",
        tmp_path,
        "/dev/zero",
        "/dev/null",
        tmp_path / "socket",
    ):
        with pytest.raises(OSError, match="it is not a regular file"):
            open_regular(path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")
    with pytest.raises(OSError, match="symbolic links"):
        open_regular(tmp_path / "loop")
    for name in ("a\0b", "a\ud800"):
        with pytest.raises(OSError, match="it is not a file name"):
            open_regular(tmp_path / name)


def test_a_device_that_takes_the_place_of_a_file_meanwhile_is_not_read(
    tmp_path: Path, fifo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look and the opening."""
    (tmp_path / "f").write_bytes(b"abc")
    regular = os.stat(tmp_path / "f")
    monkeypatch.setattr(os, "stat", lambda path, **_: regular)
    with pytest.raises(OSError, match="it is not a regular file"):
        open_regular(fifo)


def test_a_file_is_read_up_to_the_bytes_that_are_allowed_and_no_longer_one(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert read_regular(tmp_path / "f", 3) == b"abc"
    with pytest.raises(OSError, match="more than 2 bytes"):
        read_regular(tmp_path / "f", 2)
    (tmp_path / "empty").write_bytes(b"")
    assert read_regular(tmp_path / "empty", 0) == b""


# -- writing ---------------------------------------------------------------------------------------


def test_what_is_written_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "f"
    for text in ("one", "another"):
        write_whole(path, text)
        assert path.read_text() == text
    assert os.listdir(tmp_path) == ["f"]


def test_the_file_has_a_name_that_others_may_open(tmp_path: Path) -> None:
    with replacing(tmp_path / "f") as file, open(file.name, "wb") as again:
        again.write(b"by name")
    assert (tmp_path / "f").read_bytes() == b"by name"


def test_what_is_private_is_so_from_the_beginning_and_the_rest_has_the_usual_rights(
    tmp_path: Path,
) -> None:
    old = os.umask(0o027)
    try:
        for private, mode in ((True, 0o600), (False, 0o640)):
            path = tmp_path / str(private)
            with replacing(path, private=private) as file:
                assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == mode
            assert stat.S_IMODE(path.stat().st_mode) == mode
    finally:
        os.umask(old)


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "target", tmp_path / "link"
    link.symlink_to(target)
    for text in ("made", "replaced"):  # at first it points to nothing
        write_whole(link, text)
        assert link.is_symlink()
        assert target.read_text() == text
    with pytest.raises(OSError, match="it is a link"), replacing(link, follow_link=False):
        pass
    assert target.read_text() == "replaced"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        write_whole(tmp_path / "loop", "")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file of another user's")
def test_a_link_that_another_user_made_in_a_shared_folder_is_not_followed(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    (tmp_path / "mine").write_text("mine")
    (shared / "link").symlink_to(tmp_path / "mine")
    os.lchown(shared / "link", 12345, 12345)
    with pytest.raises(PermissionError, match="a link made by another user"):
        write_whole(shared / "link", "theirs")
    assert (tmp_path / "mine").read_text() == "mine"
    os.lchown(shared / "link", 0, 0)
    write_whole(shared / "link", "changed")
    assert (tmp_path / "mine").read_text() == "changed"


def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path, fifo: Path) -> None:
    (tmp_path / "to-fifo").symlink_to(fifo)
    (tmp_path / "folder").mkdir()
    for path in (fifo, tmp_path / "to-fifo", tmp_path / "folder"):
        with pytest.raises(OSError, match="it is not a regular file"):
            write_whole(path, "text")
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    with pytest.raises(OSError, match="it is not a file name"):
        write_whole(tmp_path / "a\0b", "text")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        write_whole(tmp_path / "file" / "below", "text")
    assert parts(tmp_path) == []


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_whole(path, "old")

    def fails() -> None:
        with replacing(path) as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


def _interrupted(do: Callable[[], None], at: int) -> bool:
    """Whether ``do`` got as far as the ``at``-th line of files.py, where Ctrl-C came."""
    lines = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != files.__file__:
            return None
        lines += event == "line"
        if event == "line" and lines == at:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        do()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_ctrl_c_anywhere_leaves_the_old_file_or_the_new_one_and_no_part(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_whole(path, "old")
    found, at = set(), 1
    while _interrupted(lambda: write_whole(path, "new"), at):
        found.add(path.read_text())
        assert os.listdir(tmp_path) == ["f"], f"interrupted at line {at}"
        path.write_text("old")
        at += 1
    assert found == {"old", "new"}
    assert at > 20


# -- parts that a killed process has left ----------------------------------------------------------

_HOLDS = """
import sys
from kvp_edge.files import replacing
with replacing(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    sys.stdin.readline()
"""


def _writer(path: Path) -> subprocess.Popen[str]:
    """A process in the middle of writing."""
    command = [sys.executable, "-c", _HOLDS, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def test_the_part_of_a_killed_process_is_taken_away_at_the_next_save(tmp_path: Path) -> None:
    path = tmp_path / "f"
    for name in ("f", "other"):
        with _writer(tmp_path / name) as process:
            process.kill()
    (left,) = (name for name in parts(tmp_path) if name.startswith("f."))
    assert re.fullmatch(r"f\.[0-9a-f]{8}\.part", left)
    write_whole(path, "new")
    assert [name[:6] for name in parts(tmp_path)] == ["other."]  # another name's stays
    assert path.read_text() == "new"


def test_the_part_of_a_living_process_stays_and_is_finished(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with _writer(path) as process:
        write_whole(path, "mine")
        assert len(parts(tmp_path)) == 1
        assert path.read_text() == "mine"
        process.communicate("\n")
    assert process.returncode == 0
    assert path.read_text() == "half"
    assert parts(tmp_path) == []


def test_what_is_only_called_like_a_part_is_left_alone(tmp_path: Path, fifo: Path) -> None:
    others = ["f.backup.part", "f.0123456.part", "f.0123456789.part", "ff.01234567.part"]
    for name in others:
        (tmp_path / name).write_text("mine")
    (tmp_path / "f.00000001.part").symlink_to(tmp_path / "f.backup.part")
    (tmp_path / "f.00000002.part").mkdir()
    os.mkfifo(tmp_path / "f.00000003.part")
    before = parts(tmp_path)
    write_whole(tmp_path / "f", "new")
    assert parts(tmp_path) == before


def test_a_part_taken_for_a_left_over_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another save may come between the making of a part and its locking."""
    hold, taken = files._hold, []

    def too_late(file: Any) -> bool:
        if not taken:
            taken.append(file.name)
            os.unlink(file.name)
        return hold(file)

    monkeypatch.setattr(files, "_hold", too_late)
    write_whole(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "new"
    assert len(taken) == 1
    assert os.listdir(tmp_path) == ["f"]


def test_many_may_save_under_one_name(tmp_path: Path) -> None:
    path, failed = tmp_path / "f", []
    texts = [str(i) * 100_000 for i in range(4)]

    def save(text: str) -> None:
        try:
            for _ in range(30):
                write_whole(path, text)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=save, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert path.read_text() in texts
    assert os.listdir(tmp_path) == ["f"]
