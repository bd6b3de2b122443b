"""The file of a KV log: what was added is there until it is given up, whatever happens."""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import itertools
import os
import resource
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvp_edge import files
from kvp_edge.binding.structs import LogLayout
from kvp_edge.cache import log_file
from kvp_edge.cache.kv_log import Block, Bytes, InMemory, KVLog
from kvp_edge.cache.log_file import LogFile, read_log
from kvp_edge.errors import OptionError
from support.properties import examples

K_ROW, V_ROW, LAYERS, HEADS = 12, 20, 2, 3
LAYOUT = LogLayout(
    n_layer=LAYERS, n_head_kv=HEADS, head_size_k=2, head_size_v=3, type_k=1, type_v=1,
    k_row=K_ROW, v_row=V_ROW, bytes_per_token=LAYERS * (K_ROW + V_ROW),
)  # fmt: skip
PER_TOKEN = int(LAYOUT.bytes_per_token)


def block_of(first: int, n: int, seed: int = 0) -> Block:
    """With rows of its own; the last token is a span, and the two before another."""
    rng = np.random.default_rng((first, n, seed))
    spans = [(first + n - 3, first + n - 1, 1)] * (n > 2) + [(first + n - 1, first + n, 0)]
    return Block(
        first,
        n,
        first // 2,
        rng.integers(0, 256, n * PER_TOKEN, np.uint8),
        rng.normal(size=(LAYERS, HEADS, n)).astype(np.float32),
        np.array(spans, np.int32),
    )


def put(store: LogFile, block: Block) -> Block:
    without = replace(block, rows=np.empty(0, np.uint8))
    return store.add(without, lambda into: np.copyto(into, block.rows))


def same(a: Block, b: Block) -> bool:
    return (a.first, a.n, a.rope_first) == (b.first, b.n, b.rope_first) and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("rows", "scores", "spans")
    )


def assert_same(got: Any, want: Any) -> None:
    assert [(b.first, b.n) for b in got] == [(b.first, b.n) for b in want]
    assert all(map(same, got, want))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log"


def test_what_was_added_is_in_the_maps_and_in_the_file(path: Path) -> None:
    store = LogFile(path, LAYOUT, {"model": "f00d"})
    blocks = [block_of(first, n) for first, n in ((0, 1), (1, 40), (41, 7), (48, 300))]
    got = [put(store, block) for block in blocks]
    assert_same(got, blocks)
    about, there = read_log(path, LAYOUT)
    assert about["about"] == {"model": "f00d"}
    assert_same(there, blocks)
    store.close()
    assert_same(got, blocks)
    assert_same(read_log(path, LAYOUT)[1], blocks)


def test_rows_are_aligned_for_the_scorer_and_nobody_can_change_them(path: Path) -> None:
    store = LogFile(path, LAYOUT)
    for first in range(0, 70, 7):
        rows = put(store, block_of(first, 7)).rows
        assert rows.ctypes.data % 64 == 0
        with pytest.raises(ValueError, match="read-only"):
            rows[0] = 1


def test_the_file_is_for_nobody_else_to_read(path: Path) -> None:
    old = os.umask(0)
    try:
        LogFile(path, LAYOUT).close()
        assert path.stat().st_mode & 0o777 == 0o600
        path.chmod(0o666)
        store = LogFile(path, LAYOUT)
        assert path.stat().st_mode & 0o777 == 0o600
        put(store, block_of(0, 9))
        store.keep(())
        assert path.stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(old)


