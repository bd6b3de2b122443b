#!/usr/bin/env python3
"""Many threads, many models, and calls that come at the wrong time.

    python scripts/stress_threads.py [--seconds 60 | --rounds N] [--seed 0]

Every thread does one of the following until the time is over, or so many times, all at once:

    loading   loads a model, reads a text, evicts, compares what is kept, closes; the threads share
              one object of each policy
    writing   writes replies, while others ask for the same model
    saving    saves the conversation of the model that is writing, and loads what was saved
    looking   reads the statistics of the model that is writing, and tokenizes with it
    closing   closes a model that another thread reads with

A call at the wrong time must be refused with InUseError, or after close() with ClosedError. All
else ends the run with status 1; a crash ends it by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kvp_edge import ClosedError, InUseError, Llama
from kvp_edge.bundled import bundled_model
from kvp_edge.one_call import CLOSED
from kvp_edge.policies import get_policy

TEXT = b"The old man went to the sea. My dog is called Rex. Snow fell on all the roofs. " * 40


def model(policy: Any = "keydiff", **how: Any) -> Llama:
    quiet = {"n_threads": 1, "n_threads_batch": 1, "verbose": False}
    limits = {"n_ctx": 4096, "kv_budget": 128, "reserve": 128, "n_batch": 64}
    return Llama(bundled_model(), policy=policy, **{**quiet, **limits, **how})


class Stress:
    def __init__(self, seconds: float, rounds: int | None, seed: int) -> None:
        self.seconds, self.rounds = seconds, rounds
        self.rng = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.policies = {name: get_policy(name, bundled_model()) for name in ("auto", "snapkv")}
        self.kept = {name: self.read(name).tobytes() for name in self.policies}
        self.writer = model(reserve=256)
        self.writer.eval(self.writer.tokenize(TEXT)[:50])
        self.folder = tempfile.TemporaryDirectory()

    def read(self, policy: str) -> Any:
        """What a model keeps of the text, with the object that all threads share."""
        with contextlib.closing(model(self.policies[policy])) as llm:
            llm.eval(llm.tokenize(TEXT)[:300])
            llm.evict()
            return np.array(llm.kv_indices)

    def loading(self) -> None:
        name = self.rng.choice(list(self.policies))
        if self.read(name).tobytes() != self.kept[name]:
            raise AssertionError(f"'{name}' kept other tokens than it does alone")

    def writing(self) -> None:
        words = " ".join(self.rng.sample(["snow", "dog", "sea", "roof", "Rex", "man"], 3))
        self.writer.create_completion(f"The {words} " * 40, max_tokens=8, temperature=0.0)
        time.sleep(self.rng.random() / 20)  # others want it, too

    def saving(self) -> None:
        path = Path(self.folder.name) / "session.kvp"
        self.writer.save_session(path)
        self.counts["saved"] += 1
        with contextlib.closing(model(reserve=256)) as other:
            other.load_session(path)
            other.eval(other.tokenize(TEXT)[:3])

    def looking(self) -> None:
        stats = self.writer.kv_stats
        if not (stats.kept <= stats.cells and stats.where):
            raise AssertionError(stats)
        self.writer.tokenize(TEXT)

    def closing(self) -> None:
        llm = model()
        seen: list[BaseException] = []

        def reads() -> None:
            try:
                while True:
                    llm.eval(llm.tokenize(TEXT)[:100])
                    llm.reset()
                    time.sleep(self.rng.random() / 100)
            except (InUseError, ClosedError) as error:
                seen.append(error)

        thread = threading.Thread(target=reads)
        thread.start()
        while thread.is_alive():
            try:
                llm.close()
                break
            except InUseError:
                self.counts["close was refused"] += 1
                time.sleep(self.rng.random() / 1000)
        thread.join()
        if str(seen) != str([ClosedError(CLOSED)]):
            raise AssertionError(seen)

    def repeat(self, what: Callable[[], None]) -> None:
        name, done = what.__name__, 0
        ends = time.monotonic() + self.seconds
        while not self.failures:
            if done >= self.rounds if self.rounds is not None else time.monotonic() > ends:
                break
            try:
                what()
                self.counts[name] += 1
                done += 1
            except InUseError:
                self.counts[f"{name}: refused"] += 1
                time.sleep(self.rng.random() / 1000)
            except BaseException:
                self.failures.append(f"{name}: {traceback.format_exc()}")

    def run(self) -> int:
        jobs = [self.loading, self.loading, self.writing, self.writing, self.saving, self.looking]
        threads = [
            threading.Thread(target=self.repeat, args=(job,)) for job in [*jobs, self.closing]
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.writer.close()
        self.folder.cleanup()
        print(", ".join(f"{name} {n}" for name, n in sorted(self.counts.items())))
        for failure in self.failures:
            print(failure, file=sys.stderr)
        return 1 if self.failures else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rounds", type=int, help="instead of a time: of every thread")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    return Stress(args.seconds, args.rounds, args.seed).run()


if __name__ == "__main__":
    sys.exit(main())
