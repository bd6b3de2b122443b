"""Sessions of a conversation with a KV log: all of it comes back, and what is new is appended."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import RandomModel, random_tokens
from kvp_edge import Llama, OptionError, SessionError, sessions
from kvp_edge.cache import kv_log, log_file, manager, session_file
from kvp_edge.cache.kv_log import Block, Bytes, InMemory, KVLog
from kvp_edge.cache.log_file import read_log
from kvp_edge.files import records
from makers import record_files
from makers.gguf_models import ModelShape
from support.interrupt import interrupted

Maker = Callable[[ModelShape], RandomModel]
Loader = Callable[..., Llama]

LLAMA = ModelShape("llama")
BOUND: dict[str, Any] = {
    "n_ctx": 3000, "kv_budget": 100, "recent": 20, "reserve": 60, "granularity": "head",
    "policy": "keydiff", "recall": "reply",
}  # fmt: skip


RECALLS = ("recalls", "recalled", "recall_ms")


@pytest.fixture
def model(random_model: Maker) -> str:
    return random_model(LLAMA).path


@pytest.fixture
def opened(model: str, load: Loader) -> Callable[..., Llama]:
    return lambda **more: load(model, **{**BOUND, **more})


Opened = Callable[..., Llama]


def log_of(llm: Llama) -> KVLog:
    assert llm.kv is not None
    assert llm.kv.log is not None
    return llm.kv.log


def assert_same_log(a: Llama, b: Llama) -> None:
    one, other = log_of(a), log_of(b)
    assert (one.end, one.lost) == (other.end, other.lost)
    assert [(x.first, x.n, x.rope_first) for x in one.blocks] == [
        (x.first, x.n, x.rope_first) for x in other.blocks
    ]
    for x, y in zip(one.blocks, other.blocks, strict=True):
        for name in ("rows", "scores", "spans"):
            np.testing.assert_array_equal(getattr(x, name), getattr(y, name))


def answer(llm: Llama, seed: int) -> tuple[str, Any]:
    """The reply to some more tokens, before which others come back, and what is held then."""
    prompt = [*llm.input_ids[: llm.n_tokens].tolist(), *random_tokens(30, seed=seed)]
    result: Any = llm.create_completion(prompt, max_tokens=20, temperature=0.0)
    return result["choices"][0]["text"], llm.kv_indices.tolist()


def test_a_resumed_chat_has_the_log_and_recalls_the_same(opened: Opened, tmp_path: Path) -> None:
    first = opened(kv_log=tmp_path / "first.kvlog")
    first.eval(random_tokens(500))
    first.save_session(tmp_path / "s", "mine")
    assert log_of(first).n_tokens > 400
    for store in ({}, {"kv_log": tmp_path / "second.kvlog"}):
        second = opened(**store)
        second.eval(random_tokens(300, seed=9))
        assert second.load_session(tmp_path / "s") == "mine"
        assert_same_log(first, second)
        second.save_session(tmp_path / "copy")
        third = opened()
        third.load_session(tmp_path / "copy")
        want = [answer(first, seed) for seed in (7, 8)]
        assert [answer(second, seed) for seed in (7, 8)] == want
        assert [answer(third, seed) for seed in (7, 8)] == want
        assert_same_log(first, second)
        first.load_session(tmp_path / "s")
    # its own store has copies, and the others are given up
    about, written = read_log(tmp_path / "second.kvlog", log_of(second).layout)
    assert about["about"]["model"] == os.path.basename(first.model_path)
    assert sum(b.n for b in written) <= 2 * log_of(second).n_tokens + 200


def test_a_state_carries_the_log_in_memory_and_pickled(opened: Opened, tmp_path: Path) -> None:
    first = opened(kv_log=tmp_path / "first.kvlog")
    first.eval(random_tokens(500))
    state = first.save_state()
    pickled = pickle.dumps(state)
    assert state.llama_state_size > log_of(first).nbytes
    assert len(pickled) > log_of(first).nbytes
    want = [answer(first, seed) for seed in (7, 8)]
    first.reset()
    first.eval(random_tokens(400, seed=3))
    for llm in (first, opened(), opened(kv_log=tmp_path / "third.kvlog")):
        for one in (state, pickle.loads(pickled)):
            llm.load_state(one)
            assert [answer(llm, seed) for seed in (7, 8)] == want


def test_what_came_back_is_counted_for_each_conversation(opened: Opened, tmp_path: Path) -> None:
    one, other = opened(), opened()
    one.eval(random_tokens(500))
    answer(one, 7)
    counted = [one.kv_stats[name] for name in RECALLS]
    assert all(counted)
    one.save_session(tmp_path / "s")
    state = one.save_state()
    other.eval(random_tokens(400, seed=3))
    for resume in (lambda: other.load_session(tmp_path / "s"), lambda: other.load_state(state)):
        answer(other, 8)
        resume()
        assert [other.kv_stats[name] for name in RECALLS] == counted
    other.reset()
    assert [other.kv_stats[name] for name in RECALLS] == [0, 0, 0]


def test_a_session_from_before_recalls_were_saved_counts_from_zero(
    opened: Opened, tmp_path: Path
) -> None:
    one, other = opened(), opened()
    one.eval(random_tokens(500))
    answer(one, 7)
    state = one.save_state()
    for name in RECALLS:
        del state.header[name]
    answer(other, 8)
    other.load_state(state)
    assert [other.kv_stats[name] for name in RECALLS] == [0, 0, 0]


def test_a_state_of_a_log_that_is_held_still_is_not_copied(opened: Opened) -> None:
    llm = opened()
    llm.eval(random_tokens(400))
    state, blocks = llm.save_state(), log_of(llm).blocks
    llm.eval(random_tokens(200, seed=2))
    llm.load_state(state)
    assert all(a is b for a, b in zip(log_of(llm).blocks, blocks, strict=True))


# -- appending ------------------------------------------------------------------------------------


def test_saving_again_appends_what_is_new_and_a_loaded_session_grows_as_well(
    opened: Opened, tmp_path: Path
) -> None:
    path, llm = tmp_path / "s", opened()
    llm.eval(random_tokens(600))
    llm.save_session(path, 0)
    for step in range(1, 5):
        before, status = path.read_bytes(), path.stat()
        logged = log_of(llm).nbytes
        llm.eval(random_tokens(40, seed=step))
        llm.save_session(path, step)
        after = path.read_bytes()
        assert path.stat().st_ino == status.st_ino
        assert after[: len(before)] == before
        state = llm.save_state()
        new = log_of(llm).nbytes - logged + len(state.llama_state)
        assert len(after) - len(before) < 1.5 * new + 20_000
        assert os.listdir(tmp_path) == ["s"]
        # the same as one that is written at once
        llm.save_session(tmp_path / "whole", step)
        whole = opened()
        whole.load_session(tmp_path / "whole")
        grown = opened()
        assert grown.load_session(path) == step
        assert_same_log(grown, whole)
        np.testing.assert_array_equal(grown.kv_indices, whole.kv_indices)
        (tmp_path / "whole").unlink()
        llm = grown  # goes on with what it has loaded
    assert answer(grown, 9) == answer(whole, 9)


def test_the_file_never_has_more_than_half_of_what_nobody_needs(
    opened: Opened, tmp_path: Path
) -> None:
    path, other, llm = tmp_path / "s", tmp_path / "t", opened()
    llm.eval(random_tokens(400))
    inodes, most = set(), 0.0
    for step in range(12):
        llm.eval(random_tokens(12, seed=step))
        llm.save_session(path)
        inodes.add(path.stat().st_ino)
        fresh = opened()
        fresh.load_session(path)
        fresh.save_session(other)
        most = max(most, path.stat().st_size / other.stat().st_size)
    assert 1.5 < most < 2.1
    assert 1 < len(inodes) < 12


def test_another_conversation_is_written_anew(opened: Opened, tmp_path: Path) -> None:
    path, llm = tmp_path / "s", opened()
    llm.eval(random_tokens(500))
    llm.save_session(path)
    inode, size = path.stat().st_ino, path.stat().st_size
    llm.reset()
    llm.eval(random_tokens(500, seed=2))
    llm.save_session(path)
    assert path.stat().st_ino != inode
    assert path.stat().st_size < 1.1 * size


def _touched(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def _other_file(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)


def _longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


@pytest.mark.parametrize(
    "change",
    [
        _touched,
        _other_file,
        _longer,
        lambda path: path.chmod(0o644),
        lambda path: path.unlink(),
        lambda path: os.link(path, path.parent / "backup"),
    ],
)
def test_a_file_that_somebody_else_has_changed_is_replaced(
    opened: Opened, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    path, llm = tmp_path / "s", opened()
    llm.eval(random_tokens(500))
    llm.save_session(path)
    change(path)
    backup = tmp_path / "backup"
    before = backup.read_bytes() if backup.exists() else b""
    inode = path.stat().st_ino if path.exists() else -1
    held = path.open("rb") if path.exists() else None  # so that its number is not given again
    llm.eval(random_tokens(20, seed=1))
    llm.save_session(path)
    assert path.stat().st_ino != inode
    assert path.stat().st_mode & 0o777 == 0o600
    if held is not None:
        held.close()
    assert not backup.exists() or backup.read_bytes() == before
    opened().load_session(path)


def test_an_append_through_a_link_is_one_to_the_file(opened: Opened, tmp_path: Path) -> None:
    path, llm = tmp_path / "s", opened()
    (tmp_path / "link").symlink_to(path)
    llm.eval(random_tokens(500))
    llm.save_session(tmp_path / "link")
    inode = path.stat().st_ino
    for name in ("s", "link"):
        llm.eval(random_tokens(20, seed=1))
        llm.save_session(tmp_path / name)
        assert path.stat().st_ino == inode
    assert (tmp_path / "link").is_symlink()


def test_an_append_sweeps_what_a_killed_save_has_left(opened: Opened, tmp_path: Path) -> None:
    path, llm = tmp_path / "s", opened()
    llm.eval(random_tokens(500))
    llm.save_session(path)
    (tmp_path / "s.0123abcd.part").write_text("left")
    inode = path.stat().st_ino
    llm.save_session(path)
    assert path.stat().st_ino == inode
    assert os.listdir(tmp_path) == ["s"]


# -- interrupted ----------------------------------------------------------------------------------


@pytest.fixture
def twice(opened: Opened, tmp_path: Path) -> tuple[bytes, bytes]:
    """A session's file after one save and after another that appended to it."""
    llm = opened()
    llm.eval(random_tokens(400))
    llm.save_session(tmp_path / "s", 1)
    before = (tmp_path / "s").read_bytes()
    llm.eval(random_tokens(80, seed=4))
    llm.save_session(tmp_path / "s", 2)
    after = (tmp_path / "s").read_bytes()
    assert after[: len(before)] == before
    return before, after


