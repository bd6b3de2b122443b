#!/usr/bin/env python3
"""Interrupts, kills, dropped streams and failing callbacks: what a conversation is afterwards.

    python scripts/stress_interrupts.py [--seconds 60] [--seed 0]
    python scripts/stress_interrupts.py --interrupts 1000 --streams 200 --callbacks 20 --kills 40

Every model that is disturbed has a twin that never is. The twin reads, batch by batch, what the
disturbed one has read, and recalls where that one has recalled. Then both must be the same: the
tokens that every head holds, their keys and values, the KV log, the rows that queries chose, and
the logits after each batch, all bit for bit. Or the disturbed one does not trust its cache any
more: then its next reply must begin with reading the conversation again.

    interrupts  Ctrl-C while a model reads, writes, chats, streams, recalls, goes back, evicts,
                saves or loads; without recall, with it, and with the log in a file: by a timer at a
                random microsecond, or at a random one of the moments at which Python looks for
                signals
    streams     dropped after a random piece, or asked for another when something else was read
    callbacks   on_evict, on_recall, on_batch, stopping criteria, logits processors and a policy of
                one's own that raise, call what they must not, or return nonsense
    kills       kill -9 of a process that saves over one file again and again: what is there
                afterwards is a whole session, and the next save sweeps what was left
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kvp_edge import InUseError, KVCacheError, Llama, Policy
from kvp_edge.binding.queries import Queries
from kvp_edge.bundled import bundled_model
from kvp_edge.cache.recall import Choice, RecallSettings

TEXT = "the old man went to sea and my dog is called Rex snow fell on all roofs where we sang"
WORDS = TEXT.split()
WAYS: dict[str, dict[str, Any]] = {
    "learned": {},
    "keydiff, state": {"policy": "keydiff", "pack": "state"},
    "learned, token": {"granularity": "token"},
    "keydiff, q8_0": {"policy": "keydiff", "type_k": 8, "type_v": 8, "flash_attn": True},
    "snapkv": {"policy": "snapkv"},
    "keydiff, compact": {"policy": "keydiff", "positions": "compact"},
    "keydiff, token, compact": {
        "policy": "keydiff",
        "positions": "compact",
        "granularity": "token",
    },
}
RECALLS: dict[str, dict[str, Any]] = {
    "recall off": {"recall": "off"},
    "recall": {"recall": "reply"},
    "recall always, log in a file": {"recall": "always", "recall_every": 6, "kv_log": None},
}
WRITE = ("writing", "chatting", "streaming")
KINDS = {"interrupts": 0.7, "streams": 0.1, "callbacks": 0.1, "kills": 0.1}  # shares of the time


class Watched(Llama):
    """A model that writes down its steps: what it was told to read, every batch with the logits
    after it, every time that it begins anew or takes over what was saved."""

    def __init__(self, **how: Any) -> None:
        self.steps: list[tuple[Any, ...]] = []
        quiet = {"n_threads": 1, "n_threads_batch": 1, "verbose": False}
        limits: dict[str, Any] = {"n_ctx": 9000, "kv_budget": 128, "reserve": 128, "n_batch": 64}
        super().__init__(bundled_model(), **{**quiet, **limits, **how})
        self.on_batch = self.note
        assert self.kv is not None
        self.make_room, self.choose, self.bring = (
            self.kv.make_room, self.kv.choose_by_queries, self.kv.bring
        )  # fmt: skip

    def note_recalls(self) -> None:
        """Write down what is done to the cache before it reads, too."""
        kv: Any = self.kv
        kv.make_room, kv.choose_by_queries, kv.bring = self.room, self.chosen, self.brought

    def room(self, n: int) -> int:
        may = self.make_room(n)
        self.steps.append(("room", n))
        return may

    def chosen(self, n: int) -> Choice | None:
        choice = self.choose(n)
        self.steps.append(("chosen", n, choice, self.newest_queries(n)))
        return choice

    def brought(self, choice: Choice) -> float:
        ms = self.bring(choice)
        self.steps.append(("brought", int(self.n_tokens)))
        return ms

    def newest_queries(self, n: int) -> Queries | None:
        assert self.kv is not None
        assert self.kv.query_log is not None
        return self.kv.query_log.of(self.kv.seen - n, self.kv.seen)

    def note(self, first: int, end: int) -> None:
        read = self.input_ids[first:end].tolist()
        self.steps.append(("batch", first, read, self.newest_logits().copy()))

    def reset(self) -> None:
        super().reset()
        self.steps.append(("reset",))

    def eval(self, tokens: Any) -> None:
        self.steps.append(("eval", int(self.n_tokens)))
        super().eval(tokens)

    def take_over(self, tokens: Any) -> None:
        super().take_over(tokens)
        self.steps.append(("restored",))

    @property
    def text(self) -> list[int]:
        return self.input_ids[: self.n_tokens].tolist()


def options(way: str, kv_log: Path) -> dict[str, Any]:
    """Of a name in WAYS and one in RECALLS, with a comma between."""
    cache, recall = next((WAYS[a], RECALLS[b]) for a in WAYS for b in RECALLS if way == f"{a}, {b}")
    return {**cache, **recall} | ({"kv_log": str(kv_log)} if "kv_log" in recall else {})


class Lying(Policy):
    """Prefers large keys, but for what ``lie`` says."""

    name = "lying"
    scope = "cache"

    def __init__(self) -> None:
        self.lie: Callable[[Any], Any] | None = None

    def score(self, view: Any) -> Any:
        true = np.linalg.norm(view.keys(), axis=-1)
        return true if self.lie is None else self.lie(true)


def rows(llm: Watched) -> list[bytes]:
    """Everything that a model holds: which tokens, where, with which keys and values."""
    assert llm.kv is not None
    table = llm.kv.snapshot()
    present = table.llama_positions()
    llm.kv.cache.check_cells(present)
    newest = int(present[-1]) if len(present) else -1
    if llm.kv.cache.newest_position() != newest:
        raise AssertionError(f"newest position {llm.kv.cache.newest_position()}, not {newest}")
    read = llm.kv.cache.read(0, newest + 1, len(present)) if len(present) else (present,) * 3
    held = (table.indices(), table.rope_positions(), present, *read, *logged(llm))
    return [np.ascontiguousarray(part).tobytes() for part in held]


def logged(llm: Watched) -> Iterator[Any]:
    """The KV log: its tokens, their rows and the scores they had."""
    assert llm.kv is not None
    log = llm.kv.log
    blocks = () if log is None else log.blocks
    yield [(b.first, b.n, b.rope_first) for b in blocks]
    yield 0 if log is None else log.lost
    for block in blocks:
        yield from (block.rows, block.scores, block.spans)


def same_choice(a: Choice | None, b: Choice | None) -> bool:
    if a is None or b is None:
        return a is b
    return (
        a.tail == b.tail
        and np.array_equal(a.tokens, b.tokens)
        and np.array_equal(a.wanted, b.wanted)
    )


class Interrupt:
    """Ctrl-C somewhere in a call: uniform over its time, or over its steps, of the last time that a
    call of this name came to its end."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._seconds: dict[str, float] = {}
        self._steps: dict[str, int] = {}
        self._armed = False
        signal.signal(signal.SIGALRM, self._alarm)

    def _alarm(self, *_: Any) -> None:
        if self._armed:
            self._armed = False
            raise KeyboardInterrupt

    def during(self, name: str, do: Callable[[], Any]) -> bool:
        """Whether an interrupt came out of ``do``."""
        by_time = self._rng.random() < 0.5
        started, n = time.perf_counter(), 0
        at = int(self._rng.random() * self._steps.get(name, 2000))

        def count(_: Any, event: str, __: Any) -> None:
            nonlocal n
            n += event in ("call", "c_return")
            if n > at and self._armed:
                self._armed = False
                raise KeyboardInterrupt

        try:
            self._armed = True
            if by_time:
                seconds = self._rng.random() * self._seconds.get(name, 0.05)
                signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
            else:
                sys.setprofile(count)
            do()
            self._armed = False
        except KeyboardInterrupt:
            return True
        finally:
            self._armed = False
            sys.setprofile(None)
            signal.setitimer(signal.ITIMER_REAL, 0)
        if by_time:
            self._seconds[name] = time.perf_counter() - started
        else:
            self._steps[name] = n
        return False


