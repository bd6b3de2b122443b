"""Requests wait in line for a model: one thread for each context."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from kvp_edge.server.errors import APIError

#: Seconds that a reply took lately count by this much when the next wait is guessed.
_FORGETS = 0.3


class Job(Protocol):
    """What a worker does."""

    cancelled: bool

    def run(self, worker: Any) -> None:
        """It must not raise."""

    def fail(self, error: Exception) -> None:
        """It will not be run."""


class Line:
    """Jobs in the order in which they came, and the threads that do them.

    - A job is done by one worker, once, or failed.
    - At most ``most`` jobs wait.
    - A cancelled job is passed over.

    Args:
        workers: what jobs are given, one for each thread.
        most: jobs that may wait.
        close: called by each thread with its worker, in the end.
    """

    def __init__(self, workers: list[Any], most: int, close: Callable[[Any], None]) -> None:
        self._jobs: deque[Job] = deque()
        self._most, self._close = most, close
        self._changed = threading.Condition()
        self._ended = False
        self._current: dict[int, Job] = {}
        self._seconds = 1.0  # that a job takes
        self._threads = [
            threading.Thread(target=self._work, args=(i, worker), name=f"kvp-worker-{i}")
            for i, worker in enumerate(workers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        with self._changed:
            return sum(not job.cancelled for job in self._jobs)

    @property
    def at_work(self) -> int:
        return len(self._current)

    def put(self, job: Job) -> None:
        """
        Raises:
            APIError: too many wait.
        """
        with self._changed:
            if self._ended:
                raise APIError(503, "the server is stopping", code="server_stopping")
            if len(self._jobs) >= self._most:
                self._jobs = deque(job for job in self._jobs if not job.cancelled)
            if len(self._jobs) >= self._most:
                wait = max(1, round(self._seconds * len(self._jobs) / len(self._threads)))
                n = len(self._jobs)
                waiting = "1 request is" if n == 1 else f"{n} requests are"
                raise APIError(
                    503,
                    f"{waiting} waiting, and no more may (--queue): try again in about {wait} s",
                    code="queue_full",
                    headers={"Retry-After": str(wait)},
                )
            self._jobs.append(job)
            self._changed.notify()

    def _work(self, number: int, worker: Any) -> None:
        while True:
            with self._changed:
                while not self._jobs and not self._ended:
                    self._changed.wait()
                if self._ended:
                    break
                job = self._jobs.popleft()
                if job.cancelled:
                    continue
                self._current[number] = job
            started = time.monotonic()
            try:
                job.run(worker)
            finally:
                with self._changed:
                    del self._current[number]
                    took = time.monotonic() - started
                    self._seconds += _FORGETS * (took - self._seconds)
        self._close(worker)

    def end(self) -> None:
        """Cancel what is at work, fail what waits, and wait for the threads."""
        with self._changed:
            self._ended = True
            jobs, self._jobs = [*self._jobs], deque()
            for job in self._current.values():
                job.cancelled = True
            self._changed.notify_all()
        for job in jobs:
            with suppress(Exception):
                job.fail(APIError(503, "the server is stopping", code="server_stopping"))
        for thread in self._threads:
            thread.join()