def test_an_append_that_ended_anywhere_leaves_the_conversation_before_it(
    opened: Opened, tmp_path: Path, twice: tuple[bytes, bytes]
) -> None:
    path, (before, after) = tmp_path / "s", twice
    ends = sorted({len(before) + 1, len(after) - 1, *range(len(before) + 2, len(after), 997)})
    for end in ends:
        for torn in (after[:end], after[:end] + bytes(len(after) - end)):  # or a hole
            path.write_bytes(torn)
            if torn[len(before) :].strip(b"\0"):
                with pytest.warns(UserWarning, match="was not completed"):
                    header, _ = session_file.read(path)
            else:  # the system had made room, and nothing was written to it
                with pytest.warns(UserWarning, match="was not completed"):
                    header, _ = session_file.read(path)
            assert header["extra"] == 1, end
    for data, extra in ((before, 1), (after, 2)):
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert session_file.read(path)[0]["extra"] == extra
    # who goes on with the one before writes the file anew
    path.write_bytes(after[:-5])
    llm = opened()
    with pytest.warns(UserWarning, match="the save before"):
        assert llm.load_session(path) == 1
    assert llm.n_tokens == 400
    inode = path.stat().st_ino
    llm.eval(random_tokens(80, seed=4))
    llm.save_session(path, 3)
    assert path.stat().st_ino != inode
    assert opened().load_session(path) == 3