class Pair:
    """A model that is disturbed, and its twin."""

    def __init__(self, way: str, rng: random.Random, folder: Path, **how: Any) -> None:
        self.way, self.rng = way, rng
        self.llm, self.twin = (
            Watched(**{**options(way, folder / f"{way} {i}.kvlog"), **how}) for i in range(2)
        )
        self.llm.note_recalls()
        self.choice: Choice | None = None  # of the twin's queries, not brought yet
        self.room = 0  # what the model made room for before the next batch
        kv: Any = self.twin.kv
        kv.make_room = lambda n: min(n, self.twin.make_room(max(n, self.room)))
        self.file = folder / f"{way}.kvp"
        self.saved: tuple[list[int], list[bytes]] | None = None
        self.saves = self.llm.options.policy != "snapkv"
        self.messages: list[dict[str, str]] = []
        self.prompt: list[int] = []
        self.begin()

    def close(self) -> None:
        self.llm.close()
        self.twin.close()

    def some(self, least: int, most: int) -> list[int]:
        n = self.rng.randint(least, most)
        return self.llm.tokenize(" ".join(self.rng.choices(WORDS, k=n)).encode(), False)[:n]

    def begin(self) -> None:
        """A new conversation; near the end of the positions where these are compacted."""
        self.messages = []
        self.llm.reset()
        start = self.some(3800, 3900) if "compact" in self.way else self.some(1, 400)
        self.llm.eval(start)
        self.compare("reading")

    # -- calls that are disturbed ------------------------------------------------------------

    def reading(self) -> None:
        self.llm.eval(self.some(1, 300))

    def writing(self) -> None:
        self.llm.create_completion(self.prompt, max_tokens=self.rng.randint(1, 20), temperature=0.0)

    def chatting(self) -> None:
        self.llm.create_chat_completion(self.messages, max_tokens=8, temperature=0.0)

    def streaming(self) -> None:
        for _ in self.stream():
            pass

    def stream(self) -> Iterator[Any]:
        how = {"max_tokens": 12, "temperature": 0.0, "stream": True}
        if self.rng.random() < 0.5:
            return iter(self.llm.create_chat_completion(self.messages, **how))
        return iter(self.llm.create_completion(self.prompt, **how))

    def going_back(self) -> None:
        self.llm.n_tokens -= self.rng.randint(0, 20)
        self.llm.eval(self.some(1, 40))

    def evicting(self) -> None:
        self.llm.evict()

    def recalling(self) -> None:
        self.llm.recall()

    def saving(self) -> None:
        self.llm.save_session(self.file)

    def loading(self) -> None:
        self.llm.load_session(self.file)

    def state(self) -> None:
        self.llm.load_state(self.llm.save_state())

    def restore_twin(self, own: bool) -> None:
        """As ``state`` or ``loading`` do; llama.cpp puts what it takes into other cells."""
        if own:
            self.twin.load_state(self.twin.save_state())
        else:
            self.twin.load_session(self.file)
            if self.saved != (self.twin.text, rows(self.twin)):
                raise AssertionError("what was loaded is not what was saved")

    def any_call(self) -> Callable[[], None]:
        calls = [self.reading, self.writing, self.chatting, self.streaming, self.evicting]
        kv, back = self.llm.kv, self.llm.n_tokens - 20
        assert kv is not None
        if kv.log is not None:
            calls.append(self.recalling)
        if back > 5 and (kv.can_rewind(back) or kv.can_return(back)):
            calls.append(self.going_back)
        if self.saves:
            calls += [self.saving, self.state]
        if self.saved:
            calls.append(self.loading)
        self.prompt = self.llm.text + self.some(0, 200)
        if self.rng.random() < 0.2:
            self.prompt = self.prompt[: max(1, self.llm.n_tokens - self.rng.randint(0, 99))]
            self.prompt += self.some(1, 40)
        said = {"role": "user", "content": " ".join(self.rng.choices(WORDS, k=12))}
        self.messages = [*self.messages[-6:], said]
        return self.rng.choice(calls)

    # -- what must be true afterwards --------------------------------------------------------

    def replay(self, call: str) -> None:
        """Let the twin take the steps of the model, each with the same logits.

        Args:
            call: the steps are of this one; if it writes, all but its first call of ``eval`` read
                what the model has just written.
        """
        llm, twin = self.llm, self.twin
        assert twin.kv is not None
        steps, llm.steps = llm.steps, []
        evals, writes, read, self.choice, self.room = 0, False, 0, None, 0
        twin.kv.watch_queries(True)
        for step in steps:
            if step[0] == "reset":
                twin.reset()
            elif step[0] == "eval":
                evals += 1
                twin.n_tokens = min(twin.n_tokens, step[1])
                # what a recall reads again was read before
                writes = call in WRITE and evals > 1 and step[1] >= read
                read = max(read, step[1])
            elif step[0] == "room":
                self.room = step[1]
            elif step[0] == "chosen":
                twin.sync()
                self.choice = self.choice_of_twin(step[1], step[3])
                if not same_choice(self.choice, step[2]):
                    raise AssertionError(f"{step[1]} queries after {twin.n_tokens} chose others")
            elif step[0] == "brought":
                self.bring_to_twin(step[1])
            elif step[0] == "restored":
                self.restore_twin(own=call == "state")
            else:
                _, first, tokens, logits = step
                twin.n_tokens = min(twin.n_tokens, first)
                if first != twin.n_tokens:
                    raise AssertionError(f"read on at {first}, the twin at {twin.n_tokens}")
                if writes and twin.likeliest() != tokens[0]:
                    raise AssertionError(f"wrote {tokens[0]} after {first}, not {twin.likeliest()}")
                twin.eval(tokens)
                read, self.room = max(read, twin.n_tokens), 0
                if not np.array_equal(twin.newest_logits(), logits):
                    off = np.abs(twin.newest_logits() - logits).max()
                    raise AssertionError(f"logits after {twin.n_tokens} differ by {off}")
        twin.steps = []

    def choice_of_twin(self, n: int, asked: Queries | None) -> Choice | None:
        """What the newest ``n`` tokens choose.

        Args:
            asked: the model's queries. The twin logs all, so it may have given up its own.
        """
        own = self.twin.newest_queries(n)
        if own is not None and asked is not None and not np.array_equal(own.queries, asked.queries):
            raise AssertionError(f"{n} queries after {self.twin.n_tokens} differ")
        return self.twin.choose(n, asked if own is None else own)

    def bring_to_twin(self, length: int) -> None:
        """What its queries chose, when it has gone back to this length."""
        twin, choice = self.twin, self.choice
        assert choice is not None
        twin.n_tokens, self.choice = length, None
        twin.sync()
        twin.bring(choice)

    def log_as_model(self) -> None:
        """An eviction or a choice was interrupted when it had logged what it might drop: the twin
        logs the same tokens, from its own cells."""
        llm, twin = self.llm.kv, self.twin.kv
        assert llm is not None
        assert twin is not None
        if llm.log is None or twin.log is None:
            return
        for block in llm.log.blocks:
            if twin.log.end <= block.first and block.end <= self.llm.n_tokens:
                at = block.rope_first
                read = partial(twin.cache.log_rows, twin.log.layout, at, at + block.n, block.n)
                twin.log.append(block, lambda rows, read=read: read(out=rows))

    def follow(self) -> None:
        """Let the twin do what an interrupt has kept from being written down: one step at most."""
        llm, twin = self.llm, self.twin
        assert llm.kv is not None
        if self.choice is not None and llm.n_tokens == self.choice.table.seen:
            held, want = llm.kv_indices, self.choice.tokens
            if np.array_equal(held[..., : want.shape[-1]], want[0, 0] if held.ndim == 1 else want):
                self.bring_to_twin(int(llm.n_tokens))
        if llm.n_tokens == 0:
            twin.reset()
        elif llm.n_tokens < twin.n_tokens:
            twin.n_tokens = llm.n_tokens
            twin.sync()
        elif llm.n_tokens > twin.n_tokens:
            twin.eval(llm.text[twin.n_tokens :])
            self.room = 0
        twin.sync()
        if self.room:  # and nothing was read
            twin.make_room(self.room)
            self.room = 0
        held = llm.kv_stats
        # one that is about to go back from its log has not evicted since
        there = llm.n_tokens >= held.seen or llm.kv.can_rewind(llm.n_tokens)
        if there and held.kept + llm.n_tokens - held.seen < twin.kv_stats.kept:
            twin.evict()
        self.log_as_model()
        twin.steps = []

    def same(self) -> None:
        if self.llm.text != self.twin.text:
            raise AssertionError("other tokens were read")
        names = (
            "indices",
            "RoPE positions",
            "llama.cpp's positions",
            "positions",
            "keys",
            "values",
        )
        mine, others = rows(self.llm), rows(self.twin)
        more = ["what is logged"] * (max(len(mine), len(others)) - len(names))
        for name, a, b in itertools.zip_longest((*names, *more), mine, others):
            if a != b:
                raise AssertionError(
                    f"{name} differ: {self.llm.kv_stats.kept} and {self.twin.kv_stats.kept} rows "
                    f"of {self.llm.n_tokens} tokens, {self.llm.kv_stats.evictions} and "
                    f"{self.twin.kv_stats.evictions} evictions"
                )

    def compare(self, call: str) -> None:
        self.replay(call)
        self.follow()
        self.llm.sync()
        self.twin.sync()
        self.same()

    def settle(self, call: str) -> str:
        """After a disturbance: go on as somebody would, and compare.

        Returns:
            Whether the model went on from its cache or read the conversation again.
        """
        llm, twin = self.llm, self.twin
        assert llm.kv is not None
        if llm.kv.trusted:
            self.replay(call)
            self.follow()
        trusted, sure = llm.kv.trusted, False
        if trusted and self.rng.random() < 0.5:  # else the next call finds all as it is
            try:
                llm.sync()
                self.same()
                sure = True
            except KVCacheError:
                trusted = False
        llm.steps = []
        how = self.rng.random()
        prompt = self.prompt if how < 0.3 and self.prompt else llm.text
        if how > 0.6 or not prompt:
            prompt = prompt + self.some(1, 40)
        if how > 0.9:
            try:
                llm.eval(self.some(1, 100))
                self.compare("reading")
                return "went on"
            except KVCacheError:
                if sure:
                    raise
                trusted, llm.steps = False, []
        llm.create_completion(prompt, max_tokens=5, temperature=0.0)
        again = ("reset",) in [step[:1] for step in llm.steps]
        if not trusted and not again:
            raise AssertionError("a cache that is not trusted was used")
        self.compare("writing")
        twin.steps = []
        return "read again" if again else "went on"


