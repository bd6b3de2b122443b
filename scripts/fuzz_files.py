#!/usr/bin/env python3
"""Fuzz the readers of all files that kvp_edge takes from others.

    python scripts/fuzz_files.py [--seconds 20] [--inputs N] [--only session,policy] [--seed 0]

For every format, valid files are damaged (scripts/mutations.py) and read: in their bytes, and
behind right checksums and lengths in their structure. A reader may accept what it gets, if what it
gives can be used, or raise the one exception of its format. Anything else fails: another exception,
a crash, more than ``HANG`` seconds or ``MEMORY`` bytes for one input, memory that grows, and for
sessions a conversation that is not what it was after a refusal.

Run it in an environment where kvp_edge is installed with the dev extra, on Linux; checkpoints need
the extra train. Each format runs in a process of its own. What fails is kept in --findings.
Ctrl-C ends it with the figures reached so far. The parser and packer of llama.cpp's states, which
are native, have a fuzzer of their own: scripts/fuzz.py.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import mmap
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent

import mutations  # noqa: E402
from kvp_edge import KVCacheError, Llama, SessionError  # noqa: E402
from kvp_edge.binding.fingerprint import model_fingerprint  # noqa: E402
from kvp_edge.binding.model import read_model_shape  # noqa: E402
from kvp_edge.binding.structs import LogLayout  # noqa: E402
from kvp_edge.cache.kv_log import Block  # noqa: E402
from kvp_edge.cache.log_file import LogFile, read_log  # noqa: E402
from kvp_edge.errors import OptionError, PolicyFileError, RecordError, TraceError, TrainingError  # noqa: E402
from kvp_edge.evaluation.records import (  # noqa: E402
    Record,
    append_record,
    read_records,
)
from kvp_edge.policies import ArrayView, Learned, policy_of_model  # noqa: E402
from kvp_edge.policy_file import PolicyInfo, write_policy  # noqa: E402
from kvp_edge.traces.format import TraceSet  # noqa: E402
from kvp_edge.traces.sources import TextFile  # noqa: E402
from kvp_edge.traces.writer import capture_traces  # noqa: E402
from makers.gguf_models import ModelShape, write_model  # noqa: E402
from makers.policies import random_sensitivity, random_weights  # noqa: E402

HANG, MEMORY, GROWTH = 10.0, 2**30, 2**27  # seconds; bytes for one input; bytes for a whole run

TINY = ModelShape("llama", n_layer=1, n_embd=32, n_head=2, n_head_kv=2, n_ff=32)
WINDOW = ModelShape(
    "gemma3", n_layer=2, n_embd=32, n_head=1, n_head_kv=1, n_ff=32, sliding_window=8
)


class Broken(Exception):
    """What was refused has changed something, or what was accepted cannot be used."""


class Hang(BaseException):
    """No exception that anybody catches by accident."""


class Target(ABC):
    """One format. ``folder`` is its own, and is where it makes its valid files."""

    refusal: type[Exception]

    #: Bytes that a library keeps for good of every input.
    keeps = 0

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "input"

    @abstractmethod
    def damaged(self, rng: Random) -> bytes:
        """The next input, which will lie at ``path``."""

    @abstractmethod
    def read(self) -> None:
        """Read ``path``, and use what comes of it."""

    def refused(self) -> None:  # noqa: B027 (most have nothing that could be lost)
        """After a refusal."""


# -- conversations -------------------------------------------------------------------------------


class _Conversation(Target):
    """A conversation that has dropped tokens, and must outlive whatever it is asked to load."""

    refusal = SessionError
    shape = TINY

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        model = folder / "model.gguf"
        write_model(model, self.shape)
        self.llm = Llama(
            str(model),
            n_ctx=1000,
            kv_budget=64,
            recent=16,
            reserve=32,
            n_threads=1,
            n_threads_batch=1,
            verbose=False,
        )
        rng = np.random.default_rng(0)
        self.tokens = [0, *rng.integers(6, 270, 199).tolist()]
        self.make_other(folder / "other")
        self.parts = mutations.RecordParts((folder / "other").read_bytes())
        if self.parts.whole() != (folder / "other").read_bytes():
            raise Broken("the parts of a session are not the whole")
        self.llm.reset()
        self.llm.eval(self.tokens)
        self.llm.save_session(folder / "mine")
        self.remember()

    @abstractmethod
    def make_other(self, path: Path) -> None: ...

    def remember(self) -> None:
        kv = self.llm.kv
        assert kv is not None
        self.before = (kv.snapshot(), kv.protected_prefix, kv.evictions, kv.eviction_ms)
        self.logged = self.in_log()
        self.n_tokens, self.newest = int(self.llm.n_tokens), kv.cache.newest_position()

    def in_log(self) -> Any:
        """What the KV log holds."""
        assert self.llm.kv is not None
        assert self.llm.kv.log is not None
        held = self.llm.kv.log.held
        return held.end, [(b.first, b.n, b.rows.tobytes()) for b in held.blocks]

    def refused(self) -> None:
        llm, kv = self.llm, self.llm.kv
        assert kv is not None
        now = (kv.snapshot(), kv.protected_prefix, kv.evictions, kv.eviction_ms)
        same = all(a is b or a == b for a, b in zip(now[1:], self.before[1:], strict=True))
        if not (
            now[0] is self.before[0]
            and same
            and self.in_log() == self.logged
            and kv.trusted
            and llm.n_tokens == self.n_tokens
            and kv.cache.newest_position() == self.newest
            and llm.input_ids[: self.n_tokens].tolist() == self.tokens
        ):
            raise Broken("the conversation is not what it was before the refusal")

    def read(self) -> None:
        self.llm.load_session(self.path)
        self.llm.eval([7] * min(8, self.llm.n_ctx() - self.llm.n_tokens))
        self.llm.evict()
        self.llm.recall()
        with contextlib.suppress(KVCacheError):  # keys that are no numbers give no likeliest token
            self.llm.likeliest()
        self.llm.load_session(self.folder / "mine")
        self.remember()

    def damaged(self, rng: Random) -> bytes:
        return self.parts.damaged(rng)


class Session(_Conversation):
    def make_other(self, path: Path) -> None:
        self.llm.eval(self.tokens[:150][::-1])
        self.llm.save_session(path, {"messages": [{"role": "user", "content": "hi"}], "seed": 1})


class Windowed(Session):
    """Of a window cache no more is checked here than llama.cpp does, which empties it then."""

    shape = WINDOW


class Rescue(_Conversation):
    def make_other(self, path: Path) -> None:
        self.llm.eval(self.tokens[:20][::-1])
        self.llm.rescue_to(path, lambda: {"messages": []})
        self.llm.rescue("a device failed")
        self.llm.rescue_to(None)


class KVLogFile(Target):
    """What a log file holds; and a new log in its place, if it is one."""

    refusal = ValueError

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.layout = LogLayout(
            n_layer=2, n_head_kv=2, head_size_k=2, head_size_v=2, type_k=1, type_v=1,
            k_row=8, v_row=8, bytes_per_token=32,
        )  # fmt: skip
        store, rng = LogFile(self.path, self.layout, {"model": "x"}), np.random.default_rng(0)
        for i in range(5):
            block = Block(
                *(9 * i, 9, 9 * i, np.empty(0, np.uint8)),
                rng.normal(size=(2, 2, 9)).astype(np.float32),
                np.array([(9 * i, 9 * i + 2, 0)], np.int32),
            )
            store.add(block, lambda rows: rows.fill(7))
        store.close()
        self.parts = mutations.RecordParts(self.path.read_bytes())
        if self.parts.whole() != self.path.read_bytes():
            raise Broken("the parts of a log are not the whole")

    def damaged(self, rng: Random) -> bytes:
        return self.parts.damaged(rng)

    def read(self) -> None:
        before = self.path.read_bytes()
        try:
            LogFile(self.path, self.layout).close()
        except OptionError:
            if self.path.read_bytes() != before:
                raise Broken("a file that is not a log was changed") from None
        else:
            if read_log(self.path, self.layout)[1]:
                raise Broken("a log that was begun anew has blocks")
        self.path.write_bytes(before)
        for block in read_log(self.path, self.layout)[1]:
            if block.rows.nbytes != 32 * block.n:
                raise Broken("a block without its rows")


# -- policies ------------------------------------------------------------------------------------


class _PolicyTarget(Target):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.model = folder / "model.gguf"
        write_model(self.model, TINY)
        shape = read_model_shape(self.model)
        info = PolicyInfo(
            shape.architecture,
            shape.n_layer,
            shape.n_head_kv[0],
            shape.head_size_k,
            shape.head_size_v,
            hidden=4,
            context=3,
            fingerprint=model_fingerprint(self.model),
        )
        self.parts = []
        layer = replace(info, scope="layer")
        for outtype, one in (("f32", info), ("f16", info), ("q8_0", info), ("f16", layer)):
            weights = random_weights(one)
            if one is layer:
                weights = replace(weights, sensitivity=random_sensitivity(one))
            write_policy(self.path, one, weights, outtype)  # type: ignore[arg-type]
            self.parts.append(mutations.GGUFParts(self.path.read_bytes()))
            if self.parts[-1].whole() != self.path.read_bytes():
                raise Broken("the parts of a GGUF file are not the whole")
        self.shape = shape

    def damaged(self, rng: Random) -> bytes:
        return rng.choice(self.parts).damaged(rng)


class Policy(_PolicyTarget):
    """A policy file that was named."""

    refusal = PolicyFileError

    def read(self) -> None:
        info = (policy := Learned(self.path)).info
        heads = (info.n_layer, info.n_head_kv, 5)
        keys, values = (
            np.ones((*heads, size), np.float32) for size in (info.head_size_k, info.head_size_v)
        )
        with np.errstate(all="ignore"):
            policy.score(ArrayView(keys, values, np.arange(5, dtype=np.int32)))


class Beside(_PolicyTarget):
    """A policy file beside a model, which is used or passed over: nothing may be raised."""

    refusal = Hang  # type: ignore[assignment]

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path.unlink()
        self.path = folder / "kvp-input.gguf"
        # those of the package are not damaged, and to read them takes as long again
        policy_of_model._shipped = lambda: folder

    def read(self) -> None:
        found = policy_of_model.own_policy(self.model)
        if found is not None:
            Learned(found)


# -- traces, records, checkpoints ----------------------------------------------------------------


class _Traces(Target):
    refusal = TraceError

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        write_model(folder / "model.gguf", TINY)
        (folder / "text").write_text("the thing and another " * 30)
        source = TextFile(str(folder / "text"))
        self.traces = folder / "traces"
        capture_traces(folder / "model.gguf", [source], self.traces, length=40, n_traces=2)

    def read(self) -> None:
        traces = TraceSet(self.traces, partial=True)
        for trace in traces:
            for split in trace.splits[-1:]:
                trace.importance(int(split))
            next(trace.payments(), None)
        traces.check()


class Manifest(_Traces):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = self.traces / "manifest.json"
        self.value = json.loads(self.path.read_bytes())

    def damaged(self, rng: Random) -> bytes:
        return mutations.of_json(rng, self.value)


class Trace(_Traces):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = self.traces / "trace-00001.safetensors"
        self.whole = self.path.read_bytes()
        self.manifest = json.loads((self.traces / "manifest.json").read_bytes())

    def damaged(self, rng: Random) -> bytes:
        data = mutations.of_safetensors(rng, self.whole, "kvp_trace")
        self.manifest["traces"][1] |= {
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        (self.traces / "manifest.json").write_text(json.dumps(self.manifest))
        return data


class Records(Target):
    refusal = RecordError

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        record = Record(
            *("bounded", "unseen", "head", "f16", "f16", 1024, 128, 0.125, "keydiff", "recall"),
            *(0, 0, True, "f00d", 1000, 128, 872, 5, "Rex", "accuracy", 1.0, 0.5, 2**20),
        )
        for _ in range(3):
            append_record(self.path, record)
        self.values = [json.loads(line) for line in self.path.read_bytes().splitlines()]

    def damaged(self, rng: Random) -> bytes:
        lines = [json.dumps(value).encode() for value in self.values]
        lines[rng.randrange(len(lines))] = mutations.of_json(rng, self.values[0])
        return b"\n".join(lines) + b"\n" * (rng.random() < 0.5)

    def read(self) -> None:
        for record in read_records(self.path):
            record.key()


class Checkpoint(Target):
    refusal = TrainingError
    keeps = 512  # safetensors' get_tensor, a number of each tensor's: 0.3 KiB of ten tensors

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from kvp_edge.training import checkpoint  # noqa: PLC0415
        from kvp_edge.training.agent import Agents, AgentShape  # noqa: PLC0415

        shape = AgentShape(1, 2, 4, 4, hidden=3, context=3)
        settings = {"objective": "kvp", "sinks": 4, "recent": 32, "n_traces": 10}
        model = {"architecture": "llama", "name": "Tiny", "fingerprint": "f00d"}
        about = checkpoint.About(shape, settings, model, 7, {"cost": [0.5]})
        checkpoint.save(self.path, Agents(shape).state_dict(), about)
        self.whole = self.path.read_bytes()

    def damaged(self, rng: Random) -> bytes:
        return mutations.of_safetensors(rng, self.whole, None)

    def read(self) -> None:
        from kvp_edge.export.convert import policy_of  # noqa: PLC0415
        from kvp_edge.training.checkpoint import load_agents  # noqa: PLC0415

        with np.errstate(all="ignore"):
            policy_of(*load_agents(self.path))


TARGETS: dict[str, type[Target]] = {
    "session": Session,
    "session-of-a-window": Windowed,
    "rescue": Rescue,
    "log": KVLogFile,
    "policy": Policy,
    "policy-beside-a-model": Beside,
    "manifest": Manifest,
    "trace": Trace,
    "records": Records,
    "checkpoint": Checkpoint,
}
_NEEDS = {"checkpoint": ("torch", "safetensors"), "trace": ("safetensors",)}
_NEEDS["manifest"] = _NEEDS["trace"]


# -- running -------------------------------------------------------------------------------------


def _rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _size() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _hangs(*_: Any) -> None:
    raise Hang(f"more than {HANG} s for one input")


_stop = False


def _stops(*_: Any) -> None:
    global _stop  # noqa: PLW0603 (a signal's handler has nothing else to tell it by)
    _stop = True


def fuzz(target: Target, rng: Random, seconds: float, inputs: int, count: mmap.mmap) -> str:
    """Read damaged files until the time or the number is up, or it is told to stop.

    Returns:
        What came of it, for a person.

    Raises:
        whatever a reader must not raise; the input is still at ``target.path``.
    """
    signal.signal(signal.SIGALRM, _hangs)
    most = _size() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    started, n, accepted, rss = time.monotonic(), 0, 0, 0
    while n < inputs and not _stop and time.monotonic() - started < seconds:
        target.path.write_bytes(target.damaged(rng))
        signal.setitimer(signal.ITIMER_REAL, HANG)
        try:
            target.read()
            accepted += 1
        except target.refusal:
            target.refused()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        n += 1
        struct.pack_into("<Q", count, 0, n)
        rss = rss if n != 1000 else _rss()
    took = time.monotonic() - started
    growth = _rss() - rss if rss else 0
    if growth > GROWTH + n * target.keeps:
        raise Broken(f"{growth / 2**20:.0f} MiB more are in use than after 1000 inputs")
    return (
        f"{n:>9} inputs in {took:6.1f} s, {accepted:>7} accepted, {n - accepted:>7} refused, "
        f"memory {growth / 2**20:+.1f} MiB"
    )


def run(name: str, folder: Path, args: argparse.Namespace, seconds: float) -> bool:
    """Fuzz one format in a process of its own. Returns whether all was well."""
    count = mmap.mmap(-1, 8)
    folder.mkdir()
    child = os.fork()
    if child == 0:
        status, at = 1, folder
        try:
            warnings.simplefilter("ignore")
            target = TARGETS[name](folder)
            at = target.path
            print(f"{name:22}{fuzz(target, Random(args.seed), seconds, args.inputs, count)}")
            status = 0
        except BaseException:
            print(f"{name}: {traceback.format_exc()}the input: {at}")
        finally:
            sys.stdout.flush()
            os._exit(status)
    status = _wait(child, count)
    if status:
        args.findings.mkdir(parents=True, exist_ok=True)
        kept = args.findings / name
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(folder, kept)
        print(f"{name}: failed with status {status}; its files are in {kept}")
    return status == 0


def _wait(child: int, count: mmap.mmap) -> int:
    """The exit status of a process, which is killed when it makes no progress any more: a signal
    does not end what hangs in C."""
    last, since = -1, time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        (n,) = struct.unpack_from("<Q", count)
        if n != last:
            last, since = n, time.monotonic()
        elif time.monotonic() - since > 60 + HANG:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=20, help="for all formats together")
    parser.add_argument("--inputs", type=int, default=2**62, help="for each format, at most")
    parser.add_argument("--only", default=",".join(TARGETS), help="formats, with commas between")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    args = parser.parse_args()
    wanted = args.only.split(",")
    names = [n for n in wanted if all(map(importlib.util.find_spec, _NEEDS.get(n, ())))]
    for name in set(wanted) - set(names):
        print(f"{name:22}left out: it needs {' and '.join(_NEEDS[name])}")
    signal.signal(signal.SIGINT, _stops)
    signal.signal(signal.SIGTERM, _stops)
    fast = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=fast) as scratch:
        well = [
            run(n, Path(scratch) / n, args, args.seconds / len(names)) for n in names if not _stop
        ]
    return 0 if all(well) else 1


if __name__ == "__main__":
    sys.exit(main())