@pytest.mark.parametrize("room", [0, 100, 20_000])
def test_a_disk_that_fills_up_during_an_append_leaves_the_file_as_it_was(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    path, llm = tmp_path / "s", opened()
    llm.eval(random_tokens(500))
    llm.save_session(path, 1)
    before, left, real = path.read_bytes(), [room], records.Writer._write

    def full(self: Any, data: Any, crc: int = 0) -> int:
        n = memoryview(data).nbytes
        if n > left[0]:
            real(self, memoryview(data)[: left[0]])
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= n
        return real(self, data, crc)

    llm.eval(random_tokens(80, seed=4))
    with monkeypatch.context() as patch:
        patch.setattr(records.Writer, "_write", full)
        with pytest.raises(SessionError, match="cannot be written to '.*': No space left"):
            llm.save_session(path, 2)
    assert path.read_bytes() == before
    llm.save_session(path, 2)
    fresh = opened()
    assert fresh.load_session(path) == 2
    assert_same_log(fresh, llm)


_SAVES_FOR_EVER = """
import sys
sys.path[:0] = sys.argv[3:]
from conftest import random_tokens
from kvp_edge import Llama
llm = Llama(sys.argv[1], n_ctx=100000, kv_budget=100, recent=20, reserve=60, granularity="head",
            policy="keydiff", n_threads=1, n_threads_batch=1, verbose=False)
llm.eval(random_tokens(300))
for i in range(10**6):
    llm.eval(random_tokens(31, seed=i)[1:])
    llm.save_session(sys.argv[2], llm.n_tokens)
    print(llm.n_tokens, flush=True)
"""


def test_a_process_killed_while_it_saves_leaves_the_last_session_or_the_one_before(
    opened: Opened, model: str, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    command = [sys.executable, "-c", _SAVES_FOR_EVER, model, str(path), *sys.path]
    for n in (3, 8, 14):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for _ in range(n):
                saved = int(child.stdout.readline())
            child.send_signal(signal.SIGKILL)
            rest = child.stdout.read().split()
        saved = int(rest[-1]) if rest else saved
        llm = opened()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = llm.load_session(path)
        assert saved <= found == llm.n_tokens <= saved + 30
        assert log_of(llm).lost == 0
        answer(llm, n)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in a finalizer
@pytest.mark.parametrize("store", ["memory", "file"])
def test_an_interrupt_in_a_load_leaves_one_conversation_with_its_log_or_none(
    opened: Opened, tmp_path: Path, store: str
) -> None:
    llm = opened(kv_log=tmp_path / "log" if store == "file" else None)
    fresh = opened()
    texts = {n: random_tokens(n, seed=n) for n in (330, 250)}
    held = {}
    for n, text in texts.items():
        fresh.reset()
        fresh.eval(text)
        held[n] = [(b.first, b.rows.tobytes()) for b in log_of(fresh).blocks]
    llm.eval(texts[330])
    llm.save_session(tmp_path / "s")
    modules = (sessions, manager, kv_log, log_file, session_file, contextlib)
    here = [str(module.__file__) for module in modules]
    found = set()

    def survives(at: int) -> bool:
        llm.reset()
        llm.eval(texts[250])
        came = interrupted(lambda: llm.load_session(tmp_path / "s"), at, *here)
        n = llm.n_tokens
        assert llm.kv is not None
        if n in texts and llm.kv.trusted:
            assert llm.input_ids[:n].tolist() == texts[n]
            assert [(b.first, b.rows.tobytes()) for b in log_of(llm).blocks] == held[n], at
            found.add(n)
        llm.eval([]) if llm.kv.trusted else llm.reset()
        return came

    assert next(at for at in range(0, 3000, 5) if not survives(at)) > 100
    assert found == {250, 330}


# -- other settings -------------------------------------------------------------------------------


def test_without_recall_a_session_has_no_log_and_one_with_a_log_is_taken_all_the_same(
    opened: Opened, tmp_path: Path
) -> None:
    with_log, without = opened(), opened(recall="off")
    for llm in (with_log, without):
        llm.eval(random_tokens(500))
    with_log.save_session(tmp_path / "with")
    without.save_session(tmp_path / "without")
    size = (tmp_path / "without").stat().st_size
    assert size < (tmp_path / "with").stat().st_size - log_of(with_log).nbytes
    other = opened(recall="off")
    other.load_session(tmp_path / "with")
    assert answer(other, 3) == answer(without, 3)
    # saved again it is as small, and written anew
    for _ in range(3):
        without.save_session(tmp_path / "without")
    without.save_session(tmp_path / "once")
    assert (tmp_path / "without").stat().st_size == (tmp_path / "once").stat().st_size


def test_without_recall_a_log_in_a_file_is_not_written_over(opened: Opened, tmp_path: Path) -> None:
    llm, without, again = opened(), opened(recall="off"), opened()
    llm.eval(random_tokens(500))
    llm.save_session(tmp_path / "s")
    (tmp_path / "link").symlink_to(tmp_path / "s")
    logged = log_of(llm).n_tokens
    assert logged > 0
    before = (tmp_path / "s").read_bytes()
    without.load_session(tmp_path / "s")
    without.eval(random_tokens(10, seed=2))
    for name in ("s", "link"):
        with pytest.raises(SessionError, match="save to another file, or load it with recall"):
            without.save_session(tmp_path / name)
    assert (tmp_path / "s").read_bytes() == before
    without.save_session(tmp_path / "other")
    without.load_session(tmp_path / "other")  # has no log
    without.save_session(tmp_path / "other")
    again.load_session(tmp_path / "s")
    assert log_of(again).n_tokens == logged
    # where it is gone, nothing is lost
    without.load_session(tmp_path / "s")
    (tmp_path / "s").unlink()
    without.save_session(tmp_path / "s")


def test_of_a_session_without_a_log_the_tokens_before_the_tail_are_lost(
    opened: Opened, tmp_path: Path
) -> None:
    without = opened(recall="off")
    without.eval(random_tokens(500))
    without.save_session(tmp_path / "s")
    llm = opened()
    llm.eval(random_tokens(400, seed=2))
    llm.load_session(tmp_path / "s")
    assert llm.kv is not None
    tail = llm.kv.snapshot().tail
    assert tail > 0
    assert (log_of(llm).blocks, log_of(llm).end, log_of(llm).lost) == ((), tail, tail)
    llm.eval(random_tokens(200, seed=5))
    answer(llm, 5)
    assert log_of(llm).n_tokens > 0
    assert log_of(llm).lost == tail


@pytest.mark.parametrize("granularity", ["head", "token"])
def test_tokens_that_are_lost_are_not_asked_to_come_back(
    opened: Opened, tmp_path: Path, granularity: str
) -> None:
    """Not even those that would be protected."""
    without = opened(recall="off", granularity=granularity)
    without.eval(random_tokens(450))
    without.evict()
    without.save_session(tmp_path / "s")
    llm = opened(granularity=granularity)
    llm.load_session(tmp_path / "s")
    came = 0
    for seed in range(1, 8):
        llm.eval(random_tokens(37, seed=seed))
        llm.evict()
        came += llm.recall() is not None
    assert came > 0
    assert log_of(llm).lost > 0


@pytest.mark.parametrize("granularity", ["head", "token"])
def test_a_long_protected_beginning_leaves_room_for_what_comes_back(
    opened: Opened, granularity: str
) -> None:
    """Right after an eviction the tokens asked with are taken back, so that fewer are recent."""
    llm = opened(granularity=granularity)
    assert llm.kv is not None
    llm.kv.protect_prefix(79)
    llm.eval(random_tokens(300))
    for seed in range(1, 5):
        llm.eval(random_tokens(50, seed=seed))
        llm.evict()
        assert llm.recall() is not None
        assert (llm.kv_indices[..., :79] == np.arange(79)).all()


def test_a_log_of_another_type_is_refused_by_name(opened: Opened, tmp_path: Path) -> None:
    first, llm = opened(), opened(kv_log_type="q8_0")
    first.eval(random_tokens(500))
    first.save_session(tmp_path / "s")
    llm.eval(random_tokens(200, seed=2))
    for take in (
        lambda: llm.load_session(tmp_path / "s"),
        lambda: llm.load_state(first.save_state()),
    ):
        with pytest.raises(SessionError, match="a KV log of type_k = 1, but here it is 8: load"):
            take()
    assert llm.n_tokens == 200
    answer(llm, 1)


def test_where_the_log_has_less_room_its_newest_tokens_come(opened: Opened, tmp_path: Path) -> None:
    first = opened(protect_system=True)
    assert first.kv is not None
    first.eval(random_tokens(60))
    first.kv.protect_prefix(10)
    first.eval(random_tokens(800, seed=1))
    first.save_session(tmp_path / "s")
    whole = log_of(first)
    half = whole.nbytes // 2 // 1024 * 1024
    llm = opened(kv_log_limit=f"{half // 1024}KiB")
    llm.load_session(tmp_path / "s")
    log = log_of(llm)
    assert log.nbytes <= half < log.nbytes + max(b.rows.nbytes for b in whole.blocks)
    assert log.blocks[0].first == 0  # pinned
    assert log.blocks[-1].end == whole.blocks[-1].end
    assert log.n_tokens + log.lost == log.end == whole.end
    answer(llm, 5)


def test_a_full_disk_loses_what_found_no_room_and_the_chat_goes_on(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, llm = opened(), opened()
    first.eval(random_tokens(500))
    first.save_session(tmp_path / "s")
    real, left = InMemory.add, [2]

    def add(self: InMemory, block: Block, fill: Callable[[Bytes], None]) -> Block:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, block, fill)

    monkeypatch.setattr(InMemory, "add", add)
    llm.load_session(tmp_path / "s")
    assert len(log_of(first).blocks) > len(log_of(llm).blocks) == 2
    assert log_of(llm).failure == "No space left on device"
    assert log_of(llm).n_tokens + log_of(llm).lost == log_of(first).end


def test_queries_of_the_conversation_before_ask_for_nothing(opened: Opened, tmp_path: Path) -> None:
    llm, never_asked = opened(), opened()
    llm.eval(random_tokens(500))
    llm.save_session(tmp_path / "s")
    llm.reset()
    llm.eval(random_tokens(450, seed=2))
    assert llm.kv is not None
    assert llm.kv.query_log is not None
    llm.recall()  # which logs queries
    assert len(llm.kv.query_log) > 0
    for one in (llm, never_asked):
        one.load_session(tmp_path / "s")
    assert len(llm.kv.query_log) == 0
    came = [one.recall() for one in (llm, never_asked)]
    assert came[0] is not None
    assert came[1] is not None
    assert came[0].spans == came[1].spans
    assert llm.kv_indices.tolist() == never_asked.kv_indices.tolist()


def test_a_policy_that_looks_at_queries_has_no_session_and_one_that_does_not_has(
    opened: Opened, tmp_path: Path
) -> None:
    looks = opened(policy="snapkv")
    looks.eval(random_tokens(100))
    with pytest.raises(SessionError, match="with policy 'snapkv': its queries are not saved"):
        looks.save_session(tmp_path / "s")
    llm = opened()
    assert llm.kv is not None
    assert llm.kv.query_log is not None
    llm.eval(random_tokens(100))
    llm.save_session(tmp_path / "s")


def test_a_model_is_not_loaded_with_a_file_that_cannot_be_its_log(
    opened: Opened, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text("mine")
    first = opened(kv_log=tmp_path / "log")
    for name, says in (
        ("log", "in use by another Llama"),
        ("mine", "not a KV log"),
        ("none/log", "No such file"),
    ):
        with pytest.raises(OptionError, match=f"kv_log='.*{says}"):
            opened(kv_log=tmp_path / name)
    assert (tmp_path / "mine").read_text() == "mine"
    first.eval(random_tokens(400))
    state = first.save_state()
    first.close()
    second = opened(kv_log=tmp_path / "log")
    second.load_state(state)  # its rows lie in a file that has no name any more
    assert log_of(second).n_tokens > 250
    answer(second, 5)


# -- hostile --------------------------------------------------------------------------------------


Parts = dict[str, Any]


def _block(first: int, n: int, layout: dict[str, int]) -> Parts:
    heads = (layout["n_layer"], layout["n_head_kv"], n)
    return {
        "kind": b"blck",
        "header": {"first": first, "n": n, "rope_first": first},
        "arrays": {
            "scores": np.zeros(heads, np.float32),
            "spans": np.zeros((0, 3), np.int32),
            "rows": np.zeros(n * layout["bytes_per_token"], np.uint8),
        },
    }


def _numbers(**numbers: Any) -> Callable[[list[Parts], Parts], None]:
    return lambda blocks, header: blocks[1]["header"].update(numbers)


def _arrays(**changes: Callable[[Any], Any]) -> Callable[[list[Parts], Parts], None]:
    def change(blocks: list[Parts], header: Parts) -> None:
        arrays = blocks[1]["arrays"]
        arrays.update({name: f(arrays.get(name)) for name, f in changes.items()})

    return change


def _spans(*spans: tuple[int, int, int]) -> Callable[[list[Parts], Parts], None]:
    return _arrays(spans=lambda _: np.array(spans, np.int32))


HOSTILE: dict[str, Callable[[list[Parts], Parts], Any]] = {
    "first of another type": _numbers(first="50"),
    "first below 0": _numbers(first=-1),
    "first in the block before": _numbers(first=49, rope_first=49),
    "first far away": _numbers(first=2**40),
    "no tokens": _numbers(n=0),
    "more tokens than rows": _numbers(n=51),
    "true tokens": _numbers(n=True),
    "rotated too far": _numbers(rope_first=51),
    "rotated below 0": _numbers(rope_first=-1),
    "no first": lambda blocks, header: blocks[1]["header"].pop("first"),
    "rows cut": _arrays(rows=lambda a: a[:-1]),
    "rows of floats": _arrays(rows=lambda a: a[: len(a) // 4 * 4].view(np.float32)),
    "scores of other heads": _arrays(scores=lambda a: a[:1]),
    "scores of integers": _arrays(scores=lambda a: a.view(np.int32)),
    "spans of two columns": _arrays(spans=lambda a: a[:, :2]),
    "spans of one axis": _arrays(spans=lambda a: a.reshape(-1)),
    "spans of no axis": _arrays(spans=lambda a: np.array(5, np.int32)),
    "one array more": _arrays(more=lambda a: np.zeros(1, np.int32)),
    "no spans": lambda blocks, header: blocks[1]["arrays"].pop("spans"),
    "a span before it": _spans((49, 51, 0)),
    "a span after it": _spans((100, 101, 0)),
    "an empty span": _spans((60, 60, 0)),
    "overlapping spans": _spans((60, 70, 0), (69, 75, 0)),
    "a span of no kind": _spans((60, 61, 3)),
    "a span past the end": _spans((60, 2**31 - 1, 0)),
    "more spans than tokens": _spans(*[(60, 61, 0)] * 51),
    "not a block": lambda blocks, header: blocks[1].update(kind=b"conv"),
    "past the log's end": lambda blocks, header: header["log"].update(end=99),
    "the log ends before the tail": lambda blocks, header: header["log"].update(end=0),
    "the log ends after the text": lambda blocks, header: header["log"].update(end=301),
    "the log ends nowhere": lambda blocks, header: header["log"].pop("end"),
    "no layout": lambda blocks, header: header["log"].update(layout=None),
    "another layout": lambda blocks, header: header["log"]["layout"].update(k_row=1),
    "a layout without a number": lambda blocks, header: header["log"]["layout"].pop("k_row"),
    "at a place of another type": lambda blocks, header: header.update(blocks=["64"]),
    "nowhere": lambda blocks, header: header.update(blocks=[64, 2**62]),
    "before the beginning": lambda blocks, header: header.update(blocks=[-64]),
    "between": lambda blocks, header: header.update(blocks=[128]),
    "no multiple of 64": lambda blocks, header: header.update(blocks=[65]),
    "twice": lambda blocks, header: header.update(blocks=header["blocks"][:1] * 2),
    "in another order": lambda blocks, header: header["blocks"].reverse(),
    "the conversation itself": lambda blocks, header: header["blocks"].append("itself"),
    "more blocks than tokens": lambda blocks, header: header.update(blocks=[64] * 5000),
}


def _assembled(path: Path, change: Callable[[list[Parts], Parts], Any]) -> bytes:
    """The session at ``path`` with two blocks of our own in place of its log."""
    header, arrays = session_file.read(path)
    layout = header["log"]["layout"]
    blocks = [_block(0, 50, layout), _block(50, 50, layout)]
    start = record_files.start(session_file.MAGIC, session_file.VERSION)

    def laid(size_of: int) -> tuple[bytes, list[int]]:
        data, places = start, []
        for block in blocks[:size_of]:
            places.append(len(data) + -len(data) % 64)
            one = record_files.record(block["kind"], block["header"], block["arrays"])
            data = record_files.followed(data, one)
        return data, places

    header["blocks"] = laid(2)[1]
    change(blocks, header)
    data, _ = laid(2)
    if "itself" in header["blocks"]:
        header["blocks"][-1] = len(data) + -len(data) % 64
    return record_files.followed(data, record_files.record(b"conv", header, arrays))


def test_whatever_is_wrong_with_a_block_is_refused_and_the_chat_goes_on(
    opened: Opened, tmp_path: Path
) -> None:
    path, llm, never_asked = tmp_path / "s", opened(kv_log=tmp_path / "log"), opened()
    llm.eval(random_tokens(300))
    llm.save_session(path)
    good = path.read_bytes()
    for one in (llm, never_asked):
        one.reset()
        one.eval(random_tokens(400, seed=3))
    assert llm.kv is not None
    log = log_of(llm)
    before = (llm.kv.snapshot(), log.held, llm.n_tokens)
    accepted = []
    for name, change in HOSTILE.items():
        path.write_bytes(good)
        path.write_bytes(_assembled(path, change))
        try:
            llm.load_session(path)
            accepted.append(name)
        except SessionError as error:
            said = re.search(
                "is inconsistent|damaged or cut short: (?!its checksum)", str(error)
            ) or "a KV log of k_row" in str(error)
            now = (llm.kv.snapshot(), log.held, llm.n_tokens)
            same = now[0] is before[0] and now[1].end == before[1].end and now[2] == before[2]
            if not (said and same and log.n_tokens == log.end):
                accepted.append(f"{name}: {error}")
    assert accepted == []
    assert_same_log(llm, never_asked)
    written = read_log(tmp_path / "log", log.layout)[1]
    assert sum(b.n for b in written) <= 2 * log.n_tokens + 100
    assert answer(llm, 5) == answer(never_asked, 5)


def test_without_damage_the_same_blocks_are_accepted(opened: Opened, tmp_path: Path) -> None:
    path, llm = tmp_path / "s", opened()
    llm.eval(random_tokens(300))
    llm.save_session(path)
    assert llm.kv is not None
    tail = llm.kv.snapshot().tail

    def all_of_it(blocks: list[Parts], header: Parts) -> None:
        """A log may have gaps and reach to the newest token; a span may reach out of its block."""
        header["log"]["end"] = 300
        blocks[1]["arrays"]["spans"] = np.array([(60, 61, 0), (99, 300, 1)], np.int32)

    assert tail < 300
    path.write_bytes(_assembled(path, all_of_it))
    llm.load_session(path)
    log = log_of(llm)
    assert [(b.first, b.end) for b in log.blocks] == [(0, 50), (50, 100)]
    assert (log.end, log.lost) == (300, 200)


def test_damage_to_a_block_is_noticed_wherever_it_is(opened: Opened, tmp_path: Path) -> None:
    path, llm = tmp_path / "s", opened(kv_log=tmp_path / "log")
    llm.eval(random_tokens(300))
    llm.save_session(path)
    good = path.read_bytes()
    with path.open("rb") as file:
        found = [r for r in records.all_records(file, len(good)) if r.kind == b"blck"]
    for record in (found[0], found[-1]):
        for at in range(record.start, record.end, 501):
            spoilt = bytearray(good)
            spoilt[at] ^= 0x20
            path.write_bytes(spoilt)
            with pytest.raises(SessionError, match="damaged or cut short"):
                llm.load_session(path)
    assert llm.n_tokens == 300
    assert log_of(llm).n_tokens == log_of(llm).end
    path.write_bytes(good)
    llm.load_session(path)


def test_an_older_version_is_refused_with_a_sentence(opened: Opened, tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(session_file.MAGIC + (4).to_bytes(4, "little") + bytes(200))
    with pytest.raises(SessionError, match="is a session of version 4, but this .* version 5"):
        opened().load_session(tmp_path / "s")