def test_many_blocks_take_few_descriptors(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each map has one."""
    monkeypatch.setattr(log_file, "_LEAST_MAPPED", 2**16)
    store, before = LogFile(path, LAYOUT), len(os.listdir("/proc/self/fd"))
    blocks = [block_of(100 * i, 100) for i in range(300)]
    got = [put(store, block) for block in blocks]
    assert len(os.listdir("/proc/self/fd")) - before <= 12
    assert_same(got, blocks)
    del got
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) - before <= 1


# -- blocks that are not needed -------------------------------------------------------------------


def test_the_file_is_written_anew_when_more_than_half_of_it_is_not_needed(path: Path) -> None:
    store = LogFile(path, LAYOUT)
    blocks = [block_of(1000 + 50 * i, 50) for i in range(10)]
    got = [put(store, block) for block in blocks]
    inode = path.stat().st_ino
    half = store.keep(got[5:])
    assert path.stat().st_ino == inode  # exactly half
    assert all(a is b for a, b in zip(half, got[5:], strict=True))
    less = store.keep(got[6:])
    assert path.stat().st_ino != inode
    assert_same(less, blocks[6:])
    assert_same(read_log(path, LAYOUT)[1], blocks[6:])
    assert_same(got, blocks)  # who still has them, has them
    assert os.listdir(path.parent) == ["log"]


def test_nothing_needed_leaves_the_beginning_and_old_maps_alive(path: Path) -> None:
    store = LogFile(path, LAYOUT)
    store.keep(())
    store.close()
    empty = path.stat().st_size
    store = LogFile(path, LAYOUT)
    block = block_of(0, 2000)
    got = put(store, block)
    assert store.keep(()) == []
    assert path.stat().st_size == empty
    assert same(got, block)
    more = block_of(5, 6)
    assert same(put(store, more), more)
    assert_same(read_log(path, LAYOUT)[1], [more])


def test_blocks_that_were_given_up_may_come_back(path: Path) -> None:
    """A snapshot of the log is restored after the file was written anew."""
    store = LogFile(path, LAYOUT)
    blocks = [block_of(50 * i, 50) for i in range(10)]
    got = [put(store, block) for block in blocks]
    few = store.keep(got[:1])
    back = store.keep([*few, *got[1:]])
    assert_same(back, blocks)
    assert_same(read_log(path, LAYOUT)[1], blocks)
    assert all(a is b for a, b in zip(store.keep(back), back, strict=True))


def test_where_there_is_no_room_for_another_file_the_old_one_stays_in_use(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LogFile(path, LAYOUT)
    blocks = [block_of(50 * i, 50) for i in range(10)]
    got = [put(store, block) for block in blocks]
    tries = []

    def full(*args: Any, **kwargs: Any) -> Any:
        tries.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "replacing", full)
        for kept in (got[7:], got[7:], got[8:]):
            assert all(a is b for a, b in zip(store.keep(kept), kept, strict=True))
        assert len(tries) == 1  # not again for every block
        store.keep(got[9:])
        assert len(tries) == 2
    more = block_of(500, 3)
    assert same(put(store, more), more)
    assert store.keep(()) == []
    assert_same(read_log(path, LAYOUT)[1], [])


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_file_that_does_not_take_the_place_leaves_all_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    store, blocks = LogFile(path, LAYOUT), [block_of(50 * i, 50) for i in range(10)]
    got = [put(store, block) for block in blocks]
    before = len(os.listdir("/proc/self/fd"))

    def fails(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(os, "replace", fails)
        assert all(a is b for a, b in zip(store.keep(got[7:]), got[7:], strict=True))
    assert os.listdir(path.parent) == ["log"]
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(OptionError, match="in use"):
        LogFile(path, LAYOUT)
    got.append(put(store, block_of(500, 5)))
    assert_same(got, [*blocks, block_of(500, 5)])
    assert_same(store.keep(got[8:]), [*blocks[8:], block_of(500, 5)])


def test_a_file_that_somebody_put_there_meanwhile_is_not_replaced(path: Path) -> None:
    store = LogFile(path, LAYOUT)
    got = put(store, block_of(0, 50))
    path.rename(path.parent / "moved")
    path.write_text("mine")
    store.keep(())
    put(store, block_of(0, 5))
    assert path.read_text() == "mine"
    assert same(got, block_of(0, 50))


# -- ends in the middle ---------------------------------------------------------------------------


def test_whatever_is_missing_of_the_last_record_the_blocks_before_it_are_there(path: Path) -> None:
    store, block, last = LogFile(path, LAYOUT), block_of(0, 3), block_of(3, 1)
    put(store, block)
    store.close()
    begin = path.stat().st_size
    whole = LogFile(path.parent / "whole", LAYOUT)
    put(whole, block)
    put(whole, last)
    whole.close()
    data = (path.parent / "whole").read_bytes()
    assert data[:begin] == path.read_bytes()
    for end in range(begin, len(data)):
        for torn in (data[:end], data[:end] + bytes(len(data) + 50 - end)):  # or a hole
            path.write_bytes(torn)
            assert_same(read_log(path, LAYOUT)[1], [block])
    for at in range(-(-begin // 64) * 64, len(data)):
        spoilt = bytearray(data)
        spoilt[at] ^= 0x41
        path.write_bytes(spoilt)
        assert_same(read_log(path, LAYOUT)[1], [block])
    path.write_bytes(data)
    assert_same(read_log(path, LAYOUT)[1], [block, last])


def test_damage_before_the_last_record_is_noticed(path: Path) -> None:
    store = LogFile(path, LAYOUT)
    got = [put(store, block_of(9 * i, 9)) for i in range(3)]
    store.close()
    data = bytearray(path.read_bytes())
    data[data.index(got[1].rows.tobytes()) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        read_log(path, LAYOUT)


_ADDS_FOR_EVER = """
import sys
import numpy as np
from kvp_edge.cache.log_file import LogFile
sys.path.insert(0, sys.argv[2])
from test_log_file import LAYOUT, block_of, put
store = LogFile(sys.argv[1], LAYOUT)
kept = []
for i in range(10**9):
    kept.append(put(store, block_of(100 * i, 100)))
    kept = list(store.keep(kept[-9:]))
    if i == 30:
        print("runs", flush=True)
"""


def test_a_killed_process_leaves_a_file_with_whole_blocks_that_another_begins_anew(
    path: Path,
) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", _ADDS_FOR_EVER, str(path), str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"runs\n"
        with pytest.raises(OptionError, match="in use by another Llama"):
            LogFile(path, LAYOUT)
        child.send_signal(signal.SIGKILL)
    got = read_log(path, LAYOUT)[1]
    assert len(got) >= 1
    assert_same(got, [block_of(b.first, b.n) for b in got])
    LogFile(path, LAYOUT).close()
    assert read_log(path, LAYOUT)[1] == []


@pytest.mark.parametrize("room", [0, 1, 100, 1000])
def test_a_full_disk_loses_only_what_found_no_room(
    path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    store = LogFile(path, LAYOUT)
    blocks = [block_of(0, 30), block_of(30, 30), block_of(60, 30)]
    got = [put(store, blocks[0])]
    real, left = io.FileIO.write, [room]

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            n = min(left[0], memoryview(data).nbytes)
            left[0] -= n
            if n == 0 and memoryview(data).nbytes:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(self, memoryview(data)[:n])

    full = Full(os.dup(store._file.file.fileno()), "r+b")
    with monkeypatch.context() as patch:
        patch.setattr(store._file._writer, "_file", full)
        with pytest.raises(OSError, match="No space left"):
            put(store, blocks[1])
        assert_same(read_log(path, LAYOUT)[1], blocks[:1])
        assert_same(got, blocks[:1])
    got += [put(store, block) for block in blocks[1:]]
    assert_same(got, blocks)
    assert_same(read_log(path, LAYOUT)[1], blocks)


_FILLS_UP = """
import resource, sys
sys.path.insert(0, sys.argv[2])
import numpy as np
from kvp_edge.cache.kv_log import KVLog
from kvp_edge.cache.log_file import LogFile, read_log
from test_log_file import LAYOUT, assert_same, block_of
most = 100_000
log = KVLog(LAYOUT, LogFile(sys.argv[1], LAYOUT))
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
blocks = [block_of(i * 100, 100) for i in range(40)]
def append(block):
    log.append(block, lambda into: np.copyto(into, block.rows))
for block in blocks[:39]:
    append(block)
n = len(log.blocks)
assert 3 < n < 39 and log.lost == 100 * (39 - n), n
assert log.failure == "File too large", log.failure
assert_same(log.blocks, blocks[:n])
assert_same(read_log(sys.argv[1], LAYOUT)[1], blocks[:n])
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
append(blocks[39])
assert_same(log.blocks, [*blocks[:n], blocks[39]])
assert_same(read_log(sys.argv[1], LAYOUT)[1], [*blocks[:n], blocks[39]])
print("well")
"""


def test_a_file_that_may_not_grow_loses_only_what_found_no_room(path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = subprocess.run(
        [sys.executable, "-c", _FILLS_UP, str(path), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout == "well\n", done.stderr


def test_an_interrupt_in_the_middle_of_an_append_leaves_what_was_there(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, block = LogFile(path, LAYOUT), block_of(0, 9)
    got = put(store, block)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store._file, "_view", interrupt)
        with pytest.raises(KeyboardInterrupt):
            put(store, block_of(9, 9))
    assert_same(read_log(path, LAYOUT)[1], [block])
    more = block_of(9, 5)
    assert_same([got, put(store, more)], [block, more])
    assert_same(read_log(path, LAYOUT)[1], [block, more])


def test_rows_that_cannot_be_read_leave_what_was_there(path: Path) -> None:
    store = LogFile(path, LAYOUT)

    def fails(_: Bytes) -> None:
        raise RuntimeError("no rows")

    with pytest.raises(RuntimeError, match="no rows"):
        store.add(replace(block_of(0, 3), rows=np.empty(0, np.uint8)), fails)
    assert read_log(path, LAYOUT)[1] == []


# -- whose file it is -----------------------------------------------------------------------------


def test_a_second_llama_is_refused_until_the_first_is_closed(path: Path) -> None:
    first = LogFile(path, LAYOUT)
    for _ in range(2):
        with pytest.raises(OptionError, match="kv_log='.*' is in use by another Llama"):
            LogFile(path, LAYOUT)
        got = put(first, block_of(0, 9))
        assert list(first.keep([])) == []  # another file, as well locked
    first.close()
    first.close()
    second = LogFile(path, LAYOUT)
    assert same(got, block_of(0, 9))
    put(second, block_of(3, 4))
    assert_same(read_log(path, LAYOUT)[1], [block_of(3, 4)])


def test_a_log_that_was_left_is_begun_anew_and_rows_of_it_stay_readable(path: Path) -> None:
    first = LogFile(path, LAYOUT)
    got = put(first, block_of(0, 500))
    first.close()
    second = LogFile(path, LAYOUT)
    assert read_log(path, LAYOUT)[1] == []
    assert same(got, block_of(0, 500))
    second.close()


@pytest.mark.parametrize("text", [b"mine", b"kvpsess\n" + bytes(60), b"kvp", b"GGUF" * 99])
def test_another_file_is_never_overwritten(path: Path, text: bytes) -> None:
    path.write_bytes(text)
    with pytest.raises(
        OptionError, match="kv_log='.*' exists and is not a KV log .* or delete the file"
    ):
        LogFile(path, LAYOUT)
    assert path.read_bytes() == text


def test_a_file_whose_maker_was_killed_before_the_first_byte_is_taken(path: Path) -> None:
    path.touch()
    put(LogFile(path, LAYOUT), block_of(0, 1))
    assert_same(read_log(path, LAYOUT)[1], [block_of(0, 1)])


def test_what_cannot_be_a_log_is_refused_with_a_sentence(path: Path) -> None:
    os.mkfifo(path.parent / "fifo")
    (path.parent / "loop").symlink_to("loop")
    for name in ("fifo", ".", "none/log", "loop", "a\0b", "x" * 300):
        with pytest.raises(OptionError, match="(?s)kv_log=.* cannot be used: .*Name a file"):
            LogFile(path.parent / name, LAYOUT)
    assert sorted(os.listdir(path.parent)) == ["fifo", "loop"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to_is_refused(path: Path) -> None:
    path.parent.chmod(0o500)
    try:
        with pytest.raises(OptionError, match="Permission denied"):
            LogFile(path, LAYOUT)
    finally:
        path.parent.chmod(0o700)


def test_a_disk_that_is_full_at_once_is_refused_and_leaves_no_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("kvp_edge.cache.log_file.records.Writer.add", full)
    with pytest.raises(OptionError, match="No space left"):
        LogFile(path, LAYOUT)
    assert os.listdir(path.parent) == []


def test_a_link_is_followed(path: Path) -> None:
    path.symlink_to("target")
    store = LogFile(path, LAYOUT)
    put(store, block_of(0, 9))
    store.keep(())
    assert path.is_symlink()
    with pytest.raises(OptionError, match="in use"):
        LogFile(path.parent / "target", LAYOUT)


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_a_span_that_ends_after_the_cut_is_forgotten(path: Path, kind: str) -> None:
    """It may begin in a block that stays whole; other tokens will follow."""
    log = KVLog(LAYOUT, InMemory(LAYOUT) if kind == "memory" else LogFile(path, LAYOUT))
    scores = np.zeros((LAYERS, HEADS, 10), np.float32)
    for spans in ([(2, 4, 0), (8, 12, 0)], [(13, 15, 0)]):
        none = np.empty(0, np.uint8)
        block = Block(log.end, 10, log.end, none, scores, np.array(spans, np.int32))
        log.append(block, lambda rows: rows.fill(3))
    whole = log.held
    log.cut(12)
    assert log.spans().tolist() == [[2, 4, 0], [8, 12, 0]]
    log.cut(11)
    assert log.spans().tolist() == [[2, 4, 0]]
    assert [(b.first, b.n) for b in log.blocks] == [(0, 10), (10, 1)]
    log.restore(whole)
    assert log.spans().tolist() == [[2, 4, 0], [8, 12, 0], [13, 15, 0]]
    log.cut(10)
    assert log.spans().tolist() == [[2, 4, 0]]


# -- any history ----------------------------------------------------------------------------------


@examples(60)
@given(st.data())
def test_any_history_of_a_log_in_a_file_is_that_of_a_list(data: st.DataObject) -> None:
    """Tokens are added and cut, snapshots restored, the log forgotten, the file begun anew."""
    draw = data.draw
    limit = draw(st.sampled_from([None, 40 * PER_TOKEN, 100 * PER_TOKEN]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        store = LogFile(path, LAYOUT)
        log, seeds = KVLog(LAYOUT, store, limit), itertools.count()
        rows: list[Bytes | None] = []  # of each token
        kept: list[tuple[Any, list[Bytes | None]]] = []
        for _ in range(draw(st.integers(1, 25))):
            action = draw(
                st.sampled_from(["add"] * 5 + ["cut", "snapshot", "restore", "clear", "reopen"])
            )
            if action == "add":
                block = block_of(log.end, draw(st.integers(1, 30)), next(seeds))
                log.append(block, partial(_copy, block.rows))
                rows += list(_by_token(block))
            elif action == "cut":
                log.cut(length := draw(st.integers(0, log.end)))
                del rows[length:]
            elif action == "snapshot":
                kept.append((log.held, list(rows)))
            elif action == "restore" and kept:
                held, old = kept[draw(st.integers(0, len(kept) - 1))]
                log.restore(held)
                rows = list(old)
            elif action == "clear":
                log.clear()
                rows = []
            elif action == "reopen":
                store.close()
                store = LogFile(path, LAYOUT)
                log, rows = KVLog(LAYOUT, store, limit), []
            assert log.end == len(rows)
            there = log.holds(log.end)
            rows = [row if held else None for row, held in zip(rows, there, strict=True)]
            assert limit is not None or all(there)
            assert log.failure is None
            for block in log.blocks:
                for token, row in zip(range(block.first, block.end), _by_token(block), strict=True):
                    want = rows[token]
                    assert want is not None
                    assert np.array_equal(row, want)
            # all of it is in the file, which has no more than twice as much
            _, written = read_log(path, LAYOUT)
            for block in log.blocks:
                assert any(same(block, other) for other in written)
            if action in ("cut", "restore", "clear"):
                assert sum(map(_size, log.blocks)) * 2 >= sum(map(_size, written))
        store.close()


def _copy(rows: Bytes, into: Bytes) -> None:
    into[:] = rows


def _by_token(block: Block) -> Bytes:
    """uint8 [n, bytes of its rows]: what ``Block.rows`` has layer by layer."""
    parts = []
    for layer in block.rows.reshape(LAYERS, -1):
        parts += [layer[: block.n * K_ROW].reshape(block.n, -1)]
        parts += [layer[block.n * K_ROW :].reshape(block.n, -1)]
    return np.concatenate(parts, axis=1)


def _size(block: Block) -> int:
    """About what it takes in the file."""
    return 500 + block.n * (PER_TOKEN + 4 * LAYERS * HEADS)