class Stress:
    def __init__(self, seed: int, wanted: dict[str, int] | None, seconds: float) -> None:
        self.rng = random.Random(seed)
        self.wanted, self.seconds = wanted, seconds
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.interrupt = Interrupt(self.rng)

    # -- interrupts and streams --------------------------------------------------------------

    def interrupts(self, pair: Pair) -> None:
        call = pair.any_call()
        name = call.__name__
        what = f"{pair.way}: {name}"
        came = self.interrupt.during(what, call)
        self.counts[f"interrupts in {name}"] += came
        self.counts["interrupts"] += came
        try:
            if name == "saving":
                self.check_file(pair, complete=not came)
            how = pair.settle(name)
        except Exception as error:
            raise AssertionError(f"after an interrupt in {what}") from error
        self.counts[how] += came

    def check_file(self, pair: Pair, complete: bool) -> None:
        """A save was interrupted, or not: the old file is there or the new one, and no part."""
        left = [name for name in os.listdir(pair.file.parent) if name.endswith(".part")]
        if left:
            raise AssertionError(f"left over: {left}")
        if not complete and not pair.file.exists():
            return
        read = Watched(**options(pair.way, pair.file.with_suffix(".kvlog")))
        with contextlib.closing(read):
            read.load_session(pair.file)
            found = (read.text, rows(read))
        now = (pair.llm.text, rows(pair.llm))
        if found != now and (complete or found != pair.saved):
            raise AssertionError("the file is neither the old session nor the new one")
        pair.saved = found

    def streams(self, pair: Pair) -> None:
        pair.any_call()  # a new prompt and a new message
        stream = pair.stream()
        pieces = self.rng.randint(0, 10)
        for _ in range(pieces):
            next(stream, None)
        self.counts["streams"] += 1
        if pieces and self.rng.random() < 0.3:
            pair.settle("streaming")
            with contextlib.suppress(InUseError):
                if next(stream, None) is not None:
                    raise AssertionError("a stream went on with another conversation")
            pair.llm.steps = []
        else:
            pair.replay("streaming")
            del stream
            if self.rng.random() < 0.3:
                gc.collect()
        pair.settle("streaming")

    # -- callbacks ---------------------------------------------------------------------------

    def callbacks(self, folder: Path) -> None:
        """Every function of the user's, failing in every way, at a random one of its calls."""

        class Mine(Exception):
            """What the functions raise."""

        def raises(*_: Any) -> Any:
            raise Mine

        on_evict: list[Callable[..., Any]] = []
        policies = Lying(), Lying()
        on_recall: list[Callable[..., Any]] = []
        pair = Pair(
            "learned, recall",
            self.rng,
            folder,
            on_evict=lambda _: [do() for do in on_evict],
            on_recall=lambda _: [do() for do in on_recall],
        )
        lying = Pair("learned, recall off", self.rng, folder)
        for llm, policy in zip((lying.llm, lying.twin), policies, strict=True):
            assert llm.kv is not None
            llm.kv.replace_policy(policy)
        llm = pair.llm
        note = llm.on_batch
        forbidden = {
            "eval": lambda: llm.eval([1]),
            "reset": llm.reset,
            "evict": llm.evict,
            "close": llm.close,
            "load_session": lambda: llm.load_session(pair.file),
            "create_completion": lambda: llm.create_completion("a"),
        }

        def evicts(do: Callable[..., Any]) -> None:
            """Have ``do`` called by the model, not by its twin."""
            on_evict[:] = [lambda: do() if llm.steps else None]
            llm.steps.append(("eval", llm.n_tokens))
            try:
                llm.eval(pair.some(300, 300))
            finally:
                on_evict.clear()

        def writes(**how: Any) -> None:
            pair.prompt = llm.text + pair.some(1, 200)
            llm.create_completion(pair.prompt, max_tokens=9, temperature=0.0, **how)

        def recalls(do: Callable[..., Any]) -> None:
            for one in (pair.llm, pair.twin):
                assert one.kv is not None
                one.kv.recall_settings = RecallSettings(threshold=0.0)
            llm.reset()
            llm.eval(pair.some(300, 300))
            on_recall[:] = [do]
            try:
                writes()
            finally:
                on_recall.clear()

        def batches() -> None:
            left = self.rng.randint(1, 3)

            def fails(first: int, end: int) -> None:
                nonlocal left
                llm.note(first, end)
                left -= 1
                if left == 0:
                    raise Mine

            llm.on_batch = fails
            try:
                llm.eval(pair.some(250, 300))
            finally:
                llm.on_batch = note

        def at(n: int, then: Callable[..., Any], else_: Any) -> Callable[..., Any]:
            calls = Counter[int]()

            def call(*args: Any) -> Any:
                calls[0] += 1
                return then(*args) if calls[0] > n else else_(*args)

            return call

        later = self.rng.randint(0, 5)
        self.tell(pair, "on_evict raises", lambda: evicts(raises), Mine)
        for name, do in forbidden.items():
            self.tell(pair, f"on_evict calls {name}", lambda do=do: evicts(do), InUseError)
        self.tell(pair, "on_recall raises", lambda: recalls(raises), Mine)
        for name, do in forbidden.items():
            self.tell(pair, f"on_recall calls {name}", lambda do=do: recalls(do), InUseError)
        self.tell(pair, "on_batch raises", batches, Mine)
        stops = at(later, raises, lambda *_: False)

        def replies() -> None:
            for _ in range(later + 1):  # each asks at least once: a reply may end before its turn
                writes(stopping_criteria=stops)

        self.tell(pair, "a criterion raises", replies, Mine)
        process = [at(later, raises, lambda _, scores: scores)]
        # llama_cpp goes on without it: what is raised in a function that C calls is printed
        self.tell(pair, "a processor raises", lambda: writes(logits_processor=process), None)
        lies: dict[str, tuple[Callable[[Any], Any], type[Exception] | None]] = {
            "raises": (raises, Mine),
            "returns None": (lambda _: None, Exception),
            "returns a number": (lambda _: 1.0, Exception),
            "returns a list": (lambda true: true.tolist(), Exception),
            "has no layers": (lambda true: true[0], Exception),
            "has a token more": (lambda true: np.pad(true, ((0, 0), (0, 0), (0, 1))), Exception),
            "has a token less": (lambda true: true[..., 1:], Exception),
            "is NaN": (lambda true: true * np.nan, None),
            "is infinite": (lambda true: true / 0.0, None),
            "is NaN in part": (lambda true: np.where(true > true.mean(), np.nan, true), None),
            "is all the same": (np.zeros_like, None),
            "is whole numbers": (lambda true: true.astype(np.int64), None),
        }
        for name, (lie, error) in lies.items():

            def read(lie: Any = lie, error: Any = error) -> None:
                policies[0].lie, policies[1].lie = lie, None if error else lie
                try:
                    lying.llm.eval(lying.some(300, 300))
                    lying.compare("reading")
                finally:
                    policies[0].lie = policies[1].lie = None

            self.tell(lying, f"a policy {name}", read, error)
        pair.close()
        lying.close()

    def tell(
        self, pair: Pair, name: str, do: Callable[[], Any], error: type[Exception] | None
    ) -> None:
        with np.errstate(all="ignore"):
            try:
                do()
                raised = None
            except Exception as seen:
                raised = seen
            if (error is None) != (raised is None) or not isinstance(raised, error or type(None)):
                raise AssertionError(f"{name}: {raised!r}") from raised
            if error is None:
                pair.compare("reading")
            try:
                pair.settle("reading")
            except Exception as fault:
                raise AssertionError(f"after this: {name}") from fault
        self.counts["callbacks"] += 1

    # -- kills -------------------------------------------------------------------------------

    def kills(self, folder: Path) -> None:
        file = folder / "killed.kvp"
        command = [sys.executable, __file__, "--saver", str(file)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()  # it saves, from now on
            time.sleep(0.02 + self.rng.random() / 20)
            child.kill()
        left = [name for name in os.listdir(folder) if name.endswith(".part")]
        self.counts["kills"] += 1
        self.counts["kills that left a part"] += bool(left)
        want = saved_texts()
        read, fresh = Watched(), Watched()
        with contextlib.closing(read), contextlib.closing(fresh):
            read.load_session(file)
            if read.text not in want:
                raise AssertionError("a file of other tokens")
            fresh.eval(read.text)
            if rows(read) != rows(fresh):
                raise AssertionError("a file of another cache")
            read.save_session(file)
        if [name for name in os.listdir(folder) if name.endswith(".part")]:
            raise AssertionError(f"left after the next save: {left}")

    # -- all of it ---------------------------------------------------------------------------

    def run(self) -> int:
        hook, sys.unraisablehook = sys.unraisablehook, self.count_ignored
        with tempfile.TemporaryDirectory() as folder:
            for kind in KINDS:
                try:
                    self.repeat(kind, Path(folder))
                except Exception:
                    self.faults.append(f"{kind}: {traceback.format_exc()}")
        sys.unraisablehook = hook
        print(", ".join(f"{name} {n}" for name, n in sorted(self.counts.items())))
        for fault in self.faults:
            print(fault, file=sys.stderr)
        return 1 if self.faults else 0

    def count_ignored(self, what: Any) -> None:
        """Python swallows what is raised in a finalizer or in a callback that C calls."""
        of_llama_cpp = "LlamaSampler.__del__", "CustomSampler"  # half made, or it calls a processor
        if what.exc_type is KeyboardInterrupt:
            self.counts["interrupts swallowed"] += 1
        elif not any(name in repr(what.object) for name in of_llama_cpp):
            self.faults.append(f"ignored: {what.exc_value!r} in {what.object!r}")

    def repeat(self, kind: str, folder: Path) -> None:
        ends = time.monotonic() + self.seconds * KINDS[kind]
        pairs: dict[str, Pair] = {}
        while self.wanted is None or self.counts[kind] < self.wanted[kind]:
            if self.wanted is None and time.monotonic() > ends and self.counts[kind]:
                break
            if kind in ("callbacks", "kills"):
                getattr(self, kind)(folder)
                continue
            way = f"{self.rng.choice(list(WAYS))}, {self.rng.choice(list(RECALLS))}"
            if "compact" in way and self.rng.random() < 0.7:  # these read thousands of tokens
                continue
            if way not in pairs:
                pairs[way] = Pair(way, self.rng, folder)
            pair = pairs[way]
            if pair.llm.n_tokens > (6000 if "compact" in way else 1500):
                pair.begin()
            getattr(self, kind)(pair)
        for pair in pairs.values():
            pair.close()


def saved_texts() -> list[list[int]]:
    """What the process that is killed saves in turn."""
    rng = random.Random(0)
    return [[rng.randrange(300, 900) for _ in range(n)] for n in (50, 700)]


def save_for_ever(file: str) -> None:
    texts = saved_texts()
    models = [Watched(), Watched()]
    for llm, text in zip(models, texts, strict=True):
        llm.eval(text)
    models[0].save_session(file)
    print("saving", flush=True)
    while True:
        for llm in models:
            llm.save_session(file)


def main() -> int:
    about, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=60, help="most of them for interrupts (60)"
    )
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=int, help="instead of a time; others: none")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is random (0)")
    parser.add_argument("--saver", metavar="FILE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.saver:
        save_for_ever(args.saver)
    given = {kind: getattr(args, kind) for kind in KINDS}
    wanted = None if not any(given.values()) else {k: n or 0 for k, n in given.items()}
    return Stress(args.seed, wanted, args.seconds).run()


if __name__ == "__main__":
    sys.exit(main())
